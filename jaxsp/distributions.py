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
import jax.numpy as jnp
import numpy as np

from jaxsp.data.examples import Rows
from jaxsp.data.packing import Packing
from jaxsp.losses import Objective, fused_objective
from jaxsp.models import decoder
from jaxsp.models.attention import AttentionInputs, Slots
from jaxsp.models.attention.to_piece import attention_to
from jaxsp.models.config import DecoderConfig
from jaxsp.models.decoder import OutputHead
from jaxsp.models.generation import Sampling, generate
from jaxsp.prompts import DEFAULT_KIND, PROMPT_KINDS
from jaxsp.prompts.initializers import Source, Start
from jaxsp.prompts.initializers.source import Fit, Probe
from jaxsp.typing import EMPTY, AnyArray, Array, Float, Int, KeyValues, Params, PyTree


def context_prefix(
    params: Params, config: DecoderConfig, ids: Int[AnyArray, "1 c"], preamble: KeyValues | None = None
) -> KeyValues:
    """The prefix that a context is: its tokens read once, after ``preamble``, for all rows.

    Args:
      params: the frozen weights.
      config: configuration of the model.
      ids: token ids ``[1, C]``; C may be 0.
      preamble: prefix that stands before it.
    """
    return decoder.prefill(params, config, decoder.embed(params, config, ids), preamble)


def prompt_prefix(
    params: Params, config: DecoderConfig, sigma: PyTree, preamble: KeyValues, kind: str = DEFAULT_KIND
) -> KeyValues:
    """The prefix that a soft prompt is, where the context stood; differentiable in ``sigma``.

    Args:
      params: the frozen weights.
      config: configuration of the model.
      sigma: the prompt's parameters.
      preamble: prefix that stands before it.
      kind: a key of ``jaxsp.prompts.PROMPT_KINDS``.
    """
    return PROMPT_KINDS[kind].prefix(sigma, preamble, functools.partial(decoder.prefill, params, config))


MATCHED_TOKENS, PROBED_TOKENS = 1024, 512
"""Tokens of the rows that an initializer is fitted to, and looks at first, at most ..."""

MATCHED_BYTES = 2**30
"""... and as many as have scores of this size in one layer."""

read_prompt = jax.jit(prompt_prefix, static_argnames=("config", "kind"))
"""``prompt_prefix``, compiled."""


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
) -> PyTree:
    """σ before training.

    Args:
      params: the frozen weights.
      config: configuration of the model.
      context_ids: token ids ``[C]`` of the context.
      preamble: prefix that stands before it.
      key: random key, for the initializers that draw.
      prompt_length: K.
      initial: a key of ``jaxsp.prompts.initializers.INITIALIZERS``; by default the kind's own.
      kind: a key of ``jaxsp.prompts.PROMPT_KINDS``.
      rank: rank of a prompt of low rank; by default the one that takes half of the room.
      rows: rows to train on, for the initializers that are fitted to them.

    Returns:
      A pytree of float32 arrays.

    Raises:
      UserError: the initializer and the kind don't go together, or it needs rows.
    """

    def read(vectors: Array) -> KeyValues:
        inputs = vectors[None].astype(config.dtype)
        positions = preamble.next_position[:, None] + jnp.arange(prompt_length)[None]
        return decoder.hidden(params, config, inputs, positions, (preamble,))[1]

    def context() -> KeyValues:
        return _without(preamble, decoder.read_long(params, config, context_ids[None], preamble))

    whole = functools.cache(context)

    def some_rows(tokens: int) -> Rows:
        assert rows is not None
        room = MATCHED_BYTES // (4 * config.heads * whole().positions.shape[1])
        return _few(rows, min(tokens, room), key)

    def compacted(fit: Fit, counts: Int[AnyArray, "l g"]) -> KeyValues:
        few = some_rows(MATCHED_TOKENS)
        return _compacted(params, config, preamble, whole(), few, fit, jnp.asarray(counts))

    def probed(probe: Probe) -> Array:
        return _probed(params, config, preamble, whole(), some_rows(PROBED_TOKENS), probe)

    has_rows = rows is not None and len(rows) > 0

    def written(ids: Array) -> np.ndarray:
        sampling = Sampling(temperature=1.0, max_tokens=prompt_length)
        (found,) = generate(params, config, decoder.empty_prefix(config), [ids], sampling, key=key)
        return np.array(found)

    source = Source(
        key=key,
        context_ids=context_ids,
        prompt_length=prompt_length,
        heads=(config.layers, config.kv_heads),
        embed=functools.partial(decoder.embed, params, config),
        vocab_size=config.vocab_size,
        read=read,
        context=context,
        written=written,
        probed=probed if has_rows else None,
        compacted=compacted if has_rows else None,
    )
    chosen = PROMPT_KINDS[kind]
    return chosen.initial(Start(initial or chosen.DEFAULTS["initial"], source, rank))


def _without(preamble: KeyValues, prefix: KeyValues) -> KeyValues:
    """The part of a prefix behind the preamble."""
    size = preamble.positions.shape[1]
    return KeyValues(prefix.keys[:, :, size:], prefix.values[:, :, size:], prefix.positions[:, size:])


def _few(rows: Rows, tokens: int, key: Array) -> Rows:
    """Some of the rows, packed: as many as have so many tokens together, at least one."""
    lengths = rows.lengths
    order = np.asarray(jax.random.permutation(key, len(rows)))
    order = order[: max(1, int((np.cumsum(lengths[order]) <= tokens).sum()))]
    packing = Packing.for_all(lengths[order], most_rows=len(rows)).grown(lengths[order])
    targets = {"tokens": rows.targets["tokens"]}  # the others are large, and not read here
    return packing.pack(dataclasses.replace(rows, targets=targets), order)


@functools.partial(jax.jit, static_argnames=("config", "fit"))
def _compacted(
    params: Params,
    config: DecoderConfig,
    preamble: KeyValues,
    context: KeyValues,
    rows: Rows,
    fit: Fit,
    counts_LG: Int[Array, "l g"],
) -> KeyValues:
    """The slots that ``fit`` makes of the context, as ``rows`` are read after it."""
    end = context.next_position[:, None]

    def rewrite(inputs: AttentionInputs, counts_G: Array) -> tuple[tuple[Slots, ...], Slots]:
        *before, _, _ = inputs.slots
        found = attention_to(inputs, len(before))
        chosen_GK, bias_GK, values_GKF = jax.vmap(fit)(found.scores, found.weight, found.values, counts_G)
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
    params: Params, config: DecoderConfig, preamble: KeyValues, context: KeyValues, rows: Rows, probe: Probe
) -> Array:
    """The findings of ``probe`` in every head as ``rows`` are read after the context, ``[L, G, ...]``."""

    def rewrite(inputs: AttentionInputs, own: None) -> tuple[tuple[Slots, ...], Array]:
        del own
        *before, _ = inputs.slots
        found = attention_to(inputs, len(before) - 1)
        return tuple(before), jax.vmap(probe)(found.scores, found.weight, found.values)

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
