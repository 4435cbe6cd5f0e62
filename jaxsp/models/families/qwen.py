"""Qwen 2 and 2.5 (biases on queries, keys and values) and Qwen 3 (normalised queries and keys).

Reference: Qwen Team 2024 (arXiv:2412.15115), 2025 (arXiv:2505.09388).
"""

from __future__ import annotations

from typing import Any

from jaxsp.models.config import DecoderConfig
from jaxsp.models.families.common import attention_biases, read_config, sliding_windows


def config(hf: Any, dtype: str) -> DecoderConfig:
    own = {"qkv_bias": True}
    if hf.model_type == "qwen3":
        own = {"qk_norm": "head", **attention_biases(hf)}
    return read_config(hf, dtype, sliding_windows=sliding_windows(hf), **own)
