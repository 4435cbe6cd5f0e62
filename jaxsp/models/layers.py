"""Parts of the decoder's layers: norms, activations, dense layers with int8 kernels."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsp.models.config import DecoderConfig
from jaxsp.typing import Array, Float


def _silu(x: Array) -> Array:
    # x · sigmoid(x) to the last bit. jax.nn.silu computes the sigmoid from a tanh on CPU, which loses the
    # relative precision of its negative tail: on SmolLM2 that alone moved logits by 1e-4. Below -40 the
    # result is 0 in float32; the bound keeps the derivative finite.
    return x / (1 + jnp.exp(-jnp.maximum(x, -40)))


ACTIVATIONS = {"silu": _silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) or LayerNorm (Ba et al. 2016, arXiv:1607.06450).

    Weights and arithmetic are float32 in every model.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        if self.config.layer_norm:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(variance + self.config.norm_epsilon)
        wide = wide * self.param("weight", nn.initializers.ones, x.shape[-1:])
        if self.config.layer_norm:
            wide = wide + self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return wide.astype(self.config.dtype)


class Int8Dense(nn.Module):
    """``nn.Dense`` with an int8 kernel and a float32 scale for each output.

    Reference: absmax quantisation in Dettmers et al. 2022, arXiv:2208.07339; here of weights alone.
    """

    config: DecoderConfig
    size: int
    use_bias: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, zeros = self.config, nn.initializers.zeros
        kernel = self.param("kernel", zeros, (x.shape[-1], self.size), jnp.int8)
        scale = self.param("scale", nn.initializers.ones, (self.size,), jnp.float32)
        y: Any = _int8_product(x, kernel, scale, c.precision)  # older jax types it as object
        return y + self.param("bias", zeros, (self.size,), c.dtype) if self.use_bias else y


# Autodiff would keep every layer's kernel in floats until the backward pass, and multiply in float32
# there. The kernel is frozen: the gradient goes to x alone.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _int8_product(x: Array, kernel: Array, scale: Array, precision: jax.lax.Precision) -> Array:
    whole = kernel.astype(x.dtype)
    y = jnp.dot(x, whole, precision=precision, preferred_element_type=jnp.float32)
    return (y * scale).astype(x.dtype)


def _int8_forward(
    x: Array, kernel: Array, scale: Array, precision: jax.lax.Precision
) -> tuple[Array, tuple[Array, Array]]:
    return _int8_product(x, kernel, scale, precision), (kernel, scale)


def _int8_backward(
    precision: jax.lax.Precision, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, None, None]:
    kernel, scale = kept
    # 128 is exact in any dtype; without it the scaled gradient could vanish in float16.
    scaled = (gradient * (128 * scale)).astype(gradient.dtype)
    kernel = kernel.astype(gradient.dtype) / 128
    return jnp.einsum("...o,io->...i", scaled, kernel, precision=precision), None, None


_int8_product.defvjp(_int8_forward, _int8_backward)


def head_product(
    states: Float[Array, "*b d"], table: Float[Array, "v d"], precision: jax.lax.Precision
) -> Float[Array, "*b v"]:
    """Logits, float32: the products of last hidden states with the rows of the head's matrix.

    A single state in bfloat16 goes with a row of zeros. By itself XLA multiplies it on a CPU ten times as
    slowly as it does two (jax 0.10 and 0.12, a vocabulary of 49,152): most of a lone user's step.

    Args:
      states: any number of them.
      table: the head's matrix.
      precision: of the products.
    """
    product = functools.partial(
        jnp.einsum, "...d,vd->...v", precision=precision, preferred_element_type=jnp.float32
    )
    if states.size != states.shape[-1] or states.dtype != jnp.bfloat16:
        return product(states, table)
    two_2D = jnp.pad(states.reshape(1, -1), ((0, 1), (0, 0)))
    return product(two_2D, table)[:1].reshape(*states.shape[:-1], -1)
