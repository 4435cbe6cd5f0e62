"""The needs of a compression: the compiled program's own memory, and arithmetic that XLA agrees with."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxsp import device, distributions, plan
from jaxsp.data.examples import make_rows
from jaxsp.data.packing import Packing
from jaxsp.models import decoder, sharding
from jaxsp.models.load import model_config
from jaxsp.models.sharding import as_mesh
from jaxsp.plan import arithmetic, room
from jaxsp.prompts import PROMPT_KINDS
from jaxsp.settings import make_settings
from jaxsp.training.drivers import DRIVERS, JitDriver, MeshDriver, mesh_of, sharded_update
from jaxsp.training.state import initial_state, stack
from jaxsp.training.update import Frozen, UpdateSettings
from jaxsp.typing import UserError
from tests import tiny
from tests.conftest import slow_beside

SETTINGS = make_settings({"prompt_length": 4, "optimizer": "adam"})
MESH = make_settings({"parallel": "mesh", "mesh": "data=2,model=2"}, base=SETTINGS)


@pytest.fixture(scope="module")
def config(tiny_model):
    return tiny_model.config


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROMPT_KINDS)
@pytest.mark.parametrize("settings", [SETTINGS, MESH], ids=lambda settings: settings.devices.parallel)
def test_the_program_is_the_one_that_runs(tiny_model, settings, kind):
    """Compiled from shapes alone, its memory is that of the driver's step on real arrays."""
    params, config = tiny_model.params, tiny_model.config
    packing = Packing(4, 40)
    context = np.full((1, plan.PREAMBLE_TOKENS), 5)
    preamble = distributions.context_prefix(params, config, context)
    rows = make_rows([[3, 4, 5]], [[6, 7]])
    rows = rows.with_targets(hidden=np.zeros((1, 2, config.width), np.float32))
    batch, frozen = packing.pack(rows, np.arange(1)), Frozen(params, preamble)
    mesh = mesh_of(settings)
    settings = make_settings({"kind": kind}, base=settings)
    chosen, key = UpdateSettings.of(config, settings), jax.random.key(0)
    sigma = distributions.initial_prompt(
        params, config, context[0], preamble, key=key, prompt_length=4, initial="first", kind=kind
    )
    rates = PROMPT_KINDS[kind].rates(sigma, {})
    states = stack([initial_state(sigma, chosen.optimizer, key=key, rates=rates)])
    batches = jax.tree.map(lambda leaf: leaf[None], batch)
    driver = DRIVERS[settings.devices.parallel](frozen, chosen, mesh=mesh)
    assert isinstance(driver, JitDriver | MeshDriver)
    if mesh is not None:
        batches = sharding.put(batches, mesh, sharding.along("data", 1))
    lowered = sharded_update.lower(driver.place(states), batches, **driver._step.keywords)
    theirs = lowered.compile().memory_analysis()
    ours = plan.compiled(config, settings, packing, mesh).memory_analysis()
    for name in ("argument", "temp", "output"):
        assert getattr(ours, f"{name}_size_in_bytes") == getattr(theirs, f"{name}_size_in_bytes")


