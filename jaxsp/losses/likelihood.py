"""Likelihood of given tokens, answers and candidates under the student, in nats."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax.numpy as jnp

from jaxsp.losses.checks import Logits, Losses, Mask, Number, Tokens, check_ids, fraction, prepare
from jaxsp.losses.vocabulary import Found, compared, first_token, shards, total, total_over_tokens
from jaxsp.typing import AnyArray, Array, Bool, Float, Int

AnswerLogits: TypeAlias = Float[AnyArray, "*b t v"]
Answers: TypeAlias = Int[AnyArray, "*b t"]
AnswerMask: TypeAlias = Bool[AnyArray, "*b t"] | Int[AnyArray, "*b t"] | None
AnswerLosses: TypeAlias = Float[Array, "*b"]
CandidateLogits: TypeAlias = Float[AnyArray, "*b n t v"]
Candidates: TypeAlias = Int[AnyArray, "*b n t"]
CandidateMask: TypeAlias = Bool[AnyArray, "*b n t"] | Int[AnyArray, "*b n t"] | None


def negative_log_likelihood(
    student_logits: Logits,
    targets: Tokens,
    mask: Mask = None,
    *,
    label_smoothing: Number = 0.0,
    axis_name: str | None = None,
) -> Losses:
    r"""The student's surprise at each token of the gold answer.

    .. math:: -(1 - \epsilon) \log q_{\hat y_t} - \frac{\epsilon}{V} \sum_v \log q_v,
              \quad q = p(\cdot \mid \sigma, z, \hat y_{<t})

    Minimising it makes the gold answer as sure as possible, whatever else the teacher found likely.

    Args:
      student_logits: ``[*b, t, v]``, any float dtype.
      targets: ``[*b, t]`` token ids in ``[0, v)``; under a False mask any number will do. Of labels with -100
        where none counts, the mask is ``labels != -100``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      label_smoothing: ε, the share of the target spread evenly over the vocabulary (over those tokens
        that the student doesn't ban with ``-inf``).
      axis_name: mapped axis over which the vocabulary is sharded, if it is.

    Returns:
      ``[*b, t]`` float32, in nats; exactly 0 with zero gradient where the mask is False.

    Raises:
      ValueError: shapes, dtypes or ids don't fit, or ε is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
      >>> negative_log_likelihood(logits, jnp.array([0])).round(4)
      Array([0.5108], dtype=float32)

    Reference:
      Xiao & Zhu 2025, Foundations of Large Language Models, ch. 3 (soft prompts as compressed
      context, arXiv:2501.09223); smoothing: Szegedy et al. 2015 (arXiv:1512.00567).
    """
    label_smoothing = fraction("label_smoothing", label_smoothing)
    mask, logits = prepare(mask, student_logits=student_logits)
    check_ids(targets, mask.shape, logits.shape[-1] * shards(axis_name), mask)
    given = jnp.asarray(targets), label_smoothing
    return jnp.where(mask, compared(_surprise, logits, *given, axis_name=axis_name), 0.0)


def _surprise(log_q: Array, targets: Array, smoothing: Any, axis_name: str | None = None) -> Found:
    # A token is found by comparing ids: so a negative one does not count from the end, and what is out of
    # range on either side is nowhere.
    width = log_q.shape[-1]
    gold = targets[..., None] == first_token(width, axis_name) + jnp.arange(width)
    known = total_over_tokens(gold, axis_name) > 0
    wanted = gold.astype(jnp.float32)
    if not isinstance(smoothing, float) or smoothing:
        allowed = (log_q > -jnp.inf).astype(jnp.float32)
        share = allowed / total(jnp.sum(allowed, axis=-1, keepdims=True), axis_name)
        wanted = (1 - smoothing) * wanted + smoothing * share
    unwanted = wanted == 0
    terms = jnp.where(unwanted, 0.0, wanted * jnp.where(unwanted, 0.0, log_q))
    value = -total_over_tokens(terms, axis_name)
    return jnp.where(known, value, jnp.nan), -wanted, -1.0


def sequence_log_likelihood(
    student_logits: AnswerLogits, targets: Answers, mask: AnswerMask = None
) -> AnswerLosses:
    r"""Log-likelihood of whole answers.

    .. math:: \log p(\hat y \mid \sigma, z) = \sum_t \log p(\hat y_t \mid \sigma, z, \hat y_{<t})

    Args:
      student_logits: ``[*b, t, v]``, any float dtype.
      targets: ``[*b, t]`` token ids in ``[0, v)``.
      mask: ``[*b, t]``, True at the answer's tokens; all if ``None``.

    Returns:
      ``[*b]`` float32, in nats, at most 0; 0 for an answer without tokens.

    Raises:
      ValueError: shapes, dtypes or ids don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.1, 0.9]]))
      >>> f"{jnp.exp(sequence_log_likelihood(logits, jnp.array([0, 1]))):.2f}"
      '0.45'

    Reference:
      Xiao & Zhu 2025, Foundations of Large Language Models, ch. 3 (arXiv:2501.09223).
    """
    return -jnp.sum(negative_log_likelihood(student_logits, targets, mask), axis=-1)


def candidate_scores(
    logits: CandidateLogits, candidates: Candidates, mask: CandidateMask = None, *, per_token: bool = False
) -> Float[Array, "*b n"]:
    r"""Log-likelihood of each of n candidate answers: :math:`\log p(y \mid c, z)` for given y.

    Args:
      logits: ``[*b, n, t, v]`` of any model (teacher or student) reading each candidate.
      candidates: ``[*b, n, t]`` token ids.
      mask: ``[*b, n, t]``, True at a candidate's tokens; all if ``None``.
      per_token: divide by the number of tokens, so that long candidates are not put last.

    Returns:
      ``[*b, n]`` float32, in nats; ``-inf`` for a candidate without tokens.

    Raises:
      ValueError: shapes, dtypes or ids don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.log(jnp.array([[[0.6, 0.4]], [[0.6, 0.4]]]))
      >>> [f"{jnp.exp(x):.2f}" for x in candidate_scores(logits, jnp.array([[0], [1]]))]
      ['0.60', '0.40']

    Reference:
      Scoring by length: Brown et al. 2020, GPT-3, section 2.4 (arXiv:2005.14165).
    """
    mask, logits = prepare(mask, logits=logits)
    if logits.ndim < 3:
        raise ValueError(f"logits must have shape [*b, n, t, v], not {list(logits.shape)}.")
    check_ids(candidates, mask.shape, logits.shape[-1], mask, name="candidates")
    scores = sequence_log_likelihood(logits, candidates, mask)
    lengths = jnp.sum(mask, axis=-1)
    if per_token:
        scores = scores / jnp.maximum(lengths, 1)
    return jnp.where(lengths > 0, scores, -jnp.inf)


def predict(
    logits: CandidateLogits, candidates: Candidates, mask: CandidateMask = None, *, per_token: bool = False
) -> Int[Array, "*b"]:
    r"""The candidate that the model finds most likely: :math:`\hat y = \arg\max_y p(y \mid c, z)`.

    Args:
      logits: ``[*b, n, t, v]`` of the model reading each candidate.
      candidates: ``[*b, n, t]`` token ids.
      mask: ``[*b, n, t]``, True at a candidate's tokens; all if ``None``.
      per_token: compare log-likelihoods per token.

    Returns:
      ``[*b]`` int32 indices into the n candidates; of equally likely ones the first.

    Raises:
      ValueError: shapes, dtypes or ids don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.log(jnp.array([[[0.4, 0.6]], [[0.4, 0.6]]]))
      >>> predict(logits, jnp.array([[0], [1]]))
      Array(1, dtype=int32)

    Reference:
      Xiao & Zhu 2025, Foundations of Large Language Models, ch. 3 (arXiv:2501.09223).
    """
    scores = candidate_scores(logits, candidates, mask, per_token=per_token)
    # A NaN, of an id out of range, would come first.
    return jnp.argmax(jnp.where(jnp.isnan(scores), -jnp.inf, scores), axis=-1).astype(jnp.int32)
