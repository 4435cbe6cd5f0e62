"""Llama 2 and 3.x, SmolLM2, and whatever else declares ``model_type: llama``.

Reference: Touvron et al. 2023 (arXiv:2307.09288), Grattafiori et al. 2024 (arXiv:2407.21783).
"""

from __future__ import annotations

from jaxsp.models.config import DecoderConfig
from jaxsp.models.rope import rope_frequencies
from jaxsp.typing import UserError

_LAYER = "model.layers.{layer}"

WEIGHTS = {
    "embed_tokens/embedding": "model.embed_tokens.weight",
    "layers/input_layernorm/weight": f"{_LAYER}.input_layernorm.weight",
    **{
        f"layers/{name}_proj/{ours}": f"{_LAYER}.self_attn.{name}_proj.{theirs}"
        for name in ("q", "k", "v", "o")
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
    "layers/post_attention_layernorm/weight": f"{_LAYER}.post_attention_layernorm.weight",
    **{
        f"layers/{name}_proj/{ours}": f"{_LAYER}.mlp.{name}_proj.{theirs}"
        for name in ("gate", "up", "down")
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
    "norm/weight": "model.norm.weight",
    "lm_head/embedding": "lm_head.weight",
}


def config(hf, dtype: str) -> DecoderConfig:
    """The decoder's hyper-parameters from a ``transformers.LlamaConfig``."""
    if hf.hidden_act not in ("silu", "swish"):
        raise UserError(
            f"Activation {hf.hidden_act!r} is not supported in a llama model, only 'silu'."
        )
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        width=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_width=hf.head_dim,
        mlp_width=hf.intermediate_size,
        window=hf.max_position_embeddings,
        rope_frequencies=rope_frequencies(hf.rope_parameters, hf.head_dim),
        norm_epsilon=hf.rms_norm_eps,
        tied_head=hf.tie_word_embeddings,
        attention_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
        dtype=dtype,
    )
