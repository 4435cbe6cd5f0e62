"""The mechanism under the fused objectives: positions in chunks, the gradient formed in the forward pass.

A position's loss depends on its own hidden state alone. So its gradient can be formed while the chunk's
logits are at hand, and the backward pass only scales it. Live positions are taken first, and chunks
that hold none are not computed.

Rows may be spread over devices by ``jax.jit`` alone. A chunk of consecutive positions would then be on one of
them, and XLA would have all compute it. So a chunk has as many positions of each group of rows, one at least;
where the devices' number divides that of the rows, rows of different devices are never in one group. The
devices are those of the mesh; a program without one may have all of them. If it has fewer, or rows are not
spread, values are the same, and groups with few live positions wait for those with more.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsp import device
from jaxsp.losses import vocabulary
from jaxsp.losses.objective import Objective
from jaxsp.typing import Array, ceil_div

Arrays = dict[str, Array]
Results = tuple[Array, Arrays]  # the objective's values, and the metrics'

# Bytes that the arrays over one chunk's logits may take. An accelerator needs long chunks to be kept
# busy: each reads the whole head from memory.
_CPU_BUDGET, _BUDGET = 2**28, 2**30
_ARRAYS, _CLOSED_ARRAYS = 6, 5
"""Arrays of the size of the logits, float32, when an objective is differentiated, and when its gradient is
written out; a metric adds one. On a CPU (jax 0.12) KL takes 3 or 4, with NLL in a mixture one more. JS and
skewed KL take 6, a fifth more than the budget: shorter chunks for all would cost KL time."""

_CAST_BYTES = 2**25
"""A head of another dtype than the product's is cast so many bytes at a time."""


def is_cpu() -> bool:
    """Whether there is no accelerator."""
    return device.platform() == "cpu"


