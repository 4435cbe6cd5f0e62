"""A frozen decoder-only transformer (Flax Linen): embed, hidden, unembed, kept apart.

The layers are stacked and scanned. Keys and values of earlier tokens (a prefix, a cache) come in as
``past``; those of the tokens just read come back, so that prefilling, training and decoding are one
function. Nothing here knows what a prompt is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsp.models.attention import AttentionInputs, Slots, attention
from jaxsp.models.config import DecoderConfig
from jaxsp.models.layers import ACTIVATIONS, Int8Dense, Norm, head_product
from jaxsp.models.rope import rotate, rotation
from jaxsp.models.sharding import weights_are_cut, whole
from jaxsp.typing import EMPTY, AnyArray, Array, Float, Int, KeyValues, Params, PyTree, ceil_div

Rewrite = Callable[[AttentionInputs, Any], tuple[tuple[Slots, ...], PyTree]]
"""From a layer's queries and keys, and what is meant for this layer: the slots that stand there in place of
the pieces read before, and what is kept of it."""


class LayerInputs(NamedTuple):
    """Each layer's own inputs: scanned over, where they differ from layer to layer."""

    past_kv: tuple[tuple[Array, Array, Array | None], ...]
    """Keys, values and bias of each past."""
    rope: Array | None
    """Which of the model's rotations turns this layer; None: its only one, or it has none."""
    sliding_window: Array | None
    """None: the configuration's first is that of all layers, or it has none."""
    rewrite: PyTree = None
    """Inputs of the ``Rewrite``, if there is one."""


class Reading(NamedTuple):
    """Inputs that all layers share: where the tokens stand, and where those read before."""

    positions_BT: Array
    segment_ids_BT: Array | None
    past_positions: tuple[Array, ...]
    rotations: tuple[tuple[Array, Array], ...]
    """Cosine and sine of every position, one pair a distinct rope."""


_Kept = tuple[Array, Array, PyTree]  # a layer's keys and values, and what its rewrite kept


class DecoderLayer(nn.Module):
    """Attention and MLP, each with its norms and its residual.

    The residual stream is float32 in every model: rounded to bfloat16 at each of its sums, it would lose
    more than all else that is rounded. What is kept for the backward pass is in the model's dtype.
    """

    config: DecoderConfig
    rewrite: Rewrite | None = None

    def __call__(self, x_BTD: Array, own: LayerInputs, reading: Reading) -> tuple[Array, _Kept]:
        change = DecoderLayer._change
        if cut := weights_are_cut():
            change = nn.map_variables(change, "params", whole)
        if self.config.remat or cut:  # of whole layers none is kept
            change = nn.remat(change, prevent_cse=False)
        change_BTD, key_values = change(self, x_BTD.astype(self.config.dtype), own, reading)
        return x_BTD + change_BTD, key_values

    @nn.compact
    def _change(self, x_BTD: Array, own: LayerInputs, reading: Reading) -> tuple[Array, _Kept]:
        """The layer's change to the residual stream."""
        pre, post = self.config.pre_norm, self.config.post_norm
        x_BTD = x_BTD.astype(jnp.float32)
        y = self._norm("attention_pre_norm", x_BTD, wanted=pre)
        y, key_values = self._attention(y, own, reading)
        change_BTD = self._norm("attention_post_norm", y, wanted=post).astype(jnp.float32)
        y = self._mlp(self._norm("mlp_pre_norm", x_BTD + change_BTD, wanted=pre))
        return change_BTD + self._norm("mlp_post_norm", y, wanted=post), key_values

    def _norm(self, name: str, x: Array, *, wanted: bool) -> Array:
        return Norm(self.config, name=name)(x) if wanted else x.astype(self.config.dtype)

    def _dense(self, name: str, size: int, x: Array, *, bias: bool) -> Array:
        c = self.config
        if c.quantization == "int8":
            return Int8Dense(c, size, bias, name=name)(x)
        return nn.Dense(size, bias, dtype=c.dtype, param_dtype=c.dtype, precision=c.precision, name=name)(x)

    def _attention(self, x_BTD: Array, own: LayerInputs, reading: Reading) -> tuple[Array, _Kept]:
        c = self.config
        q_BTHF = self._heads("q", c.heads, x_BTD)
        k_BTGF = self._heads("k", c.kv_heads, x_BTD)
        v_BTGF = self._heads("v", c.kv_heads, x_BTD)
        if reading.rotations:
            cos_sin = reading.rotations[0]
            if own.rope is not None:
                cos_sin = jax.tree.map(lambda *all: jnp.stack(all)[own.rope], *reading.rotations)
            q_BTHF, k_BTGF = rotate(q_BTHF, cos_sin), rotate(k_BTGF, cos_sin)
        past = zip(own.past_kv, reading.past_positions, strict=True)
        slots = [Slots(keys, values, at, bias=bias) for (keys, values, bias), at in past]
        slots.append(Slots(k_BTGF, v_BTGF, reading.positions_BT, reading.segment_ids_BT))
        window = next(iter(c.sliding_windows), None) if own.sliding_window is None else own.sliding_window
        inputs = AttentionInputs(
            q_BTHF,
            reading.positions_BT,
            tuple(slots),
            scale=c.head_width**-0.5 if c.query_scale is None else c.query_scale,
            softcap=c.attention_softcap,
            sliding_window=window,
            segment_ids_BT=reading.segment_ids_BT,
            precision=c.precision,
        )
        kept: PyTree = ()
        if self.rewrite is not None:
            before, kept = self.rewrite(inputs, own.rewrite)
            inputs = dataclasses.replace(inputs, slots=(*before, slots[-1]))
        out_BTX = attention(inputs, c.attention).reshape(*x_BTD.shape[:2], -1)
        return self._dense("o_proj", c.width, out_BTX, bias=c.output_bias), (k_BTGF, v_BTGF, kept)

    def _heads(self, name: str, heads: int, x_BTD: Array) -> Array:
        c = self.config
        y_BTX = self._dense(f"{name}_proj", heads * c.head_width, x_BTD, bias=c.qkv_bias)
        if c.qk_norm == "width" and name != "v":
            y_BTX = Norm(c, name=f"{name}_norm")(y_BTX)
        y_BTHF = y_BTX.reshape(*y_BTX.shape[:2], heads, c.head_width)
        if c.qk_norm == "head" and name != "v":
            y_BTHF = Norm(c, name=f"{name}_norm")(y_BTHF)
        return y_BTHF

    def _mlp(self, x_BTD: Array) -> Array:
        c = self.config
        dense = functools.partial(self._dense, bias=c.mlp_bias)
        activation = ACTIVATIONS[c.activation]
        y = activation(dense("gate_proj" if c.gated_mlp else "up_proj", c.mlp_width, x_BTD))
        if c.gated_mlp:
            y *= dense("up_proj", c.mlp_width, x_BTD)
        return dense("down_proj", c.width, y)


