"""Whether two predictions differ in what they put first: metrics, without a useful gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsp.losses.checks import Logits, Losses, Mask, check_count, prepare
from jaxsp.losses.likelihood import AnswerLogits, AnswerLosses, AnswerMask
from jaxsp.typing import Array


def zero_one(teacher_logits: Logits, student_logits: Logits, mask: Mask = None) -> Losses:
    r"""0/1 loss: do teacher and student put different tokens first?

    .. math:: 1[\arg\max_v p_v \ne \arg\max_v q_v]

    It is piecewise constant in the logits: its gradient is 0 almost everywhere, so it measures and
    does not train. Of tied tokens the lowest id comes first.

    Args:
      teacher_logits: ``[*b, t, v]``.
      student_logits: ``[*b, t, v]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.

    Returns:
      ``[*b, t]`` float32: 1 where they differ, 0 where they agree or the mask is False.

    Raises:
      ValueError: shapes or dtypes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> zero_one(jnp.array([[2.0, 1.0]]), jnp.array([[9.0, 0.0]]))
      Array([0.], dtype=float32)

    Reference:
      Xiao & Zhu 2025, Foundations of Large Language Models, ch. 3 (arXiv:2501.09223).
    """
    mask, teacher, student = prepare(mask, teacher_logits=teacher_logits, student_logits=student_logits)
    differ = jnp.argmax(teacher, axis=-1) != jnp.argmax(student, axis=-1)
    return _measured(differ, teacher, student, mask)


def topk_mismatch(teacher_logits: Logits, student_logits: Logits, mask: Mask = None, *, k: int = 5) -> Losses:
    r"""Top-k error: is the teacher's first token not among the student's k first?

    .. math:: 1[\arg\max_v p_v \notin \text{top}_k(q)]

    ``zero_one`` at k = 1; a larger k forgives near misses. Of tied tokens the lowest id comes first.

    Args:
      teacher_logits: ``[*b, t, v]``.
      student_logits: ``[*b, t, v]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      k: number of the student's tokens that will do.

    Returns:
      ``[*b, t]`` float32: 1 where it is not, 0 where it is or the mask is False.

    Raises:
      ValueError: shapes or dtypes don't fit, or k < 1.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher, student = jnp.array([[3.0, 2.0, 1.0]]), jnp.array([[2.0, 3.0, 1.0]])
      >>> topk_mismatch(teacher, student, k=1), topk_mismatch(teacher, student, k=2)
      (Array([1.], dtype=float32), Array([0.], dtype=float32))

    Reference:
      Top-5 error: Russakovsky et al. 2014, ImageNet challenge (arXiv:1409.0575).
    """
    check_count("k", k)
    mask, teacher, student = prepare(mask, teacher_logits=teacher_logits, student_logits=student_logits)
    first = jnp.argmax(teacher, axis=-1)[..., None]
    its_logit = jnp.take_along_axis(student, first, axis=-1)
    ids = jnp.arange(student.shape[-1])
    ahead = (student > its_logit) | ((student == its_logit) & (ids < first))
    return _measured(jnp.sum(ahead, axis=-1) >= k, teacher, student, mask)


def sequence_mismatch(
    teacher_logits: AnswerLogits, student_logits: AnswerLogits, mask: AnswerMask = None
) -> AnswerLosses:
    r"""0/1 loss of whole answers: do the two put different tokens first at any position?

    .. math:: \max_t 1[\arg\max_v p_{tv} \ne \arg\max_v q_{tv}]

    If the answer read is the teacher's own greedy one, up to its end-of-turn token, this is whether
    the student's own greedy answer differs from it: both take the same tokens until the first mismatch.

    Args:
      teacher_logits: ``[*b, t, v]``.
      student_logits: ``[*b, t, v]``.
      mask: ``[*b, t]``, True at the answer's tokens; all if ``None``.

    Returns:
      ``[*b]`` float32: 1 where the answers differ, else 0.

    Raises:
      ValueError: shapes or dtypes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher, student = jnp.array([[2.0, 1.0], [2.0, 1.0]]), jnp.array([[2.0, 1.0], [0.0, 1.0]])
      >>> sequence_mismatch(teacher, student)
      Array(1., dtype=float32)

    Reference:
      Xiao & Zhu 2025, Foundations of Large Language Models, ch. 3 (arXiv:2501.09223).
    """
    return jnp.max(zero_one(teacher_logits, student_logits, mask), axis=-1, initial=0.0)


def rank_agreement(
    teacher_logits: Logits, student_logits: Logits, mask: Mask = None, *, n: int = 10
) -> Losses:
    r"""Does the student keep the order of the teacher's n best tokens? Kendall's τ over their pairs.

    .. math:: \frac{\#\text{pairs in the same order} - \#\text{pairs in the opposite order}}{\#\text{pairs}}

    Pairs that the teacher ties don't count, nor do tokens that it bans; pairs that only the student
    ties count 0.

    Args:
      teacher_logits: ``[*b, t, v]``.
      student_logits: ``[*b, t, v]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      n: number of tokens; all v if there are fewer.

    Returns:
      ``[*b, t]`` float32, from -1 (reversed) to 1 (the same order, or no pair to compare); 0 where the
      mask is False.

    Raises:
      ValueError: shapes or dtypes don't fit, or n < 1.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher, student = jnp.array([[3.0, 2.0, 1.0, 0.0]]), jnp.array([[3.0, 1.0, 2.0, 9.0]])
      >>> rank_agreement(teacher, student, n=3).round(4)
      Array([0.3333], dtype=float32)

    Reference:
      Kendall 1938, A New Measure of Rank Correlation (doi:10.1093/biomet/30.1-2.81).
    """
    check_count("n", n)
    mask, teacher, student = prepare(mask, teacher_logits=teacher_logits, student_logits=student_logits)
    best, ids = jax.lax.top_k(teacher, min(n, teacher.shape[-1]))
    theirs = jnp.take_along_axis(student, ids, axis=-1)
    better, worse = best[..., :, None], best[..., None, :]
    apart = (better > worse) & (worse > -jnp.inf)  # each pair once, and no token that is banned
    same = theirs[..., :, None] > theirs[..., None, :]
    opposite = theirs[..., :, None] < theirs[..., None, :]
    pairs = jnp.sum(apart, axis=(-2, -1))
    score = jnp.sum(apart * (same.astype(jnp.float32) - opposite), axis=(-2, -1))
    agreement = jnp.where(pairs > 0, score / jnp.maximum(pairs, 1), 1.0)
    return _measured(agreement, teacher, student, mask)


def _measured(values: Array, teacher: Array, student: Array, mask: Array) -> Array:
    """The values, but NaN where a side has a NaN: comparing it would pass for agreement."""
    broken = jnp.any(jnp.isnan(teacher) | jnp.isnan(student), axis=-1)
    values = jnp.where(broken, jnp.nan, values.astype(jnp.float32))
    return jnp.where(mask, values, 0.0)