def chunk_size(
    positions: int, tokens: int, *, masked: bool, metrics: int = 0, closed: bool = False, shards: int = 1
) -> int:
    """The number of positions at a time that fit the budget, evenly spread; on a CPU shorter with a mask.

    Args:
      positions: all of them.
      tokens: number of tokens of the vocabulary.
      masked: whether there is a mask.
      metrics: evaluated beside the objective.
      closed: whether the objective's gradient is written out.
      shards: devices that the positions are known to be spread over.
    """
    budget = (_CPU_BUDGET if is_cpu() else _BUDGET) * shards
    arrays = (_CLOSED_ARRAYS if closed else _ARRAYS) + metrics
    size = max(96 * shards, budget // (4 * arrays * tokens))  # each chunk reads the head: not too short
    if masked and is_cpu():  # the last chunk of live positions is computed whole: shorter ones waste less
        size = min(size, max(64, positions // 8))
    chunks = max(1, ceil_div(positions, size))
    return 16 * max(1, ceil_div(positions, 16 * chunks))  # even, and a shape that hardware likes


@dataclasses.dataclass(frozen=True)
class ChunkSettings:
    """All that is static: equal settings compile once.

    Attributes:
      objective: what is differentiated.
      metrics: what is evaluated on the same logits.
      chunk: positions at a time.
      all_live: there was no mask.
      softcaps: softcaps of the teacher's and of the student's logits.
      axis_name: over which the heads' rows are sharded.
      gathered: the logits of all shards are brought together.
      trains_head: the head gets a gradient.
      together: teacher and student share a head, which is read once for both.
    """

    objective: Objective
    metrics: tuple[tuple[str, Objective], ...]
    chunk: int
    all_live: bool
    softcaps: tuple[float | None, float | None]
    axis_name: str | None
    gathered: bool
    trains_head: bool
    together: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def evaluate(settings: ChunkSettings, hidden: Array, head: Array, given: Mapping[str, Any]) -> Results:
    """(values, metrics) of all positions, ``[*b, t]`` each; differentiable in ``hidden`` and ``head``.

    Args:
      settings: what is static.
      hidden: the student's ``[*b, t, D]``.
      head: the student's ``[V, D]``.
      given: ``each``: by position ``live`` and what the objectives read, as ``teacher_hidden``, ``targets``;
        ``teacher_head`` ``[V, E]``, if it is another one; ``options``, numbers of the objective.
    """
    return _in_chunks(settings, hidden, head, given, gradient=False)[0]


def _forward(settings: ChunkSettings, hidden: Array, head: Array, given: Mapping[str, Any]) -> Any:
    later = settings.trains_head  # each position's part in the head's gradient must be weighed
    results, (gradient, _) = _in_chunks(settings, hidden, head, given, gradient=not later)
    return results, (hidden, head, given) if later else (gradient, given["each"]["live"])


def _backward(settings: ChunkSettings, saved: Any, cotangents: Results) -> Any:
    if settings.trains_head:
        hidden, head, given = saved
        given = {**given, "each": {**given["each"], "weight": cotangents[0]}}
        return *_in_chunks(settings, hidden, head, given, gradient=True)[1], None
    gradient, live = saved
    scaled = cotangents[0][..., None] * gradient.astype(jnp.float32)
    # A cotangent under the mask may be infinite (that of a square root at 0).
    return jnp.where(live[..., None], scaled, 0.0).astype(gradient.dtype), None, None


evaluate.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames=("settings", "gradient"))
def _in_chunks(
    settings: ChunkSettings, hidden: Array, head: Array, given: Mapping[str, Any], *, gradient: bool
) -> tuple[Results, tuple[Array | None, Array | None]]:
    """((values, metrics), (gradient to the states, to the head)) of all positions, ``[*b, t, ...]``."""
    one = functools.partial(_one_chunk, settings, head, given, gradient=gradient)
    heads = [head, given.get("teacher_head", head)] if settings.axis_name is None else []
    arrays = {"student_hidden": hidden, **given["each"]}
    found, to_head = chunked(one, arrays, settings.chunk, all_live=settings.all_live, reads=(heads, [head]))
    results, to_hidden = found
    return results, (to_hidden, None if to_head is None else to_head.astype(head.dtype))


def chunked(
    one: Callable[[Arrays], tuple[Any, Any]],
    arrays: Arrays,
    size: int,
    *,
    all_live: bool,
    reads: tuple[Any, Any] = ((), ()),
) -> tuple[Any, Any]:
    """``one`` of all positions, so many at a time; chunks without any that counts are not computed.

    Args:
      one: takes arrays ``[*g, n, ...]`` and gives two trees: of such arrays, and of sums over positions.
      arrays: by position, ``[*b, t, ...]``; ``live`` says which count.
      size: positions of a chunk.
      all_live: whether all count.
      reads: what else the one tree and the other are made of.

    Returns:
      The two trees, of ``[*b, t, ...]`` and of sums.
    """
    batch = arrays["live"].shape
    devices = _devices(arrays.values())
    cuts = [math.gcd(n, devices) for n in batch[:-1]]
    grouped = {name: _grouped(array, batch, cuts) for name, array in arrays.items()}
    live = grouped["live"]
    *groups, R = live.shape
    axis, C = len(groups), max(1, size // math.prod(groups))
    if R <= C:
        found, sums = one(grouped)
        return jax.tree.map(lambda a: _ungrouped(a, batch, cuts), found), sums
    # Live positions first; chunks beyond the last of them are never computed.
    order: Any = None if all_live else jnp.argsort(~live, axis=axis, stable=True)
    count = R if all_live else jnp.max(jnp.sum(live, axis=axis))

    def taken(a: Array, index: Array) -> Array:
        return jnp.take_along_axis(a, index.reshape(*index.shape, *[1] * (a.ndim - index.ndim)), axis=axis)

    def part(i: Any) -> tuple[Any, Arrays]:
        start = jnp.minimum(i * C, R - C)  # the last one begins earlier, and computes some once more
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=C, axis=axis)
        chunk = jax.tree.map(cut if order is None else lambda a: taken(a, cut(order)), grouped)
        return start, {**chunk, "fresh": jnp.broadcast_to(start + jnp.arange(C) >= i * C, (*groups, C))}

    def body(i: Any, out: Any) -> Any:
        start, chunk = part(i)
        found, sums = one(chunk)
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=axis)
        return jax.tree.map(write, out[0], found), jax.tree.map(jnp.add, out[1], sums)

    def blank(shape: tuple[int, ...], dtype: Any, reads: Any) -> Array:
        return vocabulary.like_varying(jnp.zeros(shape, dtype), *grouped.values(), *reads)

    found, sums = jax.eval_shape(lambda: one(part(0)[1]))
    begun = jax.tree.map(lambda a: blank((*live.shape, *a.shape[axis + 1 :]), a.dtype, reads[0]), found)
    zeros = jax.tree.map(lambda a: blank(a.shape, a.dtype, reads[1]), sums)
    out, sums = jax.lax.fori_loop(0, -(-count // C), body, (begun, zeros))
    if order is not None:
        rank = jnp.argsort(order, axis=axis)
        out = jax.tree.map(lambda a: taken(a, rank), out)
    return jax.tree.map(lambda a: _ungrouped(a, batch, cuts), out), sums


def _devices(arrays: Iterable[Array]) -> int:
    """The number of devices that rows may be spread over without a word in their types."""
    meshes = jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays)
    for mesh in meshes:
        if not mesh.empty:
            return math.prod(size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)
    return len(device.every())  # a program does not know whether it has one alone


def _grouped(array: Array, batch: tuple[int, ...], cuts: list[int]) -> Array:
    """``[*b, t, ...]`` as ``[*g, R, ...]``: for each axis of ``*b`` that is cut, one of its groups."""
    axes, rest = len(cuts), array.shape[len(batch) :]
    cut_up = [size for n, cut in zip(batch[:-1], cuts, strict=True) for size in (cut, n // cut)]
    array = array.reshape(*cut_up, *batch[-1:], *rest)
    array = jnp.moveaxis(array, range(0, 2 * axes, 2), range(axes))
    groups = [cut for cut in cuts if cut > 1]
    return array.reshape(*groups, math.prod(batch) // math.prod(cuts), *rest)


def _ungrouped(array: Array, batch: tuple[int, ...], cuts: list[int]) -> Array:
    """``[*g, R, ...]`` as ``[*b, t, ...]`` again."""
    axes = len(cuts)
    rest = array.shape[sum(cut > 1 for cut in cuts) + 1 :]
    within = [n // cut for n, cut in zip(batch[:-1], cuts, strict=True)]
    array = array.reshape(*cuts, *within, *batch[-1:], *rest)
    return jnp.moveaxis(array, range(axes), range(0, 2 * axes, 2)).reshape(*batch, *rest)


def _one_chunk(
    settings: ChunkSettings, head: Array, given: Mapping[str, Any], chunk: Arrays, *, gradient: bool
) -> tuple[tuple[Results, Array | None], Array | None]:
    live, student = chunk["live"], chunk["student_hidden"]
    inputs: dict[str, Any] = {name: chunk[name] for name in chunk if name not in ("live", "weight", "fresh")}
    all_shards, shard = (settings.axis_name, None) if settings.gathered else (None, settings.axis_name)

    def logits_of(hidden: Array, head: Array, live: Array = live) -> Array:
        return vocabulary.gather(raw_logits(hidden, head, live), all_shards)

    teacher_cap, own_cap = (functools.partial(capped, softcap) for softcap in settings.softcaps)
    if settings.together:
        both = jnp.stack([inputs["teacher_hidden"], student])
        teacher_raw, raw = logits_of(both, head, jnp.stack([live, live]))
        inputs["teacher_logits"] = teacher_cap(teacher_raw)
    else:
        if "teacher_hidden" in inputs:  # where nothing reads them, they are not computed
            teacher_head = given.get("teacher_head", head)
            inputs["teacher_logits"] = teacher_cap(logits_of(inputs["teacher_hidden"], teacher_head))
        raw = logits_of(student, head)
    inputs |= {"mask": live, "axis_name": shard}
    measured = {
        name: _of_chunk(entry, {**inputs, "student_logits": own_cap(raw)}) for name, entry in settings.metrics
    }

    def values_of(raw: Array, student: Array) -> Array:
        own = {"student_logits": own_cap(raw), "student_hidden": student}
        return _of_chunk(settings.objective, {**inputs, **own}, given["options"])

    values, pull = jax.vjp(values_of, raw, student)
    if not gradient:
        return ((values, measured), None), None
    weight = jnp.where(live, chunk["weight"], 0.0) if "weight" in chunk else jnp.ones_like(values)
    values, weight = jax.lax.optimization_barrier((values, weight))  # in the memory that the values took
    to_raw, to_hidden = pull(weight)
    to_head = None
    if settings.gathered:
        to_raw = vocabulary.own_part(to_raw, head.shape[0], settings.axis_name)
    if "student_logits" in settings.objective.inputs:
        more = product("...v,vd->...d", to_raw, head, student.dtype)
        to_hidden = to_hidden.astype(jnp.float32) + vocabulary.total(more, settings.axis_name)
    if settings.trains_head:
        own = to_raw if "fresh" not in chunk else jnp.where(chunk["fresh"][..., None], to_raw, 0.0)
        flat, states = (x.reshape(-1, x.shape[-1]) for x in (own, student))
        to_head = product("vn,nd->vd", flat.T, states, head.dtype)
    return ((values, measured), to_hidden.astype(student.dtype)), to_head


def _of_chunk(entry: Objective, inputs: dict[str, Any], options: Mapping[str, Any] = {}) -> Array:
    """Values of the chunk ``[*g, n]``; a function of a user's own sees one axis of positions."""
    shape = inputs["mask"].shape
    if len(shape) > 1 and not entry.is_ours:
        inputs = {
            name: x.reshape(-1, *x.shape[len(shape) :]) if isinstance(x, jax.Array) else x
            for name, x in inputs.items()
        }
    return entry(**inputs, **options).reshape(shape)


def raw_logits(hidden: Array, head: Array, live: Array) -> Array:
    """Logits ``[*g, n, v]`` before a softcap, 0 where a position does not count."""
    # A NaN under the mask must not reach the gradient. And on jax 0.10's CPU backend the product, fused with
    # the softmax's reduction for want of something between them, takes 1.5 times as long.
    return jnp.where(live[..., None], product("...d,vd->...v", hidden, head, hidden.dtype), 0)


def capped(softcap: float | None, raw: Array) -> Array:
    """Logits after the softcap, if there is one."""
    return raw if softcap is None else softcap * jnp.tanh(raw / softcap)


def product(spec: str, left: Array, head: Array, dtype: Any) -> Array:
    """With the head, of logits' gradients or of hidden states, whose ``dtype`` it is."""
    # In bfloat16 or else float32: a gradient of probabilities underflows in float16.
    dtype = jnp.bfloat16 if jnp.promote_types(dtype, head.dtype) == jnp.bfloat16 else jnp.float32
    # Float32 at full precision, which accelerators don't give unasked; sums always in float32.
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    multiply = functools.partial(jnp.einsum, spec, precision=precision, preferred_element_type=jnp.float32)
    left, (V, D) = left.astype(dtype), head.shape
    blocks = 1 if head.dtype == dtype else ceil_div(4 * V * D, _CAST_BYTES)
    if blocks == 1:
        return multiply(left, head.astype(dtype))
    # Cast as a whole, it would be twice its size, for as long as the loop over the chunks runs.
    rows, to_logits, kept = ceil_div(V, blocks), spec.endswith("v"), head
    if jax.__version_info__ < (0, 11) and head.dtype == jnp.bfloat16:
        kept = jax.lax.bitcast_convert_type(head, jnp.uint16)  # of bfloat16 a CPU would cut all as float32

    def body(i: Any, out: Array) -> Array:
        start = jnp.minimum(i * rows, V - rows)
        block = jax.lax.dynamic_slice_in_dim(kept, start, rows)
        block = jax.lax.bitcast_convert_type(block, head.dtype).astype(dtype)
        if to_logits:
            return jax.lax.dynamic_update_slice_in_dim(out, multiply(left, block), start, axis=-1)
        part = jax.lax.dynamic_slice_in_dim(left, start, rows, axis=-1)
        return out + multiply(jnp.where(start + jnp.arange(rows) < i * rows, 0, part), block)

    blank = jnp.zeros((*left.shape[:-1], V if to_logits else D), jnp.float32)
    return jax.lax.fori_loop(0, blocks, body, vocabulary.like_varying(blank, left, head))
