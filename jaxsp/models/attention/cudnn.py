"""Attention on an NVIDIA GPU by cuDNN's fused kernels. Not run on a GPU yet: tested through XLA's path."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsp import device
from jaxsp.models.attention.inputs import AttentionInputs, joined, joined_bias, padded, visible
from jaxsp.typing import Array

WIDEST = 128
"""Head width that every GPU with the kernels takes."""

AMPERE = 8  # the first compute capability (its major number) with them


def unsupported_reason(inputs: AttentionInputs) -> str | None:
    """Why the kernels can't serve these inputs."""
    F = inputs.q_BTHF.shape[-1]
    if device.platform() == "gpu" and _compute_capability() < AMPERE:
        return "cuDNN's attention needs an NVIDIA GPU of the Ampere generation or later"
    if inputs.q_BTHF.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's attention takes bfloat16 or float16, not {inputs.q_BTHF.dtype}"
    if F % 8 or F > WIDEST:
        return f"cuDNN takes head widths that are multiples of 8 up to {WIDEST}, not {F}"
    if inputs.softcap is not None:
        return "cuDNN's attention has no softcap"
    return None


def _compute_capability() -> int:
    # AMD's GPUs name theirs otherwise ("gfx942").
    major = str(getattr(device.current(), "compute_capability", "")).partition(".")[0]
    return int(major) if major.isdigit() else 0


def attend(inputs: AttentionInputs) -> Array:
    """Attention over all slots in one row, shared ones copied to each row, under an explicit mask.

    The mask ``[B, 1, T, S]`` has no head axis. Where there is no GPU, XLA computes the same.
    """
    B, T, H, _ = inputs.q_BTHF.shape
    keys_BSGF = joined([s.keys for s in inputs.slots], B)
    values_BSGF = joined([s.values for s in inputs.slots], B)
    seen = [
        visible(inputs.positions_BT, inputs.segment_ids_BT, s, inputs.sliding_window) for s in inputs.slots
    ]
    mask_BTS = jnp.concatenate(seen, axis=-1)
    # The backward kernel takes even lengths only; what is added sees nothing and is seen by nobody.
    mask_BTS = jnp.pad(mask_BTS, ((0, 0), (0, T % 2), (0, keys_BSGF.shape[1] % 2)))
    bias_BSG, bias_BH1S = joined_bias(inputs.slots, B), None
    if bias_BSG is not None:
        of_heads_BSH = jnp.repeat(padded(bias_BSG, 2), H // bias_BSG.shape[2], axis=2)
        bias_BH1S = of_heads_BSH.swapaxes(1, 2)[:, :, None].astype(inputs.q_BTHF.dtype)
    out_BTHF = jax.nn.dot_product_attention(
        padded(inputs.q_BTHF, 2),
        padded(keys_BSGF, 2),
        padded(values_BSGF, 2),
        bias=bias_BH1S,
        mask=mask_BTS[:, None],
        scale=inputs.scale,
        implementation="cudnn" if device.platform() == "gpu" else "xla",
    )
    return out_BTHF[:, :T]
