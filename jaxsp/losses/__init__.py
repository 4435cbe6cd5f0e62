"""Losses between a full-context distribution and a soft-prompted one: pure functions of arrays.

Import them on their own: ``from jaxsp import losses`` loads jax, and neither flax nor transformers.
Each returns unreduced float32 ``[*b, t]``; reduce once, last, with ``masked_mean``.
"""

from jaxsp.losses.divergence import js_divergence, kl_divergence, reverse_kl_divergence
from jaxsp.losses.likelihood import negative_log_likelihood
from jaxsp.losses.mismatch import zero_one
from jaxsp.losses.objectives import OBJECTIVES, Objective, trainable
from jaxsp.losses.reduce import Total, masked_mean, masked_sum, merge

__all__ = [
    "OBJECTIVES",
    "Objective",
    "Total",
    "js_divergence",
    "kl_divergence",
    "masked_mean",
    "masked_sum",
    "merge",
    "negative_log_likelihood",
    "reverse_kl_divergence",
    "trainable",
    "zero_one",
]
