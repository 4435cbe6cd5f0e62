"""SmolLM3: Llama in which some layers have no positions (NoPE).

Reference: Hugging Face 2025 (huggingface.co/blog/smollm3), Yang et al. 2025 (arXiv:2501.18795).
"""

from __future__ import annotations

from typing import Any

from jaxsp.models.config import DecoderConfig
from jaxsp.models.families.common import attention_biases, read_config, sliding_windows


def config(hf: Any, dtype: str) -> DecoderConfig:
    usual = read_config(
        hf, dtype, sliding_windows=sliding_windows(hf), mlp_bias=hf.mlp_bias, **attention_biases(hf)
    )
    turned = zip(usual.ropes, hf.no_rope_layers, strict=True)  # 1 there means that it has positions
    return usual.replace(ropes=tuple(rope if has else rope.without_positions() for rope, has in turned))
