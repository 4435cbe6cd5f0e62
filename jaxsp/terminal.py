"""The terminal: what would move its cursor or change its colours is shown instead; and how a command ends."""

from __future__ import annotations

import functools
import io
import logging
import re
import signal
import sys
import threading

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 and C1, but for tabs and ends of lines


def visible(text: str) -> str:
    """The text with a sign in place of each control character.

    Example:
      >>> visible("one\\ttwo\\x1b[31m")
      'one\\ttwo␛[31m'
    """

    def sign(found: re.Match[str]) -> str:
        code = ord(found[0])
        if code < 32:
            return chr(0x2400 + code)
        return "\N{SYMBOL FOR DELETE}" if code == 127 else "\N{REPLACEMENT CHARACTER}"

    return _CONTROL.sub(sign, text)


@functools.cache
def say_once(line: str) -> None:
    """Shows a line on standard error, once in a process; by ``logging``, so that a program may catch it."""
    logging.getLogger("jaxsp").warning("%s", visible(line))


def prepare() -> None:
    """Makes standard output and error take any text, and a signal to end (SIGTERM) ask as Ctrl-C does.

    What the encoding of the output lacks is spelled out; who is asked to end saves what there is.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread():  # no other may set it
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_: object) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in the background by a script
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)
