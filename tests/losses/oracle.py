"""Every objective in float64 NumPy, straight from its formula: what the library is held against."""

from __future__ import annotations

import numpy as np


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    logits = np.asarray(logits, np.float64) / temperature
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(axis=-1)


def kl(teacher, student, targets=None, temperature=1.0):
    return divergence(probabilities(teacher, temperature), probabilities(student, temperature))


def reverse_kl(teacher, student, targets=None, temperature=1.0):
    return kl(student, teacher, temperature=temperature)


def js(teacher, student, targets=None, beta=0.5, temperature=1.0):
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    m = beta * p + (1 - beta) * q
    return beta * divergence(p, m) + (1 - beta) * divergence(q, m)


def nll(teacher, student, targets):
    return -np.log(np.take_along_axis(probabilities(student), targets[..., None], -1)[..., 0])


def zero_one(teacher, student, targets=None):
    return (np.argmax(teacher, -1) != np.argmax(student, -1)).astype(np.float64)


ORACLES = {"kl": kl, "reverse_kl": reverse_kl, "js": js, "nll": nll, "zero_one": zero_one}


def gradient(name: str, teacher, student, targets, step: float = 1e-5) -> np.ndarray:
    """Central differences of the sum, with respect to the student's logits."""
    student = np.asarray(student, np.float64)
    out = np.zeros_like(student)
    for place in np.ndindex(student.shape):
        up, down = student.copy(), student.copy()
        up[place] += step
        down[place] -= step
        out[place] = (
            ORACLES[name](teacher, up, targets).sum() - ORACLES[name](teacher, down, targets).sum()
        ) / (2 * step)
    return out
