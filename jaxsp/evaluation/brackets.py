"""The brackets: every quality figure of σ stands between the full context and none."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxsp import distributions
from jaxsp.models import decoder
from jaxsp.models.language_model import LanguageModel
from jaxsp.prompts import PROMPT_KINDS
from jaxsp.typing import KeyValues, PyTree

CONDITIONS = {
    "full_context": "the whole context: what σ should be",
    "prompt": "the trained soft prompt σ",
    "initial": "σ before training",
    "truncated_context": "the context cut to the length of σ",
    "no_context": "nothing where the context stood",
}


def read_context(
    model: LanguageModel, ids: np.ndarray, before: KeyValues | None = None
) -> KeyValues:
    """The prefix of context ids ``[C]`` after ``before``."""
    return decoder.read_long(model.params, model.config, ids[None], before)


def read_prompt(model: LanguageModel, sigma: PyTree, before: KeyValues, kind: str) -> KeyValues:
    """The prefix of a soft prompt after ``before``."""
    read = functools.partial(jax.jit, static_argnums=(1, 4))(distributions.prompt_prefix)
    return read(model.params, model.config, sigma, before, kind)


def bracket_prefixes(
    model: LanguageModel, before: KeyValues, context: np.ndarray, initial: PyTree, kind: str
) -> dict[str, KeyValues]:
    """The prefixes of the conditions that need neither the whole context nor the trained prompt.

    Args:
      model: the frozen model.
      before: the prefix that stands before the context in all of them.
      context: token ids ``[C]``.
      initial: the prompt before training.
      kind: of the prompt.

    Returns:
      By name; two of them are one object where they are the same.
    """
    length = PROMPT_KINDS[kind].length(initial)
    untrained = read_prompt(model, initial, before, kind)
    truncated = context[:length]
    # By default σ starts as the truncated context: then the two are one, and measured once.
    same = np.array_equal(initial.get("embeddings"), model.embed(truncated).astype(jnp.float32))
    return {
        "initial": untrained,
        "truncated_context": untrained if same else read_context(model, truncated, before),
        # Padded to the others' size, to share their compiled programs.
        "no_context": before.append(decoder.empty_prefix(model.config, length)),
    }
