"""The k best tokens, their log-probabilities, and the mass of all others: a coarser distribution, and small.

A token of an answer takes 8 k + 4 bytes, whatever the model's width: 516 for the usual k = 64, where the last
hidden states take 2,304 (D = 576 in float32) or 8,192 (D = 4,096 in bfloat16).
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxsp import distributions
from jaxsp.data.examples import Rows
from jaxsp.losses import Objective, fused_topk
from jaxsp.models.config import DecoderConfig
from jaxsp.models.output_head import OutputHead
from jaxsp.typing import Array, Float, Int, KeyValues, Params


def options(objective: Objective, tokens: int) -> dict[str, int]:
    """The number of tokens that the objective compares, and of those that teacher and student share."""
    return {"k": min(objective.entries, tokens), "tokens": tokens}


def at_positions(
    params: Params, config: DecoderConfig, prefix: KeyValues, rows: Rows, *, k: int, tokens: int
) -> tuple[Float[Array, "b a k"], Int[Array, "b a k"], Float[Array, "b a"]]:
    """``[B, A, k]`` float32 and int32, and ``[B, A]`` float32: a chunk of positions at a time has logits.

    Args:
      params: the teacher's weights.
      config: its configuration.
      prefix: prefix of the context.
      rows: what is read after it.
      k: number of tokens.
      tokens: number of tokens, the first ones, that the distribution is over: where two models pad one
        vocabulary to two sizes, no text has the others.
    """
    states = distributions.answer_hidden(params, config, prefix, rows)
    head = OutputHead.of(params, config)
    unembedding = head.unembedding if head.unembedding.shape[0] == tokens else head.unembedding[:tokens]
    best = fused_topk(states, unembedding, jnp.asarray(rows.mask), k=k, softcap=head.softcap)
    return best.log_probs, best.ids, best.tail
