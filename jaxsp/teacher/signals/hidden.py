"""The last hidden states: with the frozen head the exact distribution, at D/V of its size.

A token of an answer takes D numbers of the model's dtype: 2,304 bytes for D = 576 in float32, 8,192 for 4,096
in bfloat16.
"""

from __future__ import annotations

from jaxsp import distributions
from jaxsp.data.examples import Rows
from jaxsp.losses import Objective
from jaxsp.models.config import DecoderConfig
from jaxsp.typing import Array, Float, KeyValues, Params


def options(objective: Objective, tokens: int) -> dict[str, int]:
    """None: they serve every objective, over any vocabulary."""
    del objective, tokens
    return {}


def at_positions(
    params: Params, config: DecoderConfig, prefix: KeyValues, rows: Rows
) -> Float[Array, "b a d"]:
    """``[B, A, D]`` in the model's dtype."""
    return distributions.answer_hidden(params, config, prefix, rows)
