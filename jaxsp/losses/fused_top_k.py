"""The best tokens of a head's distributions and the mass of the rest, without the logits in memory."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsp.losses import checks, chunked_head
from jaxsp.losses.checks import Hidden, Mask
from jaxsp.losses.topk import TOP_K
from jaxsp.typing import AnyArray, Array, Float, Int


class TopKAndTail(NamedTuple):
    """The best tokens of a distribution, best first, and the mass of all others."""

    log_probs: Float[Array, "*b t k"]
    ids: Int[Array, "*b t k"]
    tail: Float[Array, "*b t"]


def fused_top_k(
    hidden: Hidden,
    unembedding: Float[AnyArray, "v d"],
    mask: Mask = None,
    *,
    k: int = TOP_K,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> TopKAndTail:
    r"""The k most likely tokens of each position, their log-probabilities, and the probability of all others.

    .. math:: p = \text{softmax}(W h),\qquad p_{tail} = \sum_{v \notin K} p_v

    The tail is summed over the others themselves: what the k leave of 1 is lost to rounding where it is
    small. A chunk of positions at a time has logits; where no position of it counts, it is not computed.

    Args:
      hidden: last hidden states ``[*b, t, d]``.
      unembedding: the head ``[v, d]``.
      mask: ``[*b, t]``, True where a position counts; all if ``None``.
      k: number of tokens; all v if there are fewer.
      softcap: logits are :math:`c \tanh(x / c)` (Gemma 2).
      chunk_size: positions at a time; by default as many as fit a budget (256 MiB on a CPU, else 1 GiB).

    Returns:
      ``TopKAndTail(log_probs, ids, tail)``: float32 and int32 ``[*b, t, k]``, best first, ties by id, and
      float32 ``[*b, t]``; all 0 where the mask is False.

    Raises:
      ValueError: shapes or dtypes don't fit, or a number is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> head = jnp.log(jnp.array([[0.1], [0.6], [0.3]]))
      >>> best = fused_top_k(jnp.ones((1, 1)), head, k=2)
      >>> best.ids, [f"{p:.2f}" for p in jnp.exp(best.log_probs)[0]], f"{best.tail[0]:.2f}"
      (Array([[1, 2]], dtype=int32), ['0.60', '0.30'], '0.10')

    Reference:
      Hsu et al. 2024, Liger Kernel (arXiv:2410.10989), here for what a teacher's store keeps.
    """
    tokens = checks.check_head("hidden", hidden, "unembedding", unembedding)
    checks.check_count("k", k)
    if softcap is not None:
        softcap = checks.number("softcap", softcap)
        checks.check_positive("softcap", softcap)
    batch = hidden.shape[:-1]
    if chunk_size is None:
        chunk_size = chunked_head.chunk_size(math.prod(batch), tokens, masked=mask is not None)
    checks.check_count("chunk_size", chunk_size)
    live = checks.check_mask(mask, batch).reshape(-1)
    flat = jnp.reshape(jnp.asarray(hidden), (-1, hidden.shape[-1]))
    found = _in_chunks(flat, live, jnp.asarray(unembedding), min(k, tokens), softcap, chunk_size)
    return TopKAndTail(*(leaf.reshape(*batch, *leaf.shape[1:]) for leaf in found))


@functools.partial(jax.jit, static_argnames=("k", "softcap", "size"))
def _in_chunks(
    hidden: Array, live: Array, head: Array, k: int, softcap: float | None, size: int
) -> tuple[Array, ...]:
    """The same of positions ``[N]``."""
    N = hidden.shape[0]
    order, count = jnp.argsort(~live, stable=True), jnp.sum(live)  # those that count first

    def best(index: Array) -> tuple[Array, ...]:
        logits = chunked_head.product("nd,vd->nv", hidden[index], head, hidden.dtype)
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        log_probs, ids = jax.lax.top_k(log_p, k)
        others = jnp.put_along_axis(log_p, ids, -jnp.inf, axis=-1, inplace=False)
        return log_probs, ids, jnp.sum(jnp.exp(others), axis=-1)

    def nothing(index: Array) -> tuple[Array, ...]:
        return tuple(jnp.zeros(like.shape, like.dtype) for like in jax.eval_shape(best, index))

    def chunk(given: tuple[Array, Array]) -> tuple[Array, ...]:
        first, index = given
        return jax.lax.cond(first < count, best, nothing, index)

    chunks = jnp.pad(order, (0, -N % size)).reshape(-1, size)
    found = jax.lax.map(chunk, (jnp.arange(len(chunks)) * size, chunks))
    rank = jnp.zeros(N, jnp.int32).at[order].set(jnp.arange(N, dtype=jnp.int32))

    def placed(values: Array) -> Array:
        own = values.reshape(-1, *values.shape[2:])[rank]
        return jnp.where(live.reshape(-1, *[1] * (own.ndim - 1)), own, 0)

    return tuple(map(placed, found))
