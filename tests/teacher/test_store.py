"""A teacher's words on disk: read by the next run, whole or not at all, and never a reason to fail."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxsp
from jaxsp import compile_cache
from jaxsp.data.documents import as_queries
from jaxsp.data.packing import Packing
from jaxsp.data.ragged import Ragged
from jaxsp.progress import Display
from jaxsp.settings import make_settings
from jaxsp.teacher import problem as problems, store as stores, targets
from jaxsp.teacher.problem import Problem, read_preamble, run_teacher, teacher_key, tokenize
from jaxsp.teacher.store import MANIFEST, Store, check, entries, prune
from jaxsp.typing import UserError
from tests.conftest import CONTEXT, QUERIES, assert_same_sigma

SETTINGS: dict[str, Any] = {"prompt_length": 4, "steps": 2, "batch_size": 4, "max_answer_tokens": 6}
READ = "Teacher's answers and signals: read from"


@pytest.fixture(autouse=True)
def shared(cache, monkeypatch):
    """The shared folder, one of this test alone."""
    monkeypatch.delenv("JAXSP_TEACHER_CACHE")
    return cache / "teachers"


@pytest.fixture
def shards(monkeypatch):
    """Several files a signal: two rows each."""
    monkeypatch.setattr(targets, "SHARD_BYTES", 2000)


@pytest.fixture
def asked(tiny_model):
    """The number of times that the teacher is asked to answer."""
    calls, answer_ids = [], problems.answer_ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problems, "answer_ids", lambda *a, **k: calls.append(1) or answer_ids(*a, **k))
        yield calls


@pytest.fixture
def teach(tiny_model):
    """Asks the teacher; gives the problem, and the lines said."""
    settings = make_settings(SETTINGS)
    job = tokenize(tiny_model, CONTEXT, as_queries(QUERIES[:8]), as_queries(QUERIES[8:]), settings)
    preamble, lines = read_preamble(tiny_model), list[str]()

    def run(own: Path | None = None, store: Store | None = None) -> tuple[Problem, list[str]]:
        lines.clear()
        store = store or Store.of_run(own, lines.append)
        return run_teacher(tiny_model, job, settings.teacher, preamble, Display(visible=False), store), lines

    return run


def compress(model, **more) -> jaxsp.Result:
    return jaxsp.compress(model, CONTEXT, QUERIES, **{**SETTINGS, **more})


def assert_equal(ours: Problem, theirs: Problem) -> None:
    assert ours.answers == theirs.answers
    for a, b in zip(jax.tree.leaves(ours.rows), jax.tree.leaves(theirs.rows), strict=True):
        np.testing.assert_array_equal(a, b)


def only(folder: Path) -> Path:
    (entry,) = folder.iterdir()
    return entry


def flip(file: Path) -> None:
    """One bit in the middle, in a file of its own: links to it stay as they are."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    file.write_bytes(bytes(data))


def cut(file: Path) -> None:
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-1])


# Kept and read


@pytest.mark.slow
def test_a_second_run_reads_it_and_says_so(tiny_model, tmp_path, shared, asked, capfd):
    """Into a folder, then without one, then a third that is resumed after the shared one is gone."""
    first = compress(tiny_model, out=tmp_path / "out")
    assert READ not in capfd.readouterr().err
    second = compress(tiny_model)
    assert capfd.readouterr().err.count(f"{READ} {shared}\n") == 1
    assert len(asked) == 1
    assert_same_sigma(second.prompt.sigma, first.prompt.sigma)
    compress(tiny_model, out=tmp_path / "third")
    shutil.rmtree(shared)
    (tmp_path / "third" / "report.json").unlink()
    resumed = compress(tiny_model, out=tmp_path / "third", resume=True)
    assert f"{READ} {tmp_path / 'third' / 'run' / 'teachers'}\n" in capfd.readouterr().err
    assert len(asked) == 1
    assert_same_sigma(resumed.prompt.sigma, first.prompt.sigma)


