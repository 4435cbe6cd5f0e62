"""Gemma 2: scaled embeddings, norms on both sides, soft caps, every other layer with a sliding window.

Reference: Gemma Team 2024 (arXiv:2408.00118).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxsp.models.config import DecoderConfig
from jaxsp.models.families import common
from jaxsp.models.weights import Tensor
from jaxsp.typing import UserError


def config(hf: Any, dtype: str, **family: Any) -> DecoderConfig:
    if hf.use_bidirectional_attention:
        raise UserError("Gemma with bidirectional attention is no language model; jaxsp can't use it.")
    return common.read_config(
        hf,
        dtype,
        activation=common.activation(hf.hidden_activation),
        post_norm=True,
        embedding_scale=hf.hidden_size**0.5,
        query_scale=hf.query_pre_attn_scalar**-0.5,
        attention_softcap=hf.attn_logit_softcapping,
        logit_softcap=hf.final_logit_softcapping,
        sliding_windows=common.sliding_windows(hf),
        **common.attention_biases(hf),
        **family,
    )


def tensors(config: DecoderConfig) -> dict[str, Tensor]:
    usual = common.usual_tensors(
        attention_pre_norm="input_layernorm",
        attention_post_norm="post_attention_layernorm",
        mlp_pre_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    )
    return {
        path: dataclasses.replace(tensor, plus=1.0) if path.endswith("norm/weight") else tensor
        for path, tensor in usual.items()
    }
