"""Every attention backend equals the plainest formula, in value and gradient, wherever it serves."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsp.models import attention as package
from jaxsp.models.attention import BACKENDS, AttentionInputs, Slots, attention, chunked, cudnn
from jaxsp.models.attention.inputs import joined_bias
from jaxsp.prompts.initializers import ABSENT
from jaxsp.typing import EMPTY, UserError
from tests import programs

B, T, H, G, F = 2, 10, 4, 2, 8


def reference(inputs: AttentionInputs):
    """Full scores, one head of keys a query head, nothing clever."""
    scores, values = [], []
    for slots in inputs.slots:
        k, v, where = (
            jnp.broadcast_to(x, (B, *x.shape[1:])) for x in (slots.keys, slots.values, slots.positions)
        )
        group = inputs.q_BTHF.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
        score = jnp.einsum("bthf,bshf->bhts", inputs.q_BTHF, k, preferred_element_type=jnp.float32)
        score = score * inputs.scale
        if inputs.softcap is not None:
            score = inputs.softcap * jnp.tanh(score / inputs.softcap)
        if slots.bias is not None:
            score += jnp.repeat(slots.bias, group, axis=2).swapaxes(1, 2)[:, :, None]
        t, s = inputs.positions_BT[:, None, :, None], where[:, None, None, :]
        seen = (s != EMPTY) & (s <= t)
        if inputs.sliding_window is not None:
            seen &= t - s < inputs.sliding_window
        if slots.segment_ids is not None:
            assert inputs.segment_ids_BT is not None
            own = inputs.segment_ids_BT[:, None, :, None]
            seen &= own == jnp.broadcast_to(slots.segment_ids, where.shape)[:, None, None, :]
        scores.append(jnp.where(seen, score, -jnp.inf))
        values.append(v)
    weights = jnp.nan_to_num(jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1))
    out = jnp.einsum("bhts,bshf->bthf", weights, jnp.concatenate(values, axis=1).astype(float))
    return out.astype(inputs.q_BTHF.dtype)


def numbers(*shape: int, seed: int, dtype="float32"):
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), dtype)


def piece(where, segment_ids=None, *, seed, groups=G, dtype="float32", biased=False):
    where = jnp.asarray(where, jnp.int32)
    shape = (*where.shape, groups, F)
    keys, values = (numbers(*shape, seed=seed, dtype=dtype), numbers(*shape, seed=seed + 1, dtype=dtype))
    bias = numbers(*shape[:3], seed=seed + 2) if biased else None
    return Slots(keys, values, where, segment_ids, bias)


def row(start: int, kept: Sequence[int] = range(T)):
    """Positions of a row of T tokens of which only those kept are there."""
    where = np.full(T, EMPTY)
    where[list(kept)] = np.arange(start, start + len(kept))
    return np.stack([where] * B)


def make(
    where, *past: Slots, groups=G, segment_ids=None, dtype="float32", seed=0, **options
) -> AttentionInputs:
    where = jnp.asarray(where, jnp.int32)
    own = piece(where, segment_ids, seed=seed + 1, groups=groups, dtype=dtype)
    settings = {"scale": 0.4, "softcap": None, "sliding_window": None, **options}
    return AttentionInputs(
        numbers(*where.shape, H, F, seed=seed, dtype=dtype), where, (*past, own),
        segment_ids_BT=segment_ids, precision=jax.lax.Precision.DEFAULT, **settings,
    )  # fmt: skip


PREFIX = np.arange(5)[None]
PACKED = jnp.array([[0] * 4 + [1] * 6, [0] * 7 + [2] * 3], jnp.int32)
PACKED_ROW = np.array([[*range(4), *range(6)], [*range(7), *range(3)]])

LEFT_AND_RIGHT = np.stack([row(5, range(3, T))[0], row(5, range(7))[0]])
BETWEEN_AND_NOTHING = np.stack([row(5, [0, 1, 4, 5, 9])[0], row(5, [])[0]])

CASES = {
    "row alone": lambda **o: make(row(0), groups=H, **o),
    "shared prefix": lambda **o: make(row(5), piece(PREFIX, seed=9, **o), **o),
    "prefix with holes": lambda **o: make(
        row(3), piece([[0, EMPTY, 1, EMPTY, 2]], seed=9, **o), **o
    ),
    "prefix and a cache of each row": lambda **o: make(
        np.stack([np.arange(9, 9 + T), np.arange(7, 7 + T)]),
        piece(PREFIX, seed=9, **o),
        piece([[5, 6, 7, 8], [EMPTY, 5, 6, EMPTY]], seed=11, **o),
        **o,
    ),
    "padding left and right": lambda **o: make(LEFT_AND_RIGHT, piece(PREFIX, seed=9, **o), **o),
    "padding between, nothing else": lambda **o: make(
        BETWEEN_AND_NOTHING, piece(PREFIX, seed=9, **o), **o
    ),
    "window": lambda **o: make(row(5), piece(PREFIX, seed=9, **o), sliding_window=4, **o),
    "traced window, padding between": lambda **o: make(
        BETWEEN_AND_NOTHING, piece(PREFIX, seed=9, **o), sliding_window=jnp.int32(3), **o
    ),
    "softcap": lambda **o: make(row(5), piece(PREFIX, seed=9, **o), softcap=0.7, **o),
    "bias": lambda **o: make(row(5), piece(PREFIX, seed=9, biased=True, **o), **o),
    "bias and softcap": lambda **o: make(
        row(5), piece(PREFIX, seed=9, biased=True, **o), softcap=0.7, **o
    ),
    "bias of each row": lambda **o: make(
        np.stack([np.arange(9, 9 + T), np.arange(7, 7 + T)]),
        piece(PREFIX, seed=9, **o),
        piece([[5, 6, 7, 8], [EMPTY, 5, 6, EMPTY]], seed=11, biased=True, **o),
        **o,
    ),
    "bias and packing": lambda **o: make(
        PACKED_ROW + 5, piece(PREFIX, seed=9, biased=True, **o), segment_ids=PACKED, **o
    ),
    "packing": lambda **o: make(PACKED_ROW, segment_ids=PACKED, **o),
    "packing after a prefix": lambda **o: make(
        PACKED_ROW + 5, piece(PREFIX, seed=9, **o), segment_ids=PACKED, **o
    ),
    "packing and softcap": lambda **o: make(
        PACKED_ROW + 5, piece(PREFIX, seed=9, **o), segment_ids=PACKED, softcap=0.7, **o
    ),
    "a segment a token, and padding": lambda **o: make(
        np.stack([np.full(T, 5), [5, 6, *[5] * 6, EMPTY, EMPTY]]), piece(PREFIX, seed=9, **o),
        segment_ids=jnp.array([range(T), [0, 0, *range(1, 7), EMPTY, EMPTY]], jnp.int32), **o,
    ),
}  # fmt: skip

REFUSED = {
    ("splash", "window"): "counts positions",
    ("splash", "traced window, padding between"): "counts positions",
    ("splash", "bias and softcap"): "a bias after a softcap",
    ("splash", "packing and softcap"): "several segments",
    ("cudnn", "softcap"): "no softcap",
    ("cudnn", "packing and softcap"): "no softcap",
    ("cudnn", "bias and softcap"): "no softcap",
}


def value_and_gradient(attend, inputs: AttentionInputs):
    """The outputs of real queries; the gradient of all that is differentiable."""

    def loss(q, key_values):
        slots = tuple(
            s._replace(keys=k, values=v, bias=b)
            for s, (k, v, b) in zip(inputs.slots, key_values, strict=True)
        )
        out = attend(dataclasses.replace(inputs, q_BTHF=q, slots=slots))
        real = jnp.where((inputs.positions_BT != EMPTY)[..., None, None], out, 0)
        weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        return jnp.sum(weights * real), (out, real)

    arguments = inputs.q_BTHF, [(s.keys, s.values, s.bias) for s in inputs.slots]
    gradient, (out, real) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*arguments)
    assert np.isfinite(np.asarray(out, np.float32)).all()  # padding too
    assert out.dtype == inputs.q_BTHF.dtype
    return [np.asarray(x, np.float32) for x in (real, *jax.tree.leaves(gradient))]


@functools.cache
def expected(case):
    return value_and_gradient(reference, CASES[case]())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_reference(backend, case):
    inputs = CASES[case]()
    if reason := REFUSED.get((backend, case)):
        half = CASES[case](dtype="bfloat16")
        assert reason in str(BACKENDS[backend].unsupported_reason(half))
        return
    # Without asking leave: cuDNN's formulation is exact in float32, its kernels refuse it.
    got = value_and_gradient(BACKENDS[backend].attend, inputs)
    for x, y in zip(got, expected(case), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("backend", "case"),
    [(b, case) for b in BACKENDS for case in ("padding left and right", "bias")]
    + [("chunked", "window"), ("cudnn", "window")],
)
def test_bfloat16_is_as_near_as_bfloat16_can_be(backend, case):
    inputs = CASES[case](dtype="bfloat16")
    assert BACKENDS[backend].unsupported_reason(inputs) is None
    wide = dataclasses.replace(
        inputs,
        q_BTHF=inputs.q_BTHF.astype(jnp.float32),
        slots=tuple(
            s._replace(keys=s.keys.astype(jnp.float32), values=s.values.astype(jnp.float32))
            for s in inputs.slots
        ),
    )
    got = value_and_gradient(BACKENDS[backend].attend, inputs)
    for x, y in zip(got, value_and_gradient(reference, wide), strict=True):
        assert np.linalg.norm(x - y) < 2**-7 * np.linalg.norm(y)


@pytest.mark.parametrize("backend", ["chunked", "splash"])  # cuDNN's formulation has no float16 on a CPU
def test_a_slot_that_is_not_there_is_none_in_float16_either(backend):
    """Its bias is beyond that dtype's numbers."""
    inputs = CASES["bias"](dtype="float16")
    prefix, own = inputs.slots
    assert prefix.bias is not None
    gone = prefix._replace(bias=prefix.bias.at[:, 1].set(ABSENT))
    joined = joined_bias((gone, own), B)
    assert joined is not None
    assert np.isfinite(joined.astype(jnp.float16)).all()  # as splash and cudnn take it
    left = prefix._replace(positions=prefix.positions.at[:, 1].set(EMPTY))
    got, expected = (
        value_and_gradient(BACKENDS[backend].attend, dataclasses.replace(inputs, slots=(slots, own)))
        for slots in (gone, left)
    )
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2**-7)


