"""Requests that come and go: each with a prefix and a sampling of its own, in one running loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.models.config import DecoderConfig
from jaxsp.models.generation.engine import Batch
from jaxsp.models.generation.likely import Likely
from jaxsp.models.generation.requests import Requests, TokenIds, as_arrays, check_request
from jaxsp.models.generation.sampling import Sampling, round_up, tabulate
from jaxsp.typing import Array, KeyValues, Params, UserError

SMALLEST, GROWTH = 128, 4
"""Tokens that there is room for where nobody needs more, and the factor to the next size: a step costs as
much as there is room."""

WIDTH_GROWTH = 4
"""The factor from one number of slots that a step computes to the next, from one slot on."""

CHUNK = 32
"""Query tokens read at once: most are short, and all others wait meanwhile."""


class News(NamedTuple):
    """The tokens that a request got in one look, and whether it has ended."""

    row: int
    ids: list[int]
    ended: bool
    likely: Likely | None
    """Probabilities of these tokens, ``[tokens, ...]``, where the request wants them."""


class Live:
    """A loop that requests join while others are under way, and leave before their end.

    A request's tokens depend on itself, its prefix and its seed, not on what else is there; in bfloat16 up to
    rounding. Nothing is compiled after ``warm_up``, whatever the sampling and the lengths of the requests.

    Args:
      params: the frozen weights.
      config: configuration of the model.
      prefixes: with batch size 1 each, of any lengths; a request is read after one of them.
      slots: most sequences that decode together; as many more can wait for the next step. Where fewer are
        there, a step computes fewer.
      query_tokens: longest request.
      answer_tokens: longest answer.
      stops: most stop ids that a request has.

    Example:
      >>> import jaxsp
      >>> from jaxsp.models import decoder
      >>> model = jaxsp.load_model("smollm2-135m-instruct", dtype="float32")
      >>> nothing = decoder.empty_prefix(model.config)
      >>> live = Live(model.params, model.config, [nothing], slots=1, query_tokens=16, answer_tokens=16)
      >>> row = live.add(model.tokenizer.encode("The capital of France is"), Sampling(max_tokens=2))
      >>> [(model.tokenizer.decode(news.ids), news.ended) for news in live.advance(8)]
      [(' Paris.', True)]
    """

    def __init__(
        self,
        params: Params,
        config: DecoderConfig,
        prefixes: Sequence[KeyValues],
        *,
        slots: int,
        query_tokens: int,
        answer_tokens: int,
        stops: int = 8,
    ) -> None:
        prefix = prefixes[0] if len(prefixes) == 1 else KeyValues.side_by_side(KeyValues.alike(prefixes))
        self._config, self._before = config, [one.end for one in prefixes]
        self._sizes = query_tokens, answer_tokens
        rows, chunk = 2 * slots, min(CHUNK, round_up(query_tokens, 16))
        self._room, self._stops, self._several = round_up(query_tokens, chunk), stops, len(prefixes) > 1
        nobody = self._as_arrays([], Sampling(), 0, 0, False)
        self._table: Requests = jax.tree.map(lambda one: one[jnp.zeros(rows, int)], nobody)
        widths = [WIDTH_GROWTH**n for n in range(slots) if WIDTH_GROWTH**n < slots]
        sizes = chunk, slots, round_up(answer_tokens, 16)
        self._batch = Batch(params, config, prefix, self._table, *sizes, widths=widths)
        self._levels = [self._batch.sizes]
        most, size = self._batch.sizes, SMALLEST
        while size < max(most):
            level = min(round_up(size, chunk), most[0]), min(round_up(size, 16), most[1])
            self._levels.insert(-1, level)
            size *= GROWTH
        self._free = list(range(rows))
        self._seen: dict[int, int] = {}  # tokens by rows
        self._wants: dict[int, bool] = {}  # their probabilities
        self._lengths: dict[int, int] = {}  # tokens of the requests

    @property
    def free(self) -> int:
        """Number of requests that can be added."""
        return len(self._free)

    @property
    def busy(self) -> bool:
        """Whether any request waits or is under way."""
        return self._batch.busy

    @property
    def steps(self) -> int:
        """Decoding steps done."""
        return self._batch.steps

    def add(
        self, request: TokenIds, sampling: Sampling, *, after: int = 0, seed: int = 0, likely: bool = False
    ) -> int:
        """Lets a request join; it is read as soon as a slot is free.

        Args:
          request: token ids to read after the prefix, not empty.
          sampling: rule by which tokens are chosen; stop strings are the caller's business.
          after: index of the prefix.
          seed: of the draws; its last 32 bits count.
          likely: whether the probabilities of its tokens are wanted.

        Returns:
          Its row: the request's name until it has ended.

        Raises:
          UserError: the request is invalid or too long, or there is no room.
        """
        if not self._free:
            raise UserError(f"There is no room for more than {len(self._table.length_B)} requests at once.")
        check_request("The request", self._config, request, sampling, self._before[after])
        for what, count, limit in (
            ("tokens", len(request), self._sizes[0]),
            ("tokens to answer", sampling.max_tokens, self._sizes[1]),
            ("stop ids", len(sampling.stop_ids), self._stops),
        ):
            if count > limit:
                raise UserError(f"The request has {count} {what}; there is room for {limit}.")
        row = self._free.pop(0)
        self._table = _put(self._table, self._as_arrays(request, sampling, after, seed, likely), row)
        self._batch.put(row, self._table)
        self._seen[row], self._wants[row], self._lengths[row] = 0, likely, len(request)
        return row

    def drop(self, row: int) -> None:
        """Takes a request out before its end; its slot is free at the next step.

        Args:
          row: the request's; of one that has ended nothing happens.
        """
        if self._seen.pop(row, None) is not None:
            self._batch.drop(row)
            self._free.append(row)

    def advance(self, steps: int) -> list[News]:
        """Decodes so many steps, or until no request is left.

        Args:
          steps: the number; any is the same compiled program.

        Returns:
          The news of each request that was under way.
        """
        found = []
        likely = None
        self._fit(steps)
        for row, ids, ended in self._batch.advance(steps):
            start, stop = self._seen[row], len(ids)
            own = None
            if self._wants[row]:
                likely = likely or self._batch.likely()
                own = jax.tree.map(lambda each, at=(row, slice(start, stop)): each[at].copy(), likely)
            found.append(News(row, ids[start:], ended, own))
            self._seen[row] = stop
            if ended:
                del self._seen[row]
                self._free.append(row)
        return found

    def warm_up(self) -> None:
        """Compiles all that will be needed; nothing may be under way."""
        for level in self._levels:
            for other in self._levels:
                self._batch.resize(*level)
                self._batch.resize(*other)
            self._batch.resize(*level)
            for width in self._batch.widths:
                rows = [self.add([0], Sampling(max_tokens=1)) for _ in range(width)]
                while self.busy:
                    self._batch.advance(1)
                for row in rows:
                    del self._seen[row]
                    self._free.append(row)

    def _fit(self, steps: int) -> None:
        """Makes as much room as the requests need for so many steps, and no more."""
        query = max((self._lengths[row] for row in self._seen), default=0)
        answer = min(max(self._seen.values(), default=0) + steps, self._sizes[1])
        self._batch.resize(*next(level for level in self._levels if query <= level[0] and answer <= level[1]))

    def _as_arrays(
        self, request: TokenIds, sampling: Sampling, after: int, seed: int, likely: bool
    ) -> Requests:
        """One request as a table of its own."""
        key = jax.random.key(np.uint32(seed % 2**32))[None]
        choices = tabulate([sampling], 1, key, stops=self._stops, always=True)
        rows = [after] if self._several else None
        found = as_arrays([request], [sampling], choices, rows, self._room)
        return found._replace(likely_B=jnp.asarray([likely]))


@jax.jit
def _put(table: Requests, own: Requests, row: int | Array) -> Requests:
    """The table with another request in a row."""
    return jax.tree.map(lambda all_R, one_1: all_R.at[row].set(one_1[0]), table, own)
