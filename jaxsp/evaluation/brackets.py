"""The brackets: every quality figure of σ stands between the full context and none."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp import distributions, prompts
from jaxsp.evaluation.certainty import certainty
from jaxsp.evaluation.metrics import at_positions, at_positions_with_states
from jaxsp.models.language_model import LanguageModel
from jaxsp.prompts import PROMPT_KINDS, storage
from jaxsp.settings import Settings
from jaxsp.teacher.answers import answer_ids, answers_with_log_probs
from jaxsp.teacher.problem import Problem, read_part
from jaxsp.typing import EMPTY, Int, KeyValues, PyTree, UserError

BRACKETS = {
    "full_context": "the whole context: what σ should be",
    "prompt": "the trained soft prompt σ",
    "initial": "σ before training",
    "truncated_context": "the context cut to the length of σ",
    "own_context": "the whole context, read by the model itself",
    "retrieved_part": "the part of the context that the query's words are found in",
    "first_part": "the first part of the context alone",
    "no_context": "nothing where the context stood",
}
"""In the order of the report. Those of parts are there where the context has several. Where another model
teaches, the full context is what that one said; beside it is the model's own reading of a context in one."""

IN_PARTS = {"full_context": "the part of the context that the query is taught by: what σ should be"}
"""Names of brackets that are others where the context has several parts."""

TRAINED = ("prompt", "no_context")
"""Conditions measured on the training queries, too, as the verdict compares them there; their answers to the
others are reported."""


CHECKED = 4
"""Held-out queries that are read after the context once more."""
SAME, SAME_IN_16_BITS = 1e-3, 0.05
"""KL, in nats, between what one model says twice: by the rounding of sums in another order."""


class Measured(NamedTuple):
    """A bracket on the queries."""

    positions: dict[str, np.ndarray]
    """Each metric of a position, ``[N, A]``; NaN for queries on which the bracket is not measured."""
    answers: list[list[int]]
    """Free-running answers to the held-out queries, as token ids."""
    states: dict[int, np.ndarray] | None = None
    """Last hidden states ``[A, D]`` at the answer positions of the held-out queries, by their numbers; of σ
    alone."""
    certainties: list[float] | None = None
    """Certainty of each of the answers; of σ alone."""


def measure_all(
    model: LanguageModel,
    problem: Problem,
    sigmas: Mapping[str, PyTree],
    settings: Settings,
    known: Mapping[str, Measured],
) -> dict[str, Measured]:
    """Measures every bracket; the full context is what the teacher said, and not read again.

    Of a context in parts it is the part of each query. Beside it stand the first part, and the part that a
    search finds; where the teacher's parts were found by this search, that is the full context itself.

    Args:
      model: the frozen model.
      problem: the queries, and what the teacher said.
      sigmas: ``prompt``, and ``initial`` where the start is known, of the same length.
      settings: settings of the prompts.
      known: what was measured before and is not measured again.
    """
    preamble, kind = problem.preamble, settings.prompt.kind
    prompt_length = PROMPT_KINDS[kind].prompt_length(sigmas["prompt"])
    vectors = model.embed(problem.job.context_ids[:prompt_length]).astype(jnp.float32)
    prefixes = {
        **{name: _read(model, problem, sigma, kind) for name, sigma in sigmas.items()},
        "truncated_context": _read(model, problem, {"embeddings": vectors}, "embedding"),
        "no_context": preamble,
    }
    new = {name: prefix for name, prefix in prefixes.items() if name not in known}
    measured = {**known, **measure(model, problem, new, settings.teacher.max_answer_tokens)}
    if "full_context" not in known:
        check_teacher(model, problem)
        positions, _ = _positions(model, None, problem, held_out_alone=True)
        measured["full_context"] = Measured(positions, problem.job.held_out(problem.answers))
    job, most = problem.job, settings.teacher.max_answer_tokens
    if problem.has_other_teacher and len(job.parts) == 1 and "own_context" not in known:
        # By itself: beside it the others would be as long.
        own = {"own_context": read_part(model, job, 0, problem.preamble)}
        measured |= measure(model, problem, own, most)
    for name, part_of in _parts_read(problem).items():
        if name not in known:
            measured[name] = _after_parts(model, problem, part_of, most)
    return measured


