"""Any objective straight from hidden states: logits exist for one chunk of positions at a time.

With a frozen head the loss of a position depends on that position's hidden state alone. So its
gradient with respect to the hidden state is formed in the forward pass, while the chunk's logits are
at hand, and the backward pass only scales it: nothing of shape ``[b, t, v]`` ever exists, and nothing is
computed twice. Live positions are taken first, and chunks that hold none are not computed. The gradient
in the forward pass is the idea of Liger Kernel (Hsu et al. 2024, arXiv:2410.10989). A ``custom_vjp`` has
no forward mode: use ``jax.grad`` or ``jax.vjp``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxsp.losses import vocabulary
from jaxsp.losses.checks import (
    check_count,
    check_floating,
    check_ids,
    check_mask,
    check_positive,
    number,
)
from jaxsp.losses.objectives import OBJECTIVES, Objective, named
from jaxsp.losses.vocabulary import RULES

if TYPE_CHECKING:
    from jaxsp.typing import Array, Bool, Float, Int

# Bytes that the arrays over one chunk's logits may take. An accelerator needs long chunks to be kept
# busy: each reads the whole head from memory.
_BUDGET = {"cpu": 2**28}
_ACCELERATOR_BUDGET = 2**30
_ARRAYS = 6  # of the size of the logits, float32, when an objective is differentiated


def fused_kl_divergence(
    teacher_hidden: Float[Array, "*b t d"],
    student_hidden: Float[Array, "*b t d"],
    unembedding: Float[Array, "v d"],
    mask: Bool[Array, "*b t"] | None = None,
    *,
    temperature: float = 1.0,
    teacher_unembedding: Float[Array, "v e"] | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "*b t"]:
    r"""``kl_divergence`` of the heads' distributions, without their logits in memory.

    .. math:: KL(\text{softmax}(W h^c / \tau) \,\|\, \text{softmax}(W h^\sigma / \tau)),\qquad
              \frac{\partial}{\partial h^\sigma} = \frac{1}{\tau} (q - p)^\top W

    Args:
      teacher_hidden: last hidden states ``[*b, t, d]``; no gradient flows to them.
      student_hidden: last hidden states ``[*b, t, d]``.
      unembedding: the frozen head ``[v, d]``; no gradient flows to it.
      mask: ``[*b, t]``, True where a position counts; all if ``None``. Chunks of others are not computed.
      temperature: both sides' logits are divided by it.
      teacher_unembedding: the teacher's head ``[v, e]``, if it is another one.
      softcap: logits are :math:`c \tanh(x / c)`, on both sides (Gemma 2).
      chunk_size: positions at a time; by default as many as fit a budget (256 MiB on a CPU, else 1 GiB).
      axis_name: of the mapped axis over which the rows of the heads are sharded, in order.

    Returns:
      ``[*b, t]`` float32, in nats; exactly 0, with zero gradient, where the mask is False.

    Raises:
      ValueError: shapes or dtypes don't fit, or a number is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> teacher, student, head = (jax.random.normal(jax.random.key(i), (3, 4)) for i in range(3))
      >>> fused = fused_kl_divergence(teacher, student, head)
      >>> from jaxsp.losses import kl_divergence
      >>> bool(jnp.allclose(fused, kl_divergence(teacher @ head.T, student @ head.T), atol=1e-6))
      True

    Reference:
      Hinton et al. 2015 (arXiv:1503.02531); the fusion: Hsu et al. 2024 (arXiv:2410.10989).
    """
    options = (("temperature", number(temperature=temperature)),)
    kl = dataclasses.replace(OBJECTIVES["kl"], options=options)
    return fused_objective(
        kl,
        student_hidden,
        unembedding,
        mask,
        teacher_hidden=teacher_hidden,
        teacher_unembedding=teacher_unembedding,
        softcap=softcap,
        chunk_size=chunk_size,
        axis_name=axis_name,
    )[0]


def fused_negative_log_likelihood(
    student_hidden: Float[Array, "*b t d"],
    targets: Int[Array, "*b t"],
    unembedding: Float[Array, "v d"],
    mask: Bool[Array, "*b t"] | None = None,
    *,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "*b t"]:
    r"""``negative_log_likelihood`` under the head's distribution, without its logits in memory.

    .. math:: -\log \text{softmax}(W h)_{\hat y},\qquad
              \frac{\partial}{\partial h} = (q - e_{\hat y})^\top W

    Args:
      student_hidden: last hidden states ``[*b, t, d]``.
      targets: ``[*b, t]`` token ids in ``[0, v)``; under a False mask any number will do.
      unembedding: the frozen head ``[v, d]``; no gradient flows to it.
      mask: ``[*b, t]``, True where a position counts; all if ``None``. Chunks of others are not computed.
      label_smoothing: the share of the target spread evenly over the vocabulary.
      softcap: logits are :math:`c \tanh(x / c)` (Gemma 2).
      chunk_size: positions at a time; by default as many as fit a budget (256 MiB on a CPU, else 1 GiB).
      axis_name: of the mapped axis over which the rows of the head are sharded, in order.

    Returns:
      ``[*b, t]`` float32, in nats; exactly 0, with zero gradient, where the mask is False.

    Raises:
      ValueError: shapes, dtypes or ids don't fit, or a number is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> student, head = (jax.random.normal(jax.random.key(i), (3, 4)) for i in range(2))
      >>> targets = jnp.array([0, 2, 1])
      >>> fused = fused_negative_log_likelihood(student, targets, head)
      >>> from jaxsp.losses import negative_log_likelihood
      >>> bool(jnp.allclose(fused, negative_log_likelihood(student @ head.T, targets), atol=1e-6))
      True

    Reference:
      Hsu et al. 2024, Liger Kernel (arXiv:2410.10989).
    """
    options = (("label_smoothing", number(label_smoothing=label_smoothing)),)
    nll = dataclasses.replace(OBJECTIVES["nll"], options=options)
    return fused_objective(
        nll,
        student_hidden,
        unembedding,
        mask,
        targets=targets,
        softcap=softcap,
        chunk_size=chunk_size,
        axis_name=axis_name,
    )[0]


def fused_objective(
    objective: str | Objective,
    student_hidden: Float[Array, "*b t d"],
    unembedding: Float[Array, "v d"],
    mask: Bool[Array, "*b t"] | None = None,
    *,
    teacher_hidden: Float[Array, "*b t e"] | None = None,
    teacher_unembedding: Float[Array, "v e"] | None = None,
    targets: Int[Array, "*b t"] | None = None,
    teacher_log_probs: Float[Array, "*b t k"] | None = None,
    teacher_ids: Int[Array, "*b t k"] | None = None,
    metrics: Sequence[str] = (),
    softcap: float | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "*b t"], dict[str, Float[Array, "*b t"]]]:
    """Any objective of the table, or a mixture, and any metrics beside it, in one pass over chunks.

    Args:
      objective: a key of ``OBJECTIVES``, or an ``Objective``. Its gradient flows to ``student_hidden``.
      student_hidden: last hidden states ``[*b, t, d]``.
      unembedding: the frozen head ``[v, d]``; no gradient flows to it.
      mask: ``[*b, t]``, True where a position counts; all if ``None``. Chunks of others are not computed.
      teacher_hidden: the teacher's last hidden states; no gradient flows to them.
      teacher_unembedding: the teacher's head ``[v, e]``, if it is another one.
      targets: ``[*b, t]`` gold tokens.
      teacher_log_probs: ``[*b, t, k]``, see ``topk_kl_divergence``; by default from ``teacher_hidden``.
      teacher_ids: ``[*b, t, k]``.
      metrics: names of further objectives to evaluate on the same logits, without a gradient.
      softcap: logits are c·tanh(x / c), on both sides (Gemma 2).
      chunk_size: positions at a time; by default as many as fit a budget (256 MiB on a CPU, else 1 GiB).
      axis_name: of the mapped axis over which the rows of the heads are sharded, in order and evenly. The KL
        divergence and the likelihood then reduce over it; for others each chunk's logits are gathered.

    Returns:
      The objective's values ``[*b, t]``, float32, exactly 0 with zero gradient where the mask is False;
      and the metrics', by name.

    Raises:
      ValueError: something needed is missing, shapes or dtypes don't fit, or a number is out of range.

    Example:
      >>> import jax
      >>> teacher, student, head = (jax.random.normal(jax.random.key(i), (3, 4)) for i in range(3))
      >>> values, measured = fused_objective(
      ...     "js", student, head, teacher_hidden=teacher, metrics=("zero_one",))
      >>> values.shape, list(measured)
      ((3,), ['zero_one'])

    Reference:
      Hsu et al. 2024, Liger Kernel (arXiv:2410.10989), here for any objective.
    """
    if isinstance(objective, str):
        objective = named(objective)
    measures = tuple((name, named(name)) for name in metrics)
    batch = student_hidden.shape[:-1]
    teacher_head = unembedding if teacher_unembedding is None else teacher_unembedding
    tokens = _checked_head("student_hidden", student_hidden, "unembedding", unembedding)
    if teacher_hidden is not None:
        name = "unembedding" if teacher_unembedding is None else "teacher_unembedding"
        if _checked_head("teacher_hidden", teacher_hidden, name, teacher_head) != tokens:
            raise ValueError(
                f"unembedding has {tokens} rows and teacher_unembedding {teacher_head.shape[0]};"
                " teacher and student must share the vocabulary."
            )
        if teacher_hidden.shape[:-1] != batch:
            raise ValueError(
                f"teacher_hidden must have shape {[*batch, 'd']}, not {list(teacher_hidden.shape)}."
            )
    if softcap is not None:
        softcap = number(softcap=softcap)
        check_positive(softcap=softcap)
    if chunk_size is not None:
        check_count(chunk_size=chunk_size)
    live = check_mask(mask, batch)
    if targets is not None:
        check_ids(targets, batch, tokens * vocabulary.shards(axis_name), live)
    if teacher_ids is not None and teacher_log_probs is not None:
        for name, entries in (
            ("teacher_log_probs", teacher_log_probs),
            ("teacher_ids", teacher_ids),
        ):
            if entries.shape[:-1] != batch:
                raise ValueError(
                    f"{name} must have shape {[*batch, 'k']}, not {list(entries.shape)}."
                )
        there = live[..., None] & (teacher_log_probs != -jnp.inf)
        everyone = tokens * vocabulary.shards(axis_name)
        check_ids(teacher_ids, teacher_log_probs.shape, everyone, there, name="teacher_ids")
    own = axis_name is None or (_rule(objective) is not None and not measures)
    width = tokens if own else tokens * vocabulary.shards(axis_name)
    plan = _Plan(
        objective,
        measures,
        chunk_size or _chunk_size(math.prod(batch), width, masked=mask is not None),
        all_live=mask is None,
        softcap=softcap,
        axis_name=axis_name,
    )
    per_position = {
        "teacher_hidden": teacher_hidden,
        "targets": targets,
        "teacher_log_probs": teacher_log_probs,
        "teacher_ids": teacher_ids,
        "live": live,
    }
    for entry in (objective, *(entry for _, entry in measures)):
        _check_inputs(entry, per_position)
    per_position = {
        name: array.reshape(-1, *array.shape[len(batch) :])
        for name, array in per_position.items()
        if array is not None
    }
    flat = student_hidden.reshape(-1, student_hidden.shape[-1])
    flat = vocabulary.like_varying(flat, *per_position.values())
    results: Any = _fused(plan, flat, per_position, (teacher_head, unembedding))
    values, measured = results
    return values.reshape(batch), {name: measured[name].reshape(batch) for name in metrics}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that is static: equal plans compile once."""

    objective: Objective
    metrics: tuple[tuple[str, Objective], ...]
    chunk: int
    all_live: bool
    softcap: float | None
    axis_name: str | None

    def reads_teacher_logits(self, top_k_given: bool) -> bool:
        """Does any objective read them, or a top-k that must be taken from them?"""
        names = {"teacher_logits"} if top_k_given else {"teacher_logits", "teacher_ids"}
        entries = (self.objective, *(entry for _, entry in self.metrics))
        return any(names & set(entry.inputs) for entry in entries)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    plan: _Plan, hidden: Array, per_position: dict[str, Array], heads: tuple[Array, Array]
) -> tuple[Array, dict[str, Array]]:
    return _in_chunks(plan, hidden, per_position, heads, gradient=False)[0]


