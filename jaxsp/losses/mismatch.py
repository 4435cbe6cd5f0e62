"""Whether two predictions differ: metrics, without a useful gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsp.losses.checks import check_logits, check_mask
from jaxsp.typing import Array, Bool, Float


def zero_one(
    teacher_logits: Float[Array, "*b t v"],
    student_logits: Float[Array, "*b t v"],
    mask: Bool[Array, "*b t"] | None = None,
) -> Float[Array, "*b t"]:
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
    check_logits(teacher_logits=teacher_logits, student_logits=student_logits)
    mask = check_mask(mask, student_logits.shape[:-1])
    teacher, student = (
        jnp.argmax(jax.lax.stop_gradient(logits), axis=-1)
        for logits in (teacher_logits, student_logits)
    )
    return jnp.where(mask, (teacher != student).astype(jnp.float32), 0.0)
