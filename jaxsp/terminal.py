"""The terminal: what would move its cursor or change its colours is shown instead; and how a command ends."""

from __future__ import annotations

import _thread
import functools
import io
import logging
import os
import re
import signal
import sys
import threading
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 and C1, but for tabs and ends of lines


def duration(seconds: float) -> str:
    """A time for people.

    Example:
      >>> duration(0.2), duration(9.6), duration(200), duration(7500)
      ('under 1 s', '10 s', '3 min', '2 h 5 min')
    """
    if seconds < 0.5:
        return "under 1 s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


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


def say(line: str) -> None:
    """Shows a line on standard error, by ``logging``, so that a program may catch it."""
    logging.getLogger("jaxsp").warning("%s", visible(line))


@functools.cache
def say_once(line: str) -> None:
    """As ``say``, once in a process."""
    say(line)


def prepare() -> None:
    """Makes standard output and error take any text, and a signal to end (SIGTERM) ask as Ctrl-C does.

    What the encoding of the output lacks is spelled out; who is asked to end saves what there is. A stream
    that was closed (``<&-``) is as an empty one.
    """
    for name, mode, errors in (
        ("stdin", "r", "surrogateescape"),  # what is no text is refused where it is used
        ("stdout", "w", "backslashreplace"),
        ("stderr", "w", "backslashreplace"),
    ):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if threading.current_thread() is threading.main_thread():  # no other may set it
        signal.signal(signal.SIGTERM, _interrupt)
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = _unraisable


def flush() -> None:
    """Writes out what was printed.

    Raises:
      OSError: it can't be, as the disk is full or whoever read it has gone; the rest is dropped.
    """
    try:
        sys.stdout.flush()
    except OSError:  # Python would say so once more when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _unraisable(found: Any) -> None:
    """An interrupt that came where Python can raise nothing, as it collects garbage, comes once more."""
    if found.exc_type is KeyboardInterrupt:
        threading.Timer(0.1, _wake).start()
    else:
        sys.__unraisablehook__(found)


def _wake() -> None:
    """Sends the main thread what ``prepare`` takes for Ctrl-C, also while it waits."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    else:
        _thread.interrupt_main()


def _interrupt(*_: object) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in the background by a script
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)
