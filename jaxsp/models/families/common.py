"""Readers of configurations and checkpoint names that most families share."""

from __future__ import annotations

from typing import Any

from jaxsp.models.config import Activation, DecoderConfig
from jaxsp.models.rope import make_rope
from jaxsp.models.weights import Tensor
from jaxsp.typing import UserError

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def read_config(hf: Any, dtype: str, turned: float = 1.0, **family: Any) -> DecoderConfig:
    """A decoder of this configuration's sizes that is otherwise like Llama, except for what ``family`` says.

    Families differ in which fields of a configuration they heed (Llama has no ``layer_types``, Mistral no
    ``attention_bias``), so whatever not all have is for the family to read.

    Args:
      hf: the ``transformers`` configuration.
      dtype: dtype of the decoder.
      turned: the part of a head that its rope turns.
      family: fields of the decoder's configuration.

    Raises:
      UserError: the activation or the rope type is not supported.
    """
    head_width = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    if "activation" not in family:
        family["activation"] = activation(hf.hidden_act)
    if "ropes" not in family:
        family["ropes"] = (make_rope(hf.rope_parameters, head_width, turned),) * hf.num_hidden_layers
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        width=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_width=head_width,
        mlp_width=hf.intermediate_size,
        window=hf.max_position_embeddings,
        norm_epsilon=hf.rms_norm_eps,
        tied_head=hf.tie_word_embeddings,
        dtype=dtype,
        **family,
    )


def attention_biases(hf: Any) -> dict[str, bool]:
    """Biases of all four projections, where a configuration has ``attention_bias``."""
    return {"qkv_bias": hf.attention_bias, "output_bias": hf.attention_bias}


def sliding_windows(hf: Any) -> tuple[int | None, ...]:
    """Each layer's sliding window, by its kind."""
    return tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in layer_kinds(hf))


def activation(name: str) -> Activation:
    """Ours for a name in a configuration; raises ``UserError`` if there is none."""
    if name not in _ACTIVATIONS:
        raise UserError(f"Activation {name!r} is not supported; jaxsp knows {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


def layer_kinds(hf: Any) -> list[str]:
    """Each layer's kind: ``full_attention`` or ``sliding_attention``."""
    kinds = hf.layer_types
    if odd := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UserError(f"Layers of the kind {min(odd)!r} are not supported.")
    return kinds


def usual_tensors(**norms: str) -> dict[str, Tensor]:
    """The tensors of Llama's checkpoints and those that follow its names.

    Args:
      norms: our name of each norm in a layer, and the checkpoint's; those of queries and keys, which only
        some models have, are called alike in all.
    """
    layer = "model.layers.{layer}"
    norms |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    out = {
        "embed_tokens/embedding": Tensor("model.embed_tokens.weight"),
        "norm/weight": Tensor("model.norm.weight"),
        "lm_head/embedding": Tensor("lm_head.weight"),
    }
    for ours, theirs in norms.items():
        out[f"layers/{ours}/weight"] = Tensor(f"{layer}.{theirs}.weight")
    for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in names:
            at = f"{layer}.{part}.{name}_proj"
            out[f"layers/{name}_proj/kernel"] = Tensor(f"{at}.weight")
            out[f"layers/{name}_proj/bias"] = Tensor(f"{at}.bias")
    return out


def llama_tensors(config: DecoderConfig) -> dict[str, Tensor]:
    """The tensors of a checkpoint with Llama's norms, one before attention, one before the MLP."""
    return usual_tensors(attention_pre_norm="input_layernorm", mlp_pre_norm="post_attention_layernorm")