class Decoder(nn.Module):
    """The decoder driven by its config; use the functions below, which take ``params`` explicitly."""

    config: DecoderConfig
    rewrite: Rewrite | None = None

    def setup(self) -> None:
        c = self.config
        table = functools.partial(nn.Embed, features=c.width, dtype=c.dtype, param_dtype=c.dtype)
        self.embed_tokens = table(c.vocab_size)
        if not c.ropes:
            self.embed_positions = table(c.window)
        self.layers = nn.scan(
            DecoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast("int", (0, nn.broadcast)),  # one an argument
            length=c.layers,
            check_constancy_invariants=False,  # nothing is broadcast out: one tracing less
        )(c, self.rewrite)
        self.norm = Norm(c)
        if not c.tied_head:
            self.lm_head = table(c.vocab_size)

    def embed(self, ids_BT: Array) -> Array:
        return self.embed_tokens(ids_BT) * jnp.asarray(self.config.embedding_scale, self.config.dtype)

    def hidden(
        self,
        x_BTD: Array,
        positions_BT: Array,
        past: tuple[KeyValues, ...],
        segment_ids_BT: Array | None,
        rewrite: PyTree = None,
    ) -> tuple[Array, KeyValues, PyTree]:
        c = self.config
        x_BTD = x_BTD.astype(jnp.float32)
        if not c.ropes:
            x_BTD += self.embed_positions(jnp.maximum(positions_BT, 0))
        ropes = list(dict.fromkeys(c.ropes))
        unlimited = jnp.iinfo(jnp.int32).max
        windows = [unlimited if size is None else size for size in c.sliding_windows]
        own = LayerInputs(
            past_kv=tuple((kv.keys, kv.values, kv.bias) for kv in past),
            rope=jnp.array([ropes.index(rope) for rope in c.ropes]) if len(ropes) > 1 else None,
            sliding_window=jnp.array(windows, jnp.int32) if len(set(windows)) > 1 else None,
            rewrite=rewrite,
        )
        reading = Reading(
            positions_BT,
            segment_ids_BT,
            past_positions=tuple(kv.positions for kv in past),
            rotations=tuple(rotation(positions_BT, rope) for rope in ropes),
        )
        x_BTD, (keys, values, kept) = self.layers(x_BTD, own, reading)
        return self.norm(x_BTD), KeyValues(keys, values, positions_BT), kept

    def unembed(self, hidden: Array) -> Array:
        c = self.config
        table = (self.embed_tokens if c.tied_head else self.lm_head).embedding
        logits = head_product(hidden, table, c.precision)
        return logits if c.logit_softcap is None else c.logit_softcap * jnp.tanh(logits / c.logit_softcap)

    def __call__(self, ids_BT: Array) -> Array:
        positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
        return self.unembed(self.hidden(self.embed(ids_BT), positions_BT, (), None)[0])


