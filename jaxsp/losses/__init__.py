"""Losses between a teacher's and a student's predictions: pure functions of arrays, for any JAX trainer.

``from jaxsp import losses`` needs jax alone: beside it, ``pip install --no-deps jaxsp`` is enough. Functions
take logits ``[*b, t, v]`` of any float dtype (or those of one position, ``[v]``, as inside of ``jax.vmap``)
and return unreduced float32 ``[*b, t]`` in nats; whole-answer ones ``[*b]``. ``OBJECTIVES`` is the table of
all that can be trained on or measured, with options in text (``print`` it). The ``fused_`` functions start
from hidden states: logits exist for a few positions at a time.

Which for which wish
====================

====================================================  =================================================
the teacher's uncertainty and ranking kept            ``kl``; from its stored best tokens ``topk_kl``
only what the teacher finds likely                    ``reverse_kl``
something between these two                           ``js(beta=...)``, ``alpha(alpha=...)``
robust where the student bans what the teacher likes  ``js``, ``skewed_kl``
the gold answer certain                               ``nll``, with ``label_smoothing`` not quite
both                                                  ``kl=0.7,nll=0.3``, with ``temperature=2``
disagreements counted                                 ``zero_one``, ``topk_mismatch``: no gradient
a similarity made large                               ``cosine_similarity``, minimised by its ``.cost``
what other distillers train on, to compare with       ``truncated_kl``, ``renormalised_topk_kl``
====================================================  =================================================

The textbook cases, on one position where the teacher gives the right answer (token 0) 60% and an alternative
(token 1) 30%:

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

In a trainer
============

A complete step, on labels that are -100 where nothing counts. Sums and counts come first, one division last.
With rows on several devices inside of ``shard_map`` or ``pmap`` they are added up before it, by
``total = losses.Total(*jax.lax.psum(total, "data"))``; under ``jax.jit`` the mean is that of all by itself.

>>> def loss(weights, head, teacher_hidden, inputs, labels):
...     values, measured = losses.fused_objective(
...         "kl=0.7,nll=0.3", inputs @ weights, head, labels != -100,
...         teacher_hidden=teacher_hidden, targets=labels, metrics=("zero_one",), temperature=2.0)
...     total = losses.masked_sum(values, labels != -100)
...     return losses.masked_mean(total), measured["zero_one"]
>>> @jax.jit
... def step(weights, *batch):
...     (value, misses), gradient = jax.value_and_grad(loss, has_aux=True)(weights, *batch)
...     return weights - 0.01 * gradient, value
>>> random = jax.random.normal(jax.random.key(0), (4, 3, 8))
>>> weights, head, labels = random[0, 0, :, None] * random[0, 1], random[0], jnp.array([[2, 1, -100]] * 4)
>>> first = step(weights, head, random, random, labels)
>>> bool(step(first[0], head, random, random, labels)[1] < first[1])
True

Sequences that count alike whatever their length, and only from their second position on:

>>> counts = (labels != -100) & (jnp.arange(3) >= 1)
>>> values = losses.fused_kl_divergence(random, 2 * random, head, counts)
>>> losses.masked_mean(values, counts, weights=1 / counts.sum(-1)).shape
()

Rows may be on several devices by ``jax.jit`` alone, on a mesh of any kind of axes, with the head on each; a
device then computes its own. The head's rows may be cut over an axis of ``shard_map`` (``axis_name``).

>>> from jax.sharding import NamedSharding, PartitionSpec
>>> rows = NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec("data"))
>>> states = jax.device_put(random, rows)
>>> jax.jit(losses.fused_kl_divergence)(states, 2 * states, head).shape
(4, 3)
"""

from jaxsp.losses.divergence import (
    alpha_divergence,
    js_divergence,
    kl_divergence,
    renyi_divergence,
    reverse_kl_divergence,
    skewed_kl_divergence,
    total_variation,
)
from jaxsp.losses.fused import fused_kl_divergence, fused_negative_log_likelihood, fused_objective, fused_topk
from jaxsp.losses.likelihood import (
    candidate_scores,
    negative_log_likelihood,
    predict,
    sequence_log_likelihood,
)
from jaxsp.losses.mismatch import rank_agreement, sequence_mismatch, topk_mismatch, zero_one
from jaxsp.losses.objectives import OBJECTIVES, Objective, as_objective, mixture, parse
from jaxsp.losses.reduce import Total, masked_mean, masked_sum, merge
from jaxsp.losses.similarity import cosine_similarity, distribution_cosine_similarity, hidden_mse
from jaxsp.losses.topk import (
    TopK,
    TopKAndTail,
    renormalised_topk_kl_divergence,
    topk,
    topk_js_divergence,
    topk_kl_divergence,
    topk_reverse_kl_divergence,
    truncated_kl_divergence,
)
from jaxsp.losses.uncertainty import confidence_shift, entropy

__all__ = [
    "OBJECTIVES", "Objective", "TopK", "TopKAndTail", "Total", "alpha_divergence", "as_objective",
    "candidate_scores", "confidence_shift", "cosine_similarity", "distribution_cosine_similarity", "entropy",
    "fused_kl_divergence", "fused_negative_log_likelihood", "fused_objective", "fused_topk", "hidden_mse",
    "js_divergence", "kl_divergence", "masked_mean", "masked_sum", "merge", "mixture",
    "negative_log_likelihood", "parse", "predict", "rank_agreement", "renormalised_topk_kl_divergence",
    "renyi_divergence", "reverse_kl_divergence", "sequence_log_likelihood", "sequence_mismatch",
    "skewed_kl_divergence", "topk", "topk_js_divergence", "topk_kl_divergence", "topk_mismatch",
    "topk_reverse_kl_divergence", "total_variation", "truncated_kl_divergence", "zero_one",
]  # fmt: skip
