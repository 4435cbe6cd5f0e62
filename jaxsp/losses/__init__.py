"""Losses between a full-context distribution and a soft-prompted one: pure functions of arrays.

Import them on their own: ``from jaxsp import losses`` loads jax, and neither flax nor transformers.
Each returns unreduced float32 ``[*b, t]`` (whole-answer ones ``[*b]``); reduce once, last, with
``masked_mean``. ``OBJECTIVES`` is the table of them; the ``fused_`` ones start from hidden states.

The textbook cases, on one position where the full context gives the right answer (token 0) 60% and an
alternative (token 1) 30%:

>>> import jax, jax.numpy as jnp
>>> from jaxsp import losses
>>> teacher = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
>>> def descend(loss, steps=400):
...     logits, gradient = jnp.zeros((1, 3)), jax.jit(jax.grad(lambda x: loss(x).sum()))
...     for _ in range(steps):
...         logits -= gradient(logits)
...     return [round(float(p), 3) for p in jax.nn.softmax(logits)[0]]

Minimising the KL divergence keeps the teacher's uncertainty; maximising the likelihood of the right
answer makes it as sure as the steps allow; half of each ends between the two:

>>> descend(lambda x: losses.kl_divergence(teacher, x))
[0.6, 0.3, 0.1]
>>> gold = jnp.array([0])
>>> descend(lambda x: losses.negative_log_likelihood(x, gold))
[0.998, 0.001, 0.001]
>>> half = losses.mixture(kl=0.5, nll=0.5)
>>> descend(lambda x: half.cost(half(teacher_logits=teacher, student_logits=x, targets=gold)))
[0.8, 0.15, 0.05]

Two students with the same first token and very different distributions have the same 0/1 loss; and its
gradient is zero:

>>> close, far = jnp.log(jnp.array([[[0.6, 0.3, 0.1]], [[0.98, 0.01, 0.01]]]))
>>> losses.zero_one(teacher, close), losses.zero_one(teacher, far)
(Array([0.], dtype=float32), Array([0.], dtype=float32))
>>> losses.kl_divergence(teacher, far).round(2) - losses.kl_divergence(teacher, close)
Array([0.96], dtype=float32)
>>> jax.grad(lambda x: losses.zero_one(teacher, x).sum())(far)
Array([[0., 0., 0.]], dtype=float32)
"""

from jaxsp.losses.divergence import js_divergence, kl_divergence, reverse_kl_divergence, total_variation
from jaxsp.losses.fused import fused_kl_divergence, fused_negative_log_likelihood, fused_objective
from jaxsp.losses.fused_top_k import TopKAndTail, fused_top_k
from jaxsp.losses.likelihood import (
    candidate_scores,
    negative_log_likelihood,
    predict,
    sequence_log_likelihood,
)
from jaxsp.losses.mismatch import rank_agreement, sequence_mismatch, top_k_mismatch, zero_one
from jaxsp.losses.objectives import OBJECTIVES, Objective, as_objective, mixture, parse
from jaxsp.losses.reduce import Total, masked_mean, masked_sum, merge
from jaxsp.losses.similarity import cosine_similarity, distribution_cosine_similarity, hidden_mse
from jaxsp.losses.topk import TopK, top_k, topk_kl_divergence, truncated_kl_divergence
from jaxsp.losses.uncertainty import confidence_shift, entropy

__all__ = [
    "OBJECTIVES",
    "Objective",
    "TopK",
    "TopKAndTail",
    "Total",
    "as_objective",
    "candidate_scores",
    "confidence_shift",
    "cosine_similarity",
    "distribution_cosine_similarity",
    "entropy",
    "fused_kl_divergence",
    "fused_negative_log_likelihood",
    "fused_objective",
    "fused_top_k",
    "hidden_mse",
    "js_divergence",
    "kl_divergence",
    "masked_mean",
    "masked_sum",
    "merge",
    "mixture",
    "negative_log_likelihood",
    "parse",
    "predict",
    "rank_agreement",
    "reverse_kl_divergence",
    "sequence_log_likelihood",
    "sequence_mismatch",
    "top_k",
    "top_k_mismatch",
    "topk_kl_divergence",
    "total_variation",
    "truncated_kl_divergence",
    "zero_one",
]
