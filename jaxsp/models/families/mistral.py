"""Mistral: Llama with one sliding window for all layers, if it has one.

Reference: Jiang et al. 2023 (arXiv:2310.06825).
"""

from __future__ import annotations

from typing import Any

from jaxsp.models.config import DecoderConfig
from jaxsp.models.families.common import read_config


def config(hf: Any, dtype: str) -> DecoderConfig:
    return read_config(hf, dtype, sliding_windows=(hf.sliding_window,) * hf.num_hidden_layers)
