"""The places of the context and the query in a model's prompt: text before, the context, text after.

The texts come from the tokenizer's own chat template, by default with the document in the user turn (there
the models that were measured use it best). The context can be replaced by vectors without moving a token
around it: the texts before and after it are token ids of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsp.files import parse_json
from jaxsp.models import chat_renderer
from jaxsp.models.text import control_ids, encode, stands_alone
from jaxsp.typing import UserError

_SEPARATOR = "\n\n"
_QUERY, _ANSWER, _AGAIN = (
    f"\N{SYMBOL FOR NULL}{name}\N{SYMBOL FOR NULL}" for name in ("query", "answer", "again")
)
_CONTEXT = (
    '\N{SYMBOL FOR NULL}A "context", it\'s <b>BOLD</b> &amp;  {{ as it is }}, a\\b:\n\n\n- one\n\n\t'
    + "Word, " * 100
    + "\N{SYMBOL FOR NULL}"
)
"""Traits that templates are known to change: capitals, quotes, signs of HTML, blanks, lines, length."""

SLOTS = ("user", "system")
"""Turns that the context may stand in."""

THINKING = "enable_thinking"
"""The variable by which templates switch the model's reasoning; off, where the user doesn't ask for it."""


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """The way a chat is laid out, where the template leaves it open.

    Attributes:
      system: text of the system turn; ``None`` for the template's own.
      slot: the turn that the context stands in, ``"user"`` or ``"system"``.
      variables: further variables of the template.
    """

    system: str | None = None
    slot: str = "user"
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.slot not in SLOTS:
            raise UserError(f"Unknown slot {self.slot!r}; choose one of {', '.join(SLOTS)}.")
        if self.system is not None and self.slot == "system":
            raise UserError("Give either a system text or the slot system, where the context is that text.")


@dataclasses.dataclass(frozen=True)
class ChatTexts:
    """The fixed texts around a context and a query.

    The sequence is ``before · context · between · query · after · answer · end``.

    Attributes:
      before: what stands before the context.
      between: what stands between the context and the query.
      after: what stands between the query and the answer.
      lead: blanks before the context that are a part of its first token: a soft prompt replaces them, too.
      answer_lead: likewise before an answer that is given.
      end: what ends the answer.
      trims: whether the template drops blanks around the user's text.

    Example:
      >>> import jaxsp
      >>> tokenizer = jaxsp.load_model("smollm2-135m-instruct").tokenizer
      >>> chat = ChatTexts.of(tokenizer)
      >>> chat.between, chat.after, chat.end
      ('\\n\\n', '<|im_end|>\\n<|im_start|>assistant\\n', '<|im_end|>\\n')
      >>> tokenizer.decode(chat.query_ids(tokenizer, "How long?"))
      '\\n\\nHow long?<|im_end|>\\n<|im_start|>assistant\\n'
    """

    before: str
    between: str
    after: str
    lead: str = ""
    answer_lead: str = ""
    end: str = ""
    trims: bool = False

    @classmethod
    def of(cls, tokenizer: Any, options: ChatOptions = ChatOptions()) -> ChatTexts:
        """The texts of a tokenizer's chat template, or a plain layout if it has none.

        Args:
          tokenizer: a ``transformers`` tokenizer.
          options: what the template leaves open.

        Raises:
          UserError: the template fails, takes too long, or changes or drops the user's text.
        """
        template = _template(tokenizer)
        if template is None:
            system = f"{options.system}{_SEPARATOR}" if options.system else ""
            return cls(before=f"{tokenizer.bos_token or ''}{system}", between=_SEPARATOR, after="\n")

        def turns(context: str, query: str) -> list[dict[str, str]]:
            if options.slot == "system":
                return [_turn("system", context), _turn("user", query)]
            system = [] if options.system is None else [_turn("system", options.system)]
            return [*system, _turn("user", f"{context}{_SEPARATOR}{query}")]

        asked = turns(_CONTEXT, _QUERY)
        variables = {**_NOTHING, **_special_tokens(tokenizer), THINKING: False, **options.variables}
        opened = {**variables, "add_generation_prompt": True}
        text, padded = render(template, [asked, turns(f" {_CONTEXT}", f"{_QUERY} ")], opened)
        if text.count(_CONTEXT) != 1 or text.count(_QUERY) != 1:
            raise UserError(
                "The tokenizer's chat template does not keep the user's text as it is; remove the"
                " template to use the plain layout."
            )
        before, rest = text.split(_CONTEXT)
        between, after = rest.split(_QUERY)
        trims = f" {_CONTEXT}" not in padded or f"{_QUERY} " not in padded
        bare = before if stands_alone(tokenizer, before) else before.rstrip()
        answer_lead, end = _around_answer(template, asked, variables, text)
        return cls(bare, between, after, before[len(bare) :], answer_lead, end, trims)

    def before_ids(self, tokenizer: Any) -> list[int]:
        """Token ids of what stands before the context."""
        return encode(tokenizer, self.before, control=True)

    def context_ids(self, tokenizer: Any, text: str) -> list[int]:
        """Token ids of a context, as it stands behind what is before it."""
        text = text.lstrip() if self.trims else text
        return encode(tokenizer, self.lead + text, behind=self.before) if text else []

    def query_ids(self, tokenizer: Any, query: str) -> list[int]:
        """Token ids of what stands after the context, up to where the answer starts."""
        return self.chat_ids(tokenizer, [query])

    def chat_ids(
        self, tokenizer: Any, texts: Sequence[str], later: TurnTexts | None = None, most: int | None = None
    ) -> list[int]:
        """Token ids of what stands after the context in a chat, up to where the next answer starts.

        Args:
          tokenizer: a ``transformers`` tokenizer.
          texts: what the user and the model have said in turn, the user first and last.
          later: the texts around the later turns; needed if there are any.
          most: number of tokens from which on it is enough to have more, not all; ``None``: none is enough.
        """
        fixed = [self.between]
        if later is not None:
            fixed += [later.opening, later.turn] * (len(texts) // 2)
        ids: list[int] = []
        for place, (before, text) in enumerate(zip(fixed, texts, strict=True)):
            if self.trims:
                text = text.strip() if place else text.rstrip()
            ids += _spoken(tokenizer, before, text)
            if most is not None and len(ids) > most:
                return ids
        return ids + encode(tokenizer, self.after, control=True, behind=_WORD)

    def answer_ids(self, tokenizer: Any, answer: str) -> list[int]:
        """Token ids of an answer that is given, with what ends it."""
        return [*encode(tokenizer, self.answer_lead + answer, behind=self.after), *self.end_ids(tokenizer)]

    def end_ids(self, tokenizer: Any) -> list[int]:
        """The token that ends an answer: the first control token of ``end``, else that which ends a text."""
        ids, known = encode(tokenizer, self.end, control=True, behind=_WORD), control_ids(tokenizer)
        own = tokenizer.eos_token_id
        return [i for i in ids if i in known][:1] or ([] if own is None else [own])


@dataclasses.dataclass(frozen=True)
class TurnTexts:
    """The fixed texts around a chat's later turns: ``query · opening · answer · turn · query · after``.

    Attributes:
      opening: what stands between a query and the answer that was given to it.
      turn: what stands between that answer and the next query.
    """

    opening: str
    turn: str

    @classmethod
    def of(cls, tokenizer: Any, options: ChatOptions = ChatOptions()) -> TurnTexts:
        """The texts by the tokenizer's chat template; without one, those of the plain layout.

        Raises:
          UserError: the template has no second turn.

        Example:
          >>> import jaxsp
          >>> TurnTexts.of(jaxsp.load_model("smollm2-135m-instruct").tokenizer).turn
          '<|im_end|>\\n<|im_start|>user\\n'
        """
        if (template := _template(tokenizer)) is None:
            return cls(opening="\n", turn=_SEPARATOR)
        variables = {**_NOTHING, **_special_tokens(tokenizer), THINKING: False, **options.variables}
        turns = [_turn("user", _QUERY), _turn("assistant", _ANSWER), _turn("user", _AGAIN)]
        (text,) = render(template, [turns], {**variables, "add_generation_prompt": True})
        parts = re.split(f"({_QUERY}|{_ANSWER}|{_AGAIN})", text)
        if parts[1::2] != [_QUERY, _ANSWER, _AGAIN]:
            raise UserError(
                "The tokenizer's chat template does not keep the turns of a chat as they are; ask each"
                " question on its own."
            )
        return cls(opening=parts[2], turn=parts[4])


def _spoken(tokenizer: Any, before: str, text: str) -> list[int]:
    """Token ids of a fixed text and of the words behind it, which hold no control tokens."""
    fixed, known = encode(tokenizer, before, control=True, behind=_WORD), control_ids(tokenizer)
    if known.isdisjoint(fixed):  # mere blanks may be a part of the first token of the words
        return encode(tokenizer, before + text, behind=_WORD)
    return fixed + (encode(tokenizer, text, behind=before) if text else [])


def conversation(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The text of a chat up to where the answer begins, as a server makes it; ``None`` without a template.

    Args:
      tokenizer: a ``transformers`` tokenizer.
      messages: with ``role`` and ``content`` each; a content may also be a list of parts, where the template
        takes that.

    Raises:
      UserError: the template fails.
    """
    if (template := _template(tokenizer)) is None:
        return None
    variables = {**_NOTHING, **_special_tokens(tokenizer), THINKING: False, "add_generation_prompt": True}
    return render(template, [list(messages)], variables)[0]


