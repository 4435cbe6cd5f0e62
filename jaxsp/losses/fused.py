"""Any objective straight from hidden states: logits exist for one chunk of positions at a time.

With a frozen head the gradient with respect to the hidden states is formed in the forward pass, chunk by
chunk (``chunked_head.py``): nothing of shape ``[b, t, v]`` ever exists, and nothing is computed twice. The
idea is Liger Kernel's (Hsu et al. 2024, arXiv:2410.10989). A ``custom_vjp`` has no forward mode: use
``jax.grad`` or ``jax.vjp``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxsp.losses import checks, chunked_head, vocabulary
from jaxsp.losses.checks import Hidden, Losses, Mask, Tokens
from jaxsp.losses.closed_form import RULES
from jaxsp.losses.objectives import OBJECTIVES, TEACHER_TOP_K, Objective, parse
from jaxsp.typing import AnyArray, Float, Int


def fused_kl_divergence(
    teacher_hidden: Float[AnyArray, "*b t e"],
    student_hidden: Hidden,
    unembedding: Float[AnyArray, "v d"],
    mask: Mask = None,
    *,
    temperature: float = 1.0,
    teacher_unembedding: Float[AnyArray, "v e"] | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> Losses:
    r"""``kl_divergence`` of the heads' distributions, without their logits in memory.

    .. math:: KL(\text{softmax}(W h^c / \tau) \,\|\, \text{softmax}(W h^\sigma / \tau)),\qquad
              \frac{\partial}{\partial h^\sigma} = \frac{1}{\tau} (q - p)^\top W

    Args:
      teacher_hidden: last hidden states ``[*b, t, e]``; no gradient flows to them. With one head, e is d.
      student_hidden: last hidden states ``[*b, t, d]``.
      unembedding: the frozen head ``[v, d]``; no gradient flows to it.
      mask: ``[*b, t]``, True where a position counts; all if ``None``. Chunks of others are not computed.
      temperature: both sides' logits are divided by it.
      teacher_unembedding: the teacher's head ``[v, e]``, if it is another one.
      softcap: logits are :math:`c \tanh(x / c)`, on both sides (Gemma 2).
      chunk_size: positions at a time; by default as many as fit a budget (256 MiB on a CPU, else 1 GiB).
      axis_name: name of the mapped axis over which the rows of the heads are sharded, in order.

    Returns:
      ``[*b, t]`` float32, in nats; exactly 0, with zero gradient, where the mask is False.

    Raises:
      ValueError: shapes or dtypes don't fit, or a number is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> teacher, student, head = (jax.random.normal(jax.random.key(i), (3, 4)) for i in range(3))
      >>> fused = fused_kl_divergence(teacher, student, head)
      >>> from jaxsp.losses import kl_divergence
      >>> bool(jnp.allclose(fused, kl_divergence(teacher @ head.T, student @ head.T), atol=1e-6))
      True

    Reference:
      Hinton et al. 2015 (arXiv:1503.02531); the fusion: Hsu et al. 2024 (arXiv:2410.10989).
    """
    return fused_objective(
        dataclasses.replace(OBJECTIVES["kl"], options={"temperature": temperature}),
        student_hidden,
        unembedding,
        mask,
        teacher_hidden=teacher_hidden,
        teacher_unembedding=teacher_unembedding,
        softcap=softcap,
        chunk_size=chunk_size,
        axis_name=axis_name,
    )[0]


def fused_negative_log_likelihood(
    student_hidden: Hidden,
    targets: Tokens,
    unembedding: Float[AnyArray, "v d"],
    mask: Mask = None,
    *,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> Losses:
    r"""``negative_log_likelihood`` under the head's distribution, without its logits in memory.

    .. math:: -\log \text{softmax}(W h)_{\hat y},\qquad
              \frac{\partial}{\partial h} = (q - e_{\hat y})^\top W

    Args:
      student_hidden: last hidden states ``[*b, t, d]``.
      targets: ``[*b, t]`` token ids in ``[0, v)``; under a False mask any number will do.
      unembedding: the frozen head ``[v, d]``; no gradient flows to it.
      mask: ``[*b, t]``, True where a position counts; all if ``None``. Chunks of others are not computed.
      label_smoothing: the share of the target spread evenly over the vocabulary.
      softcap: logits are :math:`c \tanh(x / c)` (Gemma 2).
      chunk_size: positions at a time; by default as many as fit a budget (256 MiB on a CPU, else 1 GiB).
      axis_name: name of the mapped axis over which the rows of the head are sharded, in order.

    Returns:
      ``[*b, t]`` float32, in nats; exactly 0, with zero gradient, where the mask is False.

    Raises:
      ValueError: shapes, dtypes or ids don't fit, or a number is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> student, head = (jax.random.normal(jax.random.key(i), (3, 4)) for i in range(2))
      >>> targets = jnp.array([0, 2, 1])
      >>> fused = fused_negative_log_likelihood(student, targets, head)
      >>> from jaxsp.losses import negative_log_likelihood
      >>> bool(jnp.allclose(fused, negative_log_likelihood(student @ head.T, targets), atol=1e-6))
      True

    Reference:
      Hsu et al. 2024, Liger Kernel (arXiv:2410.10989).
    """
    return fused_objective(
        dataclasses.replace(OBJECTIVES["nll"], options={"label_smoothing": label_smoothing}),
        student_hidden,
        unembedding,
        mask,
        targets=targets,
        softcap=softcap,
        chunk_size=chunk_size,
        axis_name=axis_name,
    )[0]


def fused_objective(
    objective: str | Objective,
    student_hidden: Hidden,
    unembedding: Float[AnyArray, "v d"],
    mask: Mask = None,
    *,
    teacher_hidden: Float[AnyArray, "*b t e"] | None = None,
    teacher_unembedding: Float[AnyArray, "v e"] | None = None,
    teacher_softcap: float | None = None,
    targets: Tokens | None = None,
    teacher_log_probs: Float[AnyArray, "*b t k"] | None = None,
    teacher_ids: Int[AnyArray, "*b t k"] | None = None,
    teacher_tail: Float[AnyArray, "*b t"] | None = None,
    metrics: Sequence[str] = (),
    softcap: float | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> tuple[Losses, dict[str, Losses]]:
    """Any objective of the table, or a mixture, and any metrics beside it, in one pass over chunks.

    Args:
      objective: a text that ``parse`` reads, or an ``Objective``. Its gradient flows to ``student_hidden``.
      student_hidden: last hidden states ``[*b, t, d]``.
      unembedding: the frozen head ``[v, d]``; no gradient flows to it.
      mask: ``[*b, t]``, True where a position counts; all if ``None``. Chunks of others are not computed.
      teacher_hidden: the teacher's last hidden states; no gradient flows to them.
      teacher_unembedding: the teacher's head ``[v, e]``, if it is another one.
      teacher_softcap: softcap of the teacher's logits, ``inf`` for none; by default ``softcap``.
      targets: ``[*b, t]`` gold tokens.
      teacher_log_probs: ``[*b, t, k]``, see ``topk_kl_divergence``; by default from ``teacher_hidden``.
      teacher_ids: ``[*b, t, k]``.
      teacher_tail: ``[*b, t]``, probability of all others; by default what these leave of 1.
      metrics: further objectives, as text, to evaluate on the same logits, without a gradient.
      softcap: logits are c·tanh(x / c), on both sides if there is no ``teacher_softcap`` (Gemma 2).
      chunk_size: positions at a time; by default as many as fit a budget (256 MiB on a CPU, else 1 GiB).
      axis_name: the mapped axis over which the rows of the heads are sharded, in order and evenly. The KL
        divergence and the likelihood then reduce over it; for others each chunk's logits are gathered.

    Returns:
      The objective's values ``[*b, t]``, float32, exactly 0 with zero gradient where the mask is False;
      and the metrics', by name.

    Raises:
      ValueError: something needed is missing, shapes or dtypes don't fit, or a number is out of range.

    Example:
      >>> import jax
      >>> teacher, student, head = (jax.random.normal(jax.random.key(i), (3, 4)) for i in range(3))
      >>> values, measured = fused_objective(
      ...     "js", student, head, teacher_hidden=teacher, metrics=("zero_one",))
      >>> values.shape, list(measured)
      ((3,), ['zero_one'])

    Reference:
      Hsu et al. 2024, Liger Kernel (arXiv:2410.10989), here for any objective.
    """
    objective = parse(objective) if isinstance(objective, str) else objective
    measures = tuple((name, parse(name)) for name in metrics)
    teacher_head = unembedding if teacher_unembedding is None else teacher_unembedding
    tokens = _check_heads(student_hidden, unembedding, teacher_hidden, teacher_unembedding)
    own_softcap = _checked_softcap("softcap", softcap)
    other = own_softcap if teacher_softcap is None else _checked_softcap("teacher_softcap", teacher_softcap)
    batch, everyone = student_hidden.shape[:-1], tokens * vocabulary.shards(axis_name)
    best = {"teacher_log_probs": teacher_log_probs, "teacher_ids": teacher_ids, "teacher_tail": teacher_tail}
    optional = {"teacher_hidden": teacher_hidden, "targets": targets, **best}
    given = {name: array for name, array in optional.items() if array is not None}
    given["live"] = checks.check_mask(mask, batch)
    _check_given(given, everyone, (objective, *(entry for _, entry in measures)))
    # Metrics of a sharded head want whole logits: then the objective may as well take them, too.
    gathered = axis_name is not None and bool(measures)
    rule = None if gathered else RULES.get((objective.function, objective.inputs))
    width = tokens if rule else everyone
    if chunk_size is None:
        chunk_size = chunked_head.chunk_size(
            math.prod(batch), width, masked=mask is not None, metrics=len(measures)
        )
    checks.check_count("chunk_size", chunk_size)
    settings = chunked_head.ChunkSettings(
        objective, rule, measures, chunk_size, mask is None, (other, own_softcap), axis_name
    )
    given = {name: jnp.reshape(array, (-1, *array.shape[len(batch) :])) for name, array in given.items()}
    flat = jnp.reshape(student_hidden, (-1, student_hidden.shape[-1]))
    flat = vocabulary.like_varying(flat, *given.values())
    results: Any = chunked_head.evaluate(settings, flat, given, (teacher_head, unembedding))
    values, measured = results
    return values.reshape(batch), {name: measured[name].reshape(batch) for name in metrics}


def _checked_softcap(name: str, value: float | None) -> float | None:
    """The softcap as a number; ``None`` for the teacher's infinite one, which changes nothing."""
    value = None if value is None else checks.number(name, value)
    if value is None or (name == "teacher_softcap" and value == math.inf):
        return None
    checks.check_positive(name, value)
    return value


