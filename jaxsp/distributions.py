"""The model's predictions for rows (z, ŷ) after a prefix: the teacher's and the student's side.

One function serves both. The teacher's prefix is the context c, the student's the soft prompt σ:

    answer_hidden(params, config, context_prefix(...), rows)     the teacher
    answer_hidden(params, config, prompt_prefix(...), rows)      the student

Last hidden states and not logits are what is kept: the frozen head turns them into the exact
distribution at D/V of the memory. All functions are pure and work under jit, grad, vmap and pmap.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxsp.data.examples import Rows
from jaxsp.data.packing import Packing
from jaxsp.losses import Objective, fused_objective
from jaxsp.models import decoder
from jaxsp.models.attention import AttentionInputs, Slots
from jaxsp.models.attention.to_piece import attention_to
from jaxsp.models.config import DecoderConfig
from jaxsp.models.generation import Sampling, generate
from jaxsp.models.output_head import OutputHead
from jaxsp.prompts import DEFAULT_KIND, checked_kind, named_kind
from jaxsp.prompts.initializers import Source, Start
from jaxsp.prompts.initializers.match import fit_to
from jaxsp.prompts.initializers.source import Fit, Probe
from jaxsp.typing import EMPTY, AnyArray, Array, Bool, Float, Int, KeyValues, Params, PyTree, UserError


def context_prefix(
    params: Params, config: DecoderConfig, ids: Int[AnyArray, "1 c"], preamble: KeyValues | None = None
) -> KeyValues:
    """The prefix that a context is: its tokens read once, after ``preamble``, for all rows.

    Args:
      params: the frozen weights.
      config: configuration of the model.
      ids: token ids ``[1, C]``; C may be 0.
      preamble: prefix that stands before it.

    Raises:
      UserError: an id is not of the vocabulary.
    """
    _check_ids(ids, config)
    return decoder.prefill(params, config, decoder.embed(params, config, ids), preamble)


def _check_ids(ids: AnyArray, config: DecoderConfig) -> None:
    """Refuses ids that the vocabulary lacks, where they are known: they would be read as others, or NaN."""
    if not isinstance(ids, jax.core.Tracer) and getattr(ids, "is_fully_addressable", True) and ids.size:
        low, high = int(np.min(ids)), int(np.max(ids))
        if low < 0 or high >= config.vocab_size:
            wrong = low if low < 0 else high
            raise UserError(f"Token ids must lie in [0, {config.vocab_size}), the vocabulary; got {wrong}.")


@functools.partial(jax.jit, static_argnames=("config", "kind"), inline=True)
def prompt_prefix(
    params: Params, config: DecoderConfig, sigma: PyTree, preamble: KeyValues, kind: str = DEFAULT_KIND
) -> KeyValues:
    """The prefix that a soft prompt is, where the context stood; differentiable in ``sigma``.

    Args:
      params: the frozen weights.
      config: configuration of the model.
      sigma: the prompt's parameters, float32 arrays by name: those that the kind's ``FORM`` has, as
        ``PROMPT_KINDS["embedding"].FORM``, which is ``{"embeddings": "k d"}``.
      preamble: prefix that stands before it.
      kind: a key of ``jaxsp.prompts.PROMPT_KINDS``.

    Raises:
      UserError: there is no such kind, or σ has not its form.
    """
    sizes = {"l": config.layers, "g": config.kv_heads, "f": config.head_width, "d": config.width}
    chosen = checked_kind(kind, sigma, sizes)
    return chosen.prefix(sigma, preamble, functools.partial(decoder.prefill, params, config))


MATCHED_TOKENS, PROBED_TOKENS = 1024, 512
"""Tokens of the rows that an initializer is fitted to, and looks at first, at most ..."""

MATCHED_BYTES = 2**30
"""... and as many as have scores of this size in one layer."""

PART_TOKENS = 128
"""Tokens of the rows of each part of a context, in place of these, where it has many."""

THINNED, THINNED_SLOTS = 512, 16384
"""Slots that a part of a context is thinned to before all are matched together, and those of all of them,
about: what is kept in memory does not grow with the parts."""

_Own = Bool[Array, "b s"] | None
"""The slots of the part that each row was taught by; ``None``: the context has one part."""


def initial_prompt(
    params: Params,
    config: DecoderConfig,
    context_ids: Int[np.ndarray, " c"],
    preamble: KeyValues,
    *,
    key: Array,
    prompt_length: int,
    initial: str | None = None,
    kind: str = DEFAULT_KIND,
    rank: int | None = None,
    rows: Rows | None = None,
    part_lengths: Sequence[int] = (),
    part_of: Int[np.ndarray, " n"] | None = None,
) -> PyTree:
    """σ before training.

    Args:
      params: the frozen weights.
      config: configuration of the model.
      context_ids: token ids ``[C]`` of the context; of one in parts, theirs one after the other.
      preamble: prefix that stands before it.
      key: random key, for the initializers that draw.
      prompt_length: K.
      initial: a key of ``jaxsp.prompts.initializers.INITIALIZERS``; by default the kind's own.
      kind: a key of ``jaxsp.prompts.PROMPT_KINDS``.
      rank: rank of a prompt of low rank; by default the one that takes half of the room.
      rows: rows to train on, for the initializers that are fitted to them.
      part_lengths: tokens of each part of the context, where it has several: each is read by itself, and ends
        where the longest does, so that z stands at one place after all of them.
      part_of: ``[N]`` the part that each of the rows was taught by.

    Returns:
      A pytree of float32 arrays.

    Raises:
      UserError: the kind, the initializer or an id is unknown; or the initializer does not suit the kind, or
        needs rows.
    """
    _check_ids(context_ids, config)
    model = params, config, preamble
    lengths = list(part_lengths) or [len(context_ids)]
    parts = np.split(context_ids, np.cumsum(lengths)[:-1])
    context = _Context(*model, parts, rows, part_of, key, prompt_length)

    def read(vectors: Array) -> KeyValues:
        inputs = vectors[None].astype(config.dtype)
        positions = preamble.next_position[:, None] + jnp.arange(prompt_length)[None]
        return decoder.hidden(params, config, inputs, positions, (preamble,))[1]

    def written(ids: Array) -> np.ndarray:
        sampling = Sampling(temperature=1.0, max_tokens=prompt_length)
        (found,) = generate(params, config, decoder.empty_prefix(config), [ids], sampling, key=key)
        return np.array(found)

    has_rows = rows is not None and len(rows) > 0
    source = Source(
        key=key,
        context_ids=context_ids,
        prompt_length=prompt_length,
        heads=(config.layers, config.kv_heads),
        embed=functools.partial(decoder.embed, params, config),
        vocab_size=config.vocab_size,
        read=read,
        context=context.at,
        written=written,
        probed=context.probed if has_rows else None,
        compacted=context.compacted if has_rows else None,
        longest_part=max(lengths),
    )
    chosen = named_kind(kind)
    return chosen.initial(Start(initial or chosen.DEFAULTS["initial"], source, rank))


@dataclasses.dataclass(frozen=True, eq=False)
class _Context:
    """The context as σ starts from it: each part read after the preamble by itself, and when it is needed."""

    params: Params
    config: DecoderConfig
    preamble: KeyValues
    parts: list[Int[np.ndarray, " _"]]
    rows: Rows | None
    part_of: Int[np.ndarray, " n"] | None
    key: Array
    prompt_length: int

    def part(self, i: int) -> KeyValues:
        """A part. All end at one place, after which z stands: it is as far from z as it was in its turn."""
        ids, longest = self.parts[i][None], max(map(len, self.parts))
        read = functools.partial(decoder.read_long, least=longest, skipped=longest - ids.shape[1])
        return _without(self.preamble, read(self.params, self.config, ids, self.preamble))

    def at(self, places: Int[np.ndarray, " n"]) -> KeyValues:
        """The slots of some tokens, by their places in the parts one after the other, ascending."""
        found, first = [decoder.empty_prefix(self.config)], 0
        for i, ids in enumerate(self.parts):
            own = places[(first <= places) & (places < first + len(ids))] - first
            if len(own):
                found.append(_slots(self.part(i), own))
            first += len(ids)
        return KeyValues.joined(found)

    def probed(self, probe: Probe) -> Array:
        """Findings of ``probe``."""
        context, few, own_BS = self._some_rows(PROBED_TOKENS)
        return _probed(self.params, self.config, self.preamble, context, few, probe, own_BS)

    def compacted(self, fit: Fit, counts: Int[AnyArray, "l g"]) -> KeyValues:
        """The slots that ``fit`` makes of all parts."""
        context, few, own_BS = self._some_rows(MATCHED_TOKENS)
        return self._fitted(context, few, fit, counts, own_BS)

    def _fitted(
        self, context: KeyValues, few: Rows, fit: Fit, counts: Int[AnyArray, "l g"], own_BS: _Own = None
    ) -> KeyValues:
        counts = jnp.asarray(counts)
        return _compacted(self.params, self.config, self.preamble, context, few, fit, counts, own_BS)

    def _room(self, slots: int) -> int:
        """Tokens of the rows whose scores have room beside so many slots."""
        return MATCHED_BYTES // (4 * self.config.heads * slots)

    def _some_rows(self, tokens: int) -> tuple[KeyValues, Rows, _Own]:
        """The slots that the rows are fitted to, some rows, and which slots each of them has read."""
        assert self.rows is not None
        context, part_S = self._whole
        room = self._room(context.positions.shape[1])
        if part_S is None:
            return context, _few(self.rows, min(tokens, room), self.key), None
        assert self.part_of is not None
        tokens = min(max(tokens, PART_TOKENS * len(self.parts)), room)
        few, part_B = _few_of_each(self.rows, self.part_of, tokens, self.key)
        return context, few, jnp.asarray(part_B[:, None] == part_S)

    @functools.cached_property
    def _whole(self) -> tuple[KeyValues, Int[np.ndarray, " s"] | None]:
        """All slots, and of a context in parts the part of each."""
        if len(self.parts) == 1:
            return self.part(0), None
        found = [self._thinned(i) for i in range(len(self.parts))]
        sizes = [kv.positions.shape[1] for kv in found]
        spare = decoder.round_size(sum(sizes)) - sum(sizes)  # so that other contexts share the programs
        joined = KeyValues.joined([*found, decoder.empty_prefix(self.config, spare)])
        return joined, np.repeat([*range(len(sizes)), EMPTY], [*sizes, spare])

    def _thinned(self, i: int) -> KeyValues:
        """A part with as many slots as there is room for beside the others, matched to its own rows."""
        assert self.rows is not None
        assert self.part_of is not None
        count, size = len(self.parts), len(self.parts[i])
        most = max(min(THINNED, THINNED_SLOTS // count), 8 * self.prompt_length // count)
        part, rows = self.part(i), self.rows.take(np.flatnonzero(self.part_of == i))
        if size <= most or not len(rows):  # what no row has read is spread
            return _slots(part, np.linspace(0, size - 1, min(size, most)).round().astype(int))
        few = _few(rows, min(MATCHED_TOKENS, self._room(size)), self.key)
        counts = np.full((self.config.layers, self.config.kv_heads), most)
        return self._fitted(part, few, fit_to(most), counts)


@jax.jit
def _without(preamble: KeyValues, prefix: KeyValues) -> KeyValues:
    """The part of a prefix behind the preamble."""
    size = preamble.positions.shape[1]
    return KeyValues(prefix.keys[:, :, size:], prefix.values[:, :, size:], prefix.positions[:, size:])


@jax.jit
def _slots(prefix: KeyValues, index: Int[AnyArray, " n"]) -> KeyValues:
    """Some slots of a prefix."""
    return KeyValues(prefix.keys[:, :, index], prefix.values[:, :, index], prefix.positions[:, index])


def _few(rows: Rows, tokens: int, key: Array) -> Rows:
    """Some of the rows, packed: as many as have so many tokens together, at least one."""
    lengths = rows.lengths
    order = np.asarray(jax.random.permutation(key, len(rows)))
    order = order[: max(1, int((np.cumsum(lengths[order]) <= tokens).sum()))]
    packing = Packing.for_all(lengths[order], most_rows=len(rows)).grown(lengths[order])
    targets = {"tokens": rows.targets["tokens"]}  # the others are large, and not read here
    return packing.pack(dataclasses.replace(rows, targets=targets), order)


def _few_of_each(
    rows: Rows, part_of: Int[np.ndarray, " n"], tokens: int, key: Array
) -> tuple[Rows, Int[np.ndarray, " b"]]:
    """The same of every part alike, each in a row of its own; and the part of each row."""
    lengths, order = rows.lengths, np.asarray(jax.random.permutation(key, len(rows)))
    parts = np.unique(part_of)
    each = [order[part_of[order] == part] for part in parts]
    each = [o[: max(1, int((np.cumsum(lengths[o]) <= tokens // len(parts)).sum()))] for o in each]
    packing = Packing(1, decoder.round_size(max(int(lengths[some].sum()) for some in each)))
    rows = dataclasses.replace(rows, targets={"tokens": rows.targets["tokens"]})
    packed = [packing.pack(rows, some) for some in each]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *packed), parts


@functools.partial(jax.jit, static_argnames=("config", "fit"))
def _compacted(
    params: Params,
    config: DecoderConfig,
    preamble: KeyValues,
    context: KeyValues,
    rows: Rows,
    fit: Fit,
    counts_LG: Int[Array, "l g"],
    own_BS: _Own = None,
) -> KeyValues:
    """The slots that ``fit`` makes of the context, as ``rows`` are read after it."""
    end = context.next_position[:, None]

    def rewrite(inputs: AttentionInputs, counts_G: Array) -> tuple[tuple[Slots, ...], Slots]:
        *before, piece, _ = inputs.slots
        found = attention_to(inputs, len(before), own_BS)
        of_heads = found.scores, found.weight, found.values, counts_G
        chosen_GK, bias_GK, values_GKF = jax.vmap(fit, (0, 0, 0, 0, None))(*of_heads, found.own)
        if piece.bias is not None:  # those that a slot stood for already
            bias_GK += jnp.take_along_axis(piece.bias[0].T, chosen_GK, axis=1)
        keys_GKF = jnp.take_along_axis(found.keys, chosen_GK[..., None], axis=1)
        count = chosen_GK.shape[1]
        where = jnp.maximum(end - count + jnp.arange(count)[None], EMPTY)  # in every sliding window
        keys_KGF, values_KGF = keys_GKF.swapaxes(0, 1), values_GKF.swapaxes(0, 1)
        new = Slots(keys_KGF[None], values_KGF[None], where, bias=bias_GK.T[None])
        return (*before, new), new

    new = _rewritten(params, config, preamble, context, rows, rewrite, counts_LG)
    return KeyValues(new.keys, new.values, new.positions[0], new.bias)


@functools.partial(jax.jit, static_argnames=("config", "probe"))
def _probed(
    params: Params,
    config: DecoderConfig,
    preamble: KeyValues,
    context: KeyValues,
    rows: Rows,
    probe: Probe,
    own_BS: _Own = None,
) -> Array:
    """The findings of ``probe`` in every head as ``rows`` are read after the context, ``[L, G, ...]``."""

    def rewrite(inputs: AttentionInputs, own: None) -> tuple[tuple[Slots, ...], Array]:
        del own
        *before, piece, _ = inputs.slots
        found = attention_to(inputs, len(before), own_BS)
        if own_BS is not None:
            piece = piece._replace(positions=jnp.where(own_BS, piece.positions, EMPTY))
        probes = jax.vmap(probe, (0, 0, 0, None))(found.scores, found.weight, found.values, found.own)
        return (*before, piece), probes

    return _rewritten(params, config, preamble, context, rows, rewrite)


def _rewritten(
    params: Params,
    config: DecoderConfig,
    preamble: KeyValues,
    context: KeyValues,
    rows: Rows,
    rewrite: decoder.Rewrite,
    own: PyTree = None,
) -> PyTree:
    """Everything that ``rewrite`` keeps of the layers; the context is the last piece but the rows' own."""
    end = context.next_position[:, None]
    positions = jnp.where(rows.offsets == EMPTY, EMPTY, end + rows.offsets)
    inputs = decoder.embed(params, config, rows.tokens)
    past = tuple(kv for kv in (preamble, context) if kv.positions.shape[1])
    return decoder.rewrite_layers(params, config, inputs, positions, past, rows.segment_ids, rewrite, own)


