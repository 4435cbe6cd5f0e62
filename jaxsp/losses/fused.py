"""Any objective straight from hidden states: logits exist for one chunk of positions at a time.

With a frozen head the gradient with respect to the hidden states is formed in the forward pass, chunk by
chunk (``chunked_head.py``): nothing of shape ``[b, t, v]`` ever exists, and nothing is computed twice. The
idea is Liger Kernel's (Hsu et al. 2024, arXiv:2410.10989). A ``custom_vjp`` has no forward mode: use
``jax.grad`` or ``jax.vjp``. Products with the Hessian are ``jax.jvp`` of ``jax.grad``. ``jax.grad`` of
``jax.grad`` works where no chunk may be left out, without mask and weights; else jax says that it can't
reverse a loop.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from jaxsp.losses import checks, chunked_head, vocabulary
from jaxsp.losses.checks import Hidden, Losses, Mask, Number, Tokens, Weights
from jaxsp.losses.chunked_head import ChunkSettings, evaluate
from jaxsp.losses.objective import TEACHER_TOPK, Objective, no_option
from jaxsp.losses.objectives import parse
from jaxsp.losses.topk import TOPK, TopKAndTail, topk_and_tail
from jaxsp.typing import AnyArray, Array, Float, Int


def fused_kl_divergence(
    teacher_hidden: Float[AnyArray, "*t e"],
    student_hidden: Hidden,
    unembedding: Float[AnyArray, "v d"],
    mask: Mask = None,
    *,
    temperature: Number = 1.0,
    **more: Any,
) -> Losses:
    r"""``kl_divergence`` of the heads' distributions, without their logits in memory.

    .. math:: KL(\text{softmax}(W h^c / \tau) \,\|\, \text{softmax}(W h^\sigma / \tau)),\qquad
              \frac{\partial}{\partial h^\sigma} = \frac{1}{\tau} (q - p)^\top W

    Args:
      teacher_hidden: last hidden states ``[*b, t, e]``; no gradient flows to them. With one head, e is d.
      student_hidden: last hidden states ``[*b, t, d]``.
      unembedding: the head ``[v, d]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      temperature: both sides' logits are divided by it.
      **more: any other argument of ``fused_objective`` but ``metrics``.

    Returns:
      ``[*b, t]`` float32, in nats; exactly 0, with zero gradient, where the mask is False.

    Raises:
      ValueError: shapes or dtypes don't fit, a number is out of its range, or there are metrics.

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
    more |= {"teacher_hidden": teacher_hidden, "temperature": temperature}
    return _values("kl", student_hidden, unembedding, mask, **more)