def parameter_shapes(config: DecoderConfig) -> Params:
    """The parameter tree as shapes and dtypes; nothing is allocated."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    # A key that is made outside would be computed.
    return jax.eval_shape(lambda ids: Decoder(config).init(jax.random.key(0), ids), ids)["params"]


def _apply(
    params: Params, config: DecoderConfig, method: str, *arguments: Any, rewrite: Rewrite | None = None
) -> Any:
    return Decoder(config, rewrite).apply({"params": params}, *arguments, method=method)


# Called by itself each function is one program, and not one for each of its operations.
_compiled = functools.partial(jax.jit, static_argnames="config", inline=True)


@_compiled
def embed(params: Params, config: DecoderConfig, ids: Int[AnyArray, "*b t"]) -> Float[Array, "*b t d"]:
    """Input vectors of the token ids: the space in which a soft prompt lives."""
    return _apply(params, config, "embed", jnp.asarray(ids))


@_compiled
def hidden(
    params: Params,
    config: DecoderConfig,
    inputs: Float[AnyArray, "b t d"],
    positions: Int[AnyArray, "b t"],
    past: Sequence[KeyValues] = (),
    segment_ids: Int[AnyArray, "b t"] | None = None,
) -> tuple[Float[Array, "b t d"], KeyValues]:
    """Last hidden states (after the final norm) of ``inputs`` read after ``past``.

    Args:
      params: the parameter tree.
      config: its hyper-parameters.
      inputs: vectors as ``embed`` returns them, or a soft prompt's.
      positions: absolute positions, ``EMPTY`` for padding (anywhere in the row).
      past: what was read before; batch size 1 is shared by all rows.
      segment_ids: for rows that hold several sequences: tokens see ``past`` and those of their own id.

    Returns:
      The hidden states, and the keys and values of ``inputs`` (for use as a later ``past``).
    """
    past = tuple(kv for kv in past if kv.positions.shape[1])  # an empty one would only cost
    return _hidden(params, config, inputs, positions, past, segment_ids)[:2]


def rewrite_layers(
    params: Params,
    config: DecoderConfig,
    inputs: Float[AnyArray, "b t d"],
    positions: Int[AnyArray, "b t"],
    past: Sequence[KeyValues],
    segment_ids: Int[AnyArray, "b t"] | None,
    rewrite: Rewrite,
    own: PyTree = None,
) -> PyTree:
    """Everything that ``rewrite`` keeps of the layers, stacked, as ``inputs`` are read after ``past``.

    Args:
      params: the parameter tree.
      config: its hyper-parameters.
      inputs: as in ``hidden``.
      positions: likewise.
      past: what was read before.
      segment_ids: as in ``hidden``.
      rewrite: called in every layer; the layers above read what comes of it.
      own: its second argument: arrays with a leading axis of layers.
    """
    return _hidden(params, config, inputs, positions, tuple(past), segment_ids, rewrite, own)[2]


def _hidden(
    params: Params,
    config: DecoderConfig,
    inputs: AnyArray,
    positions: AnyArray,
    past: tuple[KeyValues, ...],
    segment_ids: AnyArray | None,
    rewrite: Rewrite | None = None,
    own: PyTree = None,
) -> tuple[Array, KeyValues, PyTree]:
    return _apply(params, config, "hidden", inputs, positions, past, segment_ids, own, rewrite=rewrite)


@_compiled
def unembed(params: Params, config: DecoderConfig, hidden: Float[AnyArray, "*b d"]) -> Float[Array, "*b v"]:
    """Logits, float32, of last hidden states."""
    return _apply(params, config, "unembed", jnp.asarray(hidden))


def unembedding(params: Params, config: DecoderConfig) -> Float[Array, "v d"]:
    """The output head's matrix."""
    return params["embed_tokens" if config.tied_head else "lm_head"]["embedding"]


@_compiled
def prefill(
    params: Params, config: DecoderConfig, inputs: Float[AnyArray, "1 t d"], prefix: KeyValues | None = None
) -> KeyValues:
    """Reads ``inputs`` after ``prefix`` and returns the longer prefix.

    Args:
      params: the parameter tree.
      config: its hyper-parameters.
      inputs: one sequence of vectors; it may be empty.
      prefix: prefix that stands before it, if anything.

    Returns:
      Keys and values with batch size 1: ``prefix`` followed by ``inputs``.
    """
    prefix = prefix or empty_prefix(config)
    if inputs.shape[1] == 0:
        return prefix
    positions = prefix.next_position[:, None] + jnp.arange(inputs.shape[1])[None]
    return prefix.append(hidden(params, config, inputs, positions, (prefix,))[1])


