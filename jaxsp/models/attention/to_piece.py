"""The attention that queries pay to one piece of what they see, head by head: what compaction looks at."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsp.models.attention.inputs import AttentionInputs, Slots, visible
from jaxsp.typing import Array, Bool, Float

UNSEEN = -1e30
"""Score of a slot that a query doesn't see; finite, so that one which sees nothing gets finite numbers."""


class ToPiece(NamedTuple):
    """Attention to a piece of S slots, by key/value head (axis ``G``); N queries, those of a group together.

    Attributes:
      scores: before the softmax, float32; ``UNSEEN`` where the query doesn't see the slot.
      weight: the part of the query's whole attention that the piece gets; 0 for padding.
      keys: the piece's keys.
      values: its values.
      own: the slots that a query is to be served like; None: all.
    """

    scores: Float[Array, "*g n s"]
    weight: Float[Array, "*g n"]
    keys: Float[Array, "*g s f"]
    values: Float[Array, "*g s f"]
    own: Bool[Array, "n s"] | None = None


def attention_to(inputs: AttentionInputs, index: int, own_BS: Bool[Array, "b s"] | None = None) -> ToPiece:
    """The attention to ``inputs.slots[index]``, which all rows share.

    Args:
      inputs: queries, and what they see.
      index: number of the piece.
      own_BS: the slots of the piece that the queries of a row have read; the weight is that of these alone,
        the scores are those of all. None: they have read all.
    """
    B, T, H, F = inputs.q_BTHF.shape
    piece = inputs.slots[index]
    G = piece.keys.shape[2]
    X = T * (H // G)  # queries of a row
    q_BTGRF = inputs.scale * inputs.q_BTHF.astype(jnp.float32).reshape(B, T, G, H // G, F)
    q_GBXF = q_BTGRF.transpose(2, 0, 1, 3, 4).reshape(G, B, X, F)

    def scores(slots: Slots) -> Array:
        keys = slots.keys.astype(jnp.float32)
        if slots.keys.shape[0] == 1:  # the same for all rows
            q_GNF, keys_GSF = q_GBXF.reshape(G, B * X, F), keys[0].swapaxes(0, 1)
            found = jnp.einsum("gnf,gsf->gns", q_GNF, keys_GSF).reshape(G, B, X, -1)
        else:
            found = jnp.einsum("gbxf,bsgf->gbxs", q_GBXF, keys)
        if inputs.softcap is not None:
            found = inputs.softcap * jnp.tanh(found / inputs.softcap)
        if slots.bias is not None:
            bias_GBXS = slots.bias.transpose(2, 0, 1)[:, :, None]
            found += bias_GBXS
        seen_BTS = visible(inputs.positions_BT, inputs.segment_ids_BT, slots, inputs.sliding_window)
        return jnp.where(jnp.repeat(seen_BTS, H // G, axis=1), found, UNSEEN)

    own_GBXS = scores(piece)
    others = [jax.nn.logsumexp(scores(s), axis=-1) for i, s in enumerate(inputs.slots) if i != index]
    rest_GBX = functools.reduce(jnp.logaddexp, others)
    read_GBXS = own_GBXS if own_BS is None else jnp.where(own_BS[:, None], own_GBXS, UNSEEN)
    weight_GBX = jax.nn.sigmoid(jax.nn.logsumexp(read_GBXS, axis=-1) - rest_GBX)
    real_BX = jnp.repeat(inputs.positions_BT >= 0, H // G, axis=1)
    keys_GSF, values_GSF = (x[0].astype(jnp.float32).swapaxes(0, 1) for x in (piece.keys, piece.values))
    own_NS = None if own_BS is None else jnp.repeat(own_BS, X, axis=0)
    scores_GNS, weight_GN = own_GBXS.reshape(G, B * X, -1), (weight_GBX * real_BX).reshape(G, B * X)
    return ToPiece(scores_GNS, weight_GN, keys_GSF, values_GSF, own_NS)
