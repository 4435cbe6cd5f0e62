"""One small problem that all tests of the losses share: every input an objective may take."""

from __future__ import annotations

import contextlib
import inspect

import jax
import numpy as np
from scipy.special import log_softmax

from jaxsp.losses import OBJECTIVES

B, T, V, D, K = 3, 4, 7, 5, 3


@contextlib.contextmanager
def x64():
    """jax with 64-bit types inside."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def top_entries(teacher_logits: np.ndarray, k: int = K) -> dict[str, np.ndarray]:
    log_p = log_softmax(teacher_logits.astype(np.float64), axis=-1)
    ids = np.argsort(-log_p, axis=-1, kind="stable")[..., :k]
    return {
        "teacher_ids": ids.astype(np.int32),
        "teacher_log_probs": np.take_along_axis(log_p, ids, axis=-1).astype(np.float32),
    }


def make_inputs(seed: int = 0, shape: tuple[int, ...] = (B, T), vocabulary: int = V) -> dict:
    """Random inputs, the same on every machine."""
    random = np.random.RandomState(seed)

    def normal(size: int, scale: float) -> np.ndarray:
        return (scale * random.standard_normal((*shape, size))).astype(np.float32)

    teacher_logits = normal(vocabulary, 2.0)
    return {
        "teacher_logits": teacher_logits,
        "student_logits": normal(vocabulary, 2.0),
        "teacher_hidden": normal(D, 1.0),
        "student_hidden": normal(D, 1.0),
        "targets": random.randint(0, vocabulary, shape).astype(np.int32),
        **top_entries(teacher_logits, min(K, vocabulary)),
    }


INPUTS = make_inputs()

LIKE_OTHERS = ("skewed_kl", "alpha", "renyi", "topk_reverse_kl", "topk_js", "renormalised_topk_kl")
"""Entries that go the way of js and topk_kl."""

# A value of every option, other than its default.
OPTIONS = {"temperature": 2.5, "beta": 0.3, "alpha": 0.3, "label_smoothing": 0.1, "k": 2, "n": 4}


def option_names(entry) -> list[str]:
    """The options of an objective: its function's parameters after the inputs and the mask."""
    others = list(inspect.signature(entry.function).parameters)[len(entry.inputs) + 1 :]
    return [name for name in others if name not in (*entry.optional, "axis_name")]


# Every entry with each of its options: (name, {option: value}).
VARIANTS = [
    (name, {option: OPTIONS[option]}) for name, entry in OBJECTIVES.items() for option in option_names(entry)
]
MASK = np.random.RandomState(1).uniform(size=(B, T)) < 0.6