def read_long(
    params: Params,
    config: DecoderConfig,
    ids: Int[np.ndarray, "1 c"],
    prefix: KeyValues | None = None,
    *,
    longest: int = 2048,
    skipped: int = 0,
    least: int = 0,
) -> KeyValues:
    """``prefill`` of token ids a chunk at a time: memory beside the result does not grow with them.

    One compiled function reads every chunk and writes its keys and values in place. Not for use inside
    ``jit`` or ``grad``.

    Args:
      params: the parameter tree.
      config: its hyper-parameters.
      ids: token ids of one sequence.
      prefix: prefix that stands before it, if anything.
      longest: tokens read at once.
      skipped: positions left free after ``prefix``.
      least: tokens to have slots for, so that shorter contexts share the programs of the longest.

    Returns:
      ``prefix`` followed by the tokens; slots at its end may be ``EMPTY``, so that contexts of other
      lengths share the compiled programs that read and attend to it.

    Raises:
      UserError: they are longer than the model's window.
    """
    prefix = prefix or empty_prefix(config)
    count = ids.shape[1]
    if count == 0:
        return prefix
    chunks = ceil_div(max(count, least), longest)
    size = min(longest, round_size(ceil_div(max(count, least), chunks)))
    first, slot = prefix.end + skipped, prefix.positions.shape[1]
    config.check_length(first + count)
    room = prefix.append(empty_prefix(config, chunks * size))
    padded = np.pad(ids.astype(np.int32), ((0, 0), (0, chunks * size - count)))
    offsets = np.arange(chunks * size)[None]
    positions = np.where(offsets < count, first + offsets, EMPTY).astype(np.int32)
    for i in range(0, chunks * size, size):
        part = slice(i, i + size)
        room = _read_chunk(params, config, room, padded[:, part], positions[:, part], slot + i)
    return room


def read_again(
    params: Params,
    config: DecoderConfig,
    ids: Int[np.ndarray, "1 c"],
    prefix: KeyValues,
    slot: int,
    *,
    longest: int = 64,
) -> KeyValues:
    """A prefix with other tokens from one of its slots on: what stands before it is not read again.

    Args:
      params: the parameter tree.
      config: its hyper-parameters.
      ids: token ids of one sequence, no longer than what they replace.
      prefix: from ``read_long``.
      slot: first slot that is replaced.
      longest: tokens read at once.

    Returns:
      As ``read_long``, of one size whatever is replaced.
    """
    count = ids.shape[1]
    kept = prefix.positions.at[:, slot:].set(EMPTY)
    room = KeyValues(prefix.keys, prefix.values, kept, prefix.bias).append(empty_prefix(config, longest))
    first = room.end
    for i in range(0, count, longest):
        own = ids[:, i : i + longest].astype(np.int32)
        offsets = i + np.arange(longest)[None]
        positions = np.where(offsets < count, first + offsets, EMPTY).astype(np.int32)
        padded = np.pad(own, ((0, 0), (0, longest - own.shape[1])))
        room = _read_chunk(params, config, room, padded, positions, slot + i)
    return room


def round_size(count: int) -> int:
    """The next of the sizes in quarters of an octave: ..., 16, 20, 24, 28, 32, 40, ...

    Example:
      >>> [round_size(count) for count in (1, 16, 17, 65, 354)]
      [1, 16, 20, 80, 384]
    """
    step = 1 << max(0, (count - 1).bit_length() - 3)
    return ceil_div(count, step) * step


@functools.partial(jax.jit, static_argnums=1, donate_argnums=2)
def _read_chunk(
    params: Params, config: DecoderConfig, room: KeyValues, ids_1T: Array, positions_1T: Array, slot: int
) -> KeyValues:
    new = hidden(params, config, embed(params, config, ids_1T), positions_1T, (room,))[1]
    write = jax.lax.dynamic_update_slice_in_dim
    return dataclasses.replace(
        room,
        keys=write(room.keys, new.keys, slot, axis=2),
        values=write(room.values, new.values, slot, axis=2),
        positions=write(room.positions, new.positions, slot, axis=1),
    )


@functools.partial(jax.jit, static_argnames=("config", "slots"), inline=True)
def empty_prefix(config: DecoderConfig, slots: int = 0) -> KeyValues:
    """A prefix that holds nothing, with room for ``slots`` tokens."""
    shape = (config.layers, 1, slots, config.kv_heads, config.head_width)
    zeros = jnp.zeros(shape, config.dtype)
    return KeyValues(zeros, zeros, jnp.full((1, slots), EMPTY, jnp.int32))
