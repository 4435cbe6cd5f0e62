"""Every objective in float64 NumPy, straight from its formula: what the library is held against.

Each takes the inputs by name, as ``Objective.__call__`` does, and returns ``[*b, t]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import log_softmax, logsumexp


def probabilities(logits, temperature=1.0):
    with np.errstate(invalid="ignore"):
        return np.exp(log_softmax(np.asarray(logits, np.float64) / temperature, axis=-1))


def divergence(p, q):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(axis=-1)


def pair(inputs, temperature=1.0):
    return (probabilities(inputs[f"{side}_logits"], temperature) for side in ("teacher", "student"))


def kl(inputs, temperature=1.0):
    log_p, log_q = (
        log_softmax(np.asarray(inputs[f"{side}_logits"], np.float64) / temperature, axis=-1)
        for side in ("teacher", "student")
    )
    return log_divergence(log_p, log_q)


def reverse_kl(inputs, temperature=1.0):
    swapped = {"teacher_logits": inputs["student_logits"], "student_logits": inputs["teacher_logits"]}
    return kl(swapped, temperature)


def js(inputs, beta=0.5, temperature=1.0):
    p, q = pair(inputs, temperature)
    m = beta * p + (1 - beta) * q
    return beta * divergence(p, m) + (1 - beta) * divergence(q, m)


def skewed_kl(inputs, alpha=0.1, temperature=1.0):
    p, q = pair(inputs, temperature)
    return divergence(p, alpha * p + (1 - alpha) * q)


def alpha(inputs, alpha=0.5, temperature=1.0):
    p, q = pair(inputs, temperature)
    return (1 - (p**alpha * q ** (1 - alpha)).sum(axis=-1)) / (alpha * (1 - alpha))


def renyi(inputs, alpha=0.5, temperature=1.0):
    p, q = pair(inputs, temperature)
    return np.log((p**alpha * q ** (1 - alpha)).sum(axis=-1)) / (alpha - 1)


def total_variation(inputs, temperature=1.0):
    p, q = pair(inputs, temperature)
    return np.maximum(p - q, 0).sum(axis=-1)  # what p has more of, somewhere


def log_divergence(log_p, log_q):
    possible = log_p > -np.inf
    terms = np.where(possible, log_p, 0) - np.where(possible, log_q, 0)
    return (np.exp(log_p) * terms).sum(axis=-1)


def top(inputs, k):
    """The teacher's entries, the first k of them; taken from its logits where they are not given."""
    if "teacher_ids" in inputs:
        ids = np.asarray(inputs["teacher_ids"])[..., :k]
        log_p = np.asarray(inputs["teacher_log_probs"], np.float64)[..., :k]
    else:
        log_p = log_softmax(np.asarray(inputs["teacher_logits"], np.float64), axis=-1)
        ids = np.argsort(-log_p, axis=-1, kind="stable")[..., : k or 64]
        log_p = np.take_along_axis(log_p, ids, axis=-1)
    return ids, log_p, log_softmax(np.asarray(inputs["student_logits"], np.float64), axis=-1)


def coarse(inputs, k, least=0.0):
    """Log-probabilities of both sides for the teacher's best tokens and, last, for all others together."""
    ids, log_p, log_q = top(inputs, k)
    both = np.zeros((2, *ids.shape[:-1], ids.shape[-1] + 1))
    for place in np.ndindex(ids.shape[:-1]):
        rest: Any = logsumexp(np.delete(log_q[place], ids[place]))
        p_rest = max(1 - np.exp(log_p[place]).sum(), least)
        log_p_rest = np.log(p_rest) if p_rest >= max(least, 1e-6) else -np.inf
        both[(0, *place)] = np.append(log_p[place], log_p_rest)
        both[(1, *place)] = np.append(log_q[place][ids[place]], rest)
    return both


def topk_kl(inputs, k=None):
    return log_divergence(*coarse(inputs, k))


def topk_reverse_kl(inputs, k=None):
    log_p, log_q = coarse(inputs, k, 1e-6)
    return log_divergence(log_q, log_p)


