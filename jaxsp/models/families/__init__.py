"""The model families jaxsp can run: one short file each, one line each in ``FAMILIES``.

A family is two functions:

* ``config(hf, dtype) -> DecoderConfig`` reads a ``transformers`` configuration;
* ``tensors(config) -> {path: Tensor}`` says where in a checkpoint every parameter of the decoder stands;
  by default where Llama's stand.

What most have in common is in ``common.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxsp.models.config import DecoderConfig
from jaxsp.models.families import gemma2, gemma3, gpt2, llama, mistral, olmo2, phi3, qwen, smollm3
from jaxsp.models.families.common import llama_tensors
from jaxsp.models.weights import Tensor


class Family(NamedTuple):
    """A family's two functions."""

    config: Callable[[Any, str], DecoderConfig]
    tensors: Callable[[DecoderConfig], dict[str, Tensor]] = llama_tensors


FAMILIES = {
    "gemma2": Family(gemma2.config, gemma2.tensors),
    "gemma3_text": Family(gemma3.config, gemma2.tensors),
    "gpt2": Family(gpt2.config, gpt2.tensors),
    "llama": Family(llama.config),
    "mistral": Family(mistral.config),
    "olmo2": Family(olmo2.config, olmo2.tensors),
    "phi3": Family(phi3.config, phi3.tensors),
    "qwen2": Family(qwen.config),
    "qwen3": Family(qwen.config),
    "smollm3": Family(smollm3.config),
}