def test_a_backend_that_is_asked_for_serves_or_says_why_not():
    inputs = CASES["shared prefix"](dtype="bfloat16")
    for name in BACKENDS:
        np.testing.assert_array_equal(attention(inputs, backend=name), BACKENDS[name].attend(inputs))
    for (name, case), reason in REFUSED.items():
        with pytest.raises(UserError, match=reason):
            attention(CASES[case](dtype="bfloat16"), backend=name)
    with pytest.raises(UserError, match="'flash'; choose one of auto, chunked, splash, cudnn"):
        attention(inputs, backend="flash")
    with pytest.raises(UserError, match="pass segment_ids_BT"):
        attention(dataclasses.replace(CASES["packing"](), segment_ids_BT=None))


def test_auto_takes_what_suits_the_machine(monkeypatch, caplog):
    """And says once, with the reason, that it can't take the fastest."""
    called = []
    for name, backend in BACKENDS.items():
        monkeypatch.setattr(backend, "attend", lambda inputs, name=name: called.append(name) or inputs.q_BTHF)
    monkeypatch.setattr(cudnn, "_compute_capability", lambda: 9)
    half, capped = CASES["row alone"](dtype="bfloat16"), CASES["softcap"](dtype="bfloat16")
    one = dataclasses.replace(half, q_BTHF=half.q_BTHF[:, :1], positions_BT=half.positions_BT[:, :1])
    package._say_once.cache_clear()
    for machine in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda machine=machine: machine)
        for inputs in (half, capped, one):
            attention(inputs)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attention(capped)
    assert [record.getMessage() for record in caplog.records] == [
        "Attention falls back from cudnn to chunked, which is slower: cuDNN's attention has no softcap."
    ]
    attention(one, backend="splash")  # a decoding step, whatever the model is set to
    assert called == [
        "chunked", "chunked", "chunked",
        "cudnn", "chunked", "chunked",
        "splash", "splash", "chunked",
        "chunked",
        "chunked",
    ]  # fmt: skip


