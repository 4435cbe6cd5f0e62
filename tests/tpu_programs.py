"""Every program that a compression compiles, from shapes alone: SmolLM2 with the notebook's settings.

For TPUs they are compiled (``test_tpu.py``), for NVIDIA's GPUs lowered (``test_cuda.py``).

A new prompt kind, objective or teacher signal has its program by its own table.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.scale.arithmetic import MODELS
from jaxsp import artifact, distributions
from jaxsp.data.packing import Packing
from jaxsp.evaluation import metrics, tokens
from jaxsp.losses import OBJECTIVES, Objective
from jaxsp.models import decoder
from jaxsp.models.generation import Sampling, engine
from jaxsp.models.generation.requests import as_arrays
from jaxsp.models.generation.sampling import tabulate
from jaxsp.models.output_head import OutputHead
from jaxsp.plan import PREAMBLE_TOKENS, program
from jaxsp.prompts import PROMPT_KINDS, per_head, with_defaults
from jaxsp.prompts.initializers import match
from jaxsp.settings import make_settings
from jaxsp.teacher import samples, targets
from jaxsp.teacher.signals import SIGNALS
from jaxsp.training import drivers, loop, optimizers, state

CONFIG = MODELS["SmolLM2-135M"]
SETTINGS = make_settings({"prompt_length": 16, "steps": 100, "max_answer_tokens": 48})
QUERIES, QUERY_TOKENS, CONTEXT_TOKENS, PROMPTS = 24, 64, 384, 4
PACKING = Packing.of(np.full(QUERIES, QUERY_TOKENS), SETTINGS.training.batch_size)
READING = Packing.for_all(np.full(QUERIES, QUERY_TOKENS))
"""The shape in which all rows are read once."""
WIDEST = per_head.WIDEST * SETTINGS.prompt.prompt_length


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program of a compression.

    Attributes:
      function: the jitted function that it comes from.
      trace: gives it traced, for the device that programs are for when it is called.
      reads: whether it reads several tokens after others, for which a TPU has the Splash kernels.
    """

    function: Any
    trace: Callable[[], jax.stages.Traced]
    reads: bool = False


Make = Callable[[], Program]


@functools.cache
def params() -> Any:
    return decoder.parameter_shapes(CONFIG)


@functools.cache
def head() -> Any:
    return jax.eval_shape(lambda params: OutputHead.of(params, CONFIG), params())


@functools.cache
def prefix(slots: int) -> Any:
    return program.prefix_shapes(CONFIG, slots)


def array(*shape: int, dtype: Any = jnp.int32) -> Any:
    """Stands for an array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def stacked(tree: Any, count: int = 1) -> Any:
    """The shapes of so many side by side."""
    return jax.tree.map(lambda leaf: array(count, *leaf.shape, dtype=leaf.dtype), tree)


def settings_of(kind: str = "per_head", objective: Any = "kl") -> Any:
    return with_defaults(make_settings({"kind": kind, "objective": objective}, base=SETTINGS))


def rows(packing: Packing = READING, objective: Objective = OBJECTIVES["kl"]) -> Any:
    return program.batch_shapes(CONFIG, packing, objective)


def traced(function: Any, *arguments: Any, reads: bool = False, **options: Any) -> Program:
    return Program(function, lambda: function.trace(*arguments, **options), reads)


def update(kind: str, objective: Any = "kl", prompts: int = 1, **changes: Any) -> Program:
    config, settings = CONFIG.replace(**changes), settings_of(kind, objective)
    call = functools.partial(program.traced, config, settings, PACKING, None, prompts)
    return Program(drivers.sharded_update, call, reads=True)


def families() -> list[list[str]]:
    """The objectives with a gradient, those of a module of formulas together."""
    found: dict[str, list[str]] = {}
    for name, entry in OBJECTIVES.items():
        if entry.differentiable:
            found.setdefault(entry.function.__module__.rpartition(".")[2], []).append(name)
    return list(found.values())


@functools.partial(jax.jit, static_argnames="objective")
def loss_and_gradient(states: Any, head: Any, batch: Any, objective: Objective) -> Any:
    """The mean over a batch and its gradient, without the model."""

    def total(states: Any) -> Any:
        return jnp.sum(distributions.compare(objective, states, head, batch)[0])

    return jax.value_and_grad(total)(states)


def loss(name: str) -> Program:
    entry = OBJECTIVES[name]
    batch = rows(PACKING, entry)
    states = array(*batch.mask.shape, CONFIG.width, dtype=CONFIG.dtype)
    return traced(loss_and_gradient, states, head(), batch, objective=entry)


def held_out(kind: str) -> Program:
    function = metrics._total_kl(CONFIG, kind, None)
    given = (
        (params(), prefix(PREAMBLE_TOKENS), None),
        stacked(program.state_shapes(CONFIG, settings_of(kind)).sigma),
    )
    return traced(function, *given, stacked(rows()), reads=True)


def whole() -> Any:
    """The prefix that the context is."""
    return prefix(PREAMBLE_TOKENS + CONTEXT_TOKENS)


def prefill() -> Program:
    inputs = array(1, PREAMBLE_TOKENS, CONFIG.width, dtype=CONFIG.dtype)
    return traced(decoder.prefill, params(), CONFIG, inputs, None, reads=True)


def long_read() -> Program:
    chunk = 2048
    room = prefix(PREAMBLE_TOKENS + 2 * chunk)
    given = params(), CONFIG, room, array(1, chunk), array(1, chunk), array()
    return traced(decoder._read_chunk, *given, reads=True)


def answers(*, start: bool) -> Program:
    """The answers of the teacher and of σ: the queue's start, or its loop."""
    sampling = Sampling(max_tokens=SETTINGS.teacher.max_answer_tokens)
    with jax.default_device(jax.devices("cpu")[0]):
        choices = tabulate([sampling], 32, None)
        requests = as_arrays([[0] * QUERY_TOKENS], [sampling] * QUERIES, choices, None, QUERY_TOKENS)
    table = jax.tree.map(lambda leaf: array(*leaf.shape, dtype=leaf.dtype), requests)
    B, sizes = 16, dict[str, Any](A=SETTINGS.teacher.max_answer_tokens, N=0)
    if start:
        return traced(engine._start, params(), CONFIG, None, table, B, **sizes)
    begin = functools.partial(engine._start, config=CONFIG, B=B, **sizes)
    slots = jax.eval_shape(lambda params, table: begin(params, several=None, table=table), params(), table)
    given = engine._Given(params(), CONFIG, whole(), table, QUERY_TOKENS, array())
    return traced(engine._advance, given, slots, array(B, dtype=jnp.bool_), array(), None, reads=True)