def _check_given(given: dict[str, AnyArray], everyone: int, entries: Sequence[Objective]) -> None:
    live, top = given["live"], [name for name in TEACHER_TOP_K if name in given]
    for name, last in (("teacher_hidden", "d"), *((name, "k") for name in top)):
        if name in given:
            checks.check_batch(name, given[name], live.shape, last)
    if "targets" in given:
        checks.check_ids(given["targets"], live.shape, everyone, live)
    if "teacher_tail" in given and (given["teacher_tail"].shape != live.shape or len(top) < 2):
        raise ValueError(
            f"teacher_tail must have shape {list(live.shape)} and stand beside teacher_log_probs and"
            f" teacher_ids; it has {list(given['teacher_tail'].shape)}."
        )
    if len(top) == 2:
        log_probs = given["teacher_log_probs"]
        there = live[..., None] & (log_probs != -jnp.inf)
        checks.check_ids(given["teacher_ids"], log_probs.shape, everyone, there, name="teacher_ids")
    made = ("teacher_logits",) if top else ("teacher_logits", *TEACHER_TOP_K)  # from teacher_hidden
    for entry in entries:
        for name in entry.inputs:
            source = "teacher_hidden" if name in made else name
            if not name.startswith("student") and source not in given:
                raise ValueError(f"This objective needs {source}; it was not given.")


def _check_heads(student: AnyArray, head: AnyArray, teacher: AnyArray | None, other: AnyArray | None) -> int:
    tokens = checks.check_head("student_hidden", student, "unembedding", head)
    if teacher is not None:
        name, other = ("unembedding", head) if other is None else ("teacher_unembedding", other)
        if checks.check_head("teacher_hidden", teacher, name, other) != tokens:
            raise ValueError(
                f"unembedding has {tokens} rows and teacher_unembedding {other.shape[0]};"
                " teacher and student must share the vocabulary."
            )
    return tokens
