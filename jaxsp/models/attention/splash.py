"""Attention on a TPU by the Splash kernels that come with jax.

Not run on a TPU yet: tested in interpret mode, and compiled ahead of time for v5e and v6e.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsp import device
from jaxsp.models.attention.inputs import AttentionInputs, Slots, joined, joined_bias, padded
from jaxsp.typing import EMPTY, Array

LANES = 128
"""Lengths are padded to a multiple of it."""

BLOCKS = (512, 256, LANES)
"""Lengths of a block of queries or slots: the first that divides the padded length."""

BIAS_PARTS = 2
"""Coordinates of the keys that carry a bias: what 16 bits hold of it, and the rest. A head's width is padded
to ``LANES`` anyway."""

STRANGER = 128.0
"""Root of what is taken from the score of a slot of another segment, for each bit in which the two differ."""

NO_SEGMENT = -(2**31)  # of slots that hold nothing: no query has it


def unsupported_reason(inputs: AttentionInputs) -> str | None:
    """Why the kernels can't serve these inputs: they know a slot by its order and one id, not by position."""
    if inputs.sliding_window is not None:
        return "a sliding window counts positions, Splash counts slots"
    if inputs.slots[-1].positions is not inputs.positions_BT:
        return "Splash needs the queries' own slots (with the same array of positions) last"
    if inputs.q_BTHF.dtype == jnp.float32 and inputs.precision != jax.lax.Precision.DEFAULT:
        return "Splash multiplies float32 in fewer bits than asked for"
    if coordinates := _coordinates(inputs):
        if inputs.softcap is not None:
            return "Splash can't add a bias after a softcap, nor show a prefix to several segments there"
        if -inputs.q_BTHF.shape[-1] % LANES < coordinates:
            width = inputs.q_BTHF.shape[-1]
            return f"Splash has no room for a bias, or segments after a prefix, beside heads of width {width}"
    mesh = jax.typeof(inputs.q_BTHF).sharding.mesh
    if mesh.size > 1 and not mesh.are_all_axes_manual:
        return "XLA can't spread Splash over a mesh by itself, only shard_map or pmap can"
    return None


def attend(inputs: AttentionInputs) -> Array:
    """Attention over all slots in one row, shared ones copied to each row.

    The kernel is interpreted where there is no TPU: the same arithmetic, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    B, T, H, _ = inputs.q_BTHF.shape
    keys_BSGF = joined([s.keys for s in inputs.slots], B)
    values_BSGF = joined([s.values for s in inputs.slots], B)
    positions_BS = joined([s.positions for s in inputs.slots], B)
    ids_BT, ids_BS = jnp.zeros((B, T), jnp.int32), jnp.zeros_like(positions_BS)
    if inputs.segment_ids_BT is not None and not _shares_slots(inputs):
        ids_BT = inputs.segment_ids_BT
        ids_BS = joined([s.segment_ids for s in inputs.slots if s.segment_ids is not None], B)
    ids_BS = jnp.where(positions_BS == EMPTY, NO_SEGMENT, ids_BS)
    S = keys_BSGF.shape[1]

    q_BTHF = padded(inputs.q_BTHF * jnp.asarray(inputs.scale, inputs.q_BTHF.dtype), LANES)
    if (bias_BSG := joined_bias(inputs.slots, B)) is not None:
        # q·k + bias = (q, 1, 1)·(k, parts of the bias)
        large = bias_BSG.astype(keys_BSGF.dtype)
        small = (bias_BSG - large).astype(keys_BSGF.dtype)
        keys_BSGF = jnp.concatenate([keys_BSGF, jnp.stack([large, small], axis=-1)], axis=-1)
        q_BTHF = jnp.pad(q_BTHF, ((0, 0), (0, 0), (0, 0), (0, BIAS_PARTS)), constant_values=1)
    if _shares_slots(inputs):
        q_BTHF, keys_BSGF = _told_apart(inputs, q_BTHF, keys_BSGF)
    keys_BSGF, values_BSGF = padded(keys_BSGF, LANES), padded(values_BSGF, LANES)
    # Slots added at the end come after every query: the causal mask hides them.
    ids = splash.SegmentIds(padded(ids_BT, LANES), padded(ids_BS, LANES))
    mask = splash.CausalMask((q_BTHF.shape[1], keys_BSGF.shape[1]), offset=S - T)
    q, kv = _block(q_BTHF.shape[1]), _block(keys_BSGF.shape[1])
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * H),
        block_sizes=splash.BlockSizes(
            block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv
        ),
        attn_logits_soft_cap=inputs.softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=device.platform() != "tpu",
    )
    heads_first = [x.swapaxes(1, 2) for x in (q_BTHF, keys_BSGF, values_BSGF)]
    out_BHTF = jnp.asarray(jax.vmap(kernel)(*heads_first, ids))
    return out_BHTF.swapaxes(1, 2)[:, :T]


def _shares_slots(inputs: AttentionInputs) -> bool:
    """Whether queries of several segments see some slots alike: Splash's own segment ids can't say that."""
    return inputs.segment_ids_BT is not None and any(s.segment_ids is None for s in inputs.slots)


def _bits(inputs: AttentionInputs) -> int:
    """Bits that tell a row's segments apart: there are no more of them than tokens."""
    return max(1, (inputs.q_BTHF.shape[1] - 1).bit_length())


def _coordinates(inputs: AttentionInputs) -> int:
    """Coordinates that queries and keys get beside those of their head."""
    biased = any(s.bias is not None for s in inputs.slots)
    return BIAS_PARTS * biased + 2 * _bits(inputs) * _shares_slots(inputs)


def _told_apart(inputs: AttentionInputs, q_BTHF: Array, keys_BSGF: Array) -> tuple[Array, Array]:
    """Queries and keys with coordinates by which slots of other segments get scores that count for nothing.

    Each bit b of a segment's number is (b, 1 - b) in a query and (b - 1, -b) in a key: equal bits add nothing
    to a score, not even rounding, and others take STRANGER² from it. Slots that all segments see have zeros.
    """
    bits = jnp.arange(_bits(inputs))

    def bits_of(ids: Array) -> Array:
        return (jnp.maximum(ids, 0)[..., None] >> bits) & 1

    def of_slots(slots: Slots) -> Array:
        if slots.segment_ids is None:
            return jnp.zeros((1, slots.keys.shape[1], 2 * len(bits)), jnp.int32)
        bit = bits_of(slots.segment_ids)
        return jnp.concatenate([bit - 1, -bit], axis=-1)

    def beside(x: Array, coordinates: Array) -> Array:
        more = (STRANGER * coordinates[:, :, None]).astype(x.dtype)
        return jnp.concatenate([x, jnp.broadcast_to(more, (*x.shape[:3], more.shape[-1]))], axis=-1)

    assert inputs.segment_ids_BT is not None
    bit = bits_of(padded(inputs.segment_ids_BT, LANES))
    theirs = joined([of_slots(slots) for slots in inputs.slots], len(keys_BSGF))
    return beside(q_BTHF, jnp.concatenate([bit, 1 - bit], axis=-1)), beside(keys_BSGF, theirs)


def _block(length: int) -> int:
    return next(block for block in BLOCKS if length % block == 0)