def turn_ends(tokenizer: Any) -> list[int]:
    """Tokens that end the assistant's turn by the chat template; none where that can't be read.

    Args:
      tokenizer: a ``transformers`` tokenizer.
    """
    try:
        return ChatTexts.of(tokenizer).end_ids(tokenizer) if _template(tokenizer) else []
    except UserError:  # it is said when the chat is needed
        return []


_NOTHING = {"tools": None, "documents": None, "add_generation_prompt": False}
"""Variables that templates may look for, as transformers sets them."""

_WORD = "a"
"""Stands for a text that is not known where token ids are made: it ends in a letter, as most do."""


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _template(tokenizer: Any) -> str | None:
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, Mapping) else found


def _special_tokens(tokenizer: Any) -> dict[str, str]:
    return {name: word for name, word in tokenizer.special_tokens_map.items() if isinstance(word, str)}


def _around_answer(
    template: str, asked: list[dict[str, str]], variables: dict[str, Any], opened: str
) -> tuple[str, str]:
    """Blanks before an answer, and what ends it; nothing where the template can't show an answer."""
    try:
        (text,) = render(template, [[*asked, _turn("assistant", _ANSWER)]], variables)
    except UserError:
        return "", ""
    if text.count(_ANSWER) != 1:
        return "", ""
    before, end = text.split(_ANSWER)
    lead = before.removeprefix(opened)
    return "" if lead == before or lead.strip() else lead, end