@pytest.mark.slow
def test_a_document_alone_is_studied_once(calm_model, tmp_path, shared, heeded, monkeypatch, capfd):
    settings: Any = {**SETTINGS, "max_answer_tokens": 48, "steps": 0, "study_queries": 4}
    first = jaxsp.compress(calm_model, CONTEXT, out=tmp_path / "out", **settings)
    monkeypatch.setattr("jaxsp.runs.problems.study", None)
    monkeypatch.setattr(problems, "answer_ids", None)
    second = jaxsp.compress(calm_model, CONTEXT, **settings)
    assert f"Questions from the document: read from {shared}\n" in capfd.readouterr().err
    assert second.report["study"] == first.report["study"]
    assert_same_sigma(second.prompt.sigma, first.prompt.sigma)
    assert sorted(entry.about["kind"] for entry in entries(shared)) == ["study", "teacher"]


@pytest.mark.parametrize("own", [True, False])
def test_what_is_read_is_what_was_said(teach, tmp_path, shared, shards, own):
    """Every bit, of several files; from the mapped files, which may be gone meanwhile."""
    (plain, _), folder = teach(store=Store(None)), tmp_path / "own" if own else None
    written, lines = teach(folder)
    assert lines == []
    assert_equal(written, plain)
    entry = only(shared)
    assert len(list(entry.glob("hidden-0-*.bin"))) > 2
    read, lines = teach(folder)
    assert lines == [f"{READ} {folder or shared}"]
    shutil.rmtree(shared)
    assert_equal(read, plain)
    for problem in (written, read):
        assert not any(row.flags.owndata or row.flags.writeable for row in hidden(problem).rows)
    if folder is not None:
        assert teach(folder)[1] == [f"{READ} {folder}"]
        assert not shared.exists()


def hidden(problem: Problem) -> Ragged:
    return problem.rows.targets["hidden"]


def test_only_the_rows_of_a_batch_are_read(teach, shards, monkeypatch):
    """Splits and selections of rows read nothing; a batch reads its own."""
    problem = teach()[0]
    read = set[int]()

    class Watched(np.ndarray):
        def __getitem__(self, index):
            read.add(id(self))
            return super().__getitem__(index)

    signal = hidden(problem)
    for i, row in enumerate(signal.rows):
        signal.rows[i] = row.view(Watched)
    ids = {id(row): i for i, row in enumerate(signal.rows)}
    train = problem.train
    assert len(problem.held_out) == 2
    chosen = problem.take([3, 4, 5, 6]).rows.take([2, 0])
    assert not read
    batch = Packing(2, 60).pack(train, np.array([6, 1]))
    assert {ids[i] for i in read} == {6, 1}
    assert batch.targets["hidden"][batch.mask].any()
    Packing(2, 60).pack(chosen, np.array([0]))
    assert {ids[i] for i in read} == {6, 1, 5}


def test_signals_are_written_as_they_come(teach, monkeypatch, shards):
    """Nothing of what was computed before stays in memory but the batch at hand, and the one before it."""
    import weakref

    alive, most, in_batches = weakref.WeakSet[Ragged](), [], targets.in_batches

    def watched(model, prefix, rows, packing, *signal):
        for one in in_batches(model, prefix, rows, Packing(1, packing.length), *signal):
            alive.add(one[2])
            most.append(len(alive))
            yield one

    monkeypatch.setattr(targets, "in_batches", watched)
    teach()
    assert len(most) > 3
    assert max(most) <= 2


def test_the_key_holds_all_that_decides_what_is_said(tiny_model):
    settings = make_settings(SETTINGS)
    job = tokenize(tiny_model, CONTEXT, as_queries(QUERIES), [], settings)

    def key(model=tiny_model, job=job, settings=settings) -> str:
        return teacher_key(model, job, settings.teacher)

    def changed(**fields) -> str:
        return key(dataclasses.replace(tiny_model, config=tiny_model.config.replace(**fields)))

    other_ends = dataclasses.replace(job, query_ids=[[*ids, 3] for ids in job.query_ids])
    keys = {
        "same": key(),
        "stops": key(tiny_model.stopping_at([7])),
        "dtype": changed(dtype="bfloat16"),
        "quantization": changed(quantization="int8"),
        "config": changed(norm_epsilon=0.5),
        "weights": key(dataclasses.replace(tiny_model, fingerprint="another")),
        "before": key(job=dataclasses.replace(job, preamble_ids=job.preamble_ids[1:])),
        "after": key(job=other_ends),
        "longest": key(settings=make_settings({**SETTINGS, "max_answer_tokens": 7})),
    }
    assert len(set(keys.values())) == len(keys), keys
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxsp.teacher.keys.VERSION", stores.VERSION + 1)
        assert key() != keys["same"]
    assert key() == keys["same"]
    assert key(settings=make_settings({**SETTINGS, "steps": 9})) == keys["same"]


