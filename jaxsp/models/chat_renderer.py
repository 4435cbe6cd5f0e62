"""Renders a chat template in a process of its own: it is a program of whoever made the model.

Run as a script, it reads one JSON object from standard input, writes one to standard output, and imports
nothing of jaxsp. jinja's sandbox keeps the template from files and from Python; the limits here keep it from
taking the machine's time and memory.

Source: the variables and filters that templates may use,
https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import datetime
import json
import sys
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, MEMORY, CHARACTERS = 10, 1 << 30, 1_000_000
"""Limits of a template: seconds of the processor (the script's argument), bytes, and characters that it
writes."""


class _Generation(Extension):
    """``{% generation %}``, by which trainers find the assistant's words, changes no text."""

    tags = {"generation"}  # noqa: RUF012 (as jinja declares it)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=options.pop("ensure_ascii", False), indent=indent, **options)


def rendered(template: str, conversations: list[Any], variables: dict[str, Any]) -> list[dict[str, str]]:
    """The ``text`` of each conversation, or the ``error`` that the template ends in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    found: list[dict[str, str]] = []
    for messages in conversations:
        try:
            compiled = environment.from_string(template)
            text = compiled.render(messages=messages, **variables)
            if len(text) > CHARACTERS:
                raise jinja2.TemplateError(f"it writes {len(text)} characters")
            found.append({"text": text})
        except MemoryError:
            found.append({"error": "it needs too much memory"})
        except Exception as error:  # whatever a stranger's program may raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            found.append({"error": reason[:300]})
    return found


def _limit(seconds: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows, where only the time is limited, by who waits
        return
    for kind, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, MEMORY)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    _limit(int(sys.argv[1]))
    json.dump(rendered(**asked), sys.stdout)
