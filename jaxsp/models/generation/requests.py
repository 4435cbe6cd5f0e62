"""The requests of a generation: checked, and as arrays that the compiled loop indexes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.models.config import DecoderConfig
from jaxsp.models.generation.sampling import Choices, Sampling, column, round_up, tabulate
from jaxsp.models.generation.stop_strings import Decode
from jaxsp.typing import Array, Int, KeyValues, UserError

CHUNK = 128
"""Longest run of query tokens read at once; a longer query takes several."""


class Requests(NamedTuple):
    """All requests as arrays; or, taken by index, those that the slots serve."""

    ids_BZ: Int[Array, "b z"]
    length_B: Int[Array, " b"]
    max_B: Int[Array, " b"]
    choices: Choices
    after_B: Int[Array, " b"] | None
    """Each one's row of the prefix; None where the prefix has one row."""


def make_table(
    requests: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    key: Array,
    after: Sequence[int] | None = None,
) -> tuple[Requests, int]:
    """The requests as arrays, and the size of the chunks that they are read in."""
    R = round_up(len(requests), 64)
    longest = max(map(len, requests))
    chunk = min(CHUNK, round_up(longest, 16))
    ids_RZ = np.zeros((R, round_up(longest, chunk)), np.int32)
    for ids_Z, request in zip(ids_RZ, requests, strict=False):
        ids_Z[: len(request)] = request
    table = Requests(
        ids_BZ=jnp.asarray(ids_RZ),
        length_B=column([len(request) for request in requests], R),
        max_B=column([sampling.max_tokens for sampling in samplings], R),
        choices=tabulate(samplings, R, key),
        after_B=None if after is None else column(after, R),
    )
    return table, chunk


def check(
    config: DecoderConfig,
    prefix: KeyValues,
    requests: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    after: Sequence[int] | None,
    slots: int,
    key: Array | None,
    decode: Decode | None,
) -> None:
    """Raises ``UserError`` for arguments of ``generate`` that can't be meant."""
    if slots < 1:
        raise UserError(f"slots must be at least 1; got {slots}.")
    if len(samplings) != len(requests):
        raise UserError(f"There are {len(requests)} requests, but {len(samplings)} samplings.")
    if key is not None and not _is_key(key):
        raise UserError(f"key must be one random key, as jax.random.key(0); got {key!r}.")
    rows = _rows(len(prefix.positions), len(requests), after)
    lengths = np.asarray(prefix.next_position)
    for index, (request, sampling) in enumerate(zip(requests, samplings, strict=True)):
        _check_ids(f"Request {index}", request, config.vocab_size)
        before = int(lengths[rows[index]])
        needed = before + len(request) + sampling.max_tokens
        if needed > config.window:
            raise UserError(
                f"Request {index} has {len(request)} tokens; with the prefix ({before}) and max_tokens"
                f" ({sampling.max_tokens}) that is {needed}, more than the model's window of"
                f" {config.window}. Shorten one of them."
            )
        if max(sampling.stop_ids, default=0) >= config.vocab_size:
            raise UserError(
                f"Stop id {max(sampling.stop_ids)} is not a token: the vocabulary has"
                f" {config.vocab_size}."
            )
        if sampling.temperature and key is None:
            raise UserError(
                f"Temperature {sampling.temperature} needs a key, as jax.random.key(0)."
            )
        if sampling.stop_strings and decode is None:
            raise UserError(
                f"Stop strings {sampling.stop_strings} need decode, to read the answer."
            )


def _rows(P: int, count: int, after: Sequence[int] | None) -> np.ndarray:
    """The row of the prefix that each request is read after."""
    if after is None and P == 1:
        return np.zeros(count, int)
    if after is None:
        raise UserError(
            f"The prefix must have one row (batch size 1); got {P}, which need after=..., the row of each"
            " request."
        )
    rows = np.asarray(after)
    if rows.shape != (count,) or (
        count and (rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= P)
    ):
        raise UserError(
            f"after must have a row of the prefix, from 0 to {P - 1}, for each of the {count} requests;"
            f" got {after!r:.60}."
        )
    return rows


def _check_ids(name: str, request: Sequence[int], vocab: int) -> None:
    ids = np.asarray(request)
    if ids.ndim == 1 and not len(ids):
        raise UserError(f"{name} is empty; give at least one token to read.")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UserError(f"{name} must be a list of token ids; got {request!r:.60}.")
    outside = np.flatnonzero((ids < 0) | (ids >= vocab))
    if len(outside):
        at = outside[0]
        raise UserError(
            f"{name} has the token id {ids[at]} at place {at}; the vocabulary has {vocab}: give ids from"
            f" 0 to {vocab - 1}."
        )


def _is_key(key: Array) -> bool:
    try:
        jax.random.fold_in(key, 0)  # jax's own check
    except (TypeError, ValueError):
        return False
    return True
