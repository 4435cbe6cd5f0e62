"""jaxsp.terminal: texts of strangers can't command a terminal."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxsp import terminal
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


def test_a_notebook_shows_one_text_for_each_thing_and_no_widget(monkeypatch):
    """The texts that IPython is given to show, in their order; a changed output stands where it stood."""
    shown: list[str] = []

    def display(text, *, raw, display_id):
        place = len(shown)
        shown.append(text["text/plain"])
        return SimpleNamespace(update=lambda text, raw: shown.__setitem__(place, text["text/plain"]))

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    for is_visible in (False, True):
        ours = Display(visible=is_visible)
        with ours.phase("answers", "Answers [/x]") as note:
            note(HOSTILE)
        with ours.training(2) as on_step:
            for step in (1, 2):
                on_step({"step": step, "loss": 0.5, "tokens": 3, "seconds": 0.1})
        with ours.jobs(2, 0) as show:
            show(1, HOSTILE)
        assert is_visible or not shown
    phase, training, jobs = shown
    assert phase.startswith("Answers [/x]: ")
    assert phase.endswith(" s")
    assert training.startswith("Training step 2/2 ")
    assert jobs.startswith("1/2 prompts ")
    assert "\x1b" not in "".join(shown)


def test_a_notebook_shows_a_mistake_as_its_sentence(monkeypatch):
    """IPython asks an error itself for its traceback."""
    from IPython.core.interactiveshell import InteractiveShell

    shown: list[list[str]] = []
    shell = InteractiveShell()
    monkeypatch.setattr(shell, "_showtraceback", lambda kind, error, lines: shown.append(lines))
    shell.run_cell("from jaxsp.errors import Damaged\nraise Damaged('a.json is missing', 'write it anew')")
    assert shown == [["Damaged: a.json is missing; write it anew."]]


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


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("compress - <&-", 2, "jaxsp: standard input is empty.\n"),
        (
            r"compress - < <(printf 'a\377')",
            2,
            "jaxsp: standard input is not UTF-8 (byte 1); convert it first.\n",
        ),
        ("--help >&-", 0, ""),
        ("--help > /dev/full", 2, "jaxsp: No space left on device.\n"),
        ("--frob 2>&-", 2, ""),
        (
            r"compress $'a\377'",
            2,
            r"jaxsp: The argument 'a\udcff' is no text in Unicode ('\udcff' at 1); write it in UTF-8." + "\n",
        ),
    ],
)
def test_streams_that_are_closed_or_full(command, code, said):
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    line = f"{shlex.quote(sys.executable)} -m jaxsp {command}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (code, said)


@pytest.fixture
def prepared():
    """SIGTERM is an interrupt, as in a command."""
    before = signal.signal(signal.SIGTERM, terminal._interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


def test_an_interrupt_that_nothing_could_raise_comes_once_more(prepared):
    """As where jax frees memory while Python collects garbage; at once, whatever is waited for."""
    ignored: Any = SimpleNamespace(exc_type=KeyboardInterrupt)
    begun = time.perf_counter()
    terminal._unraisable(ignored)
    with pytest.raises(KeyboardInterrupt):
        time.sleep(10)
    assert time.perf_counter() - begun < 5