@pytest.mark.parametrize("kind", slow_beside(PROMPT_KINDS, "embedding", "key_value", "nested", "low_rank"))
def test_operations_are_those_that_xla_counts(tmp_path, kind):
    """XLA counts the body of the scan over layers once: the model of three is to it as one of a layer."""
    sizes: dict[str, Any] = {
        "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(tiny.config(**sizes)))
    config = model_config(str(tmp_path), "float32")
    packing = Packing(8, 24)
    settings, readings = make_settings({"kind": kind}, base=SETTINGS), int(PROMPT_KINDS[kind].IS_READ)
    cost = plan.compiled(config, settings, packing, None).cost_analysis()
    assert cost is not None
    one_layer = plan.step_flops(config.replace(layers=1), 4, 24, packing, readings)
    assert cost["flops"] == pytest.approx(one_layer, rel=0.1)
    assert plan.step_flops(config, 4, 24, packing, readings) > 2.5 * one_layer


@pytest.mark.slow
def test_a_mesh_is_planned_by_device(config, monkeypatch):
    """From a program compiled for it; the search for the largest batch is tested below."""
    monkeypatch.setattr(plan, "largest", lambda size_of, limit, rows, **_: rows)
    settings = make_settings({"batch_size": 16}, base=MESH)
    config = config.replace(vocab_size=260, mlp_width=480)  # nearly all of it can be cut
    limit = 16 * 2**20
    found = plan.plan(config, settings, context_tokens=99, query_tokens=40, memory_limit=limit)
    leaves = jax.tree.leaves(plan.decoder.parameter_shapes(config))
    weights = 4 * sum(math.prod(leaf.shape) for leaf in leaves)
    assert found.devices == 4
    assert found.memory is not None
    assert weights / 2 < found.memory.arguments < 0.65 * weights
    assert found.fits
    assert found.largest_rows == found.rows
    assert found.rows % 2 == 0
    assert found.matmul_rate > 1e8
    assert found.step_seconds == pytest.approx(found.flops / found.matmul_rate / 0.56)


@pytest.fixture
def programs(monkeypatch):
    """Instead of compiled programs, what was asked of them; 1000 bytes a row and part and prompt."""
    asked = []

    def compiled(config, settings, packing, mesh, prompts=1, teacher_head=None):
        asked.append(packing)
        sizes = (10_000, 1000 * prompts * packing.rows // settings.devices.grad_accumulation, 500)
        names = ("argument_size_in_bytes", "temp_size_in_bytes", "output_size_in_bytes")
        found = SimpleNamespace(**dict(zip(names, sizes, strict=True)))
        return SimpleNamespace(memory_analysis=lambda: found)

    monkeypatch.setattr(plan, "compiled", compiled)
    monkeypatch.setattr(plan, "matmul_rate", lambda config: 1e9)
    return asked


@pytest.mark.parametrize(
    ("mesh", "room", "at_once"),
    [(None, None, 40), (None, 40, 40), (None, 17, 17), (None, 0, 1), ("data=2", 17, 16), ("data=2", 0, 2)],
)
def test_how_many_prompts_have_room(config, programs, monkeypatch, mesh, room, at_once):
    """As many as are wished for, unless the device has room for fewer."""
    limit = None if room is None else math.ceil((10_000 + 4000 * room) / plan.FILL)
    monkeypatch.setattr(plan, "_memory_stats", lambda: {} if room is None else {"bytes_limit": limit})
    laid_out = None if mesh is None else as_mesh(mesh)
    found = plan.prompts_at_once(config, SETTINGS, Packing(4, 48), laid_out, most=40)
    assert found == at_once


@pytest.mark.parametrize(
    ("changes", "rows", "share", "largest"),
    [
        ({}, 6, 6, 40),
        ({"grad_accumulation": 2}, 6, 6, 80),
        ({"grad_accumulation": 4}, 8, 8, 160),
        ({"parallel": "pmap"}, 8, 1, 320),
        ({"parallel": "mesh", "mesh": "data=2,model=2"}, 6, 6, 40),
    ],
)
def test_what_fits(config, programs, monkeypatch, changes, rows, share, largest):
    """The whole of it but the compiler; with 40 of its rows a device is full to nine tenths."""
    monkeypatch.setattr(Packing, "of", lambda *_: Packing(6, 48))
    settings = make_settings(changes)
    context = 2 * 4 * config.layers * config.kv_heads * config.head_width * (99 + plan.PREAMBLE_TOKENS)
    context += 4 * (99 + plan.PREAMBLE_TOKENS)  # positions
    limit = math.ceil((10_500 + context + 40_000) / plan.FILL)
    common: dict[str, Any] = {"context_tokens": 99, "query_tokens": 40}
    found = plan.plan(config, settings, **common, memory_limit=limit)
    assert found.memory is not None
    assert found.memory.context == context
    assert (found.rows, programs[0].rows, found.largest_rows) == (rows, share, largest)
    assert found.fits
    tight = plan.plan(config, settings, **common, memory_limit=9000)
    assert not tight.fits
    assert tight.largest_rows == 0


@pytest.mark.parametrize("changes", [{}, {"grad_accumulation": 4}])
@pytest.mark.parametrize(("query_tokens", "rows"), [(40, 9), (17, 200), (64, 3)])
def test_the_largest_batch_size_fits(config, programs, monkeypatch, changes, query_tokens, rows):
    """A run with it takes no more tokens a batch than were found to fit; one more takes too many."""
    sizes = {"context_tokens": 99, "query_tokens": query_tokens}
    parts = changes.get("grad_accumulation", 1)
    monkeypatch.setattr(plan, "largest", lambda *_, **__: rows * parts)
    found = plan.plan(config, make_settings({"batch_size": 8, **changes}), **sizes)
    room = found.largest_rows * found.row_tokens
    suggested = found.largest_batch_size
    own = plan.plan(config, make_settings({"batch_size": suggested, **changes}), **sizes)
    assert 0.6 * room < own.rows * own.row_tokens <= room
    assert suggested * query_tokens <= room
    bigger = plan.plan(config, make_settings({"batch_size": suggested + 1, **changes}), **sizes)
    assert bigger.rows * bigger.row_tokens > room


def test_sigma_is_read_once_a_part(config, programs, monkeypatch):
    monkeypatch.setattr(Packing, "of", lambda *_: Packing(4, 48))

    def flops_of(parts, kind):
        settings = make_settings({"grad_accumulation": parts, "kind": kind})
        return plan.plan(config, settings, context_tokens=99, query_tokens=9).flops

    flops = [flops_of(parts, "embedding") for parts in (1, 2, 4)]
    assert flops_of(1, "key_value") == flops_of(4, "key_value") < flops[0]  # it is not read at all
    assert 0 < flops[1] - flops[0] == pytest.approx((flops[2] - flops[0]) / 3)


@pytest.mark.parametrize(
    ("size_of", "limit", "expected"),
    [
        (lambda rows: 100 + 10 * rows, 1000, 90),
        (lambda rows: 100 + 10 * rows, 109, 0),
        (lambda rows: 100 + 10 * rows, 131, 3),
        (lambda rows: 10 * rows + rows**2 / 50, 1000, 85),
        (lambda rows: 5 * max(rows, 64), 1000, 200),  # flat at the start
        (lambda rows: 10 * rows if rows < 50 else math.inf, 1000, 49),  # refused by the compiler
        (lambda rows: math.inf, 1000, 0),
    ],
)
@pytest.mark.parametrize("multiple", [1, 6])
def test_the_largest_is_followed_along_a_line_and_checked(size_of, limit, expected, multiple):
    asked = []

    def counted(rows):
        asked.append(rows)
        return size_of(rows)

    found = plan.largest(counted, limit, 2 * multiple, multiple=multiple)
    assert found == 0 or (found in asked and size_of(found) <= limit)
    assert 0.9 * (expected - multiple) <= found <= expected
    assert len(asked) == len(set(asked)) <= 8
    assert all(rows % multiple == 0 for rows in asked)


def test_what_cannot_be_planned(config, tmp_path):
    def refuses(message, settings=SETTINGS, context_tokens=50, query_tokens=20):
        with pytest.raises(UserError, match=message):
            plan.plan(config, settings, context_tokens=context_tokens, query_tokens=query_tokens)

    refuses("at least 1 and --query-tokens at least 2; got 0 and 20", context_tokens=0)
    refuses("shorter than the context: --prompt-length is 4, --context-tokens 4.", context_tokens=4)
    refuses("window of 512", query_tokens=500)
    refuses("Unknown objective 'klx'", make_settings({"objective": "klx"}))
    refuses("takes 3 devices", make_settings({"parallel": "mesh", "mesh": "data=3"}))
    refuses("doesn't divide the model's", make_settings({"parallel": "mesh", "mesh": "model=8"}))
    with pytest.raises(UserError, match="Unknown dtype 'int7'"):
        model_config(str(tmp_path), "int7")
    with pytest.raises(UserError, match=r"no config\.json"):
        model_config(str(tmp_path))


def described(name="v5e-1", devices=1):
    """A system described by this machine's own devices: the compiler is the one at hand."""
    chip = device.CHIPS[name.partition("-")[0]]
    return device.Described(name, chip, tuple(jax.devices()[:devices]), "libtpu 0.0.42.1")


def test_a_described_device_is_planned_for(config, programs, monkeypatch):
    """Its memory and its speed, which nothing measures, and no more than it has."""
    monkeypatch.setattr(plan, "matmul_rate", None)
    monkeypatch.setattr(plan, "device_memory", None)
    sizes: dict[str, Any] = {"context_tokens": 99, "query_tokens": 40}
    told: list[str] = []
    found = plan.plan(config, SETTINGS, **sizes, system=described(), on_progress=told.append)
    assert (found.memory_limit, found.matmul_rate) == (2**34, 197e12 / 6)  # float32
    assert found.compiled_for == "v5e-1 in float32, by libtpu 0.0.42.1"
    assert found.fits
    assert found.room_elsewhere is None
    assert told[0] == f"compiling the update of {found.rows} rows of {found.row_tokens} tokens"
    half = plan.plan(config.replace(dtype="bfloat16"), SETTINGS, **sizes, system=described("v6e-1"))
    assert (half.memory_limit, half.matmul_rate) == (2**35, 918e12)


def test_an_update_that_the_compiler_refuses(config, programs, monkeypatch):
    """It does not fit; the largest batch is that of the programs that it took."""
    taken = plan.compiled

    def compiled(config, settings, packing, mesh):
        if packing.rows > 30:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 20.1G of 15.75G hbm")
        return taken(config, settings, packing, mesh)

    monkeypatch.setattr(plan, "compiled", compiled)
    monkeypatch.setattr(Packing, "of", lambda *_: Packing(40, 48))
    found = plan.plan(config, SETTINGS, context_tokens=99, query_tokens=40, system=described())
    assert found.memory is None
    assert not found.fits
    assert 20 <= found.largest_rows <= 30
    assert len(programs) <= plan.DESCRIBED_TRIES
    monkeypatch.setattr(plan, "compiled", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plan.plan(config, SETTINGS, context_tokens=99, query_tokens=40, system=described())


def test_a_context_larger_than_a_chip_is_counted_from_a_part_of_it(config, monkeypatch):
    asked, plain = [], decoder.empty_prefix.lower
    counted = SimpleNamespace(lower=lambda config, slots: asked.append(slots) or plain(config, slots))
    monkeypatch.setattr(plan.decoder, "empty_prefix", counted)
    monkeypatch.setattr(plan.device, "platform", lambda: "tpu")
    slots = 2**30
    found = plan._context_bytes(config, slots)
    assert max(asked) <= 128
    entries = 2 * config.layers * config.kv_heads * config.head_width
    assert found == pytest.approx(slots * (entries * np.dtype(config.dtype).itemsize + 4), rel=0.01)


LARGE = {
    "vocab_size": 32000, "width": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "head_width": 128,
    "mlp_width": 14336, "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("v5e-1", {"layers": 40}, "on a device, and a .* has 16.00 GiB; --device v6e-1 has room for them."),
        ("v5e-1", {"layers": 64}, "; --device v5e-4 --parallel mesh --mesh model=4 has room for them."),
        (
            "v6e-1",
            {"layers": 128, "mlp_width": 28672},
            "; --device v6e-8 --parallel mesh --mesh model=8 has room",
        ),
        ("v5e-1", {"layers": 64, "kv_heads": 1}, "; --device v5e-4 --parallel mesh --mesh fsdp=4 has room"),
        (
            "v5e-1",
            {"layers": 64, "kv_heads": 1, "width": 4095},
            "; --device v6e-1 --quantization int8 has room",
        ),
        (
            "v6e-1",
            {"layers": 200, "kv_heads": 1, "width": 4095},
            "; none of the devices .*: over 1 of them, .* takes 39.* GiB.",
        ),
    ],
)
def test_weights_that_a_described_device_has_no_room_for(config, programs, name, changes, said):
    """Refused before anything is compiled, with the devices that have it."""
    large = config.replace(**{**LARGE, **changes}, ropes=(), tied_head=True)
    with pytest.raises(UserError, match=said) as error:
        plan.plan(large, SETTINGS, context_tokens=99, query_tokens=40, system=described(name))
    assert str(error.value).startswith("The model's weights take ")
    assert programs == []


def test_weights_that_leave_little_room(config, programs, monkeypatch):
    """They fit, and no batch beside them: what has room is said."""
    large = config.replace(**LARGE, ropes=(), tied_head=True)
    own = 0.95 * room.weight_bytes(large, None)
    monkeypatch.setattr(room, "FILL", 0.99)
    monkeypatch.setattr(plan, "largest", lambda *_, **__: 0)
    sizes: dict[str, Any] = {"context_tokens": 99, "query_tokens": 40}
    found = plan.plan(large, SETTINGS, **sizes, system=described())
    assert own < found.memory_limit
    assert found.room_elsewhere == "--device v6e-1 has room for them"
    small = plan.plan(config, SETTINGS, **sizes, system=described())
    assert small.room_elsewhere is None


def test_weights_over_a_mesh_are_shares(config):
    """Matrices are cut; norms and what doesn't divide lie on each device."""
    config = config.replace(vocab_size=260)
    whole, half = (room.weight_bytes(config, as_mesh(layout)) for layout in ("data=2", "model=2"))
    assert whole / 2 < half < 0.52 * whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_speed_is_that_of_the_best_probe(config, monkeypatch, dtype):
    """Not of what the machine's other programs leave over."""
    times = iter([0.0, *np.cumsum([0.0, 5.0, 0.0, 0.5, 0.0, 40.0, 0.0, 0.2])])
    monkeypatch.setattr(arithmetic, "SIZES", {"cpu": (64,)})
    monkeypatch.setattr(arithmetic, "PROBE_SECONDS", 45.6)
    monkeypatch.setattr(arithmetic.time, "perf_counter", lambda: next(times, 1e9))
    assert arithmetic.matmul_rate(config.replace(dtype=dtype)) == pytest.approx(2 * 64**3 / 0.2)
