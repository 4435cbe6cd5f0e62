"""The probabilities of an answer's tokens, of those that were chosen and of the most probable ones."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsp.typing import Array, Bool, Float, Int

MOST = 20
"""Alternatives that are kept for each token of a server's answer."""


class Likely(NamedTuple):
    """Natural logarithms of probabilities by the model's whole softmax, before any temperature."""

    chosen_RA: Float[Array, "r a"]
    ids_RAN: Int[Array, "r a n"]
    """The most probable tokens, the first one first; there may be room for none."""
    log_RAN: Float[Array, "r a n"]

    @classmethod
    def room(cls, rows: int, tokens: int, most: int) -> Likely:
        """Room for so many requests, tokens of each, and alternatives of each token."""
        alternatives = rows, tokens, most
        return cls(jnp.zeros((rows, tokens)), jnp.zeros(alternatives, jnp.int32), jnp.zeros(alternatives))

    def written(
        self,
        logits_BV: Float[Array, "b v"],
        token_B: Int[Array, " b"],
        wanted_B: Bool[Array, " b"],
        row_B: Int[Array, " b"],
        place_B: Int[Array, " b"],
    ) -> Likely:
        """The same with those of the tokens just chosen; where nobody wants them they cost nothing."""

        def measured() -> tuple[Array, ...]:
            log_BV = jax.nn.log_softmax(logits_BV, axis=-1)
            chosen_B1 = jnp.take_along_axis(log_BV, token_B[:, None], axis=1)
            most = self.ids_RAN.shape[-1]
            log_BN, ids_BN = jax.lax.top_k(log_BV, most) if most else (log_BV[:, :0], token_B[:, None][:, :0])
            return chosen_B1[:, 0], ids_BN.astype(jnp.int32), log_BN

        def nothing() -> tuple[Array, ...]:
            return jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), tuple(jax.eval_shape(measured)))

        new = jax.lax.cond(jnp.any(wanted_B), measured, nothing)
        put = [old.at[row_B, place_B].set(each, mode="drop") for old, each in zip(self, new, strict=True)]
        return Likely(*put)