def test_what_a_backend_can_not_serve_is_said_and_served_by_chunked(monkeypatch, caplog):
    """A bias or a sliding window on a TPU."""
    called = []
    for name, backend in BACKENDS.items():
        monkeypatch.setattr(backend, "attend", lambda inputs, name=name: called.append(name) or inputs.q_BTHF)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    package._say_once.cache_clear()
    plain = CASES["bias"](dtype="bfloat16")
    wide = dataclasses.replace(plain, q_BTHF=jnp.zeros((B, T, H, 128), jnp.bfloat16))
    for inputs in (CASES["bias and softcap"](dtype="bfloat16"), CASES["window"](dtype="bfloat16"), wide):
        attention(inputs)
    assert called == ["chunked"] * 3
    begin = "Attention falls back from splash to chunked, which is slower: "
    assert caplog.messages == [
        f"{begin}Splash can't add a bias after a softcap, nor show a prefix to several segments there.",
        f"{begin}a sliding window counts positions, Splash counts slots.",
        f"{begin}Splash has no room for a bias, or segments after a prefix, beside heads of width 128.",
    ]
    attention(plain)
    assert called[-1] == "splash"


def test_refusals_by_dtype_width_order_and_machine(monkeypatch):
    inputs = CASES["shared prefix"](dtype="bfloat16")
    wide = dataclasses.replace(inputs, q_BTHF=jnp.zeros((B, T, H, 12), jnp.bfloat16))
    single = dataclasses.replace(CASES["shared prefix"](), precision=jax.lax.Precision.HIGHEST)
    turned = dataclasses.replace(inputs, slots=inputs.slots[::-1])
    assert "not 12" in str(cudnn.unsupported_reason(wide))
    assert "not float32" in str(cudnn.unsupported_reason(single))
    assert "fewer bits" in str(BACKENDS["splash"].unsupported_reason(single))
    assert "own slots" in str(BACKENDS["splash"].unsupported_reason(turned))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # but the device has no capability
    assert "Ampere" in str(cudnn.unsupported_reason(inputs))


