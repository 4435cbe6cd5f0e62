"""Llama 2 and 3.x, SmolLM2, and whatever else declares ``model_type: llama``.

Reference: Touvron et al. 2023 (arXiv:2307.09288), Grattafiori et al. 2024 (arXiv:2407.21783).
"""

from __future__ import annotations

from typing import Any

from jaxsp.models.config import DecoderConfig
from jaxsp.models.families.common import attention_biases, read_config


def config(hf: Any, dtype: str) -> DecoderConfig:
    return read_config(hf, dtype, mlp_bias=hf.mlp_bias, **attention_biases(hf))