def fused_negative_log_likelihood(
    student_hidden: Hidden,
    targets: Tokens,
    unembedding: Float[AnyArray, "v d"],
    mask: Mask = None,
    *,
    label_smoothing: Number = 0.0,
    **more: Any,
) -> Losses:
    r"""``negative_log_likelihood`` under the head's distribution, without its logits in memory.

    .. math:: -\log \text{softmax}(W h)_{\hat y},\qquad
              \frac{\partial}{\partial h} = (q - e_{\hat y})^\top W

    Args:
      student_hidden: last hidden states ``[*b, t, d]``.
      targets: ``[*b, t]`` token ids in ``[0, v)``; under a False mask any number will do. Of labels with -100
        where none counts, the mask is ``labels != -100``.
      unembedding: the head ``[v, d]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      label_smoothing: the share of the target spread evenly over the vocabulary.
      **more: any other argument of ``fused_objective`` but ``metrics``.

    Returns:
      ``[*b, t]`` float32, in nats; exactly 0, with zero gradient, where the mask is False.

    Raises:
      ValueError: shapes, dtypes or ids don't fit, a number is out of its range, or there are metrics.

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
    more |= {"targets": targets, "label_smoothing": label_smoothing}
    return _values("nll", student_hidden, unembedding, mask, **more)


def _values(objective: str, /, *arrays: Any, metrics: Any = (), **more: Any) -> Losses:
    if metrics is not None and len(metrics):
        raise ValueError(
            "This function returns no metrics: give metrics= to"
            f" fused_objective({objective!r}, ..., metrics=...)."
        )
    return fused_objective(objective, *arrays, **more)[0]


def fused_objective(
    objective: str | Objective,
    student_hidden: Hidden,
    unembedding: Float[AnyArray, "v d"],
    mask: Mask = None,
    *,
    teacher_hidden: Float[AnyArray, "*t e"] | None = None,
    teacher_unembedding: Float[AnyArray, "v e"] | None = None,
    teacher_softcap: float | None = None,
    targets: Tokens | None = None,
    teacher_log_probs: Float[AnyArray, "*t k"] | None = None,
    teacher_ids: Int[AnyArray, "*t k"] | None = None,
    teacher_tail: Float[AnyArray, "*t"] | None = None,
    weights: Weights = None,
    metrics: Sequence[str | Objective] = (),
    softcap: float | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
    head_gradient: bool = False,
    **options: Number,
) -> tuple[Losses, dict[str, Losses]]:
    """Any objective of the table, or a mixture, and any metrics beside it, in one pass over chunks.

    Args:
      objective: a text that ``parse`` reads, or an ``Objective``. It sees chunks of positions, ``[n, v]``.
      student_hidden: last hidden states ``[*b, t, d]``; the gradient flows to them. With a logit scale, these
        times the scale; with a bias of the head, ``[h, 1]`` of width d + 1.
      unembedding: the head ``[v, d]``; with a bias, ``[W, bias]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``. Chunks of others are not computed.
      teacher_hidden: the teacher's last hidden states; no gradient flows to them.
      teacher_unembedding: the teacher's head ``[v, e]``, if it is another one.
      teacher_softcap: softcap of the teacher's logits, ``inf`` for none; by default ``softcap``.
      targets: ``[*b, t]`` gold tokens.
      teacher_log_probs: ``[*b, t, k]``, see ``topk_kl_divergence``; by default from ``teacher_hidden``.
      teacher_ids: ``[*b, t, k]``.
      teacher_tail: ``[*b, t]``, probability of all others; by default what these leave of 1.
      weights: of positions ``[*b, t]`` or of sequences ``[*b]``: what all values are multiplied by. Where it
        is 0 nothing is computed. The mean is then the sum of the values over that of the weights.
      metrics: further objectives to evaluate on the same logits, without a gradient.
      softcap: logits are c·tanh(x / c), on both sides if there is no ``teacher_softcap`` (Gemma 2).
      chunk_size: positions at a time, on all devices together; by default as many as fit a budget, 256 MiB on
        a CPU, else 1 GiB: of each device, where it is known that they share the rows. On a mesh of Auto axes
        jit does not know that: give as many times the size for one.
      axis_name: the mapped axis over which the rows of the heads are sharded, in order and evenly. Objectives
        with that argument (KL, JS, likelihood ...) reduce over it; for others a chunk's logits are gathered.
      head_gradient: whether the head is trained, or tied to what is; each chunk's logits are computed twice.
      **options: numbers of the objective, as ``temperature`` and ``beta``; they may be traced. A mixture's go
        to all terms that have them.

    Returns:
      The objective's values ``[*b, t]``, float32, exactly 0 with zero gradient where the mask is False,
      and the metrics', by text. Of second derivatives ``jax.jvp`` of ``jax.grad`` works always.

    Raises:
      ValueError: something needed is missing, shapes or dtypes don't fit, or a number is out of range.

    Example:
      >>> import jax
      >>> teacher, student, head = (jax.random.normal(jax.random.key(i), (3, 4)) for i in range(3))
      >>> values, measured = fused_objective(
      ...     "js", student, head, teacher_hidden=teacher, metrics=("zero_one",), beta=0.3)
      >>> values.shape, list(measured)
      ((3,), ['zero_one'])

    Reference:
      Hsu et al. 2024, Liger Kernel (arXiv:2410.10989), here for any objective.
    """
    entry, measures, traced = _entries(objective, metrics, options)
    entries = entry, *dict(measures).values()
    best = {"teacher_log_probs": teacher_log_probs, "teacher_ids": teacher_ids, "teacher_tail": teacher_tail}
    optional = {"teacher_hidden": teacher_hidden, "targets": targets, **best}
    tokens = checks.check_heads(student_hidden, unembedding, teacher_hidden, teacher_unembedding)
    each = _checked(optional, student_hidden.shape[:-1], mask, tokens * vocabulary.shards(axis_name), entries)
    if weights is not None:
        weights = checks.weights_of(weights, each["live"].shape)
        each["live"] &= weights != 0
    given: dict[str, Any] = {"each": each, "options": traced}
    if teacher_unembedding is not None:
        given["teacher_head"] = jnp.asarray(teacher_unembedding)
    # What is the same on devices whose positions are not gets the sum of their gradients.
    student, head = (vocabulary.like_varying(x, *each.values()) for x in (student_hidden, unembedding))
    all_live = mask is None and weights is None
    gathered = axis_name is not None and not all(entry.sums_over_shards for entry in entries)
    tokens *= vocabulary.shards(axis_name if gathered else None)
    how = {"masked": not all_live, "metrics": len(measures), "closed": entry.sums_over_shards}
    size, softcaps = _size(chunk_size, student, tokens, **how), _softcaps(softcap, teacher_softcap)
    static = size, all_live, softcaps, axis_name, gathered, head_gradient, _read_once(given, student)
    settings = ChunkSettings(entry, measures, *static)
    found = vocabulary.on_auto_axes(functools.partial(evaluate, settings), student, student, head, given)
    return _in_order(found, measures, each["live"], weights)


def fused_topk(
    hidden: Hidden,
    unembedding: Float[AnyArray, "v d"],
    mask: Mask = None,
    *,
    k: int = TOPK,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> TopKAndTail:
    r"""The k most likely tokens of each position, their log-probabilities, and the probability of all others.

    .. math:: p = \text{softmax}(W h),\qquad p_{tail} = \sum_{v \notin K} p_v

    The tail is summed over the others themselves: what the k leave of 1 is lost to rounding where it is
    small. A chunk of positions at a time has logits; where no position of it counts, it is not computed.

    Args:
      hidden: last hidden states ``[*b, t, d]``.
      unembedding: the head ``[v, d]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      k: number of tokens; all v if there are fewer.
      softcap: logits are :math:`c \tanh(x / c)` (Gemma 2).
      chunk_size: positions at a time; by default as many as fit a budget (256 MiB on a CPU, else 1 GiB).

    Returns:
      ``TopKAndTail(log_probs, ids, tail)``: float32 and int32 ``[*b, t, k]``, best first, ties by id, and
      float32 ``[*b, t]``; all 0 where the mask is False.

    Raises:
      ValueError: shapes or dtypes don't fit, or a number is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> head = jnp.log(jnp.array([[0.1], [0.6], [0.3]]))
      >>> best = fused_topk(jnp.ones((1, 1)), head, k=2)
      >>> best.ids, [f"{p:.2f}" for p in jnp.exp(best.log_probs)[0]], f"{best.tail[0]:.2f}"
      (Array([[1, 2]], dtype=int32), ['0.60', '0.30'], '0.10')

    Reference:
      Hsu et al. 2024, Liger Kernel (arXiv:2410.10989), here for what a teacher's store keeps.
    """
    tokens = checks.check_head("hidden", hidden, "unembedding", unembedding)
    checks.check_count("k", k)
    states = jnp.asarray(hidden)
    live = checks.check_mask(mask, hidden.shape[:-1])
    size = _size(chunk_size, states, tokens, masked=mask is not None)
    static = {"k": k, "softcap": _softcaps(softcap)[0], "size": size, "all_live": mask is None}
    find = functools.partial(_best, **static)
    return TopKAndTail(*vocabulary.on_auto_axes(find, states, states, live, jnp.asarray(unembedding)))


@functools.partial(jax.jit, static_argnames=("k", "softcap", "size", "all_live"))
def _best(
    hidden: Array, live: Array, head: Array, *, k: int, softcap: float | None, size: int, all_live: bool
) -> TopKAndTail:
    def one(chunk: dict[str, Array]) -> tuple[TopKAndTail, None]:
        live = chunk["live"]
        raw = chunked_head.raw_logits(chunk["hidden"], head, live)
        best, ids, tail = topk_and_tail(chunked_head.capped(softcap, raw), k)
        best, ids = (jnp.where(live[..., None], x, 0) for x in (best, ids))
        return TopKAndTail(best, ids, jnp.where(live, tail, 0)), None

    arrays = {"hidden": hidden, "live": live}
    return chunked_head.chunked(one, arrays, size, all_live=all_live, reads=([head], []))[0]


Measures = tuple[tuple[str, Objective], ...]


def _entries(
    objective: str | Objective, metrics: Sequence[str | Objective], options: dict[str, Any]
) -> tuple[Objective, Measures, dict[str, Array]]:
    """The objective with the options that are known, the metrics, and the other options."""
    known = {name: value for name, value in options.items() if not isinstance(value, jax.core.Tracer)}
    entry, *others = (parse(one) if isinstance(one, str) else one for one in (objective, *metrics))
    measures = tuple((str(name), other) for name, other in zip(metrics, others, strict=True))
    traced = {name: value for name, value in options.items() if name not in known}
    for name in traced.keys() - entry.known_options.keys():
        raise no_option(entry, name, entry.known_options)
    return entry.with_options(**known), measures, traced


def _checked(
    optional: dict[str, Any], batch: tuple[int, ...], mask: Mask, tokens: int, entries: Sequence[Objective]
) -> dict[str, Array]:
    """Checks what is given for each position; gives it, and as ``live`` which positions count."""
    each = {name: jnp.asarray(array) for name, array in optional.items() if array is not None}
    each["live"] = checks.check_mask(mask, batch)
    checks.check_given(each, each["live"], tokens)
    made = () if any(name in each for name in TEACHER_TOPK) else TEACHER_TOPK  # of teacher_hidden
    for name in (name for entry in entries for name in entry.inputs if not name.startswith("student")):
        source = "teacher_hidden" if name in ("teacher_logits", *made) else name
        if source not in each:
            raise ValueError(f"This objective needs {source}; it was not given.")
    return each


def _read_once(given: dict[str, Any], student: Array) -> bool:
    """Whether the head is read once for both sides: an accelerator waits for it."""
    teacher = None if "teacher_head" in given else given["each"].get("teacher_hidden")
    return teacher is not None and teacher.dtype == student.dtype and not chunked_head.is_cpu()


def _size(size: int | None, states: Array, tokens: int, **how: Any) -> int:
    positions = math.prod(states.shape[:-1])
    if size is None:
        return chunked_head.chunk_size(positions, tokens, shards=vocabulary.parts(states), **how)
    checks.check_count("chunk_size", size)
    return size


def _in_order(found: Any, metrics: Measures, live: Array, weights: Array | None) -> Any:
    """The values and the metrics, in the order in which they were asked for, times the weights."""
    if weights is not None:
        found = jax.tree.map(lambda x: jnp.where(live, x * weights, 0.0), found)
    return found[0], {name: found[1][name] for name, _ in metrics}


def _softcaps(own: float | None, teacher: float | None = None) -> tuple[float | None, float | None]:
    """The teacher's softcap and the student's; ``None`` for none, as the teacher's infinite one is."""
    own = None if own is None else checks.positive("softcap", checks.number("softcap", own))
    if teacher is None:
        return own, own
    teacher = checks.number("teacher_softcap", teacher)
    return None if teacher == math.inf else checks.positive("teacher_softcap", teacher), own
