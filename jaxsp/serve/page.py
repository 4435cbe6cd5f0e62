"""The page at ``/``: a chat with σ beside the whole document and nothing; and what it asks for.

The page itself is the same for everybody, and holds no name and no text of a soft prompt: these come as JSON,
for which a key is asked.
"""

from __future__ import annotations

import functools
from typing import Any

from jaxsp.evaluation import page
from jaxsp.files import os_errors_as_user_errors
from jaxsp.runs.folder import REPORT, read_report
from jaxsp.serve.brackets import DOCUMENT, NOTHING, Bracket
from jaxsp.serve.served import Served, Shelf
from jaxsp.study.lost import lost, passages
from jaxsp.terminal import visible
from jaxsp.typing import UserError

TEMPLATE, PACKAGE = "chat.html.jinja", "jaxsp.serve"


@functools.cache
def html() -> str:
    """The page."""
    return page.render(TEMPLATE, PACKAGE, kinds=(DOCUMENT, NOTHING))


@functools.cache
def headers() -> dict[str, str]:
    """Headers of the page: a browser runs its script alone, and shows it in no other page."""
    return {
        "content-security-policy": f"{page.policy(TEMPLATE, PACKAGE)}; frame-ancestors 'none'",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }


def listed(shelf: Shelf) -> list[dict[str, Any]]:
    """The soft prompts as the page offers them.

    Args:
      shelf: all that are served.
    """
    return [
        {**served.entry, "missing": Bracket(f"{name}:{DOCUMENT}", DOCUMENT, served).missing}
        for name, served in shelf.items()
    ]


def document(served: Served) -> dict[str, Any]:
    """The document of a soft prompt, and what σ lost of it by its report.

    Args:
      served: the soft prompt.

    Returns:
      ``passages`` with a ``text`` and the numbers of the ``lost`` answers that most likely stand there;
      ``lost`` with the texts of these; and ``note``, what is to be said of them.
    """
    queries, note = _lost(served)
    context = served.prompt.context
    return {
        "passages": [
            {"text": visible(piece.text), "lost": piece.lost} for piece in passages(context or "", queries)
        ],
        "lost": queries,
        "note": note,
    }


def _lost(served: Served) -> tuple[list[dict[str, str]], str]:
    """The held-out queries that σ lost, and a sentence on them."""
    names = ("query", "answer_full_context", "answer_prompt")
    if served.changed:
        return [], "What was lost is not known: the folder holds another soft prompt than the one served."
    if not (served.folder / REPORT).is_file():
        return [], "What was lost is not known: there is no report beside the soft prompt."
    try:
        with os_errors_as_user_errors():
            report = read_report(served.folder)
        if report.get("error"):
            return [], "What was lost is not known: training failed, and nothing was measured."
        found = [{name: visible(str(query[name])) for name in names} for query in lost(report["queries"])]
        count = sum(query["split"] == "held_out" for query in report["queries"])
        slots = int(report["prompt_length"])
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return [], "What was lost is not known: the report is damaged, or of another version of jaxsp."
    whole = "" if slots == served.held else f" with all its {slots} slots"
    if not found:
        return [], f"By the report, σ{whole} lost none of the {count} held-out answers."
    return found, f"By the report, σ{whole} lost {len(found)} of the {count} held-out answers."
