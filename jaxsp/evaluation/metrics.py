"""The metrics: every objective at every answer position, and whole answers against the teacher's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsp import distributions
from jaxsp.data.examples import Rows
from jaxsp.data.packing import Packing
from jaxsp.data.words import plain, runs
from jaxsp.losses import OBJECTIVES, Objective, Total, masked_sum
from jaxsp.models import sharding
from jaxsp.models.config import DecoderConfig
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.output_head import OutputHead
from jaxsp.typing import Array, Float, KeyValues, Params, PyTree

POSITION_METRICS = (
    "kl",
    "reverse_kl",
    "js",
    "topk_kl",
    "nll",
    "cosine_similarity",
    "zero_one",
    "rank_agreement",
    "entropy",
    "confidence_shift",
)
"""Measured at every answer position, in every report: keys of ``jaxsp.losses.OBJECTIVES``."""


def _misses(student_logits: Array, targets: Array, mask: Array) -> Array:
    """1 where the most probable token is not the answer's, else 0."""
    return jnp.where(mask, jnp.argmax(student_logits, axis=-1) != targets, False).astype(jnp.float32)


_OF_TOKENS = ("student_logits", "targets")

OF_ANSWERS = {
    "kl": OBJECTIVES["nll"],
    "nll": OBJECTIVES["nll"],
    "zero_one": Objective(_misses, _OF_TOKENS, differentiable=False),
}
"""The metrics where of the teacher only its answers are known. It then counts as certain of them: the KL
divergence from a distribution that is all on one token is that token's negative log-likelihood."""

_RESAMPLES = 4000


@functools.partial(jax.jit, static_argnames=("config", "names"))
def _at_positions(
    params: Params,
    config: DecoderConfig,
    prefix: KeyValues | None,
    rows: Rows,
    names: tuple[str, ...],
    teacher_head: OutputHead | None,
) -> tuple[dict[str, Array], Array]:
    """The metrics, and the last hidden states that they come from."""
    head = OutputHead.of(params, config)
    if prefix is None:
        states, head = jnp.asarray(rows.targets["hidden"]), teacher_head or head
    else:
        states = distributions.answer_hidden(params, config, prefix, rows)
    if "hidden" not in rows.targets:
        found = {name: distributions.compare(OF_ANSWERS[name], states, head, rows)[0] for name in names}
        return found, states
    first, *others = names
    values, measured = distributions.compare(first, states, head, rows, teacher_head, others)
    return {first: values, **measured}, states


def at_positions(
    model: LanguageModel,
    prefix: KeyValues | None,
    rows: Rows,
    packing: Packing,
    names: Sequence[str] = POSITION_METRICS,
    teacher_head: OutputHead | None = None,
) -> dict[str, Float[np.ndarray, "n a"]]:
    """Each named objective between the teacher and the model after ``prefix``, at every position.

    Args:
      model: the frozen model.
      prefix: prefix of the bracket measured; ``None`` for the teacher's own last hidden states.
      rows: with the teacher's targets.
      packing: packing of the batches they are read in.
      names: keys of ``jaxsp.losses.OBJECTIVES``; those that compare hidden states of two widths are left
        out, and without the teacher's distributions all but ``OF_ANSWERS``.
      teacher_head: head of the teacher, if it is another model.

    Returns:
      By name, ``[N, A]`` float32; 0 under a False mask.
    """
    return at_positions_with_states(model, prefix, rows, packing, (), names, teacher_head)[0]


def at_positions_with_states(
    model: LanguageModel,
    prefix: KeyValues | None,
    rows: Rows,
    packing: Packing,
    states_of: Collection[int],
    names: Sequence[str] = POSITION_METRICS,
    teacher_head: OutputHead | None = None,
) -> tuple[dict[str, Float[np.ndarray, "n a"]], dict[int, Float[np.ndarray, "_ d"]]]:
    """``at_positions``, and the last hidden states that were measured.

    Args:
      model: as in ``at_positions``, and so are the others.
      prefix: prefix of the bracket measured, or ``None``.
      rows: with the teacher's targets.
      packing: packing of the batches.
      states_of: indices of the rows whose states are wanted; none is kept of the others.
      names: metrics.
      teacher_head: head of the teacher.

    Returns:
      The metrics; and by index the states ``[A, D]`` at the answer positions of a row.
    """
    batches = packing.in_order(rows)
    if "hidden" not in rows.targets:
        names = [name for name in names if name in OF_ANSWERS]
        if prefix is None:  # certain of its own answers
            return {name: np.zeros(rows.mask.shape, np.float32) for name in names}, {}
    elif rows.targets["hidden"].shape[-1] != model.config.width:
        names = [name for name in names if not OBJECTIVES[name].compares_hidden]
    given = tuple(names), teacher_head
    parts, kept = [], dict[int, np.ndarray]()
    for index in batches:
        batch = packing.pack(rows, index)
        found, states = _at_positions(model.params, model.config, prefix, batch, *given)
        parts.append(found)
        if wanted := [i for i in index.tolist() if i in states_of]:
            of_rows = dict(zip(index.tolist(), packing.split(states, rows, index).rows, strict=True))
            kept |= {i: of_rows[i] for i in wanted}
    return {name: packing.unpack([p[name] for p in parts], rows, batches) for name in names}, kept