def topk_js(inputs, beta=0.5, k=None):
    p, q = np.exp(coarse(inputs, k))
    m = beta * p + (1 - beta) * q
    return beta * divergence(p, m) + (1 - beta) * divergence(q, m)


def renormalised_topk_kl(inputs, k=None):
    log_p, log_q = (log_softmax(side[..., :-1], axis=-1) for side in coarse(inputs, k))
    return log_divergence(log_p, log_q)


def truncated_kl(inputs, k=None):
    ids, log_p, log_q = top(inputs, k)
    return log_divergence(log_p, np.take_along_axis(log_q, ids, axis=-1))


def nll(inputs, label_smoothing=0.0):
    log_q = log_softmax(np.asarray(inputs["student_logits"], np.float64), axis=-1)
    gold = np.take_along_axis(log_q, np.asarray(inputs["targets"])[..., None], axis=-1)[..., 0]
    allowed = log_q > -np.inf
    even = np.where(allowed, log_q, 0).sum(axis=-1) / allowed.sum(axis=-1)
    return -(1 - label_smoothing) * gold - label_smoothing * even


def zero_one(inputs):
    first = (np.argmax(inputs[f"{side}_logits"], axis=-1) for side in ("teacher", "student"))
    return np.not_equal(*first).astype(np.float64)


def topk_mismatch(inputs, k=5):
    first = np.argmax(inputs["teacher_logits"], axis=-1)
    best = np.argsort(-np.asarray(inputs["student_logits"], np.float64), axis=-1, kind="stable")
    return 1.0 - (best[..., :k] == first[..., None]).any(axis=-1)


def rank_agreement(inputs, n=10):
    teacher, student = (np.asarray(inputs[f"{s}_logits"]) for s in ("teacher", "student"))
    out = np.ones(teacher.shape[:-1])
    for place in np.ndindex(out.shape):
        best = np.argsort(-teacher[place].astype(np.float64), kind="stable")[:n]
        pairs = [
            float(student[place][i] > student[place][j]) - float(student[place][i] < student[place][j])
            for x, i in enumerate(best)
            for j in best[x + 1 :]
            if teacher[place][i] > teacher[place][j] > -np.inf
        ]
        out[place] = np.mean(pairs) if pairs else 1.0
    return out


def entropy(inputs, temperature=1.0, side="student_logits"):
    p = probabilities(inputs[side], temperature)
    return -divergence(p, np.ones_like(p))


def confidence_shift(inputs):
    p, q = pair(inputs)
    return q.max(axis=-1) - p.max(axis=-1)


def cosine(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)


def cosine_similarity(inputs):
    return cosine(inputs["teacher_hidden"], inputs["student_hidden"])


def distribution_cosine_similarity(inputs, temperature=1.0):
    return cosine(*pair(inputs, temperature))


def hidden_mse(inputs):
    teacher, student = (np.asarray(inputs[f"{s}_hidden"], np.float64) for s in ("teacher", "student"))
    return np.square(teacher - student).mean(axis=-1)


ORACLES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        kl,
        reverse_kl,
        js,
        skewed_kl,
        alpha,
        renyi,
        total_variation,
        topk_kl,
        topk_reverse_kl,
        topk_js,
        truncated_kl,
        renormalised_topk_kl,
        nll,
        zero_one,
        topk_mismatch,
        rank_agreement,
        entropy,
        confidence_shift,
        cosine_similarity,
        distribution_cosine_similarity,
        hidden_mse,
    )
}


def gradient(name: str, inputs: dict, wrt: str, step: float = 1e-5, **options) -> np.ndarray:
    """Central differences with respect to the input named; a position's value is of its own alone."""
    at = np.asarray(inputs[wrt], np.float64)
    out = np.zeros_like(at)
    for place in range(at.shape[-1]):
        nudge = step * np.eye(at.shape[-1])[place]
        more, less = (ORACLES[name]({**inputs, wrt: at + sign * nudge}, **options) for sign in (1, -1))
        out[..., place] = (more - less) / (2 * step)
    return out
