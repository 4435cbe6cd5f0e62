"""The mechanism under the fused objectives: positions in chunks, the gradient formed in the forward pass.

A position's loss depends on its own hidden state alone. So its gradient can be formed while the chunk's
logits are at hand, and the backward pass only scales it. Live positions are taken first, and chunks
that hold none are not computed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxsp.losses import vocabulary
from jaxsp.losses.closed_form import Arrays, Rule
from jaxsp.losses.objectives import Objective
from jaxsp.typing import Array

Heads = tuple[Array, Array]
Results = tuple[Array, Arrays]  # the objective's values, and the metrics'

# Bytes that the arrays over one chunk's logits may take. An accelerator needs long chunks to be kept
# busy: each reads the whole head from memory.
_BUDGET = {"cpu": 2**28}
_ACCELERATOR_BUDGET = 2**30
_ARRAYS = 6  # of the size of the logits, float32, when an objective is differentiated; a metric adds one


def chunk_size(positions: int, tokens: int, *, masked: bool, metrics: int = 0) -> int:
    """The number of positions at a time that fit the budget, evenly spread; shorter with a mask."""
    budget = _BUDGET.get(jax.default_backend(), _ACCELERATOR_BUDGET)
    size = max(96, budget // (4 * (_ARRAYS + metrics) * tokens))  # each chunk reads the head: not too short
    if masked:  # the last chunk of live positions is computed whole: shorter ones waste less
        size = min(size, max(64, positions // 8))
    chunks = max(1, math.ceil(positions / size))
    return 16 * max(1, math.ceil(positions / chunks / 16))  # even, and a shape that hardware likes


@dataclasses.dataclass(frozen=True)
class ChunkSettings:
    """All that is static: equal settings compile once.

    Attributes:
      objective: what is differentiated.
      rule: its gradient written out, if there is one to use.
      metrics: what is evaluated on the same logits.
      chunk: positions at a time.
      all_live: there was no mask.
      softcaps: softcaps of the teacher's and of the student's logits.
      axis_name: over which the heads' rows are sharded.
    """

    objective: Objective
    rule: Rule | None
    metrics: tuple[tuple[str, Objective], ...]
    chunk: int
    all_live: bool
    softcaps: tuple[float | None, float | None]
    axis_name: str | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def evaluate(settings: ChunkSettings, hidden: Array, per_position: Arrays, heads: Heads) -> Results:
    """(values, metrics) of all positions, ``[N]`` each; differentiable in ``hidden``.

    Args:
      settings: what is static.
      hidden: the student's ``[N, D]``.
      per_position: ``live`` ``[N]``, and what the objectives read: ``teacher_hidden``, ``targets``, ...
      heads: the teacher's ``[V, E]`` and the student's ``[V, D]``.
    """
    return _in_chunks(settings, hidden, per_position, heads, gradient=False)[0]


def _forward(settings: ChunkSettings, hidden: Array, per_position: Arrays, heads: Heads):
    results, gradient = _in_chunks(settings, hidden, per_position, heads, gradient=True)
    return results, (gradient, per_position["live"])


def _backward(_: ChunkSettings, saved: tuple[Array, Array], cotangents: Results):
    gradient, live = saved
    scaled = cotangents[0][:, None] * gradient.astype(jnp.float32)
    # A cotangent under the mask may be infinite (that of a square root at 0).
    return jnp.where(live[:, None], scaled, 0.0).astype(gradient.dtype), None, None


evaluate.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames=("settings", "gradient"))
def _in_chunks(
    settings: ChunkSettings, hidden: Array, per_position: Arrays, heads: Heads, *, gradient: bool
) -> tuple[Results, Array | None]:
    """((values, metrics), gradient) of all positions, ``[N]`` and ``[N, D]``."""
    arrays = {"student_hidden": hidden, **per_position}
    one = functools.partial(_one_chunk, settings, heads, gradient=gradient)
    N, C = hidden.shape[0], settings.chunk
    if N <= C:
        return one(arrays)
    # Live positions first; chunks beyond the last of them are never computed.
    padding = -N % C
    live = per_position["live"]
    order = jnp.arange(N) if settings.all_live else jnp.argsort(~live, stable=True)
    order = jnp.pad(order, (0, padding))
    count = N if settings.all_live else jnp.sum(live)

    def body(i: Array, out: Any) -> Any:
        start = i * C
        index = jax.lax.dynamic_slice_in_dim(order, start, C)
        chunk = {name: jnp.take(array, index, axis=0) for name, array in arrays.items()}
        chunk["live"] &= start + jnp.arange(C) < N
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return jax.tree.map(write, out, one(chunk))

    shapes = jax.eval_shape(one, {name: array[:C] for name, array in arrays.items()})
    sources = list(arrays.values()) + (list(heads) if settings.axis_name is None else [])

    def blank(like: Any) -> Array:
        zeros = jnp.zeros((N + padding, *like.shape[1:]), like.dtype)
        return vocabulary.like_varying(zeros, *sources)

    out = jax.lax.fori_loop(0, -(-count // C), body, jax.tree.map(blank, shapes))
    if settings.all_live:
        return jax.tree.map(lambda a: a[:N], out)
    rank = jnp.zeros(N, jnp.int32).at[order[:N]].set(jnp.arange(N, dtype=jnp.int32))
    return jax.tree.map(lambda a: jnp.take(a, rank, axis=0), out)


def _one_chunk(
    settings: ChunkSettings, heads: Heads, chunk: Arrays, *, gradient: bool
) -> tuple[Results, Array | None]:
    teacher_head, head = heads
    live = chunk["live"]
    given = {name: array for name, array in chunk.items() if name != "live"}
    student = given["student_hidden"]
    axis, rule = settings.axis_name, settings.rule

    def logits_of(hidden: Array, head: Array) -> Array:
        # A NaN under the mask must not reach the gradient. And on jax 0.10's CPU backend the product,
        # fused with the softmax's reduction for want of something between them, takes 1.5 times as long.
        raw = jnp.where(live[:, None], product("nd,vd->nv", hidden, head, hidden.dtype), 0)
        return raw if rule else vocabulary.gather(raw, axis)

    def cap(softcap: float | None, raw: Array) -> Array:
        return raw if softcap is None else softcap * jnp.tanh(raw / softcap)

    teacher_cap, own_cap = (functools.partial(cap, softcap) for softcap in settings.softcaps)
    if "teacher_hidden" in given:  # where nothing reads them, they are not computed
        given["teacher_logits"] = teacher_cap(logits_of(given["teacher_hidden"], teacher_head))
    given["student_logits"], uncap = jax.vjp(own_cap, logits_of(student, head))
    measured = {name: entry(mask=live, **given) for name, entry in settings.metrics}

    if rule:
        values, to_logits = rule(given, live, axis, **dict(settings.objective.options))
        to_hidden = jnp.zeros(student.shape, jnp.float32)
    else:

        def values_of(student_logits: Array, student_hidden: Array) -> Array:
            own = {"student_logits": student_logits, "student_hidden": student_hidden}
            return settings.objective(mask=live, **{**given, **own})

        values, pull = jax.vjp(values_of, given["student_logits"], student)
        to_logits, to_hidden = pull(jnp.ones_like(values))
    if not gradient:
        return (values, measured), None
    if "student_logits" in settings.objective.inputs:
        (to_raw,) = uncap(to_logits)
        to_raw = to_raw if rule else vocabulary.own_part(to_raw, head.shape[0], axis)
        to_hidden += vocabulary.total(product("nv,vd->nd", to_raw, head, student.dtype), axis)
    return (values, measured), to_hidden.astype(student.dtype)


def product(spec: str, left: Array, head: Array, dtype: Any) -> Array:
    """With the head, of logits' gradients or of hidden states, whose ``dtype`` it is."""
    # In bfloat16 or else float32: a gradient of probabilities underflows in float16.
    dtype = jnp.bfloat16 if jnp.promote_types(dtype, head.dtype) == jnp.bfloat16 else jnp.float32
    # Float32 at full precision, which accelerators don't give unasked; sums always in float32.
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    left, head = left.astype(dtype), head.astype(dtype)
    return jnp.einsum(spec, left, head, precision=precision, preferred_element_type=jnp.float32)
