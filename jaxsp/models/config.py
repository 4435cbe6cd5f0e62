"""The hyper-parameters that the decoder's code reads, and nothing else."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxsp.models.rope import Rope
from jaxsp.typing import UserError

Activation = Literal["silu", "gelu_tanh"]
Quantization = Literal["none", "int8"]


# Dtype and quantization stand by themselves beside the identity; the others don't change what is computed.
_NO_IDENTITY = ("window", "dtype", "quantization", "remat", "attention")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Hyper-parameters of one decoder; hashable, so that it can be a static argument of ``jax.jit``.

    Built by a family's ``config`` from the ``transformers`` configuration (see ``models/families``).
    The defaults are those of Llama.
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
    norm_epsilon: float
    tied_head: bool

    ropes: tuple[Rope, ...] = ()
    """Each layer's rotary positions; empty if positions are learned vectors added to the inputs."""
    sliding_windows: tuple[int | None, ...] = ()
    """Number of positions that each layer sees back, its own included; ``None`` or empty: all of them."""
    qk_norm: Literal["head", "width"] | None = None
    """Normalise queries and keys: each head by itself, or all heads as one vector."""
    qkv_bias: bool = False
    output_bias: bool = False
    query_scale: float | None = None
    """Attention scores are multiplied by it; ``None`` is ``head_width ** -0.5``."""
    attention_softcap: float | None = None
    """Attention scores are ``c · tanh(score / c)``."""

    activation: Activation = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False

    layer_norm: bool = False
    """LayerNorm with a bias in place of RMSNorm."""
    pre_norm: bool = True
    """Normalise what attention and MLP read."""
    post_norm: bool = False
    """Normalise what attention and MLP add to the residual."""

    embedding_scale: float = 1.0
    """Multiplies what ``embed`` returns; the head keeps the table as it is."""
    logit_softcap: float | None = None

    dtype: str = "float32"
    """Dtype of matrices and activations; norms, softmax and logits are float32 whatever it is."""
    quantization: Quantization = "none"
    """Form of the layers' matrices: in ``dtype``, or int8 with a float32 scale for each output."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    attention: str = "auto"
    """The attention backend, a key of ``jaxsp.models.attention.BACKENDS``, or ``auto``."""

    def __post_init__(self) -> None:
        sizes = "vocab_size width layers heads kv_heads head_width mlp_width"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise UserError(f"A decoder can't have {name} {getattr(self, name)}.")
        if self.heads % self.kv_heads:
            raise UserError(
                f"{self.heads} attention heads can't share {self.kv_heads} key/value heads: the"
                " first must be a multiple of the second."
            )

    def __repr__(self) -> str:
        """The fields that differ from their default, a value that all layers share written once."""
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default and value != ():
                text = _per_layer(value) if isinstance(value, tuple) else repr(value)
                shown.append(f"{field.name}={text}")
        return textwrap.fill(
            f"DecoderConfig({', '.join(shown)})", 100, subsequent_indent="    ", break_on_hyphens=False
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that decide what the weights compute, where they differ from their default, as JSON
        keeps them.

        Example:
          >>> import jaxsp
          >>> jaxsp.load_model("smollm2-135m-instruct").config.identity["ropes"]
          '30 × Rope(32 frequencies, 1 to 1.43e-05, mean 0.00379)'
        """
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _NO_IDENTITY or value in (field.default, ()):
                continue
            if isinstance(value, tuple):
                value = _per_layer(value)
            found[field.name] = value
        return found

    def check_length(self, tokens: int) -> None:
        """Raises ``UserError`` if a sequence of so many tokens is longer than the window."""
        if tokens > self.window:
            raise UserError(
                f"{tokens} tokens are more than the model's window of {self.window}; shorten the text."
            )

    @property
    def precision(self) -> jax.lax.Precision:
        """float32 means float32: accelerators would otherwise multiply it in fewer bits."""
        exact = jnp.dtype(self.dtype) == jnp.float32
        return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT

    def replace(self, **changes: Any) -> DecoderConfig:
        return dataclasses.replace(self, **changes)


def _per_layer(values: tuple[Any, ...]) -> str:
    """Each layer's value, found by its number where there are several."""
    kinds = list(dict.fromkeys(values))
    if len(kinds) == 1:
        return f"{len(values)} × {kinds[0]}"
    return f"{kinds}[{' '.join(str(kinds.index(value)) for value in values)}]"
