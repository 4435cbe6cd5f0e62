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
from jaxsp.typing import AnyArray, Array, Float, ceil_div

LIKELIEST = 5
"""Tokens of each distribution that are kept."""

MOST_TOKENS = 1000
"""Answer tokens of a run that are kept, about 200 bytes each: those of the answers with the largest KL."""

_CHUNK = 64
"""Positions at a time: one program for all."""


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
    wrong, mask = measured["no_context"].positions["zero_one"], problem.rows.mask
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
                "decisive": (wrong[i, here] > 0).tolist(),
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
    flat = np.concatenate(states)
    padded = np.zeros((ceil_div(len(flat), _CHUNK) * _CHUNK, flat.shape[1]), flat.dtype)
    padded[: len(flat)] = flat
    parts = [_top(head, padded[i : i + _CHUNK], vocabulary) for i in range(0, len(padded), _CHUNK)]
    probabilities, ids = (np.concatenate([np.asarray(part[j]) for part in parts]) for j in range(2))
    pairs = [
        [[text(int(token)), round(float(p), 4)] for token, p in zip(some, chances, strict=True)]
        for some, chances in zip(ids[: len(flat)], probabilities, strict=False)
    ]
    ends = np.cumsum([len(own) for own in states]).tolist()
    return [pairs[end - len(own) : end] for end, own in zip(ends, states, strict=True)]


@functools.partial(jax.jit, static_argnames="vocabulary")
def _top(head: OutputHead, states: Float[AnyArray, "p d"], vocabulary: int) -> tuple[Array, Array]:
    """The largest probabilities at each position, ``[P, 5]``, and their tokens."""
    states = jnp.asarray(states)
    logits = product("pd,vd->pv", states, head.unembedding[:vocabulary], states.dtype)
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    best, ids = jax.lax.top_k(logits, min(LIKELIEST, vocabulary))
    return jnp.exp(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)), ids
