"""A run's files are damaged, or can't be written: a sentence, or the same result; never other numbers."""

from __future__ import annotations

import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import jaxsp
from jaxsp.errors import UserError
from jaxsp.runs.folder import Result, RunFolder
from jaxsp.runs.resume import Earlier
from jaxsp.teacher.store import Store
from jaxsp.training.slots import Step, lines_checksum, past_lines
from jaxsp.typing import Interrupted
from tests.conftest import CONTEXT, QUERIES, assert_same_sigma

SETTINGS: dict[str, Any] = {
    "prompt_length": 4, "steps": 12, "batch_size": 4, "max_answer_tokens": 6, "evaluate_every": 5,
    "checkpoint_every": 4,
}  # fmt: skip


def compress(model, out: Path, **more) -> jaxsp.Result:
    options: dict[str, Any] = {"progress": False, **SETTINGS, **more}
    return jaxsp.compress(model, CONTEXT, QUERIES, out=out, **options)


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> tuple[jaxsp.Result, Path]:
    """The run that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return compress(tiny_model, out), out


@pytest.fixture(scope="module")
def stopped(tiny_model, tmp_path_factory) -> Path:
    """The same, stopped after step 9."""

    def stop(step: Step) -> None:
        if step.number == 9:
            raise KeyboardInterrupt

    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.raises(Interrupted):
        compress(tiny_model, out, callbacks=[stop])
    return out


@pytest.fixture
def pieces(stopped, tmp_path) -> Path:
    return shutil.copytree(stopped, tmp_path / "out")


def flip(file: Path, bit: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(bytes(data))


def assert_same(ours: jaxsp.Result, theirs: jaxsp.Result) -> None:
    assert_same_sigma(ours.prompt.sigma, theirs.prompt.sigma)
    for a, b in zip(ours.lines, theirs.lines, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


# One bit


def read_finished(out: Path) -> Any:
    """All that jaxsp reads of a finished run."""
    found = Result.load(out)
    folder = RunFolder(out)
    sigma = [leaf.tobytes() for leaf in jax.tree.leaves(found.prompt.sigma)]
    return sigma, found.prompt.manifest, found.prompt.context, found.report, found.lines, folder.chats()


def read_stopped(out: Path) -> Any:
    """All that a run goes on from."""
    folder = RunFolder(out)
    settings = folder._settings()
    (states,) = folder.checkpoints.iterdir()
    checkpoints, saved = Earlier(True, lambda text: None).opened(states)
    arrays, _ = checkpoints._read()
    checkpoints.close()
    assert saved is not None
    step = int(next(array[0] for name, array in arrays.items() if name == "step"))
    lines = past_lines(folder.metrics, step)
    known = lines_checksum(lines)
    if saved["lines"] != [known]:
        raise UserError("The lines are others.")
    store, said = Store(folder.teachers), {}
    for entry in sorted(folder.teachers.iterdir()):

        def content(place: Path) -> dict[str, bytes]:
            return {file.name: file.read_bytes() for file in place.iterdir() if file.suffix == ".bin"}

        said[entry.name] = store.read(entry.name, content, "")
    return settings, {name: array.tobytes() for name, array in arrays.items()}, saved, lines, said


@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_a_bit_of_any_file_is_noticed_or_harmless(state, whole, stopped, tmp_path):
    """No training: what would be read is what was read before, or a sentence says what is damaged."""
    out, read = {"finished": (whole[1], read_finished), "stopped": (stopped, read_stopped)}[state]
    folder, draw = tmp_path / "out", random.Random(0)
    shutil.copytree(out, folder)
    allowed = [read(folder)]
    if state == "stopped":  # the checkpoint before the newest will do
        (newest,) = folder.glob("run/checkpoints/*/9/*/*.safetensors")
        flip(newest)
        allowed.append(read(folder))
        assert allowed[0] != allowed[1]
    noticed = dict[str, int]()
    for file in sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()):
        size = 8 * (out / file).stat().st_size
        for _ in range(6 if size else 0):
            shutil.rmtree(folder)
            shutil.copytree(out, folder)
            flip(folder / file, draw.randrange(size))
            try:
                found = read(folder)
            except UserError as error:
                found = str(error)
                noticed[file.name] = noticed.get(file.name, 0) + ("\n" not in found)
            else:
                assert found in allowed, file
    some = ["manifest.json", "prompt.safetensors", "context.txt", "report.json", "metrics.jsonl"]
    if state == "stopped":
        some = ["settings.json", "metrics.jsonl", "hidden-0-00000.bin", "answers.json", "manifest.json"]
    assert [name for name in some if noticed.get(name, 0) < 5] == []


# Going on


def test_the_second_checkpoint_is_used_where_the_newest_is_damaged(tiny_model, whole, pieces, capfd):
    (newest,) = pieces.glob("run/checkpoints/*/9/*/*.safetensors")
    flip(newest)
    resumed = compress(tiny_model, pieces, resume=True, progress=True)
    said = capfd.readouterr().err
    assert "The checkpoint of step 9 in" in said
    assert "Resuming after step 8." in said
    assert_same(resumed, whole[0])


def test_a_run_does_not_go_on_without_its_lines(tiny_model, whole, pieces):
    metrics = pieces / "metrics.jsonl"
    before = metrics.read_text()
    lines = before.splitlines(keepends=True)
    for content, words in (
        (lines[:3] + lines[4:], "line 4 is that of step 4, not 3"),
        (lines[:5], "lacks the line of step 5"),
        (
            [before.replace('"loss": 0', '"loss": 1').replace('"loss": 2', '"loss": 3')],
            "not those that were written",
        ),
        (None, "is missing"),
    ):
        metrics.unlink()
        if content is not None:
            metrics.write_text("".join(content))
        with pytest.raises(UserError, match=rf"metrics\.jsonl.* {words}.*; start anew with --overwrite\.$"):
            compress(tiny_model, pieces, resume=True)
    metrics.write_text(before)
    assert_same(compress(tiny_model, pieces, resume=True), whole[0])


@pytest.mark.parametrize("name", ["report.json", "metrics.jsonl", "prompt.safetensors", "run/settings.json"])
def test_a_finished_run_that_is_damaged_says_so(tiny_model, whole, tmp_path, name):
    out = shutil.copytree(whole[1], tmp_path / "out")
    flip(out / name)
    with pytest.raises(UserError, match=rf"{name}.* damaged.*; start anew with --overwrite\.$"):
        compress(tiny_model, out, resume=True)


# What the operating system refuses


@pytest.mark.parametrize("most", [400, 5_000, 12_000])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(tiny_model, whole, tmp_path, most):
    """No file may grow beyond so many bytes."""
    out, (soft, hard) = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        with pytest.raises(UserError, match=rf"{out}.*File too large") as caught:
            compress(tiny_model, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    how = {"resume": True} if (out / "run" / "settings.json").exists() else {"overwrite": True}
    assert_same(compress(tiny_model, out, **how), whole[0])


def test_a_folder_that_vanishes_is_one_sentence(tiny_model, tmp_path):
    def vanish(step: Step) -> None:
        if step.number == 3:
            shutil.rmtree(tmp_path / "out")

    with pytest.raises(UserError, match=rf"^{tmp_path}/out.*No such file or directory; when that is mended"):
        compress(tiny_model, tmp_path / "out", callbacks=[vanish])


# Many


def job(name: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "context": f"{CONTEXT} No. {name}.", "queries": QUERIES, **more}


JOBS = [job(name) for name in ("a", "b", "c", "d", "e")]


def compress_many(model, out: Path, **more) -> list[jaxsp.Result]:
    options = {**SETTINGS, "out": out, "at_once": 2, "progress": True, **more}
    return list(jaxsp.compress_many(model, JOBS, **options))


@pytest.fixture(scope="module")
def many(calm_model, tmp_path_factory) -> tuple[list[jaxsp.Result], Path]:
    out = tmp_path_factory.mktemp("many") / "out"
    return compress_many(calm_model, out), out


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


# Done again, a job has other neighbours: sums are rounded otherwise, by as much as in test_many.py.
ROUNDING = 1e-4

DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a": ("report.json", cut),
    "b": ("metrics.jsonl", cut),
    "c": ("prompt.safetensors", flip),
    "d": ("run/settings.json", cut),
}


@pytest.mark.slow
def test_of_many_jobs_only_the_damaged_are_done_again(calm_model, many, tmp_path, capfd):
    results, folder = many
    out = shutil.copytree(folder, tmp_path / "out")
    for name, (file, damage) in DAMAGE.items():
        damage(out / name / file)
    whole = (out / "e" / "report.json").stat().st_mtime_ns
    capfd.readouterr()
    again = compress_many(calm_model, out, resume=True)
    said = " ".join(capfd.readouterr().err.split())
    for name, (file, _) in DAMAGE.items():
        assert f"{out / name / file}" in said
        assert f"; {name} is done anew." in said
    assert "; e is done anew." not in said
    assert (out / "e" / "report.json").stat().st_mtime_ns == whole
    for ours, theirs in zip(again, results, strict=True):
        assert_same_sigma(ours.prompt.sigma, theirs.prompt.sigma, atol=ROUNDING)
    assert [result.report["id"] for result in again] == ["a", "b", "c", "d", "e"]


@pytest.mark.slow
def test_of_many_jobs_in_training_only_the_damaged_begin_anew(calm_model, many, tmp_path, capfd):
    out = tmp_path / "out"

    def stop(step: Step) -> None:
        if step.job == "b" and step.number == 9:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        compress_many(calm_model, out, callbacks=[stop])
    cut(out / "a" / "metrics.jsonl")
    for entry in (out / "run" / "teachers").iterdir():
        cut(entry / "answers.json")
    steps: list[tuple[str, int]] = []
    again = compress_many(
        calm_model, out, resume=True, callbacks=[lambda step: steps.append((step.job, step.number))]
    )
    said = " ".join(capfd.readouterr().err.split())
    assert "; a is done anew." in said
    assert "; b is done anew." not in said
    assert (
        said.count("It is made anew.")
        == len({entry.name for entry in (out / "run" / "teachers").iterdir()}) - 3
    )
    assert ("a", 1) in steps
    assert ("b", 9) not in steps
    assert ("b", 10) in steps
    for ours, theirs in zip(again, many[0], strict=True):
        assert_same_sigma(ours.prompt.sigma, theirs.prompt.sigma, atol=ROUNDING)


@pytest.mark.slow
def test_of_many_jobs_all_begin_anew_where_no_checkpoint_can_be_read(calm_model, many, tmp_path, capfd):
    out = tmp_path / "out"

    def stop(step: Step) -> None:
        if step.number == 9:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        compress_many(calm_model, out, callbacks=[stop])
    for file in out.glob("run/checkpoints/*/*/*/*.safetensors"):
        cut(file)
    again = compress_many(calm_model, out, resume=True)
    assert "; its prompts are begun anew." in " ".join(capfd.readouterr().err.split())
    for ours, theirs in zip(again, many[0], strict=True):
        assert_same_sigma(ours.prompt.sigma, theirs.prompt.sigma, atol=ROUNDING)
    assert not any((out / "run" / "checkpoints").iterdir())
