"""Muon over Adam's direction: all directions of a prompt's vectors move alike.

Reference: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), here by an exact decomposition: a prompt
is a small matrix.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jaxsp.settings import TrainingSettings
from jaxsp.training.optimizers.adam import B2
from jaxsp.typing import Array, Float

B1 = 0.8
"""Momentum shorter than Adam's, chosen on training loss."""


def orthogonalise(y: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Each matrix of ``y`` ``[*b, k, d]`` with all its singular values equal, and entries of mean square 1.

    Directions that ``y`` does not have (singular value 0) stay out of it. Arrays of fewer axes have no
    directions to balance: they are only scaled to root mean square 1.

    Example:
      >>> import jax.numpy as jnp
      >>> orthogonalise(jnp.array([[3.0, 0.0], [0.0, 0.1]])).round(2)
      Array([[1.41, 0.  ],
             [0.  , 1.41]], dtype=float32)
    """
    if y.ndim < 2:
        size = jnp.sqrt(jnp.mean(jnp.square(y)))
        return y / jnp.where(size > 0, size, 1.0)
    u, s, vt = jnp.linalg.svd(y, full_matrices=False)
    longer = max(y.shape[-2:])
    present = s > jnp.finfo(y.dtype).eps * longer * s[..., :1]
    return longer**0.5 * (u * present[..., None, :]) @ vt


def make(settings: TrainingSettings) -> optax.GradientTransformation:
    """Adam's direction (with Nesterov momentum), orthogonalised over the last two axes of each array.

    Adam scales each entry of σ alone; this also moves every direction of its K vectors alike, so that
    a few strong ones don't use up the step.
    """
    del settings
    return optax.chain(
        optax.scale_by_adam(b1=B1, b2=B2, nesterov=True),
        optax.stateless(lambda updates, params: jax.tree.map(orthogonalise, updates)),
        optax.scale(-1.0),
    )
