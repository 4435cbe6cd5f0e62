"""The learning rate over a run."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxsp.typing import AnyArray, Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The number of steps of a run and the learning rate of each: it rises to its peak in a line, then falls
    along a cosine.

    Arrays and not settings, so that runs of other lengths and rates share a compiled update.

    Attributes:
      peak: the highest rate.
      steps: steps of the run; an update beyond them changes nothing.
      warmup: those of the rise.
      fall: the part of the peak that is gone at the end; 1 falls to 0, 0 stays at the peak.

    Reference:
      Loshchilov & Hutter 2017, SGDR (arXiv:1608.03983).
    """

    peak: Float[Array, ""]
    steps: Int[Array, ""]
    warmup: Int[Array, ""]
    fall: Float[Array, ""]

    def rate(self, step: Int[AnyArray, ""] | int) -> Float[Array, ""]:
        """The learning rate of a step, counted from 0.

        Example:
          >>> schedule = warmup_cosine(1.0, 4, warmup_fraction=0.5)
          >>> [round(float(schedule.rate(step)), 2) for step in range(5)]
          [0.0, 0.5, 1.0, 0.5, 0.0]
        """
        rise = step / jnp.maximum(self.warmup, 1)
        done = (step - self.warmup) / jnp.maximum(self.steps - self.warmup, 1)
        left = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(done, 1.0)))
        return self.peak * jnp.where(step < self.warmup, rise, 1 - self.fall * (1 - left))


def warmup_cosine(peak: float, steps: int, warmup_fraction: float = 0.0) -> Schedule:
    """The schedule that rises in the fraction ``warmup_fraction`` of the steps, then falls to 0."""
    rise = round(warmup_fraction * steps)
    return Schedule(jnp.float32(peak), jnp.int32(steps), jnp.int32(rise), jnp.float32(1))


def constant(steps: int = 2**31 - 1, rate: float = 1.0) -> Schedule:
    """The same learning rate at every step."""
    return Schedule(jnp.float32(rate), jnp.int32(steps), jnp.int32(0), jnp.float32(0))