def _forward(plan: _Plan, hidden: Array, per_position: dict[str, Array], heads: Any):
    results, gradient = _in_chunks(plan, hidden, per_position, heads, gradient=True)
    return results, (gradient, per_position["live"])


def _backward(_: _Plan, saved: tuple[Array, Array], cotangents: tuple[Array, dict[str, Array]]):
    gradient, live = saved
    scaled = cotangents[0][:, None] * gradient.astype(jnp.float32)
    # A cotangent under the mask may be infinite (that of a square root at 0).
    return jnp.where(live[:, None], scaled, 0.0).astype(gradient.dtype), None, None


_fused.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames=("plan", "gradient"))
def _in_chunks(
    plan: _Plan,
    hidden: Array,
    per_position: dict[str, Array],
    heads: tuple[Array, Array],
    *,
    gradient: bool,
) -> tuple[tuple[Array, dict[str, Array]], Array | None]:
    """((values, metrics), gradient) of all positions, ``[N]`` and ``[N, D]``."""
    arrays = {"student_hidden": hidden, **per_position}
    one = functools.partial(_one_chunk, plan, heads, gradient=gradient)
    N, C = hidden.shape[0], plan.chunk
    if N <= C:
        return one(arrays)
    # Live positions first; chunks beyond the last of them are never computed.
    padding = -N % C
    live = per_position["live"]
    order = jnp.arange(N) if plan.all_live else jnp.argsort(~live, stable=True)
    order = jnp.pad(order, (0, padding))
    count = N if plan.all_live else jnp.sum(live)

    def body(i: Array, out: Any) -> Any:
        start = i * C
        index = jax.lax.dynamic_slice_in_dim(order, start, C)
        chunk = {name: jnp.take(array, index, axis=0) for name, array in arrays.items()}
        chunk["live"] &= start + jnp.arange(C) < N
        part = one(chunk)
        return jax.tree.map(
            lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, start, 0), out, part
        )

    shapes = jax.eval_shape(one, {name: array[:C] for name, array in arrays.items()})
    sources = list(arrays.values()) + (list(heads) if plan.axis_name is None else [])

    def blank(like: Any) -> Array:
        zeros = jnp.zeros((N + padding, *like.shape[1:]), like.dtype)
        return vocabulary.like_varying(zeros, *sources)

    out = jax.lax.fori_loop(0, -(-count // C), body, jax.tree.map(blank, shapes))
    if plan.all_live:
        return jax.tree.map(lambda a: a[:N], out)
    rank = jnp.zeros(N, jnp.int32).at[order[:N]].set(jnp.arange(N, dtype=jnp.int32))
    return jax.tree.map(lambda a: jnp.take(a, rank, axis=0), out)


def _one_chunk(
    plan: _Plan, heads: tuple[Array, Array], chunk: dict[str, Array], *, gradient: bool
) -> tuple[tuple[Array, dict[str, Array]], Array | None]:
    teacher_head, head = heads
    live = chunk["live"]
    given = {name: array for name, array in chunk.items() if name != "live"}
    student = given["student_hidden"]
    axis = plan.axis_name
    # Metrics of a sharded head want whole logits: then the objective may as well take them, too.
    rule = _rule(plan.objective) if axis is None or not plan.metrics else None

    def logits_of(hidden: Array, head: Array) -> Array:
        # A NaN under the mask must not reach the gradient. And on jax 0.10's CPU backend the product,
        # fused with the softmax's reduction for want of something between them, takes 1.5 times as long.
        raw = jnp.where(live[:, None], _project(hidden, head), 0)
        return raw if rule else vocabulary.gather(raw, axis)

    def cap(raw: Array) -> Array:
        return raw if plan.softcap is None else plan.softcap * jnp.tanh(raw / plan.softcap)

    if "teacher_hidden" in given and plan.reads_teacher_logits("teacher_ids" in given):
        given["teacher_logits"] = cap(logits_of(given["teacher_hidden"], teacher_head))
    given["student_logits"], uncap = jax.vjp(cap, logits_of(student, head))
    measured = {name: entry(mask=live, **given) for name, entry in plan.metrics}

    if rule:
        values, to_logits = rule(given, live, axis, **dict(plan.objective.options))
        to_hidden = jnp.zeros(student.shape, jnp.float32)
    else:

        def values_of(student_logits: Array, student_hidden: Array) -> Array:
            own = {"student_logits": student_logits, "student_hidden": student_hidden}
            return plan.objective(mask=live, **{**given, **own})

        values, pull = jax.vjp(values_of, given["student_logits"], student)
        to_logits, to_hidden = pull(jnp.ones_like(values))
    if not gradient:
        return (values, measured), None
    if "student_logits" in plan.objective.inputs:
        (to_raw,) = uncap(to_logits)
        to_raw = to_raw if rule else vocabulary.own_part(to_raw, head.shape[0], axis)
        to_hidden += vocabulary.total(_project_back(to_raw, head, student), axis)
    return (values, measured), to_hidden.astype(student.dtype)


def _rule(objective: Objective) -> Any:
    return RULES.get((objective.function, objective.inputs))


def _chunk_size(positions: int, tokens: int, *, masked: bool) -> int:
    budget = _BUDGET.get(jax.default_backend(), _ACCELERATOR_BUDGET)
    size = max(128, budget // (4 * _ARRAYS * tokens))  # each chunk reads the head: not too short
    if masked:  # the last chunk of live positions is computed whole: shorter ones waste less
        size = min(size, max(64, positions // 8))
    chunks = max(1, math.ceil(positions / size))
    return 16 * max(1, math.ceil(positions / chunks / 16))  # even, and a shape that hardware likes


def _project(hidden: Array, head: Array) -> Array:
    return _product("nd,vd->nv", hidden, head, hidden)


def _project_back(gradient: Array, head: Array, hidden: Array) -> Array:
    return _product("nv,vd->nd", gradient, head, hidden)


def _product(spec: str, left: Array, head: Array, hidden: Array) -> Array:
    dtype = jnp.promote_types(hidden.dtype, head.dtype)
    if dtype != jnp.bfloat16:  # a gradient of probabilities underflows in float16
        dtype = jnp.float32
    # Float32 at full precision, which accelerators don't give unasked; sums always in float32.
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    left, head = left.astype(dtype), head.astype(dtype)
    return jnp.einsum(spec, left, head, precision=precision, preferred_element_type=jnp.float32)


def _check_inputs(entry: Objective, given: dict[str, Array | None]) -> None:
    sources = {"teacher_logits": "teacher_hidden"}
    if given["teacher_ids"] is None and given["teacher_log_probs"] is None:
        sources |= {"teacher_ids": "teacher_hidden", "teacher_log_probs": "teacher_hidden"}
    for name in entry.inputs:
        source = sources.get(name, name)
        if not name.startswith("student") and given.get(source) is None:
            raise ValueError(f"This objective needs {source}; it was not given.")


def _checked_head(name: str, hidden: Array, head_name: str, head: Array) -> int:
    check_floating("d", **{name: hidden})
    if head.ndim != 2 or 0 in head.shape or not jnp.issubdtype(head.dtype, jnp.floating):
        raise ValueError(
            f"{head_name} must be floating [v, d], not {head.dtype} {list(head.shape)}."
        )
    if head.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name} has vectors of {hidden.shape[-1]} and {head_name} rows of {head.shape[1]}."
        )
    return head.shape[0]