def check_teacher(model: LanguageModel, problem: Problem) -> None:
    """Reads a few held-out queries after the context once more: the model must say what the teacher said.

    Raises:
      UserError: it says something else, so that every figure would be of another text or model.
    """
    job, held_out = problem.job, np.flatnonzero(~problem.job.is_train)
    if problem.has_other_teacher:
        return
    part = int(job.part_of[held_out[0]])
    rows = problem.some(held_out[job.part_of[held_out] == part][:CHECKED])
    prefix = read_part(model, job, part, problem.preamble)
    kl = at_positions(model, prefix, rows, problem.packing, ("kl",))["kl"].sum() / rows.mask.sum()
    if not kl <= (allowed := SAME if model.config.dtype == "float32" else SAME_IN_16_BITS):
        raise UserError(
            f"What the teacher is said to have said is not what the model says after the context: KL {kl:.3g}"
            f" instead of 0 (at most {allowed:g} by rounding). What is kept is of another text or model; run"
            " `jaxsp cache prune --all`, and start anew with --overwrite."
        )


def _parts_read(problem: Problem) -> dict[str, Int[np.ndarray, " n"]]:
    """The part that each query is read after, by the brackets of a context in parts.

    Where the model teaches itself and all are searched for, the part found is the full context itself.
    """
    job = problem.job
    if len(job.parts) == 1:
        return {}
    first = {"first_part": np.zeros_like(job.part_of)}
    searched = not any(query.span for query in job.held_out(job.queries))
    searched = searched and not problem.has_other_teacher
    return first if searched else {"retrieved_part": job.found, **first}


def _after_parts(
    model: LanguageModel, problem: Problem, part_of: Int[np.ndarray, " n"], max_tokens: int
) -> Measured:
    """The held-out queries, each after one part: the teacher's own where it read that one, else read anew."""
    job = problem.job
    positions, _ = _positions(model, None, problem, held_out_alone=True)
    answers = {i: problem.answers[i] for i in np.flatnonzero(~job.is_train).tolist()}
    others = [i for i in answers if problem.has_other_teacher or part_of[i] != job.part_of[i]]
    for part in np.unique(part_of[others]).tolist():
        some = [i for i in others if part_of[i] == part]
        prefix = read_part(model, job, part, problem.preamble)
        rows, head = problem.some(some), problem.teacher_head
        for name, values in at_positions(model, prefix, rows, problem.packing, teacher_head=head).items():
            positions[name][some] = values
        queries = [job.query_ids[i] for i in some]
        answers |= zip(some, answer_ids(model, prefix, queries, max_tokens=max_tokens), strict=True)
    return Measured(positions, list(answers.values()))


def storage_costs(
    model: LanguageModel, problem: Problem, sigma: PyTree, settings: Settings
) -> dict[str, dict[str, float]]:
    """Bytes of σ in each dtype that it can be saved in, and its held-out KL after that.

    Args:
      model: the frozen model.
      problem: the queries, and what the teacher said.
      sigma: σ as it was trained.
      settings: settings of the prompt.
    """
    found = {}
    for dtype in storage.DTYPES:
        stored = storage.pack(sigma, dtype)
        prefix = _read(model, problem, storage.unpack(stored), settings.prompt.kind)
        found[dtype] = {"bytes": storage.size(stored), "kl": _held_out_kl(model, problem, prefix)}
    return found


def prefill_seconds(
    model: LanguageModel, problem: Problem, sigma: PyTree, settings: Settings, known: float | None = None
) -> dict[str, float]:
    """Seconds to prepare the prefix, of σ and of the context (its longest part); compiled and loaded.

    Args:
      model: the frozen model.
      problem: the queries, and what the teacher said.
      sigma: σ as it is saved.
      settings: settings of the prompt.
      known: those of the whole context, where they were measured before.
    """
    job = problem.job
    longest = job.parts.index(job.longest_part)

    def seconds(read: Callable[[], KeyValues]) -> float:
        jax.block_until_ready(read())  # may compile
        begun = time.perf_counter()
        jax.block_until_ready(read())
        return time.perf_counter() - begun

    if known is None:
        known = seconds(lambda: read_part(model, job, longest, problem.preamble))
    own = seconds(lambda: _read(model, problem, sigma, settings.prompt.kind))
    return {"prompt": own, "full_context": known}


