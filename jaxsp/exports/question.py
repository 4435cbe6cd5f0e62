"""The question as other programs encode it: the texts around it, and ids that it may not hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsp.artifact import SoftPrompt
from jaxsp.files import sealed
from jaxsp.models.chat import ChatTexts
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.load import hub_id
from jaxsp.models.text import control_ids, encode
from jaxsp.typing import UserError

DESCRIPTION = "prompt.json"
"""File of an export with what ``description`` gives."""

_ANCHORS = ("a", "\n", ".", "")
"""Texts that a question is encoded behind, as many tokenizers begin a text in another way than they go on."""

ORDINARY = ("How long is the cable?", "the", "1, 2 and 3", '"Yes" or no?', "Übung – naïve 🙂")
"""Questions that must have the same ids everywhere."""

_PROBED, _PROBED_ENTRIES = 4, 64
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
    chat, tokenizer, config = prompt.chat, model.tokenizer, model.config
    rows = np.linspace(0, config.vocab_size - 1, _PROBED).astype(int)
    table = np.asarray(model.params["embed_tokens"]["embedding"][rows, :_PROBED_ENTRIES], np.float32)
    return {
        "kind": prompt.kind,
        "prompt_length": prompt.prompt_length,
        "model": {"name": model.short_name, "fingerprint": model.fingerprint, "path": model_path(model)},
        "weights": {"rows": rows.tolist(), "entries": table.tolist()},
        "question": _question(tokenizer, chat, [*ORDINARY, *queries]),
        "stop_ids": sorted({*model.stop_ids, *prompt.stop_ids}),
        "manifest": sealed({"sha256": "", **prompt.manifest}),
    }


def model_path(model: LanguageModel) -> str:
    """The model's id on the hub or, of a folder or a GGUF file, the folder of its weights as safetensors."""
    return hub_id(model.name) or str(model.directory)


def _question(tokenizer: Any, chat: ChatTexts, queries: Sequence[str]) -> dict[str, Any]:
    between = encode(tokenizer, chat.between, control=True, behind="a")
    control = control_ids(tokenizer)
    joined = control.isdisjoint(between)  # mere blanks may be a part of the question's first token
    found = {
        "lead_ids": [] if joined else between,
        "lead": chat.between if joined else "",
        "after_ids": encode(tokenizer, chat.after, control=True, behind="a"),
        "trims": chat.trims,
        "control_ids": sorted(control),
    }
    for anchor in _ANCHORS:
        found["anchor"] = anchor
        if all(encoded(tokenizer, found, query) == chat.query_ids(tokenizer, query) for query in queries):
            return found
    raise UserError(
        "This model's tokenizer gives questions other ids behind a soft prompt than by themselves, which"
        " other programs can't follow; the prompt can't leave jaxsp."
    )


def encoded(tokenizer: Any, question: dict[str, Any], text: str) -> list[int]:
    """Token ids of a question by a ``transformers`` tokenizer alone, as in ``consumers/question.py``."""

    def ids(some: str) -> list[int]:
        return tokenizer.encode(some, add_special_tokens=False, split_special_tokens=True)

    text = question["lead"] + (text.rstrip() if question["trims"] else text)
    own = ids(question["anchor"] + text)[len(ids(question["anchor"])) :]
    return [*question["lead_ids"], *own, *question["after_ids"]]
