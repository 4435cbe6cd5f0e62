"""A frozen decoder-only transformer (Flax Linen): embed, hidden, unembed, kept apart.

The layers are stacked and scanned. Keys and values of earlier tokens (a prefix, a cache) come in as
``past``; those of the tokens just read come back, so that prefilling, training and decoding are one
function. Nothing here knows what a prompt is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsp.models.attention import Segment, attention
from jaxsp.models.config import DecoderConfig
from jaxsp.models.rope import rotate, rotation
from jaxsp.typing import EMPTY, Array, Float, Int, KeyValues, Params


def silu(x: Array) -> Array:
    """x · sigmoid(x) to the last bit.

    ``jax.nn.silu`` computes the sigmoid from a tanh on CPU, which loses the relative precision of its
    negative tail: on SmolLM2 that alone moved logits by 1e-4. Below -40 the result is 0 in float32;
    the bound keeps the derivative finite.
    """
    return x / (1 + jnp.exp(-jnp.maximum(x, -40)))


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467), in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        weight_D = self.param("weight", nn.initializers.ones, (x_BTD.shape[-1],), x_BTD.dtype)
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return weight_D * x.astype(x_BTD.dtype)


class DecoderLayer(nn.Module):
    """Pre-norm attention and gated MLP, each with its residual."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        past_kv: tuple[tuple[Array, Array], ...],
        past_positions: tuple[Array, ...],
        positions_BT: Array,
        cos_sin: tuple[Array, Array],
    ) -> tuple[Array, tuple[Array, Array]]:
        c = self.config
        B, T, _ = x_BTD.shape
        dense = functools.partial(
            nn.Dense, dtype=c.dtype, param_dtype=c.dtype, precision=c.precision
        )
        projection = functools.partial(dense, use_bias=c.attention_bias)
        mlp = functools.partial(dense, use_bias=c.mlp_bias)

        y = RMSNorm(c.norm_epsilon, name="input_layernorm")(x_BTD)
        q = projection(c.heads * c.head_width, name="q_proj")(y)
        k = projection(c.kv_heads * c.head_width, name="k_proj")(y)
        v = projection(c.kv_heads * c.head_width, name="v_proj")(y)
        q_BTHF = rotate(q.reshape(B, T, c.heads, c.head_width), cos_sin)
        k_BTGF = rotate(k.reshape(B, T, c.kv_heads, c.head_width), cos_sin)
        v_BTGF = v.reshape(B, T, c.kv_heads, c.head_width)
        segments = [
            *(Segment(*kv, p) for kv, p in zip(past_kv, past_positions, strict=True)),
            Segment(k_BTGF, v_BTGF, positions_BT),
        ]
        out_BTHF = attention(q_BTHF, positions_BT, segments, precision=c.precision)
        x_BTD = x_BTD + projection(c.width, name="o_proj")(out_BTHF.reshape(B, T, -1))

        y = RMSNorm(c.norm_epsilon, name="post_attention_layernorm")(x_BTD)
        gate = silu(mlp(c.mlp_width, name="gate_proj")(y))
        x_BTD = x_BTD + mlp(c.width, name="down_proj")(gate * mlp(c.mlp_width, name="up_proj")(y))
        return x_BTD, (k_BTGF, v_BTGF)