def length_curve(
    model: LanguageModel, problem: Problem, sigma: PyTree, settings: Settings
) -> dict[str, float]:
    """Held-out KL of each prompt that σ holds, by its length; empty if there is but one.

    Args:
      model: the frozen model.
      problem: the queries, and what the teacher said.
      sigma: σ as it is saved.
      settings: settings of the prompt.
    """
    kind = settings.prompt.kind
    lengths = prompts.lengths(kind, sigma)
    if len(lengths) == 1:
        return {}
    each = [prompts.cut(kind, sigma, length) for length in lengths]
    prefixes = KeyValues.alike([_read(model, problem, own, own_kind) for own_kind, own in each])
    found = (_held_out_kl(model, problem, prefix) for prefix in prefixes)
    return dict(zip(map(str, lengths), found, strict=True))


def _read(model: LanguageModel, problem: Problem, sigma: PyTree, kind: str) -> KeyValues:
    return distributions.prompt_prefix(model.params, model.config, sigma, problem.preamble, kind)


def _held_out_kl(model: LanguageModel, problem: Problem, prefix: KeyValues) -> float:
    held_out = problem.held_out
    kl = at_positions(model, prefix, held_out, problem.packing, ["kl"], problem.teacher_head)["kl"]
    return float(kl.sum() / held_out.mask.sum())


def measure(
    model: LanguageModel, problem: Problem, found: Mapping[str, KeyValues], max_tokens: int
) -> dict[str, Measured]:
    """Measures brackets; what is the same is measured once.

    Answers are generated together, and positions read by one program.

    Args:
      model: the frozen model.
      problem: the queries, and what the teacher said.
      found: prefixes by name.
      max_tokens: longest free-running answer.
    """
    found = dict(zip(found, KeyValues.alike(list(found.values())), strict=True))
    keys = {name: _key(prefix) for name, prefix in found.items()}
    trained = {keys[name] for name in TRAINED if name in keys}
    distinct = {keys[name]: prefix for name, prefix in found.items()}
    queries, count = problem.job.held_out(problem.job.query_ids), len(distinct)
    stacked = KeyValues.side_by_side(list(distinct.values()))
    after = np.repeat(np.arange(count), len(queries)).tolist() if count > 1 else None
    answers, logs = answers_with_log_probs(
        model, stacked, queries * count, max_tokens=max_tokens, after=after
    )
    measured = {}
    for i, (key, prefix) in enumerate(distinct.items()):
        here, with_states = slice(i * len(queries), (i + 1) * len(queries)), key == keys.get("prompt")
        positions, states = _positions(
            model, prefix, problem, held_out_alone=key not in trained, with_states=with_states
        )
        sure = list(map(certainty, logs[here]))
        measured[key] = Measured(positions, answers[here], states if with_states else None, sure)
    # Of the others they would be kept for all jobs that have the same.
    return {
        name: measured[key] if name == "prompt" else measured[key]._replace(states=None, certainties=None)
        for name, key in keys.items()
    }


def _positions(
    model: LanguageModel,
    prefix: KeyValues | None,
    problem: Problem,
    *,
    held_out_alone: bool,
    with_states: bool = False,
) -> tuple[dict[str, np.ndarray], dict[int, np.ndarray]]:
    """The metrics of all queries, NaN of those not measured; and the states of those held out, if wanted."""
    is_train, head = problem.job.is_train, problem.teacher_head
    groups = [np.flatnonzero(~is_train)]
    if not held_out_alone:
        groups = [np.arange(len(problem.rows))]
        if not problem.wanted.is_usual:
            groups = list(problem.wanted.rows(is_train).values())
    every: dict[str, np.ndarray] = {}
    states: dict[int, np.ndarray] = {}
    for index in groups:
        wanted = frozenset(np.flatnonzero(~is_train[index]).tolist() if with_states else [])
        rows = problem.some(index)
        found, own = at_positions_with_states(model, prefix, rows, problem.packing, wanted, teacher_head=head)
        for name, values in found.items():
            every.setdefault(name, np.full(problem.rows.mask.shape, np.nan, np.float32))[index] = values
        states |= {int(index[i]): some for i, some in own.items()}
    return every, states


def _key(prefix: KeyValues) -> bytes:
    """Equal for prefixes that are the same where they are attended to; empty slots may hold anything."""
    there = np.asarray(prefix.positions)[0] != EMPTY
    key = hashlib.sha256(np.asarray(prefix.positions)[:, there].tobytes())
    for array in jax.tree.leaves((prefix.keys, prefix.values, prefix.bias)):
        key.update(np.asarray(array)[:, :, there].tobytes())
    return key.digest()