def signal(name: str) -> Program:
    options = tuple(SIGNALS[name].options(OBJECTIVES["topk_kl"], CONFIG.vocab_size).items())
    given = {"name": name, "options": options}
    return traced(targets._signal, params(), CONFIG, whole(), rows(), **given, reads=True)


def brackets(*, teacher: bool) -> Program:
    """All metrics of one bracket, or of the teacher by itself."""
    given = params(), CONFIG, None if teacher else whole(), rows()
    names = metrics.POSITION_METRICS
    return traced(metrics._at_positions, *given, names=names, teacher_head=None, reads=not teacher)


def matching(*, parts: bool, probe: bool) -> Program:
    """The start in closed form, of a context in one part or in several; before it, the slots of each head."""
    few = dataclasses.replace(rows(), targets={"tokens": rows().targets["tokens"]})
    given = params(), CONFIG, prefix(PREAMBLE_TOKENS), prefix(CONTEXT_TOKENS), few
    own = array(len(few.tokens), CONTEXT_TOKENS, dtype=jnp.bool_) if parts else None
    if probe:
        wanted = match._probe_of(match.slot_levels(WIDEST))
        return traced(distributions._probed, *given, wanted, own, reads=True)
    counts = array(CONFIG.layers, CONFIG.kv_heads)
    return traced(distributions._compacted, *given, match.fit_to(WIDEST), counts, own, reads=True)


@functools.cache
def one() -> Any:
    """The state of a prompt."""
    return program.state_shapes(CONFIG, settings_of())


def fitted() -> Any:
    """Keys and values as they come from the start in closed form."""
    found = prefix(WIDEST)
    return dataclasses.replace(found, bias=array(*found.keys.shape[:4], dtype=jnp.float32))


# Beside the model: they take no time, but must compile, too.
SMALL: dict[str, Make] = {
    "states side by side": lambda: traced(state._stacked, [one()] * PROMPTS),
    "a state put in": lambda: traced(state.put, stacked(one(), PROMPTS), array(), one()),
    "a state taken out": lambda: traced(state.unstack, stacked(one(), PROMPTS), array()),
    "the best kept": lambda: traced(
        loop._keep_best, stacked(one(), PROMPTS), array(PROMPTS, dtype=jnp.float32)
    ),
    "rates": lambda: traced(optimizers._rates, "per_head", one().sigma, ()),
    "slots of each head": lambda: traced(per_head._packed, fitted()),
    "without the preamble": lambda: traced(distributions._without, prefix(PREAMBLE_TOKENS), whole()),
    "some slots": lambda: traced(distributions._slots, whole(), array(16)),
    "likeliest tokens": lambda: traced(
        tokens._top, head(), array(64, CONFIG.width, dtype=CONFIG.dtype), vocabulary=CONFIG.vocab_size
    ),
    "keys of samples": lambda: traced(
        samples._keys, jax.eval_shape(lambda: jax.random.key(0)), array(8), array(8)
    ),
    "the saved prompt": lambda: traced(
        artifact._prefix, params(), CONFIG, array(1, PREAMBLE_TOKENS), one().sigma, "per_head", reads=True
    ),
}

PROGRAMS: dict[str, Make] = {
    "prefill": prefill,
    "long read": long_read,
    "answers": functools.partial(answers, start=False),
    "answers, start": functools.partial(answers, start=True),
    **{f"teacher's {name}": functools.partial(signal, name) for name in SIGNALS},
    **{f"update of {kind}": functools.partial(update, kind) for kind in PROMPT_KINDS},
    **{
        f"update by {first}": functools.partial(update, "per_head", first) for first, *_ in families()[1:]
    },  # kl is everywhere
    "update of many prompts": functools.partial(update, "per_head", prompts=PROMPTS),
    "update of int8": functools.partial(update, "per_head", quantization="int8"),
    **{f"loss {name}": functools.partial(loss, name) for _, *others in families() for name in others},
    **{f"held-out KL of {kind}": functools.partial(held_out, kind) for kind in PROMPT_KINDS},
    "brackets": functools.partial(brackets, teacher=False),
    "the teacher by itself": functools.partial(brackets, teacher=True),
    "match": functools.partial(matching, parts=False, probe=False),
    "match, its numbers of slots": functools.partial(matching, parts=False, probe=True),
    "match in parts": functools.partial(matching, parts=True, probe=False),
    "match in parts, its numbers of slots": functools.partial(matching, parts=True, probe=True),
    **SMALL,
}
"""Every program by its name."""

TWICE = [name for name in PROGRAMS if not name.startswith(("loss", "update by", "held-out KL of"))]
"""Those that are compiled for each generation of chips; of the others' code nothing depends on it."""
