"""Causal attention over a shared prefix, a per-row cache and the row itself, by one of several backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from jaxsp.models.attention import chunked, cudnn, splash
from jaxsp.models.attention.call import Call, Slots
from jaxsp.typing import Array, Float, Int, UserError

__all__ = ["BACKENDS", "Backend", "Call", "Slots", "attention"]


class Backend(NamedTuple):
    """A way to compute attention."""

    attend: Callable[[Call], Array]
    refusal: Callable[[Call], str | None]
    """Why it can't serve a call; None if it can."""


BACKENDS = {
    "chunked": Backend(chunked.attend, chunked.refusal),
    "splash": Backend(splash.attend, splash.refusal),
    "cudnn": Backend(cudnn.attend, cudnn.refusal),
}

_FASTEST = {"tpu": "splash", "gpu": "cudnn"}


def attention(
    q_BTHF: Float[Array, "b t h f"],
    positions_BT: Int[Array, "b t"],
    slots: Sequence[Slots],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | Int[Array, ""] | None = None,
    segment_ids_BT: Int[Array, "b t"] | None = None,
    precision: jax.lax.Precision = jax.lax.Precision.DEFAULT,
    backend: str = "auto",
) -> Float[Array, "b t h f"]:
    """Softmax attention of each query over the slots it sees.

    The mask comes from positions alone: query ``t`` sees slot ``s`` iff ``0 <= position[s] <= position[t]``,
    ``position[t] - position[s] < window``, and their segment ids agree, where slots have any. No array
    ``[B, H, T, S]`` is made. Softmax and accumulation are float32.

    Args:
      q_BTHF: rotated queries; ``H`` is a multiple of ``G``.
      positions_BT: int32; ``EMPTY`` for padding, whose output is finite and meaningless.
      slots: keys and values in the order of their positions (padding aside), the queries' own last.
      scale: of the products of queries and keys.
      softcap: bound of the scores: ``softcap * tanh(scores / softcap)``, before the mask.
      window: how many positions back a query sees, itself included; it may be traced. None: all.
      segment_ids_BT: of the queries, where several sequences are packed in one row.
      precision: of the matrix products.
      backend: a key of ``BACKENDS``; ``"auto"`` takes the fastest for this machine that serves the call.
        A single query (decoding) is always ``"chunked"``.

    Returns:
      ``[B, T, H, F]`` in the dtype of ``q``.

    Raises:
      UserError: the backend named is unknown or can't serve this call.

    Example:
      >>> import jax.numpy as jnp
      >>> where = jnp.arange(3)[None]
      >>> values = jnp.array([1.0, 3.0, 8.0]).reshape(1, 3, 1, 1)
      >>> row = Slots(keys=jnp.zeros((1, 3, 1, 1)), values=values, positions=where)
      >>> attention(jnp.ones((1, 3, 1, 1)), where, [row], scale=1.0).ravel().tolist()
      [1.0, 2.0, 4.0]
    """
    if segment_ids_BT is None and any(s.segment_ids is not None for s in slots):
        raise UserError("The slots have segment ids and the queries none; pass segment_ids_BT.")
    call = Call(
        q_BTHF, positions_BT, tuple(slots), scale, softcap, window, segment_ids_BT, precision
    )
    return BACKENDS[_choose(call, backend)].attend(call)


def _choose(call: Call, backend: str) -> str:
    if backend != "auto" and backend not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise UserError(f"There is no attention backend {backend!r}; choose one of {known}.")
    if call.q_BTHF.shape[1] == 1:
        return "chunked"
    if backend == "auto":
        fastest = _FASTEST.get(jax.default_backend(), "chunked")
        return "chunked" if BACKENDS[fastest].refusal(call) else fastest
    if reason := BACKENDS[backend].refusal(call):
        raise UserError(f"The attention backend {backend!r} can't serve: {reason}. Choose 'auto'.")
    return backend
