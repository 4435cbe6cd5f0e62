"""The head of a model by itself: of another model, when that is the teacher."""

from __future__ import annotations

import dataclasses
import functools

import jax

from jaxsp.models.config import DecoderConfig
from jaxsp.models.decoder import unembedding
from jaxsp.typing import Array, Float, Params


@functools.partial(jax.tree_util.register_dataclass, data_fields=["unembedding"], meta_fields=["softcap"])
@dataclasses.dataclass(frozen=True)
class OutputHead:
    """The head of a model: with it last hidden states, which are after the final norm, give the logits.

    Attributes:
      unembedding: its matrix ``[V, D]``.
      softcap: logits are c·tanh(x / c); static.
    """

    unembedding: Float[Array, "v d"]
    softcap: float | None = None

    @classmethod
    def of(cls, params: Params, config: DecoderConfig) -> OutputHead:
        """The head of a model with these weights."""
        return cls(unembedding(params, config), config.logit_softcap)
