"""The recipe: a student distilled from what a teacher of its vocabulary said, stored beforehand or said now.

It needs jax, optax, safetensors and ``jaxsp.losses`` alone, and knows nothing of what is inside a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from safetensors import safe_open
from safetensors.flax import save_file

from jaxsp import losses
from jaxsp.typing import Array, PyTree


class Model(NamedTuple):
    """A model as a trainer has it: functions of its weights.

    Attributes:
      hidden: from weights and token ids ``[b, t]`` to last hidden states ``[b, t, d]``, after the final norm.
      head: from weights to the head ``[v, d]``, in the dtype of the hidden states; it may be tied.
    """

    hidden: Callable[[PyTree, Array], Array]
    head: Callable[[PyTree], Array]


def train_step(
    student: Model,
    optimizer: optax.GradientTransformation,
    objective: str,
    state: tuple[PyTree, PyTree],
    batch: dict[str, Any],
    teacher_head: Array | None = None,
) -> tuple[tuple[PyTree, PyTree], Array]:
    """One update of all weights of the student, those of its head among them.

    Args:
      student: its functions.
      optimizer: from optax.
      objective: ``"kl"`` of hidden states, ``"topk_kl"`` of the best tokens.
      state: weights, and the optimizer's state.
      batch: ``ids`` and ``mask`` ``[b, t]``, and ``teacher``: what was said at these positions.
      teacher_head: the teacher's ``[v, e]``, for its hidden states.

    Returns:
      The new state, and the loss in nats.
    """

    def loss(weights: PyTree) -> Array:
        hidden, head = student.hidden(weights, batch["ids"]), student.head(weights)
        values, _ = losses.fused_objective(
            objective, hidden, head, batch["mask"], head_gradient=True,
            teacher_unembedding=teacher_head, **batch["teacher"],
        )  # fmt: skip
        return losses.masked_mean(values, batch["mask"])

    weights, moments = state
    value, gradient = jax.value_and_grad(loss)(weights)
    updates, moments = optimizer.update(gradient, moments, weights)
    return (optax.apply_updates(weights, updates), moments), value


def say_hidden(teacher: Model, weights: PyTree, ids: Array) -> dict[str, Array]:
    """Last hidden states: with the teacher's head they are its exact distribution."""
    return {"teacher_hidden": teacher.hidden(weights, ids)}


def say_topk(hidden: Array, head: Array, *, k: int) -> dict[str, Array]:
    """The k best tokens, their log-probabilities, and the probability of all others."""
    best = losses.fused_topk(hidden, head, k=k)
    return {"teacher_log_probs": best.log_probs, "teacher_ids": best.ids, "teacher_tail": best.tail}


def store(said: dict[str, Array], vocabulary: int, file: Path) -> None:
    """Writes arrays ``[n, t, ...]`` as they are; token ids in two bytes where the vocabulary allows it."""
    short = vocabulary <= 1 << 16
    save_file(
        {name: x.astype(jnp.uint16) if short and name == "teacher_ids" else x for name, x in said.items()},
        file,
    )


def read(file: Path, rows: Sequence[int]) -> dict[str, Array]:
    """These rows of what was stored, in this order; nothing else is read from the disk."""
    with safe_open(file, "flax") as stored:
        names = stored.keys()
        pieces = {name: stored.get_slice(name) for name in names}
        said = {name: jnp.concatenate([x[i : i + 1] for i in rows]) for name, x in pieces.items()}
    return {name: x.astype(jnp.int32) if name == "teacher_ids" else x for name, x in said.items()}
