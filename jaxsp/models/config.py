"""What a decoder is made of: the hyper-parameters that its code reads, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Hyper-parameters of one decoder; hashable, so that it can be a static argument of ``jax.jit``.

    Built by a family's ``config`` from the ``transformers`` configuration (see ``models/families``).
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    window: int
    """Longest sequence the model was made for, in tokens."""
    rope_frequencies: tuple[float, ...]
    """Radians per position of each rotary pair, ``head_width / 2`` of them (see ``rope.py``)."""
    norm_epsilon: float
    tied_head: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"
    """Of weights and activations; norms, softmax and logits are float32 whatever it is."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""

    @property
    def precision(self) -> jax.lax.Precision:
        """float32 means float32: accelerators would otherwise multiply it in fewer bits."""
        exact = jnp.dtype(self.dtype) == jnp.float32
        return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT

    def replace(self, **changes: Any) -> DecoderConfig:
        return dataclasses.replace(self, **changes)