def answer_hidden(
    params: Params, config: DecoderConfig, prefix: KeyValues, rows: Rows
) -> Float[Array, "b a d"]:
    """Last hidden states at the positions that predict ŷ, reading ``rows`` after ``prefix``."""
    _check_ids(rows.tokens, config)
    start = prefix.next_position[:, None]
    positions = jnp.where(rows.offsets == EMPTY, EMPTY, start + rows.offsets)
    inputs = decoder.embed(params, config, rows.tokens)
    states, _ = decoder.hidden(params, config, inputs, positions, (prefix,), rows.segment_ids)
    return jnp.take_along_axis(states, jnp.asarray(rows.answer_index)[..., None], axis=1)


def prompt_hidden(
    params: Params,
    config: DecoderConfig,
    sigma: PyTree,
    preamble: KeyValues,
    rows: Rows,
    kind: str = DEFAULT_KIND,
) -> Float[Array, "b a d"]:
    """The student's last hidden states: ``answer_hidden`` after ``prompt_prefix``."""
    prefix = prompt_prefix(params, config, sigma, preamble, kind)
    return answer_hidden(params, config, prefix, rows)


def compare(
    objective: str | Objective,
    states: Float[Array, "*m b a d"],
    head: OutputHead,
    rows: Rows,
    teacher_head: OutputHead | None = None,
    metrics: Sequence[str] = (),
) -> tuple[Float[Array, "*m b a"], dict[str, Array]]:
    """Values of an objective, and of metrics, between what the teacher said and these last hidden states.

    Args:
      objective: its text, or itself; its gradient flows to ``states``.
      states: last hidden states at the answer positions.
      head: head of the model that they come from.
      rows: with the teacher's targets.
      teacher_head: head of the teacher, if it is another model; it has no more tokens than ``head``. Those
        that it lacks, which no text has, are left out.
      metrics: further objectives, as text.
    """
    unembedding, other = head.unembedding, {}
    if teacher_head is not None:
        tokens = teacher_head.unembedding.shape[0]
        unembedding = unembedding if unembedding.shape[0] == tokens else unembedding[:tokens]
        softcap = math.inf if teacher_head.softcap is None else teacher_head.softcap
        other = {"teacher_unembedding": teacher_head.unembedding, "teacher_softcap": softcap}
    mask, given = jnp.asarray(rows.mask), {**other, **rows.teacher_inputs}
    return fused_objective(
        objective, states, unembedding, mask, metrics=metrics, softcap=head.softcap, **given
    )


def log_probs(params: Params, config: DecoderConfig, prefix: KeyValues, rows: Rows) -> Float[Array, "b a v"]:
    """log p(· | prefix, z, ŷ<t) at every answer position, float32: the exact distributions.

    For a few rows at a time; training and evaluation go by ``answer_hidden`` instead.

    Example:
      >>> import jaxsp, numpy as np
      >>> from jaxsp import distributions as d
      >>> from jaxsp.data.examples import make_rows
      >>> model = jaxsp.load_model("smollm2-135m-instruct", dtype="float32")
      >>> ids = np.array([model.tokenizer("Paris is in").input_ids])
      >>> rows = make_rows([[506]], [[314, 260]])
      >>> prefix = d.context_prefix(model.params, model.config, ids)
      >>> d.log_probs(model.params, model.config, prefix, rows).shape
      (1, 2, 49152)
    """
    states = answer_hidden(params, config, prefix, rows)
    return jax.nn.log_softmax(decoder.unembed(params, config, states), axis=-1)
