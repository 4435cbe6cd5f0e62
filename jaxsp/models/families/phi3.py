"""Phi-3: Llama whose checkpoint stores queries, keys and values as one matrix, and gate and up as one.

Reference: Abdin et al. 2024 (arXiv:2404.14219).
"""

from __future__ import annotations

from typing import Any

from jaxsp.models.config import DecoderConfig
from jaxsp.models.families.common import llama_tensors, read_config
from jaxsp.models.weights import Tensor


def config(hf: Any, dtype: str) -> DecoderConfig:
    turned = hf.rope_parameters.get("partial_rotary_factor", 1.0)
    windows = (hf.sliding_window,) * hf.num_hidden_layers
    return read_config(hf, dtype, turned, sliding_windows=windows)


def tensors(config: DecoderConfig) -> dict[str, Tensor]:
    q, kv = config.heads * config.head_width, config.kv_heads * config.head_width
    mlp = config.mlp_width
    fused = {
        "self_attn.qkv_proj": {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)},
        "mlp.gate_up_proj": {"gate": (0, mlp), "up": (mlp, 2 * mlp)},
    }
    return llama_tensors(config) | {
        f"layers/{name}_proj/kernel": Tensor(f"model.layers.{{layer}}.{stored}.weight", rows)
        for stored, parts in fused.items()
        for name, rows in parts.items()
    }
