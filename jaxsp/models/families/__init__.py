"""The model families jaxsp can run: one short file each, one line each in ``FAMILIES``.

A family is a module with two functions:

* ``config(hf, dtype) -> DecoderConfig`` reads a ``transformers`` configuration;
* ``tensors(config) -> {path: Tensor}`` says where in a checkpoint every parameter of the decoder stands.

What most have in common is in ``common.py``.
"""

from __future__ import annotations

from typing import Any, Protocol

from jaxsp.models.config import DecoderConfig
from jaxsp.models.families import gemma2, gemma3, gpt2, llama, mistral, olmo2, phi3, qwen, smollm3
from jaxsp.models.weights import Tensor


class Family(Protocol):
    """What a module in this folder provides."""

    def config(self, hf: Any, dtype: str) -> DecoderConfig: ...

    def tensors(self, config: DecoderConfig) -> dict[str, Tensor]: ...


FAMILIES: dict[str, Family] = {
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "olmo2": olmo2,
    "phi3": phi3,
    "qwen2": qwen,
    "qwen3": qwen,
    "smollm3": smollm3,
}