def render(
    template: str, conversations: Sequence[Sequence[Mapping[str, Any]]], variables: Mapping[str, Any]
) -> list[str]:
    """The texts of conversations by a chat template, which runs in a process of its own.

    Args:
      template: in jinja's language.
      conversations: messages with ``role`` and ``content`` each.
      variables: what else the template may read; as JSON carries it.

    Raises:
      UserError: the template fails, or takes too much time or memory.

    Example:
      >>> render("{% for m in messages %}{{ m.content }};{% endfor %}", [[{"content": "a"}]], {})
      ['a;']
    """
    asked = {"template": template, "conversations": conversations, "variables": dict(variables)}
    found = parse_json(_rendered(json.dumps(asked)), "The chat template", list)
    for each in found:
        if "error" in each:
            raise UserError(_unusable(each["error"]))
    return [each["text"] for each in found]


@functools.lru_cache(maxsize=64)
def _rendered(asked: str) -> str:
    # -P: the modules beside the script are not those of Python that have their names.
    command = [sys.executable, "-P", str(Path(chat_renderer.__file__)), str(chat_renderer.SECONDS)]
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, encoding="utf-8", check=False,
            timeout=10 * chat_renderer.SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise UserError(_unusable(f"it takes more than {error.timeout} s")) from error
    if done.returncode < 0:
        raise UserError(_unusable(f"it takes more than {chat_renderer.SECONDS} s, or too much memory"))
    if done.returncode:
        raise UserError(_unusable(done.stderr.strip().rpartition("\n")[2][:300]))
    return done.stdout


def _unusable(reason: str) -> str:
    return (
        f"The tokenizer's chat template can't be used: {reason.strip()}. Remove it from the model's folder to"
        " use the plain layout, or correct it."
    )
