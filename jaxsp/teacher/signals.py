"""The teacher's signal: its last hidden states where the answer is predicted.

With the frozen head they give the exact distribution over the whole vocabulary, at D/V of its size.
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from jaxsp import distributions
from jaxsp.data.packing import Packing
from jaxsp.data.examples import Rows
from jaxsp.models.config import DecoderConfig
from jaxsp.models.language_model import LanguageModel
from jaxsp.typing import Array, Float, KeyValues, Params


@functools.partial(jax.jit, static_argnames="config")
def _hidden(params: Params, config: DecoderConfig, prefix: KeyValues, rows: Rows) -> Array:
    return distributions.answer_hidden(params, config, prefix, rows)


def hidden_states(
    model: LanguageModel, prefix: KeyValues, rows: Rows, packing: Packing
) -> Float[np.ndarray, "n a d"]:
    """Last hidden states ``[N, A, D]`` at every answer position, in the model's dtype, on the host."""
    batches = packing.in_order(rows)
    parts = [
        _hidden(model.params, model.config, prefix, packing.pack(rows, index)) for index in batches
    ]
    return packing.unpack(parts, rows, batches)
