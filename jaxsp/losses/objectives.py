"""The table of objectives: everything a prompt can be trained on or measured by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from jaxsp.losses.divergence import js_divergence, kl_divergence, reverse_kl_divergence
from jaxsp.losses.likelihood import negative_log_likelihood
from jaxsp.losses.mismatch import zero_one
from jaxsp.typing import Array, Bool, Float, Int, UserError


@dataclasses.dataclass(frozen=True)
class Objective:
    """One entry of ``OBJECTIVES``; call it with everything there is, it takes what it needs.

    Attributes:
      function: the loss. It is called ``(teacher_logits, student_logits, mask)`` if it needs the
        teacher's distribution, ``(student_logits, targets, mask)`` if it needs the gold tokens.
      needs: what it reads of the teacher.
      sense: whether a good prompt makes it small or large.
      differentiable: whether its gradient says anything.
    """

    function: Callable[..., Array]
    needs: Literal["distribution", "tokens"]
    sense: Literal["minimise", "maximise"] = "minimise"
    differentiable: bool = True

    def __call__(
        self,
        teacher_logits: Float[Array, "*b t v"],
        student_logits: Float[Array, "*b t v"],
        targets: Int[Array, "*b t"],
        mask: Bool[Array, "*b t"] | None = None,
    ) -> Float[Array, "*b t"]:
        """The unreduced values ``[*b, t]`` of this objective, as they are reported."""
        if self.needs == "tokens":
            return self.function(student_logits, targets, mask)
        return self.function(teacher_logits, student_logits, mask)


OBJECTIVES: dict[str, Objective] = {
    "kl": Objective(kl_divergence, needs="distribution"),
    "reverse_kl": Objective(reverse_kl_divergence, needs="distribution"),
    "js": Objective(js_divergence, needs="distribution"),
    "nll": Objective(negative_log_likelihood, needs="tokens"),
    "zero_one": Objective(zero_one, needs="distribution", differentiable=False),
}


def trainable(name: str) -> Objective:
    """The objective of that name, if a prompt can be trained on it.

    Raises:
      UserError: there is none, or its gradient is zero almost everywhere.

    Example:
      >>> trainable("kl").sense
      'minimise'
    """
    choices = ", ".join(key for key, entry in OBJECTIVES.items() if entry.differentiable)
    if name not in OBJECTIVES:
        raise UserError(f"Unknown objective {name!r}; choose one of {choices}.")
    if not OBJECTIVES[name].differentiable:
        raise UserError(
            f"Objective {name!r} can't be trained on: it is piecewise constant, so its gradient is"
            f" zero almost everywhere. Train on one of {choices}; {name} is reported all the same."
        )
    return OBJECTIVES[name]