def test_splash_leaves_meshes_to_shard_map():
    """XLA can't partition its kernels: a batch over two devices is refused, its shards are not."""
    inputs = CASES["row alone"](dtype="bfloat16")
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("rows")
    q = jax.device_put(inputs.q_BTHF, jax.sharding.NamedSharding(mesh, rows))
    reasons = []

    def look(q):
        reasons.append(BACKENDS["splash"].unsupported_reason(dataclasses.replace(inputs, q_BTHF=q)))
        return q

    jax.jit(look)(q)
    jax.jit(jax.shard_map(look, mesh=mesh, in_specs=rows, out_specs=rows))(q)
    assert "mesh" in str(reasons[0])
    assert reasons[1] is None


def long_call():
    """More than one chunk of queries, and more than one block of Splash's, the last not full."""
    where = np.where(np.arange(150) % 7 == 3, EMPTY, np.arange(150) + 140)
    return make([where] * B, piece(np.arange(140)[None], seed=9), softcap=2.0)


@pytest.mark.parametrize("backend", ["chunked", "splash"])
def test_long_rows(backend, monkeypatch):
    inputs = long_call()
    monkeypatch.setattr(chunked, "SCORE_BYTES", 1)  # chunks of 15
    got = value_and_gradient(BACKENDS[backend].attend, inputs)
    for x, y in zip(got, value_and_gradient(reference, inputs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=5e-6)


def test_chunks_bound_the_scores(monkeypatch):
    inputs = long_call()

    def largest_chunk():
        jaxpr = jax.make_jaxpr(lambda q: chunked.attend(dataclasses.replace(inputs, q_BTHF=q)))
        scores = re.findall(rf"f32\[{B},{G},(\d+),150\]", str(jaxpr(inputs.q_BTHF)))
        return max(map(int, scores)) * G // H  # a row a query head

    assert largest_chunk() == 150
    monkeypatch.setattr(chunked, "SCORE_BYTES", 4 * B * H * (150 + 140) * 40)
    assert 16 < largest_chunk() <= 40
    monkeypatch.setattr(chunked, "SCORE_BYTES", 1)
    assert largest_chunk() <= 16


def test_memory_of_value_and_gradient_is_linear_in_the_length():
    """At T = S = 8192 the scores of eight heads alone would take 2 GiB."""
    x = jax.ShapeDtypeStruct((1, 8192, 8, 64), jnp.float32)
    where = jax.ShapeDtypeStruct((1, 8192), jnp.int32)

    def loss(q, k, v, where):
        return attention(AttentionInputs(q, where, (Slots(k, v, where),), scale=0.125)).sum()

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(x, x, x, where).compile()
    assert programs.memory(program).temp_size_in_bytes < 400 * 2**20


def test_gradient_is_causal():
    inputs = CASES["shared prefix"]()

    @jax.jit
    def influence(t):
        def output(key_values):
            slots = tuple(
                s._replace(keys=k, values=v) for s, (k, v) in zip(inputs.slots, key_values, strict=True)
            )
            return attention(dataclasses.replace(inputs, slots=slots))[:, t].sum()

        return jax.grad(output)([(s.keys, s.values) for s in inputs.slots])

    for t in (0, 4, T - 1):
        for of_prefix, of_row in zip(*influence(t), strict=True):
            assert (np.abs(of_prefix) > 0).any(axis=(2, 3)).all()
            assert (np.abs(of_row[:, : t + 1]) > 0).any(axis=(2, 3)).all()
            assert (of_row[:, t + 1 :] == 0).all()


def test_many_prefixes_at_once():
    """vmap over prefixes, as over soft prompts, equals one after the other."""
    inputs = CASES["shared prefix"]()
    keys = numbers(3, 1, 5, G, F, seed=20)

    def loss(keys):
        prefix = inputs.slots[0]._replace(keys=keys)
        return jnp.sum(attention(dataclasses.replace(inputs, slots=(prefix, inputs.slots[1]))) ** 2)

    gradient = jax.grad(loss)
    one_by_one = jax.jit(lambda keys: jax.lax.map(gradient, keys))(keys)
    at_once = jax.jit(jax.vmap(gradient))(keys)
    np.testing.assert_allclose(at_once, one_by_one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["shared prefix", "bias"])
def test_splash_lowers_for_a_tpu(monkeypatch, case):
    """The kernels of both passes pass Mosaic's checks of shapes and layouts."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    inputs = CASES[case](dtype="bfloat16")
    prefix, own = inputs.slots

    def loss(q, keys, bias):
        slots = (prefix._replace(keys=keys, bias=bias), own)
        return attention(dataclasses.replace(inputs, q_BTHF=q, slots=slots)).astype(jnp.float32).sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(inputs.q_BTHF, prefix.keys, prefix.bias)
    # One for the forward pass, one for the queries' gradient, one for that of keys and values.
    assert program.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 3
