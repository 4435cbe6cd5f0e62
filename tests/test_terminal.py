"""jaxsp.terminal: texts of strangers can't command a terminal."""

from __future__ import annotations

import pytest

from jaxsp.console import _print, _table
from jaxsp.progress import Display
from jaxsp.terminal import visible

HOSTILE = "a\x1b[2Jb\x9b31mc\x07\x00\r\x7f [/b] [link=x]y[/link] :smile:"


def test_control_characters_are_shown():
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible(HOSTILE).isprintable()
    assert visible("\x1b\x7f\x9b") == "␛␡\N{REPLACEMENT CHARACTER}"


def test_whatever_is_printed(capsys):
    _print(_table([[HOSTILE]], "[/b]", title=None), HOSTILE)
    display = Display()
    display.say(HOSTILE)
    with display.phase("answers", "Title [/x]") as note:
        note(HOSTILE)
    with display.jobs(2, 0) as show:
        show(1, HOSTILE)
    out, err = capsys.readouterr()
    for text in (out, err):
        assert "[/b]" in text
        assert ":smile:" in text
        assert "\x1b[2J" not in text
        assert not {"\x9b", "\x07", "\x00", "\x7f"} & set(text)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_encoding_that_lacks_a_letter_ends_nothing(python, encoding, tmp_path):
    code = (
        "import sys; from jaxsp.terminal import prepare; prepare();"
        "print('σ \\u6c34'); print('σ', file=sys.stderr)"
    )
    done = python("-c", code, env={"PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\\u03c3 \\u6c34\n"


@pytest.mark.parametrize("before", ["", "signal.signal(signal.SIGINT, signal.SIG_IGN)"])
def test_a_signal_to_end_asks_as_ctrl_c_does(python, before):
    code = (
        f"import os, signal; {before}\n"
        "from jaxsp.terminal import prepare; prepare()\n"
        "try: os.kill(os.getpid(), signal.SIGTERM); signal.pause()\n"
        "except KeyboardInterrupt: print('saved')"
    )
    assert python("-c", code, timeout=60).stdout == "saved\n"
