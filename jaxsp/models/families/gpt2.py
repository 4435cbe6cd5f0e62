"""GPT-2: learned positions, LayerNorm, a plain MLP; matrices stored as ``[inputs, outputs]``.

Reference: Radford et al. 2019, Language Models are Unsupervised Multitask Learners.
"""

from __future__ import annotations

from typing import Any

from jaxsp.models.config import DecoderConfig
from jaxsp.models.families.common import activation
from jaxsp.models.weights import Tensor
from jaxsp.typing import UserError


def config(hf: Any, dtype: str) -> DecoderConfig:
    if hf.scale_attn_by_inverse_layer_idx or hf.add_cross_attention or not hf.scale_attn_weights:
        raise UserError(
            "GPT-2 with scale_attn_by_inverse_layer_idx, add_cross_attention or without"
            " scale_attn_weights is not supported."
        )
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        width=hf.n_embd,
        layers=hf.n_layer,
        heads=hf.n_head,
        kv_heads=hf.n_head,
        head_width=hf.n_embd // hf.n_head,
        mlp_width=hf.n_inner or 4 * hf.n_embd,
        window=hf.n_positions,
        norm_epsilon=hf.layer_norm_epsilon,
        tied_head=hf.tie_word_embeddings,
        qkv_bias=True,
        output_bias=True,
        activation=activation(hf.activation_function),
        gated_mlp=False,
        mlp_bias=True,
        layer_norm=True,
        dtype=dtype,
    )


def tensors(config: DecoderConfig) -> dict[str, Tensor]:
    out = {
        "embed_tokens/embedding": Tensor("transformer.wte.weight"),
        "embed_positions/embedding": Tensor("transformer.wpe.weight"),
        "lm_head/embedding": Tensor("lm_head.weight"),
    }
    width, at = config.width, "transformer.h.{layer}"
    for kind in ("weight", "bias"):
        out[f"norm/{kind}"] = Tensor(f"transformer.ln_f.{kind}")
        out[f"layers/attention_pre_norm/{kind}"] = Tensor(f"{at}.ln_1.{kind}")
        out[f"layers/mlp_pre_norm/{kind}"] = Tensor(f"{at}.ln_2.{kind}")
    for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
        for i, name in enumerate("qkv"):
            out[f"layers/{name}_proj/{ours}"] = Tensor(
                f"{at}.attn.c_attn.{theirs}", (i * width, (i + 1) * width), outputs_first=False
            )
        for name, place in (("o", "attn.c_proj"), ("up", "mlp.c_fc"), ("down", "mlp.c_proj")):
            out[f"layers/{name}_proj/{ours}"] = Tensor(f"{at}.{place}.{theirs}", outputs_first=False)
    return out