def mean_kl_function(
    model: LanguageModel,
    preamble: KeyValues,
    kind: str,
    mesh: Mesh | None = None,
    teacher_head: OutputHead | None = None,
) -> Callable[[PyTree, Sequence[Rows]], Float[np.ndarray, " m"]]:
    """The figure that training watches: a function from M prompts and their packed batches to their mean KL.

    σ's arrays and those of every batch have a leading axis M, over a mesh's ``data`` if there is one; a
    prompt without positions has KL NaN. The teacher has ``teacher_head``, if it is another model.
    """

    total_kl = _total_kl(model.config, kind, mesh)

    def mean_kl(sigmas: PyTree, batches: Sequence[Rows]) -> np.ndarray:
        parts = [total_kl((model.params, preamble, teacher_head), sigmas, rows) for rows in batches]
        total, count = np.sum([(np.asarray(p.total), np.asarray(p.count)) for p in parts], axis=0)
        with np.errstate(invalid="ignore"):
            return total / count

    return mean_kl


@functools.cache
def _total_kl(config: DecoderConfig, kind: str, mesh: Mesh | None) -> Callable[..., Total]:
    """The compiled sum of the KL of M prompts, one function for one choice."""

    def total(frozen: PyTree, sigmas: PyTree, rows: Rows) -> Total:
        params, preamble, teacher_head = frozen
        read = functools.partial(distributions.prompt_hidden, params, config, kind=kind)
        states = jax.vmap(lambda sigma, rows: read(sigma, preamble, rows))(sigmas, rows)
        objective = "kl" if "hidden" in rows.targets else OF_ANSWERS["kl"]
        head = OutputHead.of(params, config)
        values, _ = distributions.compare(objective, states, head, rows, teacher_head)
        return jax.vmap(masked_sum)(values, jnp.asarray(rows.mask))

    return jax.jit(sharding.over_data(total, mesh, (None, 0, 0), out=0))


@dataclasses.dataclass(frozen=True)
class Answer:
    """A free-running answer, as token ids and as text."""

    ids: Sequence[int]
    text: str


def sequence_mismatch(reference: Answer, answer: Answer) -> float:
    """1 if the two answers differ in any token, else 0."""
    return float(list(reference.ids) != list(answer.ids))


def rouge_l(reference: str, answer: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words, 1 for equal answers.

    Words are runs of letters and digits, in lower case, of scripts without spaces the characters. Answers
    without words are equal or not as texts.

    Example:
      >>> rouge_l("The tank holds 1 litre.", "The tank holds 2 litres."), rouge_l("水箱", "水管")
      (0.6, 0.5)

    Reference:
      Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries (aclanthology.org/W04-1013).
    """
    a, b = runs(reference), runs(answer)
    if not a or not b:
        return float(plain(reference) == plain(answer))
    lengths = [0] * (len(b) + 1)  # of what the words so far and each beginning of b have in common
    for word in a:
        before, lengths = lengths, [0]
        for j, other in enumerate(b):
            lengths.append(before[j] + 1 if word == other else max(before[j + 1], lengths[j]))
    return 2 * lengths[-1] / (len(a) + len(b))


ANSWER_METRICS: dict[str, Callable[[Answer, Answer], float]] = {
    "sequence_mismatch": sequence_mismatch,
    "rouge_l": lambda reference, answer: rouge_l(reference.text, answer.text),
}
"""Measured on every free-running answer, against the full context's."""


NO_GAP = 1e-3
"""KL of a bracket, in nats a token, below which it says what the full context says: there is no gap."""


def interval(
    totals: np.ndarray | Sequence[float], counts: np.ndarray | Sequence[float] | None = None, seed: int = 0
) -> dict[str, float]:
    """The sum of ``totals`` over that of ``counts``, with a 95% percentile bootstrap interval.

    Args:
      totals: one a query, a context, or whatever is drawn anew.
      counts: one a total; 1 each if ``None``.
      seed: of the resampling.

    Returns:
      ``value``, ``low`` and ``high``.

    Reference:
      Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13.
    """
    above = np.asarray(totals, float)
    below = np.ones_like(above) if counts is None else np.asarray(counts, float)
    draws = np.random.default_rng(seed).integers(len(above), size=(_RESAMPLES, len(above)))
    with np.errstate(invalid="ignore"):  # a draw may have nothing to count
        ratios = above[draws].sum(axis=1) / below[draws].sum(axis=1)
    low, high = np.nanpercentile(ratios, [2.5, 97.5])
    return {"value": float(above.sum() / below.sum()), "low": float(low), "high": float(high)}


def gap_closed(
    prompt: tuple[np.ndarray, np.ndarray], bracket: tuple[np.ndarray, np.ndarray], seed: int = 0
) -> dict[str, Any]:
    """1 - KL(σ) / KL(bracket), with a 95% percentile bootstrap interval over queries.

    Args:
      prompt: per query, KL of σ summed over its answer positions, and the number of these.
      bracket: the same of the bracket compared with.
      seed: seed of the resampling.

    Returns:
      ``value``, ``low`` and ``high``; 1 is the full context, 0 the bracket. All are ``None`` where there is
      no gap to close (``NO_GAP``), the last two where there is but one query.
    """
    (ours, counts), (theirs, _) = prompt, bracket
    if theirs.sum() < NO_GAP * counts.sum():
        return dict.fromkeys(("value", "low", "high"))
    left = interval(ours, np.maximum(theirs, 1e-9 * counts), seed)
    low, high = (None, None) if len(ours) < 2 else (1 - left["high"], 1 - left["low"])
    return {"value": 1 - left["value"], "low": low, "high": high}
