"""Gemma 3, text: Gemma 2 with normalised queries and keys, no soft caps, and a rope for each layer kind.

Reference: Gemma Team 2025 (arXiv:2503.19786).
"""

from __future__ import annotations

from typing import Any

from jaxsp.models.config import DecoderConfig
from jaxsp.models.families import gemma2
from jaxsp.models.families.common import layer_kinds
from jaxsp.models.rope import make_rope


def config(hf: Any, dtype: str) -> DecoderConfig:
    kinds = layer_kinds(hf)
    ropes = {kind: make_rope(hf.rope_parameters[kind], hf.head_dim) for kind in set(kinds)}
    like = gemma2.config(hf, dtype, qk_norm="head", ropes=tuple(ropes[kind] for kind in kinds))
    return like.replace(attention_softcap=None)  # configurations may have one, which the model ignores
