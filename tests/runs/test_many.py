"""compress_many and its command: each as if alone, nothing lost, mistakes before any work."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

import jaxsp
from jaxsp import plan
from jaxsp.prompts import PROMPT_KINDS
from jaxsp.runs import problems, runner
from jaxsp.training.drivers import JitDriver
from jaxsp.typing import EMPTY, UserError
from tests.conftest import CONTEXT, QUERIES, assert_same_sigma

OPTIONS: dict[str, Any] = {
    "prompt_length": 4, "steps": 12, "batch_size": 3, "max_answer_tokens": 6,
    "evaluate_every": 4,
}  # fmt: skip


def job(name, context: Any = CONTEXT, queries: Any = QUERIES, **more):
    return {"id": name, "context": context, "queries": queries, **more}


UNEVEN = [
    job("few", CONTEXT[:82], QUERIES[:8], held_out=["What is left?"]),
    job("long", f"{CONTEXT} {CONTEXT}", [f"{query}!" for query in QUERIES], seed=3),
    job("same", seed=1, initial="spread", learning_rate=0.1, steps=6),
    job("other", objective="nll", prompt_length=6, held_out=0.4, steps=4),
]


def compress_many(model, jobs, **options):
    given: dict[str, Any] = {**OPTIONS, "progress": False, **options}
    return list(jaxsp.compress_many(model, jobs, **given))


@pytest.fixture(scope="module")
def results(calm_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("many") / "out"
    return compress_many(calm_model, UNEVEN, out=out, at_once=2), out


@pytest.mark.slow
def test_no_more_at_once_than_memory_has_room_for(calm_model, monkeypatch):
    slots, block = [], runner.Block

    def watched(*args, **options):
        slots.append(options["slots"])
        return block(*args, **options)

    monkeypatch.setattr(runner, "Block", watched)
    monkeypatch.setattr(plan, "_memory_stats", lambda: {"bytes_limit": 2**20})
    jobs = [job(f"{i}", seed=i, steps=1) for i in range(2)]
    assert len(compress_many(calm_model, jobs)) == 2
    assert slots == [1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [row["id"] for row in UNEVEN])
def test_each_is_what_compress_gives_alone(calm_model, results, name):
    ((result, row),) = [both for both in zip(results[0], UNEVEN, strict=True) if both[1]["id"] == name]
    settings = result.prompt.manifest["training"]
    alone = jaxsp.compress(
        calm_model, row["context"], row["queries"], held_out=row.get("held_out", 0.2),
        progress=False, **settings,
    )  # fmt: skip
    assert_same_sigma(result.prompt.sigma, alone.prompt.sigma, atol=1e-4)
    for part in ("gap_closed", "held_out", "train"):
        _assert_close(result.report[part], alone.report[part])
    assert result.report.keys() == alone.report.keys()
    assert [line.get("tokens") for line in result.lines] == [line.get("tokens") for line in alone.lines]
    assert result.report["id"] == name
    assert result.report["objective"] == row.get("objective", "kl")
    assert [line["step"] for line in result.lines] == [line["step"] for line in alone.lines]


def _assert_close(ours, theirs):
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            _assert_close(ours[name], theirs[name])
    else:
        assert ours == pytest.approx(theirs, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("uneven", [False, True])
def test_little_is_padding(calm_model, monkeypatch, uneven):
    jobs = UNEVEN[:2]
    if uneven:  # five times as long in one job as in another
        words = "Is it so, and if not, why is it not so? "
        jobs = [job(f"j{n}", queries=[f"{i} {words * n}" for i in range(12)]) for n in (0, 1, 2)]
    used, step = [], JitDriver.step

    def watched(driver, states, batches):
        live = (batches.offsets != EMPTY).mean(axis=(1, 2))
        used.extend(live[live > 0])
        return step(driver, states, batches)

    monkeypatch.setattr(JitDriver, "step", watched)
    compress_many(calm_model, jobs, batch_size=8, steps=5, kind="embedding")  # the quickest to compile
    assert len(used) == 5 * len(jobs)
    assert 1 - np.mean(used) <= 0.15


@pytest.mark.slow
def test_neighbours_change_nothing_of_what_is_drawn(calm_model):
    """Longer answers and queries beside it: the same sequences at every step as alone."""
    long = job("long", queries=[f"{query} {'And why? ' * 3}" for query in QUERIES], seed=5)
    alone = compress_many(calm_model, [job("a")], steps=6)[0]
    beside = compress_many(calm_model, [job("a"), job("b", seed=1), long], steps=6, at_once=3)[0]
    for ours, theirs in zip(beside.lines, alone.lines, strict=True):
        for name in ("tokens", "answer_tokens"):
            assert ours.get(name) == theirs.get(name)
    kl = [r.report["held_out"]["brackets"]["prompt"]["kl"] for r in (beside, alone)]
    assert kl[0] == pytest.approx(kl[1], rel=2e-3)


@pytest.mark.slow
def test_kinds_may_be_mixed_in_one_run(calm_model):
    """They train in groups, each as alone."""
    jobs = [job(f"{kind}-{seed}", kind=kind, seed=seed) for seed in (0, 1) for kind in PROMPT_KINDS]
    found = compress_many(calm_model, jobs)
    assert [r.prompt.kind for r in found] == [row["kind"] for row in jobs]
    for result, row in zip(found, jobs, strict=True):
        assert result.report["gap_closed"]["value"] > 0
        if not row["seed"]:
            continue
        (alone,) = compress_many(calm_model, [row])
        assert_same_sigma(result.prompt.sigma, alone.prompt.sigma, atol=1e-4)


@pytest.mark.slow
def test_one_folder_and_one_row_each(calm_model, results):
    found, out = results
    rows = pyarrow.parquet.read_table(out / "results.parquet").to_pylist()
    assert [row["id"] for row in rows] == [row["id"] for row in UNEVEN]
    for result, row in zip(found, rows, strict=True):
        prompt = jaxsp.SoftPrompt.load(out / row["id"])
        for name in (
            "README.md",
            "report.md",
            "report.html",
            "tokens.json",
            "plots/training.png",
            "metrics.jsonl",
        ):
            assert (out / row["id"] / name).is_file()
        assert_same_sigma(prompt.sigma, result.prompt.sigma)
        assert row["error"] is None
        assert row["gap_closed"] == result.report["gap_closed"]["value"]
        assert row["prompt_kl"] == result.report["held_out"]["brackets"]["prompt"]["kl"]
        assert row["seed"] == result.report["settings"]["seed"]
        assert json.loads((out / row["id"] / "report.json").read_text()) == json.loads(
            json.dumps(result.report)
        )
    again = jaxsp.evaluate(calm_model, jaxsp.SoftPrompt.load(out / "few"), ["What is left?"], progress=False)
    _assert_close(again["held_out"]["brackets"]["prompt"], found[0].report["held_out"]["brackets"]["prompt"])


@pytest.mark.slow
def test_a_finished_run_is_read_not_done_again(calm_model, results, monkeypatch):
    found, out = results
    monkeypatch.setattr(runner, "Block", None)
    again = compress_many(calm_model, UNEVEN, out=out, at_once=2, resume=True)
    assert [r.report for r in again] == json.loads(json.dumps([r.report for r in found]))
    assert again[0].lines == found[0].lines


@pytest.mark.slow
def test_a_loss_that_is_not_finite_fails_alone(calm_model, tmp_path):
    wild = {"learning_rate": 1e38, "max_grad_norm": 0.0}
    jobs = [job("a", **wild), job("b", **wild, seed=1), job("c")]
    found = compress_many(calm_model, jobs, out=tmp_path / "out")
    assert [bool(r.error) for r in found] == [True, True, False]
    assert "is not finite" in (found[0].error or "")
    assert found[2].report["gap_closed"]["value"] > 0
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert ["is not finite" in (row["error"] or "") for row in rows] == [True, True, False]
    assert jaxsp.SoftPrompt.load(tmp_path / "out" / "a").prompt_length == 4  # the best until then
    again = compress_many(calm_model, jobs, out=tmp_path / "out", resume=True)
    assert again[0].error == found[0].error


@pytest.mark.slow
def test_a_failed_job_says_what_it_did_and_can_be_mended(calm_model, tmp_path, jaxsp_command):
    wild = {"learning_rate": 1e38, "max_grad_norm": 0.0}
    (failed,) = compress_many(calm_model, [job("a", **wild)], out=tmp_path / "out")
    assert failed.report["steps"] == failed.lines[-1]["step"] < OPTIONS["steps"]
    assert "NaN" not in (tmp_path / "out" / "a" / "metrics.jsonl").read_text()
    (mended,) = compress_many(calm_model, [job("a")], out=tmp_path / "out", resume=True)
    assert mended.error is None
    file = tmp_path / "contexts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in (job("a", **wild), job("b"))))
    options = [part for k, v in OPTIONS.items() for part in (f"--{k.replace('_', '-')}", v)]
    code, out, err = jaxsp_command(
        "compress-many", file, "--out", tmp_path / "new", "--model", calm_model.directory,
        "--dtype", "float32", *options,
    )  # fmt: skip
    assert code == 1
    assert "1 failed: a." in err
    assert "b" in out


@pytest.mark.slow
def test_overwrite_leaves_what_is_not_ours(calm_model, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("precious")
    (tmp_path / "a" / "README.md").write_text("mine")
    for _ in range(2):
        compress_many(calm_model, [job("a")], out=tmp_path, overwrite=True, steps=4)
    assert (tmp_path / "a" / "thesis.txt").read_text() == "precious"
    assert (tmp_path / "a" / "README.md").read_text() == "mine"
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.slow
def test_steps_done_are_those_of_the_table(calm_model, tmp_path):
    rows = [job("early", patience=1, steps=60), job("late", steps=7)]
    found = compress_many(calm_model, rows, out=tmp_path / "out", objective="entropy")
    table = pyarrow.parquet.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    for result, row in zip(found, table, strict=True):
        assert row["steps"] == result.report["steps"] == result.lines[-1]["step"]
    assert table[0]["steps"] < 60
    assert table[1]["steps"] == 7


@pytest.mark.slow
def test_no_step_is_taken_in_vain(calm_model, monkeypatch):
    calls, step = [], JitDriver.step
    monkeypatch.setattr(JitDriver, "step", lambda *a: calls.append(1) or step(*a))
    compress_many(calm_model, [job("a", steps=3), job("b", steps=0)], evaluate_every=400)
    assert len(calls) == 3


@pytest.mark.slow
def test_a_prompt_is_evaluated_on_longer_queries_than_its_own(calm_model, results):
    prompt = jaxsp.SoftPrompt.load(results[1] / "few")
    report = jaxsp.evaluate(calm_model, prompt, ["What is it? " * 15], progress=False)
    assert report["held_out"]["queries"] == 1


@pytest.mark.slow
def test_the_same_context_is_taught_once(calm_model, monkeypatch):
    calls, run_teacher = [], problems.run_teacher
    monkeypatch.setattr(problems, "run_teacher", lambda *a: calls.append(1) or run_teacher(*a))
    held_out = ["What is left?"]
    jobs = [job(f"{o}-{s}", objective=o, seed=s, held_out=held_out) for o in ("kl", "nll") for s in (0, 1)]
    found = compress_many(calm_model, jobs, steps=4)
    assert len(calls) == 1
    assert len({r.report["gap_closed"]["value"] for r in found}) > 1


@pytest.mark.slow
def test_what_the_teacher_said_is_kept_on_disk(calm_model, tmp_path, monkeypatch):
    """Neither more contexts than memory keeps, nor a second run, ask it again."""
    from jaxsp.teacher import problem

    calls, answer_ids = [], problem.answer_ids
    monkeypatch.setattr(problem, "answer_ids", lambda *a, **k: calls.append(1) or answer_ids(*a, **k))
    monkeypatch.setattr(problems, "KEPT", 1)
    jobs = [
        job(f"{context}-{objective}", f"{CONTEXT} No. {context}.", objective=objective)
        for objective in ("kl", "nll")
        for context in (0, 1)
    ]
    first = compress_many(calm_model, jobs, out=tmp_path, at_once=1, steps=2)
    assert len(calls) == 2
    (tmp_path / "1-nll" / "report.json").unlink()
    again = compress_many(calm_model, jobs, out=tmp_path, at_once=1, steps=2, resume=True)
    assert len(calls) == 2
    assert_same_sigma(again[-1].prompt.sigma, first[-1].prompt.sigma)
    (tmp_path / "new").mkdir()
    compress_many(calm_model, [job("0-kl", f"{CONTEXT} No. 2.")], out=tmp_path / "new", steps=2)
    assert len(calls) == 3


@pytest.mark.slow
def test_the_last_prompt_instead_of_the_best(calm_model):
    """An objective that takes σ away from the teacher: the best is the start."""
    jobs = [job("best"), job("last", keep="last")]
    best, last = compress_many(calm_model, jobs, objective="entropy")
    kl = [line["held_out_kl"] for line in best.lines if "held_out_kl" in line]
    assert min(kl) < kl[-1]
    for result, expected in ((best, min(kl)), (last, kl[-1])):
        found = result.report["held_out"]["brackets"]["prompt"]["kl"]
        assert found == pytest.approx(expected, rel=1e-4)
    assert (best.report["kept"], last.report["kept"]) == ("best", "last")


@pytest.mark.slow
def test_contexts_of_like_length_compile_nothing_new(calm_model):
    from jax._src import test_util  # the only counter jax has

    def jobs(n):
        return [job(f"j{i}", CONTEXT[: 85 + i], QUERIES[: 5 + i % 4], seed=i, steps=4) for i in range(n)]

    counts = []
    for n in (2, 2, 6):
        with test_util.count_jit_and_pmap_lowerings() as count:
            compress_many(calm_model, jobs(n), at_once=2)
        counts.append(count() if callable(count) else count[0])
    assert counts[2] <= counts[1]


# Mistakes


GOOD = job("good")


BAD = pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 2], "expected an object with the keys id, context, queries, held_out"),
        ({"id": "x"}, "the key 'context' is missing"),
        (GOOD, "the id 'good' is given twice"),
        (job("../x"), "the id '../x' can't name a folder"),
        (job("run"), "the id 'run' can't name a folder"),
        (job(""), "the id '' can't name a folder"),
        (job("x", " "), "the context must be a text that is not empty"),
        (job("x", queries=["What? " * 80, "Why?"]), "no room for the context in the model's window of 512"),
        (job("x", queries="What?"), "queries must be a list of queries, not 'What?'"),
        (job("x", queries=0.3), "queries must be a list of queries, not 0.3"),
        (job("x", queries=["What?"]), "At least two queries are needed"),
        (job("x", queries=[], study="off"), "At least two queries are needed"),
        (job("x", "# A title\n\n## And another", []), "the document has no sentence to ask about"),
        (job("x", study="of"), "Unknown study 'of'; choose one of auto, on, off"),
        (job("x", held_out=[]), "There is no query to hold out"),
        (job("x", held_out=QUERIES[:1]), "is both for training and held out"),
        (job("x", colour="red"), "Unknown setting 'colour'"),
        (job("x", objective="zero_one"), "can't train on zero_one"),
        (job("x", prompt_length=900), "prompt must be shorter than the context"),
        (job("x", kind="low_rank", rank=4), "makes 4 slots of 16 entries no smaller; take at most 3."),
        (job("x", kind="low_rank", rates="first=0"), "of kind low_rank share their rows"),
        (job("x", rates="frob=1"), "a prompt of kind per_head has no part 'frob'"),
        (job("x", kind="embedding", initial="match"), "--initial match starts prompts of keys and values"),
        (job("x", kind="spiral"), "Unknown kind 'spiral'; choose one of per_head"),
        (job("x", length=4), "Unknown setting 'length'; it is called prompt_length now."),
        (job("x", seed=2**70), "--seed must be at least 0 and below 4294967296"),
        (job("x", seed=-1), "--seed must be at least 0 and below 4294967296, not -1"),
        (job("x", steps=10**12), "--steps must be at least 0 and below 2147483648"),
        (job("x", max_grad_norm=float("nan")), "--max-grad-norm must be a finite number, not nan"),
        (job("x", "\ud800" + CONTEXT), "there is text that is no Unicode"),
        (job("Good"), "the id 'Good' is given twice"),
        (job("results.parquet"), "neither 'run' nor 'results'"),
        (job("x" * 300), "use up to 100 letters"),
        (job("x", steps="many"), "--steps must be a whole number, not 'many'"),
        (job("x", parallel="mesh"), "a row can't have devices of its own"),
    ],
)


@BAD
def test_a_bad_job_is_an_error_before_any_work(calm_model, tmp_path, monkeypatch, row, message):
    calls = []
    monkeypatch.setattr(problems, "run_teacher", lambda *a: calls.append(1))
    with pytest.raises(UserError) as caught:
        compress_many(calm_model, [GOOD, row], out=tmp_path / "out")
    assert message in str(caught.value)
    assert str(caught.value).startswith("job 2: ")
    assert "--keep-going" in str(caught.value)
    assert not calls
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@BAD
def test_a_bad_job_is_skipped_if_asked_for(calm_model, capsys, row, message):
    options: dict[str, Any] = {**OPTIONS, "steps": 0}
    found = list(jaxsp.compress_many(calm_model, [GOOD, row], keep_going=True, **options))
    assert [r.report["id"] for r in found] == ["good"]
    said = capsys.readouterr().err
    assert "Skipped: job 2: " in said
    assert message in " ".join(said.split())


@pytest.mark.slow
def test_the_command_reports_bad_rows(jaxsp_command, calm_directory, tmp_path):
    file = tmp_path / "contexts.jsonl"
    good = job("good", f"{CONTEXT}\u2028{CONTEXT}")  # a line's end to Python, not to JSON
    file.write_text(json.dumps(good, ensure_ascii=False) + '\n{"id": \n', "utf-8")
    common = [
        "compress-many", file, "--out", tmp_path / "out", "--model", calm_directory, "--dtype",
        "float32", "--prompt-length", 4, "--steps", 2, "--max-answer-tokens", 4,
    ]  # fmt: skip
    code, out, err = jaxsp_command(*common)
    assert code == 2
    assert f"{file}, line 2: not valid JSON" in err
    assert not (tmp_path / "out").exists()
    code, out, err = jaxsp_command(*common, "--keep-going")
    assert code == 0, err
    assert "Skipped" in err
    assert "good" in out
    code, out, err = jaxsp_command(*common, "--keep-going")
    assert code == 2
    assert "is not empty" in err


@pytest.mark.slow
def test_a_folder_of_another_run(calm_model, results, tmp_path):
    _, out = results
    with pytest.raises(UserError, match="is not empty"):
        compress_many(calm_model, UNEVEN, out=out)
    with pytest.raises(UserError, match=r"with other settings: settings\.steps was 12 and is now 13\."):
        compress_many(calm_model, UNEVEN, out=out, at_once=2, resume=True, steps=13)
    changed = [{**UNEVEN[0], "context": CONTEXT[:83]}, *UNEVEN[1:]]
    with pytest.raises(UserError, match="few can't be resumed with other settings: context was"):
        compress_many(calm_model, changed, out=out, at_once=2, resume=True)
    with pytest.raises(UserError, match="no run to resume"):
        compress_many(calm_model, UNEVEN, out=tmp_path / "new", resume=True)
    with pytest.raises(UserError, match="at least one"):
        compress_many(calm_model, [])
    with pytest.raises(UserError, match="--at-once must be at least 1"):
        compress_many(calm_model, UNEVEN, at_once=0)
