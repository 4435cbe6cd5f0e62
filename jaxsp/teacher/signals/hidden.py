"""The last hidden states: with the frozen head the exact distribution, at D/V of its size."""

from __future__ import annotations

from jaxsp import distributions
from jaxsp.data.examples import Rows
from jaxsp.models.config import DecoderConfig
from jaxsp.typing import Array, Float, KeyValues, Params


def at_positions(
    params: Params, config: DecoderConfig, prefix: KeyValues, rows: Rows
) -> Float[Array, "b a d"]:
    """``[B, A, D]`` in the model's dtype."""
    return distributions.answer_hidden(params, config, prefix, rows)
