"""Answers to requests that are all there from the start: many at once, or one token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxsp.models.config import DecoderConfig
from jaxsp.models.generation import engine
from jaxsp.models.generation.engine import Progress
from jaxsp.models.generation.requests import TokenIds, Work
from jaxsp.models.generation.sampling import Sampling, round_up
from jaxsp.models.generation.stop_strings import Decode, certain, stop_at
from jaxsp.typing import AnyArray, Array, Float, KeyValues, Params


def generate(
    params: Params,
    config: DecoderConfig,
    prefix: KeyValues,
    requests: Sequence[TokenIds] | AnyArray,
    sampling: Sampling | Sequence[Sampling],
    *,
    after: Sequence[int] | AnyArray | None = None,
    slots: int = 16,
    key: Array | None = None,
    decode: Decode | None = None,
    together: bool = False,
    on_finished: Callable[[int, list[int]], None] = lambda index, ids: None,
) -> list[list[int]]:
    """Continues every request; requests wait in order for one of the slots.

    An answer depends on its request, its place in ``requests`` and the key, or on its own key alone, not on
    the slots or on the other requests; in bfloat16 up to rounding, by which a token that is nearly as
    probable can win.

    Args:
      params: the frozen weights.
      config: configuration of the model.
      prefix: read before every request: one row, never copied per slot; or several rows, which may hold
        ``EMPTY`` slots, each read before the requests that name it. Of these each slot keeps a copy.
      requests: token ids to read after the prefix, none empty; lists or arrays.
      sampling: for all requests, or one for each.
      after: the row of ``prefix`` that each request is read after; needed if there are several.
      slots: number of sequences that decode together.
      key: random key of the draws, or an array of one for each request; needed if any temperature is above 0.
      decode: the text of token ids; needed if there are stop strings.
      together: read requests when a whole group of them can be, and long ones in several chunks. That gives
        more tokens a second where many short answers are wanted of longer requests, best if those of like
        length stand together; a single answer comes later.
      on_finished: called with the index and the tokens of each answer as it ends.

    Returns:
      The tokens of each answer, in the order of the requests; a stop id that ended it is its last.

    Raises:
      UserError: a request that is empty, too long for the model's window or no token ids; a row that
        the prefix doesn't have; a missing argument.

    Example:
      >>> import jaxsp
      >>> from jaxsp.models import decoder
      >>> model = jaxsp.load_model("smollm2-135m-instruct", dtype="float32")
      >>> nothing = decoder.empty_prefix(model.config)
      >>> requests = model.tokenizer(["The capital of France is", "One, two, three,"]).input_ids
      >>> sampling = Sampling(max_tokens=2)
      >>> answers = generate(model.params, model.config, nothing, requests, sampling)
      >>> model.tokenizer.batch_decode(answers)
      [' Paris.', ' four,']
    """
    samplings = [sampling] * len(requests) if isinstance(sampling, Sampling) else list(sampling)
    answers: list[list[int]] = [[] for _ in requests]
    work = Work(config, prefix, requests, samplings, slots, key, decode, after, together)
    for index, ids, ended in _run(_batch(params, work), work):
        if ended:
            answers[index] = ids
            on_finished(index, ids)
    return answers


def generate_with_log_probs(
    params: Params,
    config: DecoderConfig,
    prefix: KeyValues,
    requests: Sequence[TokenIds] | AnyArray,
    sampling: Sampling,
    *,
    after: Sequence[int] | AnyArray | None = None,
    slots: int = 16,
) -> tuple[list[list[int]], list[Float[np.ndarray, " _"]]]:
    """Greedy answers, as ``generate`` gives them, and how probable each of their tokens was.

    Args:
      params: as in ``generate``, and so are the others.
      config: configuration of the model.
      prefix: one row, or several.
      requests: token ids to read after the prefix.
      sampling: for all requests; its temperature must be 0.
      after: the row of ``prefix`` of each request.
      slots: number of sequences that decode together.

    Returns:
      The tokens of each answer; and natural logarithms of their probabilities, by the model's whole softmax.

    Raises:
      UserError: as ``generate``.

    Example:
      >>> import jaxsp
      >>> from jaxsp.models import decoder
      >>> model = jaxsp.load_model("smollm2-135m-instruct", dtype="float32")
      >>> request, sampling = model.tokenizer.encode("The capital of France is"), Sampling(max_tokens=2)
      >>> arguments = model.params, model.config, decoder.empty_prefix(model.config), [request], sampling
      >>> (answer,), (logs,) = generate_with_log_probs(*arguments)
      >>> model.tokenizer.decode(answer), len(logs), bool((logs < 0).all())
      (' Paris.', 2, True)
    """
    work = Work(config, prefix, requests, [sampling] * len(requests), slots, None, None, after, likely=True)
    answers: list[list[int]] = [[] for _ in requests]
    batch = _batch(params, work)
    for index, ids, ended in _run(batch, work):
        if ended:
            answers[index] = ids
    found = None if batch is None else batch.likely()
    if found is None:
        return answers, []
    logs_RA = np.asarray(found.chosen_RA)
    return answers, [logs_RA[i, : len(ids)] for i, ids in enumerate(answers)]


def stream(
    params: Params,
    config: DecoderConfig,
    prefix: KeyValues,
    request: TokenIds,
    sampling: Sampling,
    *,
    key: Array | None = None,
    decode: Decode | None = None,
) -> Iterator[int]:
    """The tokens of one answer as they come: those that ``generate`` returns for this request alone.

    A token that may yet turn out to begin a stop string is held back.

    Args:
      params: the frozen weights.
      config: configuration of the model.
      prefix: read before the request; batch size 1.
      request: token ids to read after the prefix, not empty.
      sampling: rule by which tokens are chosen.
      key: random key of the draws; needed if the temperature is above 0.
      decode: the text of token ids; needed if there are stop strings.

    Raises:
      UserError: as ``generate``.
    """
    work = Work(config, prefix, [request], [sampling], 1, key, decode)

    def tokens() -> Iterator[int]:
        shown = 0
        for _, ids, ended in _run(_batch(params, work), work, steps=1):
            sure = len(ids) if ended else certain(ids, sampling.stop_strings, decode)
            yield from ids[shown:sure]
            shown = max(shown, sure)

    return tokens()


def _batch(params: Params, work: Work) -> engine.Batch | None:
    """The batch that does the work; ``None``: there is nothing to do."""
    if not (total := len(work.requests)):
        return None
    table, chunk = work.table()
    # Rounded, as the table's sizes are: calls with other limits can share the compiled loop.
    A = round_up(max(int(sampling.max_tokens) for sampling in work.samplings), 16)
    B = min(work.slots, round_up(total, engine.GROUP)) if total > 1 else 1
    patient = work.together and B >= engine.MANY
    return engine.Batch(
        params, work.config, work.prefix, table, chunk, B, A, range(total), alternatives=0, patient=patient
    )


def _run(batch: engine.Batch | None, work: Work, steps: int | None = None) -> Iterator[Progress]:
    """All requests that are under way, every ``steps``; each once more as it ends."""
    while batch is not None and batch.busy:
        for row, ids, ended in batch.advance(steps or engine.STEPS):
            end = stop_at(ids, work.samplings[row].stop_strings, work.decode)
            if end is not None:
                batch.drop(row)
            yield Progress(row, ids[:end], ended or end is not None)
