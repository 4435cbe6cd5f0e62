"""Likelihood of given tokens under the student, in nats."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsp.losses.checks import check_logits, check_mask, check_targets
from jaxsp.typing import Array, Bool, Float, Int


def negative_log_likelihood(
    student_logits: Float[Array, "*b t v"],
    targets: Int[Array, "*b t"],
    mask: Bool[Array, "*b t"] | None = None,
) -> Float[Array, "*b t"]:
    r"""How surprised the student is by each token of the gold answer.

    .. math:: -\log p(\hat y_t \mid \sigma, z, \hat y_{<t})

    Args:
      student_logits: ``[*b, t, v]``, any float dtype.
      targets: ``[*b, t]`` token ids in ``[0, v)``; under a False mask any number will do.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.

    Returns:
      ``[*b, t]`` float32, in nats; exactly 0 with zero gradient where the mask is False.

    Raises:
      ValueError: shapes or dtypes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
      >>> negative_log_likelihood(logits, jnp.array([0])).round(4)
      Array([0.5108], dtype=float32)

    Reference:
      Xiao & Zhu 2025, Foundations of Large Language Models, ch. 3 (soft prompts as compressed
      context, arXiv:2501.09223).
    """
    check_logits(student_logits=student_logits)
    check_targets(targets, student_logits.shape[:-1])
    mask = check_mask(mask, targets.shape)
    logits = jnp.where(mask[..., None], student_logits.astype(jnp.float32), 0.0)
    ids = jnp.where(mask, targets, 0)
    chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)
