"""Causal attention over a shared prefix, a per-row cache and the row itself, by one of several backends.

A backend is a module with two functions:

* ``attend(inputs) -> out_BTHF``;
* ``unsupported_reason(inputs) -> str | None``: why it can't serve these inputs; None if it can.
"""

from __future__ import annotations

import functools
import logging

from jaxsp import device
from jaxsp.models.attention import chunked, cudnn, splash
from jaxsp.models.attention.inputs import AttentionInputs, Slots
from jaxsp.typing import Array, Float, UserError

__all__ = ["BACKENDS", "AttentionInputs", "Slots", "attention"]

BACKENDS = {"chunked": chunked, "splash": splash, "cudnn": cudnn}

_log = logging.getLogger(__name__)

_FASTEST = {"tpu": "splash", "gpu": "cudnn"}


def attention(inputs: AttentionInputs, backend: str = "auto") -> Float[Array, "b t h f"]:
    """Softmax attention of each query over the slots it sees.

    The mask comes from positions alone: query ``t`` sees slot ``s`` iff ``0 <= position[s] <= position[t]``,
    ``position[t] - position[s] < sliding_window``, and their segment ids agree, where slots have any. No
    array ``[B, H, T, S]`` is made. Softmax and accumulation are float32.

    Args:
      inputs: queries, keys and values, and the rule.
      backend: a key of ``BACKENDS``; ``"auto"`` takes the fastest for this machine that serves the inputs.
        A single query (decoding) is always ``"chunked"``.

    Returns:
      ``[B, T, H, F]`` in the dtype of the queries.

    Raises:
      UserError: the backend named is unknown or can't serve these inputs.

    Example:
      >>> import jax.numpy as jnp
      >>> where = jnp.arange(3)[None]
      >>> values = jnp.array([1.0, 3.0, 8.0]).reshape(1, 3, 1, 1)
      >>> row = Slots(keys=jnp.zeros((1, 3, 1, 1)), values=values, positions=where)
      >>> inputs = AttentionInputs(jnp.ones((1, 3, 1, 1)), where, (row,), scale=1.0)
      >>> attention(inputs).ravel().tolist()
      [1.0, 2.0, 4.0]
    """
    if inputs.segment_ids_BT is None and any(s.segment_ids is not None for s in inputs.slots):
        raise UserError("The slots have segment ids and the queries none; pass segment_ids_BT.")
    return BACKENDS[_choose(inputs, backend)].attend(inputs)


def _choose(inputs: AttentionInputs, backend: str) -> str:
    if backend != "auto" and backend not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise UserError(f"There is no attention backend {backend!r}; choose one of {known}.")
    if inputs.q_BTHF.shape[1] == 1:
        return "chunked"
    if backend == "auto":
        fastest = _FASTEST.get(device.platform(), "chunked")
        reason = BACKENDS[fastest].unsupported_reason(inputs)
        if reason is not None:
            _say_once(fastest, reason)
        return fastest if reason is None else "chunked"
    if reason := BACKENDS[backend].unsupported_reason(inputs):
        raise UserError(f"The attention backend {backend!r} can't serve: {reason}. Choose 'auto'.")
    return backend


@functools.cache
def _say_once(backend: str, reason: str) -> None:
    """Warns that the fastest backend isn't used, and why."""
    _log.warning("Attention falls back from %s to chunked, which is slower: %s.", backend, reason)
