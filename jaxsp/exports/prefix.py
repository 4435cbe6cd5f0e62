"""A prefix as other programs hold it: all that stands before the question, at positions without a gap.

jaxsp lets the question stand where it stood after the whole document; others number positions by the length
of their cache. Rotary positions are relative: the keys before the question are turned back by the difference.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from jaxsp.artifact import SoftPrompt
from jaxsp.models import decoder
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.load import hub_id
from jaxsp.models.rope import Rope
from jaxsp.prompts.initializers import ABSENT
from jaxsp.typing import EMPTY, Float, Int, UserError

NEVER = 1 << 40
"""Offset of no token."""


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """A soft prompt, and the tokens before it, in float32: N slots, after which the question has position N.

    Attributes:
      prompt: the soft prompt.
      model: that it was trained for.
      keys: ``[L, G, N, F]``.
      values: ``[L, G, N, F]``.
      bias: ``[L, G, N]``, added to the scores of a slot, ``ABSENT`` where a head has none; ``None``: all 0.
      until: ``[L, N]`` int64: a sliding window leaves a slot out from this offset in the question and its
        answer on (from 0 on: always), though by its place it would not yet; ``None``: there is none such.
      vectors: ``[N, D]``, the input vectors that the keys and values were read from, where there are such;
        the model's own embedding scale is in them.
      end: the position of the question in jaxsp: the keys are turned by the difference to N.
    """

    prompt: SoftPrompt
    model: LanguageModel
    keys: Float[np.ndarray, "l g n f"]
    values: Float[np.ndarray, "l g n f"]
    bias: Float[np.ndarray, "l g n"] | None
    until: Int[np.ndarray, "l n"] | None
    vectors: Float[np.ndarray, "n d"] | None
    end: int

    @property
    def slots(self) -> int:
        """N: the tokens before the prompt and its own slots."""
        return self.keys.shape[2]


def hold(prompt: SoftPrompt, model: LanguageModel) -> Held:
    """The soft prompt as other programs hold it.

    Args:
      prompt: the soft prompt.
      model: that it was trained for, in float32.

    Raises:
      UserError: the prompt belongs to another model; the model isn't float32 or is quantized; or its
        positions can't be shifted.
    """
    if model.config.quantization != "none":
        raise UserError(
            "This prompt was trained for a model quantized to int8 as jaxsp does it, which no other program"
            " computes; train one with --quantization none."
        )
    if model.config.dtype != "float32":
        raise UserError(
            f"An export is made in float32, the model was loaded in {model.config.dtype}; load it with"
            " dtype='float32'."
        )
    found = prompt.prefix(model)
    positions, end = np.asarray(found.positions)[0], found.end
    bias = np.zeros(found.keys.shape[:1] + found.keys.shape[2:4]) if found.bias is None else found.bias[:, 0]
    keys, values, bias = (np.asarray(x, np.float32) for x in (found.keys[:, 0], found.values[:, 0], bias))
    there = (positions != EMPTY) & (bias > ABSENT / 2).any(axis=(0, 2))
    keys, values, bias, positions = keys[:, there], values[:, there], bias[:, there], positions[there]
    shift = len(positions) - end
    if shift and not model.config.ropes:
        raise UserError(
            f"{model.short_name} has learned positions, which can't be shifted: the question stands at"
            f" {end}, after {len(positions)} slots it would stand at {len(positions)}; train with --kind"
            " embedding."
        )
    keys = np.stack([turned(layer, rope, shift) for layer, rope in zip(keys, ropes(model), strict=True)])
    embeddings = prompt.sigma.get("embeddings")
    return Held(
        prompt,
        model,
        keys.swapaxes(1, 2),
        values.swapaxes(1, 2),
        bias.swapaxes(1, 2) if bias.any() else None,
        _until(model, positions, end),
        None if embeddings is None else np.concatenate([_before(prompt, model), np.float32(embeddings)]),
        end,
    )


def place(model: LanguageModel) -> str:
    """The model's id on the hub or, of a folder or a GGUF file, the folder of its weights as safetensors."""
    return hub_id(model.name) or str(model.directory)


def weights(model: LanguageModel, scratch: Path) -> Path:
    """The folder of the model's weights, for consumers that read safetensors; as ``Export.weights``."""
    return model.directory


def _before(prompt: SoftPrompt, model: LanguageModel) -> Float[np.ndarray, "p d"]:
    """Input vectors of the tokens before the prompt."""
    ids = np.array(prompt.manifest["slots"]["before_ids"], np.int32)
    return np.asarray(decoder.embed(model.params, model.config, ids[None])[0], np.float32)


def ropes(model: LanguageModel) -> tuple[Rope, ...]:
    """The rotation of each layer; one without frequencies where positions are learned."""
    return model.config.ropes or (Rope(()),) * model.config.layers


def turned(keys: Float[np.ndarray, "n g f"], rope: Rope, shift: int) -> Float[np.ndarray, "n g f"]:
    """Keys of one layer as they are ``shift`` positions further on."""
    angles = np.array(rope.frequencies, np.float64) * shift
    cos, sin, n = np.cos(angles), np.sin(angles), len(angles)
    first, second = keys[..., :n], keys[..., n : 2 * n]
    turned = first * cos - second * sin, second * cos + first * sin, keys[..., 2 * n :]
    return np.concatenate(turned, axis=-1, dtype=np.float32)


def _until(model: LanguageModel, positions: Int[np.ndarray, " n"], end: int) -> Int[np.ndarray, "l n"] | None:
    """As ``Held.until``: of slots that are nearer to the question than they were."""
    count = len(positions)
    far, near = end - positions.astype(np.int64), count - np.arange(count)
    found = np.full((model.config.layers, count), NEVER)
    for layer, window in enumerate(model.config.sliding_windows):
        if window is not None:
            found[layer] = np.where((far > near) & (near < window), np.maximum(window - far, 0), NEVER)
    return found if (found != NEVER).any() else None
