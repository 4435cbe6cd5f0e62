"""OLMo 2: norms after attention and MLP, none before; queries and keys normalised over all heads.

Reference: OLMo Team 2024 (arXiv:2501.00656).
"""

from __future__ import annotations

from typing import Any

from jaxsp.models.config import DecoderConfig
from jaxsp.models.families.common import attention_biases, read_config, usual_tensors
from jaxsp.models.weights import Tensor


def config(hf: Any, dtype: str) -> DecoderConfig:
    return read_config(hf, dtype, pre_norm=False, post_norm=True, qk_norm="width", **attention_biases(hf))


def tensors(config: DecoderConfig) -> dict[str, Tensor]:
    return usual_tensors(
        attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm"
    )
