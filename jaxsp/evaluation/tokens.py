"""The held-out answers token by token: the KL at each, and the likeliest tokens of both distributions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.evaluation.brackets import Measured
from jaxsp.losses.chunked_head import product
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.output_head import OutputHead
from jaxsp.teacher.problem import Problem
from jaxsp.typing import AnyArray, Array, Bool, Float, Int, ceil_div

LIKELIEST = 5
"""Tokens of each distribution that are kept."""

MOST_TOKENS = 1000
"""Answer tokens of a run that are kept, about 200 bytes each: those of the answers with the largest KL."""

_CHUNK = 64
"""Positions at a time: one program for all."""


def decisive(
    model: LanguageModel, problem: Problem, measured: Mapping[str, Measured]
) -> Bool[np.ndarray, "n a"]:
    """Whether an answer token is decisive: the model gets it wrong without the context, and right with it.

    The teacher's own answers it always gets right. In place of one that was given it may say another token: σ
    is then not praised for saying that, too.

    Args:
      model: the frozen model.
      problem: the queries, and what the teacher said.
      measured: by bracket; of these ``no_context`` is looked at.
    """
    found = problem.rows.mask & (measured["no_context"].positions["zero_one"] > 0)
    is_given = np.array([ids is not None for ids in problem.job.given_ids])
    query, place = np.nonzero(found & is_given[:, None])
    right = _first(model, problem, query, place) == problem.rows.targets["tokens"][query, place]
    found[query, place] = right
    return found


def _first(
    model: LanguageModel, problem: Problem, query: Int[np.ndarray, " p"], place: Int[np.ndarray, " p"]
) -> Int[np.ndarray, " p"]:
    """The tokens that the teacher puts first at these places of answers; their own where that isn't known."""
    targets = problem.rows.targets
    found = targets["tokens"][query, place]
    for name, rows in problem.wanted.rows(problem.job.is_train).items():
        (here,) = np.nonzero(np.isin(query, rows))
        if name not in targets or not len(here):
            continue
        places = list(zip(query[here].tolist(), place[here].tolist(), strict=True))
        if name == "top_k":
            found[here] = [targets[name][1][i, a][0] for i, a in places]
        else:
            head = problem.teacher_head or OutputHead.of(model.params, model.config)
            states = np.stack([np.asarray(targets["hidden"][i, a]) for i, a in places])
            found[here] = _best(head, states, head.unembedding.shape[0])[1][:, 0]
    return found


def by_token(
    model: LanguageModel, problem: Problem, measured: Mapping[str, Measured]
) -> list[dict[str, Any]]:
    """The held-out answers token by token, from what was measured; the model is not run again.

    Args:
      model: the frozen model.
      problem: the queries, and what the teacher said.
      measured: by bracket; ``prompt`` with its states, and ``no_context``.

    Returns:
      For each query, that with the largest KL first: ``row``, its number in the report's ``queries``;
      ``pieces``, the text of each token of the teacher's answer (all of them are the answer); ``kl`` and
      ``kl_no_context`` in nats; ``decisive``, whether only the context makes the model say it; ``prompt``
      and, if it is known, ``full_context``: the likeliest tokens of each distribution, as pairs of text and
      probability.
    """
    kl, none = (measured[name].positions["kl"] for name in ("prompt", "no_context"))
    decides, mask = decisive(model, problem, measured), problem.rows.mask
    states, counts = measured["prompt"].states or {}, mask.sum(axis=1)
    order = sorted(states, key=lambda i: -float(kl[i].sum() / counts[i]))
    chosen = [i for i, before in zip(order, np.cumsum(counts[order]), strict=True) if before <= MOST_TOKENS]
    chosen = chosen or order[:1]
    if not chosen:
        return []
    text = functools.lru_cache(maxsize=None)(lambda token: _decoded(model, [token]))
    own = OutputHead.of(model.params, model.config)
    heads, sides = {"prompt": own}, {"prompt": [states[i] for i in chosen]}
    if "hidden" in problem.rows.targets:
        hidden = problem.rows.targets["hidden"]
        heads["full_context"] = problem.teacher_head or own
        sides["full_context"] = [np.asarray(hidden[i, : counts[i]]) for i in chosen]
    vocabulary = min(head.unembedding.shape[0] for head in heads.values())
    likeliest = {name: _likeliest(heads[name], side, vocabulary, text) for name, side in sides.items()}
    found = []
    for place, i in enumerate(chosen):
        here = mask[i]
        found.append(
            {
                "row": i,
                "pieces": pieces(
                    problem.rows.targets["tokens"][i, here].tolist(), functools.partial(_decoded, model)
                ),
                "kl": _rounded(kl[i, here]),
                "kl_no_context": _rounded(none[i, here]),
                "decisive": decides[i, here].tolist(),
                **{name: side[place] for name, side in likeliest.items()},
            }
        )
    return found


def pieces(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each token adds; a character of several tokens comes with its last one.

    Args:
      ids: the tokens.
      decode: gives the text of some tokens.

    Example:
      >>> pieces([0, 1, 2], lambda ids: "né!"[: len(ids)] if len(ids) != 2 else "n\\N{REPLACEMENT CHARACTER}")
      ['n', '', 'é!']
    """
    found, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        is_whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        if not is_whole:
            found.append("")
        elif text.startswith(shown):
            found.append(text[len(shown) :])
            shown = text
        else:  # a tokenizer that writes an earlier part in another way now
            found.append(decode(ids[end - 1 : end]))
            shown = text
    return found


def _decoded(model: LanguageModel, ids: Sequence[int]) -> str:
    tokenizer: Any = model.tokenizer  # there is one: it has encoded the queries
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]


def _likeliest(
    head: OutputHead, states: Sequence[np.ndarray], vocabulary: int, text: Callable[[int], str]
) -> list[list[list[list[Any]]]]:
    """The likeliest tokens of each position of each answer, as text, with their probabilities."""
    probabilities, ids = _best(head, np.concatenate(states), vocabulary)
    pairs = [
        [[text(int(token)), round(float(p), 4)] for token, p in zip(some, chances, strict=True)]
        for some, chances in zip(ids, probabilities, strict=True)
    ]
    ends = np.cumsum([len(own) for own in states]).tolist()
    return [pairs[end - len(own) : end] for end, own in zip(ends, states, strict=True)]


def _best(head: OutputHead, states: Float[AnyArray, "p d"], vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest probabilities at each position, ``[P, 5]``, and their tokens, chunk by chunk."""
    count = len(states)
    padded = np.zeros((ceil_div(count, _CHUNK) * _CHUNK, states.shape[1]), states.dtype)
    padded[:count] = states
    parts = [_top(head, padded[i : i + _CHUNK], vocabulary) for i in range(0, len(padded), _CHUNK)]
    probabilities, ids = (np.concatenate([np.asarray(part[j]) for part in parts]) for j in range(2))
    return probabilities[:count], ids[:count]


@functools.partial(jax.jit, static_argnames="vocabulary")
def _top(head: OutputHead, states: Float[AnyArray, "p d"], vocabulary: int) -> tuple[Array, Array]:
    """The largest probabilities at each position, ``[P, 5]``, and their tokens."""
    states = jnp.asarray(states)
    logits = product("pd,vd->pv", states, head.unembedding[:vocabulary], states.dtype)
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    best, ids = jax.lax.top_k(logits, min(LIKELIEST, vocabulary))
    return jnp.exp(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)), ids
