"""The model families jaxsp can run: one short file each, one line each in ``FAMILIES``.

A family is a module with two names:

* ``config(hf, dtype) -> DecoderConfig`` reads a ``transformers`` configuration;
* ``WEIGHTS`` maps every parameter path of the decoder to its tensor in the checkpoint (``{layer}`` in
  the name marks stacked layers). Matrices of ``kernel`` parameters are transposed on loading.
"""

from __future__ import annotations

from typing import Protocol

from jaxsp.models.config import DecoderConfig
from jaxsp.models.families import llama


class Family(Protocol):
    """What a module in this folder provides."""

    WEIGHTS: dict[str, str]

    def config(self, hf, dtype: str) -> DecoderConfig: ...


FAMILIES: dict[str, Family] = {
    "llama": llama,
}
