"""jaxsp watch: a run as it is written, from the files alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jaxsp import watching
from jaxsp.errors import UserError
from jaxsp.runs.folder import RunFolder
from jaxsp.runs.watched import WatchedRun


def begin(folder: Path, **settings: Any) -> RunFolder:
    run = RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run.start({"steps": 4, **settings})
    return run


def line(step: int, **more: float) -> str:
    metrics = {"loss": 1.0 / step, "seconds": 2.0} if step else {}
    return json.dumps({"step": step, **metrics, **more}) + "\n"


def append(run: RunFolder, *lines: str) -> None:
    with run.metrics.open("a") as file:
        file.writelines(lines)


def shown(run: WatchedRun, has_ended: bool = False) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(watching.view(run, has_ended))
    return " ".join(console.file.getvalue().split())  # pyright: ignore[reportAttributeAccessIssue]


def test_lines_are_read_as_they_come(tmp_path):
    folder = begin(tmp_path / "out")
    run = WatchedRun(folder.directory)
    (prompt,) = run.prompts
    with folder.locked():
        run.look()
        assert not run.has_ended
        assert "no step yet" in shown(run)
        append(folder, line(0, held_out_kl=0.75), line(1)[:9])
        run.look()
        assert prompt.step == 0
        append(folder, line(1)[9:], line(2, held_out_kl=0.5))
        run.look()
        assert [known["step"] for known in prompt.lines] == [0, 1, 2]
        assert (prompt.steps, prompt.seconds_left(1), prompt.seconds_left(3)) == (4, 4.0, 12.0)
        text = shown(run)
        for part in ("step 2 of 4, about 4 s left", "held-out KL 0.500, lowest 0.500 (from 0.750)", "0.500"):
            assert part in text
        append(folder, line(3), line(4))
        run.look()
        assert "step 4 of 4, being measured" in shown(run)
        assert not run.has_ended
        folder.report.write_text('{"error": null}')
        run.look()
        assert run.has_ended
        assert "finished after 4 steps" in shown(run, True)


def test_lines_that_are_written_anew_are_read_anew(tmp_path):
    folder = begin(tmp_path / "out")
    run = WatchedRun(folder.directory)
    append(folder, line(0), line(1), line(2))
    run.look()
    folder.metrics.unlink()
    append(folder, line(0))
    run.look()
    assert run.prompts[0].step == 0
    append(folder, "{damaged\n", "[3]\n", line(1))
    run.look()
    assert [known["step"] for known in run.prompts[0].lines] == [0, 1]


def test_a_run_that_nobody_is_at_work_in_has_ended(tmp_path):
    folder = begin(tmp_path / "out")
    append(folder, line(0), line(1))
    run = WatchedRun(folder.directory)
    run.look()
    with folder.locked():
        assert not run.has_ended
    assert run.has_ended
    assert "interrupted at step 1 of 4; --resume goes on" in shown(run, True)


def test_many_prompts_are_a_row_each(tmp_path):
    many = RunFolder(tmp_path / "many")
    begin(many.directory, settings={"steps": 4})
    run = WatchedRun(many.directory)
    with many.locked():
        run.look()
        assert "0 finished, 0 in training" in shown(run)
        jobs = [begin(many.directory / name) for name in "abc"]
        for job in jobs:
            append(job, line(0, held_out_kl=0.75), line(1))
        jobs[0].report.write_text('{"error": "not finite\\u001b[31m"}')
        run.look()
        text = shown(run)
        assert "1 finished, 2 in training" in text
        assert "failed: not finite␛[31m" in text
        assert text.count("step 1 of 4, about 12 s left") == 2
        assert not run.has_ended
        assert not WatchedRun(jobs[1].directory).has_ended  # the folder above is at work
    assert run.has_ended


def test_it_ends_with_the_run_or_when_it_is_interrupted(tmp_path):
    folder = begin(tmp_path / "out")
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        append(folder, line(len(looks) - 1))
        if len(looks) == 5:
            folder.report.write_text("{}")

    console = Console(file=io.StringIO(), width=100)
    with folder.locked():
        watching.watch(str(folder.directory), console, every=0.5, sleep=sleep)
    assert looks == [0.5] * 5
    assert "finished after 4 steps" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    folder.report.unlink()
    with folder.locked():
        watching.watch(str(folder.directory), Console(file=io.StringIO()), sleep=interrupt)


def test_a_folder_without_a_run_is_a_sentence(tmp_path, jaxsp_command):
    with pytest.raises(UserError, match=r"holds no run \(no run/settings.json\)"):
        WatchedRun(tmp_path)
    code, out, err = jaxsp_command("watch", tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert "nowhere holds no run" in err


def test_a_finished_run_is_shown_once(tmp_path, jaxsp_command):
    folder = begin(tmp_path / "out")
    append(folder, line(0, held_out_kl=0.75), line(1), line(2, held_out_kl=0.5))
    folder.report.write_text('{"error": null}')
    code, out, err = jaxsp_command("watch", folder.directory)
    assert (code, err) == (0, "")
    assert "finished after 2 steps" in " ".join(out.split())


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0, 1.0)], ["▁    "]),
        ([(0, 1.0), (4, 1.0)], ["▁▁▁▁▁"]),
        ([(0, 8.0), (2, 4.0), (4, 1.0)], ["██▄▄▁"]),
        ([(0, 1000.0), (2, 1.0)], ["██▁"]),
    ],
)
def test_curves(points, expected):
    assert [row.rstrip() for row in watching.curve(points, 4, 5, 1)] == [row.rstrip() for row in expected]


def test_a_higher_curve():
    found = watching.curve([(0, 2.0), (1, 1.0), (2, 0.0)], 2, 3, 2)
    assert found == ["█▁ ", "██▁"]