# Damage


def reseal(entry: Path, **changes: Any) -> None:
    """Another manifest, in itself whole."""
    manifest = json.loads((entry / MANIFEST).read_text())
    del manifest["sha256"]
    manifest |= changes
    (entry / MANIFEST).unlink()
    (entry / MANIFEST).write_text(json.dumps(manifest | {"sha256": stores.checksum(manifest)}))


def reshape(entry: Path) -> None:
    """Wider positions than the file has, everything sealed."""
    layout = json.loads((entry / "signals.json").read_text())
    layout["hidden"][0]["shape"] = [33]
    text = json.dumps(layout)
    (entry / "signals.json").unlink()
    (entry / "signals.json").write_text(text)
    files = json.loads((entry / MANIFEST).read_text())["files"]
    reseal(entry, files={**files, "signals.json": [len(text), stores._sha256(entry / "signals.json")]})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit": (lambda e: flip(e / "hidden-0-00001.bin"), "hidden-0-00001.bin has another SHA-256"),
    "an answer": (lambda e: flip(e / "answers.json"), "answers.json has another SHA-256"),
    "a shard": (lambda e: (e / "hidden-0-00001.bin").unlink(), "hidden-0-00001.bin is missing"),
    "an end": (lambda e: cut(e / "hidden-0-00000.bin"), r"hidden-0-00000.bin has \d+ bytes, not \d+"),
    "half a manifest": (lambda e: cut(e / MANIFEST), "manifest.json can't be read"),
    "no manifest": (lambda e: (e / MANIFEST).unlink(), "manifest.json can't be read"),
    "a manifest's bit": (lambda e: flip(e / MANIFEST), "manifest.json (can't be read|is not as it was)"),
    "another key": (lambda e: reseal(e, key="0" * 16), "its key is '0{16}', not '"),
    "another version": (lambda e: reseal(e, version=9), "its version is 9, not 1"),
    "another shape": (reshape, r"hidden-0-00000.bin has \d+ bytes, not \d+, as \(\d+, 33\) takes"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_an_error_of_a_run_and_mended_in_the_shared_store(
    teach, tmp_path, shared, shards, asked, name
):
    damage, message = DAMAGE[name]
    first, _ = teach(tmp_path / "own")
    entry = only(shared)
    damage(entry)
    again, lines = teach()
    assert len(asked) == 2
    (line,) = lines
    assert re.search(message, line), line
    assert line.startswith(f"{entry} is damaged: ")
    assert line.endswith("It is made anew.")
    assert_equal(again, first)
    check(only(shared))
    # The run's own: not touched by the first damage, and never made anew.
    own = only(tmp_path / "own")
    check(own)
    damage(own)
    with pytest.raises(UserError, match=message) as caught:
        teach(tmp_path / "own")
    assert str(caught.value).startswith(f"{own} is damaged: ")
    assert str(caught.value).endswith("Start anew with --overwrite.")
    assert len(asked) == 2


def test_a_process_killed_in_the_midst_leaves_nothing_that_is_read(teach, shared, monkeypatch, asked):
    """As ``kill -9`` leaves it: what had been written, beside which the next run writes its own."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stores, "checksum", killed)
        patch.setattr(stores.shutil, "rmtree", lambda *a, **k: None)
        with pytest.raises(KeyboardInterrupt):
            teach()
    left = only(shared)
    assert left.suffix == ".part"
    assert entries(shared) == []
    teach()
    assert len(asked) == 2
    assert teach()[1] == [f"{READ} {shared}"]
    assert left.exists()  # its process may still be writing
    os.utime(left, (1, 1))
    prune(shared)
    assert not left.exists()
    assert len(entries(shared)) == 1


# A cache that can't be used


def fail(error, *_, **__):
    raise error


no_space = functools.partial(fail, OSError(errno.ENOSPC, "No space left on device"))


@pytest.mark.parametrize("own", [True, False])
def test_a_full_disk_is_one_line(teach, tmp_path, shared, shards, monkeypatch, own):
    """It fills up in the midst of the signals; the run goes on, in its own folder if it has one."""
    expected, _ = teach(store=Store(None))
    put, count = targets._Leaf.put, []

    def fills_up(self, folder, *rest):
        count.append(1)
        if folder.is_relative_to(shared):
            put(self, folder, *rest)
            no_space()
        put(self, folder, *rest)

    monkeypatch.setattr(targets._Leaf, "put", fills_up)
    folder = tmp_path / "own" if own else None
    lines = list[str]()
    store = Store.of_run(folder, lines.append)
    for _ in range(2):
        assert_equal(teach(store=store)[0], expected)
    kept = f"What the teacher says is not kept for the next run: {shared} No space left on device."
    assert lines == [kept, *([f"{READ} {folder}"] if own else [])]
    assert list(shared.iterdir()) == []
    assert count


@pytest.mark.parametrize("why", ["a file", "read-only", "no home"])
def test_a_folder_that_cannot_be_used_is_one_line(teach, cache, shared, monkeypatch, why):
    if why == "a file":
        cache.write_text("a file")
    elif why == "no home":
        monkeypatch.setattr(stores, "cache_folder", functools.partial(fail, RuntimeError("no home")))
    else:  # root may write anywhere, so the system's answer is replaced
        refusal = PermissionError(errno.EACCES, "Permission denied")
        monkeypatch.setattr(stores.Path, "mkdir", functools.partial(fail, refusal))
    lines = list[str]()
    store = Store.of_run(None, lines.append)
    problems = [teach(store=store)[0] for _ in range(2)]
    assert_equal(*problems)
    assert len(lines) == 1
    assert lines[0].startswith("What the teacher says is not kept for the next run: ")


def test_what_is_read_only_is_read(teach, shared, monkeypatch, asked):
    teach()
    monkeypatch.setattr(stores.os, "utime", no_space)
    monkeypatch.setattr(stores.Path, "mkdir", no_space)
    assert teach()[1] == [f"{READ} {shared}"]
    assert len(asked) == 1


def test_switched_off(teach, shared, monkeypatch, asked):
    monkeypatch.setenv("JAXSP_TEACHER_CACHE", "OFF")
    teach()
    assert teach()[1] == []
    assert len(asked) == 2
    assert not shared.exists()


def test_a_disk_without_links_gets_copies(teach, tmp_path, shared, monkeypatch):
    monkeypatch.setattr(stores.os, "link", no_space)
    first, _ = teach(tmp_path / "own")
    for file in only(shared).iterdir():
        copy = tmp_path / "own" / only(shared).name / file.name
        assert copy.read_bytes() == file.read_bytes()
        assert not copy.samefile(file)
    monkeypatch.undo()
    assert_equal(teach(tmp_path / "own")[0], first)


# Its size, and who is first


def putting(content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "x").write_bytes(content)

    return write


def fill(folder: Path, count: int, size: int = 1000) -> Store:
    """Entries of some bytes each, the first one not used for longest."""
    store = Store(None, folder)
    for i in range(count):
        store.write(f"e{i}", {"kind": "test"}, putting(bytes(size)), str)
        used = time.time() - 86400 * (count - i)
        os.utime(folder / f"e{i}" / MANIFEST, (used, used))
    return store


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_those_not_used_for_longest_go(tmp_path, monkeypatch):
    store = fill(tmp_path, 3)
    size = entries(tmp_path)[0].size
    assert store.read("e0", lambda folder: (folder / "x").read_bytes(), "x") == bytes(1000)  # now it is used
    monkeypatch.setattr(stores, "MAX_BYTES", int(2.5 * size))
    store.write("new", {}, putting(bytes(900)), str)
    assert names(tmp_path) == ["e0", "new"]
    monkeypatch.setattr(stores, "MAX_BYTES", 10)
    store.write("large", {}, putting(bytes(900)), str)
    assert names(tmp_path) == ["large"]  # it is being read


def test_who_comes_second_reads_the_first(tmp_path):
    """Both have found nothing, and both have made it."""
    store, read = Store(None, tmp_path), lambda folder: (folder / "x").read_text()

    def write(folder: Path) -> None:
        (folder / "x").write_text("second")
        inner = Store(None, tmp_path)
        assert inner.write("key", {}, putting(b"first"), read) == "first"

    assert store.write("key", {}, write, read) == "first"
    assert names(tmp_path) == ["key"]
    check(tmp_path / "key")


@pytest.mark.slow
def test_two_runs_at_once(tiny_model, tiny_directory, job, tmp_path, shared, capfd):
    """Started at the same time into folders of their own, they end alike; a third reads what is there."""
    options = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
    environment = dict(os.environ)
    if programs := jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        environment["JAX_COMPILATION_CACHE_DIR"] = programs
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(compile_cache.MIN_SECONDS)

    def start(name: str) -> subprocess.Popen[str]:
        words = [
            "compress", job["context"], "--queries", job["queries"], "--model", tiny_directory,
            "--dtype", "float32", "--study", "off", "--out", tmp_path / name, *options,
        ]  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-m", "jaxsp", *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    processes = [start("a"), start("b")]
    told = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    third = compress(tiny_model, out=tmp_path / "c")
    assert f"{READ} {shared}\n" in capfd.readouterr().err
    for name in "ab":
        assert_same_sigma(jaxsp.SoftPrompt.load(tmp_path / name).sigma, third.prompt.sigma)
    for folder in (shared, *(tmp_path / name / "run" / "teachers" for name in "abc")):
        check(only(folder))


# What an evaluation asks


@pytest.fixture(scope="module")
def prompt(tiny_model):
    return compress(tiny_model, steps=0, kind="embedding", progress=False).prompt


def test_an_evaluation_reads_what_the_teacher_said(tiny_model, prompt, shared, asked, capfd, monkeypatch):
    """And says so; a damaged entry is made anew, and without a cache it is asked again."""

    def evaluate() -> tuple[dict[str, Any], str]:
        found = jaxsp.evaluate(tiny_model, prompt, QUERIES[:2])
        return found, capfd.readouterr().err

    first, said = evaluate()
    assert READ not in said
    second, said = evaluate()
    assert f"{READ} {shared}\n" in said
    assert len(asked) == 1
    assert second == first
    entry = only(shared)
    flip(entry / "hidden-0-00000.bin")
    third, said = evaluate()
    assert f"{entry} is damaged: hidden-0-00000.bin has another SHA-256" in " ".join(said.split())
    assert READ not in said
    assert len(asked) == 2
    assert third == first
    check(only(shared))
    monkeypatch.setenv("JAXSP_TEACHER_CACHE", "off")
    fourth, said = evaluate()
    assert READ not in said
    assert len(asked) == 3
    assert fourth == first


# The command


def test_the_command(tmp_path, shared, jaxsp_command):
    fill(shared, 3, size=1 << 20)
    code, out, err = jaxsp_command("cache", "list")
    assert (code, err) == (0, "")
    assert out.index("e2") < out.index("e1") < out.index("e0")
    assert "1.0 days" in " ".join(out.split())
    assert "3 entries, 3.0 MiB" in out
    code, out, _ = jaxsp_command("cache", "verify")
    assert code == 0
    assert "3 of 3 entries" in out
    flip(shared / "e1" / "x")
    code, out, _ = jaxsp_command("cache", "verify")
    assert code == 1
    assert "e1 is damaged: x has another SHA-256" in out
    assert "e0" not in out
    (shared / "e2" / MANIFEST).write_text("{")
    assert "damaged" in jaxsp_command("cache", "list")[1]
    assert jaxsp_command("cache", "prune", "--older-than", "2.5")[1].startswith("1 entries, 1.0 MiB, removed")
    assert names(shared) == ["e1", "e2"]
    assert jaxsp_command("cache", "prune", "--max-size", 1.5 / 1024)[1].startswith("1 entries, 1.0 MiB")
    assert jaxsp_command("cache", "prune", "--all")[1].startswith("1 entries, 1.0 MiB")
    assert names(shared) == []
    assert "0 entries" in jaxsp_command("cache", "list")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("prune",), "prune needs --older-than, --max-size or --all"),
        (("list", "--all"), "prune needs --older-than, --max-size or --all; list and verify take none"),
        (("prune", "--older-than", -1), "--older-than must be at least 0, not -1.0."),
        (("clear",), "Expected one of ('list', 'verify', 'prune'); see jaxsp cache --help."),
    ],
)
def test_mistakes(jaxsp_command, words, message):
    code, out, err = jaxsp_command("cache", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
