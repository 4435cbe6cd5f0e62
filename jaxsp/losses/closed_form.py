"""Objectives with their gradient written out: half the memory of differentiating them, and all that a
head sharded over the vocabulary needs.

Each takes this shard's logits and returns the values ``[n]``, the same on all shards, and their gradient
to this shard's student logits ``[n, v]``.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from jaxsp.losses import vocabulary
from jaxsp.losses.checks import check_positive, fraction
from jaxsp.losses.divergence import kl_divergence, kl_terms
from jaxsp.losses.likelihood import negative_log_likelihood
from jaxsp.typing import Array

Arrays = dict[str, Array]
Rule = Callable[..., tuple[Array, Array]]


def _log_softmax(logits: Array, axis_name: str | None) -> Array:
    top = vocabulary.largest(jnp.max(logits, axis=-1, keepdims=True), axis_name)
    sums = jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True)
    return logits - top - jnp.log(vocabulary.total(sums, axis_name))


def _kl(given: Arrays, live: Array, axis_name: str | None, temperature: float = 1.0) -> tuple[Array, Array]:
    check_positive("temperature", temperature)
    log_p = _log_softmax(given["teacher_logits"] / temperature, axis_name)
    log_q = _log_softmax(given["student_logits"] / temperature, axis_name)
    values = vocabulary.total(jnp.sum(kl_terms(log_p, log_q), axis=-1), axis_name)
    gradient = (jnp.exp(log_q) - jnp.exp(log_p)) / temperature
    return jnp.where(live, values, 0.0), jnp.where(live[:, None], gradient, 0.0)


def _nll(
    given: Arrays, live: Array, axis_name: str | None, label_smoothing: float = 0.0
) -> tuple[Array, Array]:
    label_smoothing = fraction("label_smoothing", label_smoothing)
    logits = given["student_logits"]
    width = logits.shape[-1]
    first = vocabulary.first_token(width, axis_name)
    gold = first + jnp.arange(width) == given["targets"][:, None]
    log_q = _log_softmax(logits, axis_name)
    wanted = gold.astype(jnp.float32)
    if label_smoothing:
        allowed = (log_q > -jnp.inf).astype(jnp.float32)
        share = allowed / vocabulary.total(jnp.sum(allowed, axis=-1, keepdims=True), axis_name)
        wanted = (1 - label_smoothing) * wanted + label_smoothing * share
    terms = jnp.where(wanted > 0, wanted * log_q, 0.0)
    values = -vocabulary.total(jnp.sum(terms, axis=-1), axis_name)
    known = vocabulary.total(jnp.sum(gold, axis=-1), axis_name) > 0  # an id out of range reads NaN
    values = jnp.where(live, jnp.where(known, values, jnp.nan), 0.0)
    return values, jnp.where(live[:, None], jnp.exp(log_q) - wanted, 0.0)


RULES: dict[tuple[Callable[..., Array], tuple[str, ...]], Rule] = {
    (kl_divergence, ("teacher_logits", "student_logits")): _kl,
    (negative_log_likelihood, ("student_logits", "targets")): _nll,
}
"""By function and inputs of an objective: its values and their gradient to this shard's student
logits, written out. Others are differentiated, on the gathered logits; that takes twice the memory."""
