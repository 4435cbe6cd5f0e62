"""The question as other programs encode it: the texts around it, and ids that it may not hold."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsp.artifact import SoftPrompt
from jaxsp.files import sealed
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.load import hub_id
from jaxsp.models.text import control_ids, encode
from jaxsp.typing import Float, Int, UserError

DESCRIPTION = "prompt.json"
"""File of an export with what ``description`` gives."""

_ANCHORS = ("a", "\n", ".", "")
"""Texts that a question is encoded behind, as many tokenizers begin a text in another way than they go on."""

ORDINARY = ("How long is the cable?", "the", "1, 2 and 3", '"Yes" or no?', "Übung – naïve 🙂")
"""Questions that must have the same ids everywhere."""

_PROBED, PROBED_ENTRIES = 4, 64
"""Rows of the embedding table, and entries of each, by which a consumer sees that it has the same weights."""


def description(prompt: SoftPrompt, model: LanguageModel, queries: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that a consumer must know beside σ, as JSON keeps it.

    Args:
      prompt: the soft prompt.
      model: that it was trained for.
      queries: questions that are known; those encoded elsewhere must have the same ids.

    Raises:
      UserError: other programs would encode questions in another way.
    """
    rows, entries = weights_probe(model)
    manifest = without_paths(prompt.manifest)
    return {
        "kind": prompt.kind,
        "prompt_length": prompt.prompt_length,
        "model": {"name": hub_id(model.name) or model.short_name, "fingerprint": model.fingerprint},
        "weights": {"rows": rows.tolist(), "entries": entries.tolist()},
        "question": around(prompt, model, queries),
        "stop_ids": stop_ids(prompt, model),
        "manifest": sealed({"sha256": "", **manifest}),
    }


def without_paths(found: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest or report that names no folder of this machine: a path of a model is its last part.

    Example:
      >>> without_paths({"model": {"name": "/home/me/small"}, "teacher": None, "kind": "embedding"})
      {'model': {'name': 'small'}, 'teacher': None, 'kind': 'embedding'}
      >>> without_paths({"model": "/home/me/small", "taught_by": {"name": "large"}})
      {'model': 'small', 'taught_by': {'name': 'large'}}
    """

    def last(name: str) -> str:
        return Path(name).name if os.path.isabs(name) else name

    cleaned = dict(found)
    for role in ("model", "teacher", "taught_by"):
        model = found.get(role)
        if isinstance(model, str):
            cleaned[role] = last(model)
        elif model and "name" in model:
            cleaned[role] = {**model, "name": last(model["name"])}
    return cleaned


def weights_probe(model: LanguageModel) -> tuple[Int[np.ndarray, " r"], Float[np.ndarray, "r e"]]:
    """Rows of the embedding table and their first entries, by which other weights are known."""
    rows = np.linspace(0, model.config.vocab_size - 1, _PROBED).astype(np.int64)
    table = model.params["embed_tokens"]["embedding"]
    return rows, np.asarray(table[rows, :PROBED_ENTRIES], np.float32)


def stop_ids(prompt: SoftPrompt, model: LanguageModel) -> list[int]:
    """Token ids that end an answer."""
    return sorted({*model.stop_ids, *prompt.stop_ids})


def around(prompt: SoftPrompt, model: LanguageModel, queries: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that turns a question into token ids, as ``encoded`` takes it.

    Args:
      prompt: the soft prompt.
      model: that it was trained for.
      queries: questions that are known; those encoded elsewhere must have the same ids.

    Returns:
      ``behind`` and ``skip``: the text that a question is encoded behind, and the ids that are then left out;
      ``blanks``: those that are dropped from a question's end, all where it is ``None``; ``before_ids`` and
      ``after_ids``, of the chat's texts; ``control_ids``, which no question may have.

    Raises:
      UserError: other programs would encode questions in another way.
    """
    chat, tokenizer = prompt.chat, model.tokenizer
    between = encode(tokenizer, chat.between, control=True, behind="a")
    control = control_ids(tokenizer)
    joined = control.isdisjoint(between)  # mere blanks may be a part of the question's first token
    found = {
        "before_ids": [] if joined else between,
        "after_ids": encode(tokenizer, chat.after, control=True, behind="a"),
        "blanks": None if chat.trims else "",
        "control_ids": sorted(control),
    }
    for anchor in _ANCHORS:
        found["behind"] = anchor + (chat.between if joined else "")
        found["skip"] = len(_ids(tokenizer, anchor))
        if all(
            encoded(tokenizer, found, query) == chat.query_ids(tokenizer, query)
            for query in [*ORDINARY, *queries]
        ):
            return found
    raise UserError(
        "This model's tokenizer gives questions other ids behind a soft prompt than by themselves, which"
        " other programs can't follow; the prompt can't leave jaxsp."
    )


def encoded(tokenizer: Any, question: Mapping[str, Any], text: str) -> list[int]:
    """Token ids of a question by a ``transformers`` tokenizer alone, as in ``consumers/question.py``."""
    own = _ids(tokenizer, question["behind"] + text.rstrip(question["blanks"]))[question["skip"] :]
    return [*question["before_ids"], *own, *question["after_ids"]]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