class Decoder(nn.Module):
    """The decoder driven by its config; use the functions below, which take ``params`` explicitly."""

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = nn.Embed(c.vocab_size, c.width, dtype=c.dtype, param_dtype=c.dtype)
        layer = nn.remat(DecoderLayer, prevent_cse=False) if c.remat else DecoderLayer
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast("int", (0, nn.broadcast, nn.broadcast, nn.broadcast)),  # one an argument
            length=c.layers,
        )(c)
        self.norm = RMSNorm(c.norm_epsilon)
        if not c.tied_head:
            self.lm_head = nn.Embed(c.vocab_size, c.width, dtype=c.dtype, param_dtype=c.dtype)

    def embed(self, ids_BT: Array) -> Array:
        return self.embed_tokens(ids_BT)

    def hidden(
        self, inputs_BTD: Array, positions_BT: Array, past: tuple[KeyValues, ...]
    ) -> tuple[Array, KeyValues]:
        x_BTD, (keys, values) = self.layers(
            inputs_BTD.astype(self.config.dtype),
            tuple((kv.keys, kv.values) for kv in past),
            tuple(kv.positions for kv in past),
            positions_BT,
            rotation(positions_BT, self.config.rope_frequencies),
        )
        return self.norm(x_BTD), KeyValues(keys, values, positions_BT)

    def unembed(self, hidden: Array) -> Array:
        table = self.embed_tokens if self.config.tied_head else self.lm_head
        return jnp.einsum(
            "...d,vd->...v",
            hidden,
            table.embedding,
            precision=self.config.precision,
            preferred_element_type=jnp.float32,
        )

    def __call__(self, ids_BT: Array) -> Array:
        positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
        return self.unembed(self.hidden(self.embed(ids_BT), positions_BT, ())[0])


def parameter_shapes(config: DecoderConfig) -> Params:
    """The parameter tree as shapes and dtypes; nothing is allocated."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), ids)["params"]


def _apply(params: Params, config: DecoderConfig, method: str, *arguments: Any) -> Any:
    return Decoder(config).apply({"params": params}, *arguments, method=method)


def embed(params: Params, config: DecoderConfig, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Input vectors of the token ids: the space in which a soft prompt lives."""
    return _apply(params, config, "embed", ids)


def hidden(
    params: Params,
    config: DecoderConfig,
    inputs: Float[Array, "b t d"],
    positions: Int[Array, "b t"],
    past: Sequence[KeyValues] = (),
) -> tuple[Float[Array, "b t d"], KeyValues]:
    """Last hidden states (after the final norm) of ``inputs`` read after ``past``.

    Args:
      params: the parameter tree.
      config: its hyper-parameters.
      inputs: vectors as ``embed`` returns them, or a soft prompt's.
      positions: absolute positions, ``EMPTY`` for padding (anywhere in the row).
      past: what was read before; batch size 1 is shared by all rows.

    Returns:
      The hidden states, and the keys and values of ``inputs`` (for use as a later ``past``).
    """
    past = tuple(kv for kv in past if kv.positions.shape[1])  # an empty one would only cost
    return _apply(params, config, "hidden", inputs, positions, past)


def unembed(
    params: Params, config: DecoderConfig, hidden: Float[Array, "*b d"]
) -> Float[Array, "*b v"]:
    """Logits, float32, of last hidden states."""
    return _apply(params, config, "unembed", hidden)


def unembedding(params: Params, config: DecoderConfig) -> Float[Array, "v d"]:
    """The output head's matrix."""
    return params["embed_tokens" if config.tied_head else "lm_head"]["embedding"]


def prefill(
    params: Params,
    config: DecoderConfig,
    inputs: Float[Array, "1 t d"],
    prefix: KeyValues | None = None,
) -> KeyValues:
    """Reads ``inputs`` after ``prefix`` and returns the longer prefix.

    Args:
      params: the parameter tree.
      config: its hyper-parameters.
      inputs: one sequence of vectors; it may be empty.
      prefix: what stands before it, if anything.

    Returns:
      Keys and values with batch size 1: ``prefix`` followed by ``inputs``.
    """
    if prefix is None:
        prefix = empty_prefix(config)
    if inputs.shape[1] == 0:
        return prefix
    positions = prefix.next_position[:, None] + jnp.arange(inputs.shape[1])[None]
    return prefix.append(hidden(params, config, inputs, positions, (prefix,))[1])


def empty_prefix(config: DecoderConfig, slots: int = 0) -> KeyValues:
    """A prefix that holds nothing, with room for ``slots`` tokens."""
    shape = (config.layers, 1, slots, config.kv_heads, config.head_width)
    zeros = jnp.zeros(shape, config.dtype)
    return KeyValues(zeros, zeros, jnp.full((1, slots), EMPTY, jnp.int32))
