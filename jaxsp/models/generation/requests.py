"""The requests of a generation: checked, and as arrays that the compiled loop indexes."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.models.config import DecoderConfig
from jaxsp.models.generation.sampling import Choices, Sampling, are_keys, column, round_up, tabulate
from jaxsp.models.generation.stop_strings import Decode
from jaxsp.typing import EMPTY, AnyArray, Array, Bool, Int, KeyValues, UserError

TokenIds = Sequence[int] | AnyArray
"""Token ids of one sequence: a list, a tuple or an array."""

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
    likely_B: Bool[Array, " b"] | None = None
    """Whether the probabilities of its tokens are wanted; None: nobody's."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One run's work: the arguments of ``generate``, checked.

    Raises:
      UserError: a request is invalid.
    """

    config: DecoderConfig
    prefix: KeyValues
    requests: Sequence[TokenIds] | AnyArray
    samplings: Sequence[Sampling]
    slots: int
    key: Array | None
    decode: Decode | None
    after: Sequence[int] | AnyArray | None = None
    together: bool = False
    likely: bool = False
    """Whether the probabilities of all tokens are wanted."""

    def __post_init__(self) -> None:
        config = self.config
        if self.slots < 1:
            raise UserError(f"slots must be at least 1; got {self.slots}.")
        if len(self.samplings) != len(self.requests):
            raise UserError(f"There are {len(self.requests)} requests, but {len(self.samplings)} samplings.")
        if self.key is not None:
            several = are_keys(self.key)
            try:
                jax.random.fold_in(self.key[0] if several else self.key, 0)  # jax's own check
                if several and self.key.shape != (len(self.requests),):
                    raise ValueError
            except (TypeError, ValueError) as error:
                raise UserError(
                    "key must be one random key, as jax.random.key(0), or an array of one for each of the"
                    f" {len(self.requests)} requests; got {self.key!r}."
                ) from error
        positions_RS = np.asarray(self.prefix.positions)
        before_R = (positions_RS.max(axis=1, initial=EMPTY) + 1)[self._rows()]
        each = zip(self.requests, self.samplings, before_R, strict=True)
        for index, (request, sampling, before) in enumerate(each):
            check_request(f"Request {index}", config, request, sampling, int(before))
            if sampling.temperature and self.key is None:
                raise UserError(f"Temperature {sampling.temperature} needs a key, as jax.random.key(0).")
            if sampling.stop_strings and self.decode is None:
                raise UserError(f"Stop strings {sampling.stop_strings} need decode, to read the answer.")

    @property
    def several(self) -> bool:
        """Whether there are several prefixes."""
        return len(self.prefix.positions) != 1

    def table(self) -> tuple[Requests, int]:
        """The requests as arrays, and the size of the chunks that they are read in."""
        R = round_up(len(self.requests), 64)
        longest = max(map(len, self.requests))
        usual = statistics.median(map(len, self.requests)) if self.together else longest
        chunk = min(CHUNK, round_up(int(usual), 16))
        after = self._rows().tolist() if self.several else None
        choices = tabulate(self.samplings, R, self.key)
        table = as_arrays(self.requests, self.samplings, choices, after, round_up(longest, chunk))
        return table._replace(likely_B=jnp.ones(R, bool) if self.likely else None), chunk

    def _rows(self) -> np.ndarray:
        """The row of the prefix that each request is read after."""
        rows, count = len(self.prefix.positions), len(self.requests)
        if self.after is None and self.several:
            raise UserError(
                f"The prefix must have one row (batch size 1); got {rows}, which need after=..., the row"
                " of each request."
            )
        after = np.zeros(count, int) if self.after is None else np.asarray(self.after)
        good = after.shape == (count,) and (not count or after.dtype.kind in "iu")
        if not good or np.any((after < 0) | (after >= rows)):
            raise UserError(
                f"after must have a row of the prefix, from 0 to {rows - 1}, for each of the {count}"
                f" requests; got {self.after!r:.60}."
            )
        return after.astype(int)


def as_arrays(
    requests: Sequence[TokenIds] | AnyArray,
    samplings: Sequence[Sampling],
    choices: Choices,
    after: Sequence[int] | None,
    Z: int,
) -> Requests:
    """The requests as arrays, with room for ``Z`` tokens each, and as many rows as ``choices`` has."""
    R = len(choices.stops_BE)
    ids_RZ = np.zeros((R, Z), np.int32)
    for ids_Z, request in zip(ids_RZ, requests, strict=False):
        ids_Z[: len(request)] = request
    return Requests(
        ids_BZ=jnp.asarray(ids_RZ),
        length_B=column([len(request) for request in requests], R),
        max_B=column([sampling.max_tokens for sampling in samplings], R),
        choices=choices,
        after_B=None if after is None else column(after, R),
    )


def check_request(
    name: str, config: DecoderConfig, request: TokenIds, sampling: Sampling, before: int
) -> None:
    """Raises ``UserError`` if a model can't continue a request.

    Args:
      name: the request's, as the error begins.
      config: configuration of the model.
      request: the token ids.
      sampling: rule by which tokens are chosen.
      before: position of the first of them, behind the prefix.
    """
    vocab = config.vocab_size
    _check_ids(name, request, vocab)
    needed = before + len(request) + sampling.max_tokens
    if needed > config.window:
        raise UserError(
            f"{name} has {len(request)} tokens; with the prefix ({before}) and max_tokens"
            f" ({sampling.max_tokens}) that is {needed}, more than the model's window of"
            f" {config.window}. Shorten one of them."
        )
    if (stop := max(sampling.stop_ids, default=0)) >= vocab:
        raise UserError(f"Stop id {stop} is not a token: the vocabulary has {vocab}.")


def _check_ids(name: str, request: TokenIds, vocab: int) -> None:
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
