"""The command line as a user meets it: the main job, and one clear sentence for every mistake."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import jaxsp
from jaxsp import plan
from jaxsp.arguments import parse, program
from jaxsp.artifact import write_manifest
from jaxsp.cli import COMMANDS, Compress
from jaxsp.models import decoder
from jaxsp.study.seeds import SEEDS
from jaxsp.terminal import visible
from tests import tiny

FAST = ("--length", 4, "--steps", 2, "--batch-size", 4, "--max-answer-tokens", 6)


@pytest.fixture
def compress(jaxsp_command, job, tiny_directory, tmp_path):
    """``jaxsp compress`` on the tiny model, with changes; the last of a repeated option wins."""

    def run(*more, context=None, queries=None, model=tiny_directory, out=tmp_path / "out"):
        return jaxsp_command(
            "compress",
            context or job["context"],
            "--queries",
            queries or job["queries"],
            "--model",
            model,
            "--dtype",
            "float32",
            "--out",
            out,
            *FAST,
            *more,
        )

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_directory):
    """A finished run, made through the Python interface."""
    from tests.conftest import CONTEXT, QUERIES

    out = tmp_path_factory.mktemp("finished") / "out"
    jaxsp.compress(
        jaxsp.load_model(tiny_directory, dtype="float32"),
        CONTEXT,
        QUERIES,
        out=out,
        prompt_length=4,
        steps=2,
        batch_size=4,
        max_answer_tokens=6,
        progress=False,
    )
    return out


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2 and one sentence on standard error that holds these words."""
    code, out, err = result
    assert code == 2, (out, err)
    assert "Traceback" not in err
    message = [line for line in err.splitlines() if line.startswith("jaxsp: ")]
    assert len(message) == 1, err
    for word in words:
        assert str(word) in message[0], err


def test_compress_writes_everything(compress, tmp_path):
    code, out, err = compress()
    assert code == 0, err
    assert "closes" in out
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert {
        "prompt.safetensors",
        "manifest.json",
        "context.txt",
        "README.md",
        "report.json",
        "report.md",
        "report.html",
        "tokens.json",
        "metrics.jsonl",
        "plots/training.png",
        "plots/by_position.png",
        "plots/by_query.png",
    } <= files
    assert not any(name.endswith(".part") for name in files)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    brackets = {"full_context", "prompt", "initial", "truncated_context", "no_context"}
    metrics = {
        "kl",
        "reverse_kl",
        "js",
        "topk_kl",
        "nll",
        "zero_one",
        "rank_agreement",
        "entropy",
        "confidence_shift",
        "cosine_similarity",
        "decisive_agreement",
        "sequence_mismatch",
        "rouge_l",
    }
    answer_metrics = {"sequence_mismatch", "rouge_l"}  # nobody answers the training queries once more
    for split, names, expected in (
        ("held_out", brackets, metrics),
        ("train", {"prompt", "no_context"}, metrics - answer_metrics),
    ):
        assert set(report[split]["brackets"]) == names
        for row in report[split]["brackets"].values():
            assert set(row) == expected
            assert np.isfinite(list(row.values())).all()
    assert report["held_out"]["brackets"]["full_context"]["kl"] == pytest.approx(0, abs=1e-6)
    assert report["held_out"]["brackets"]["full_context"]["rouge_l"] == 1.0
    assert set(report["gap_closed"]) == {"value", "low", "high"}
    parts = ("load", "answers", "signals", "start", "train", "held_out", "evaluate")
    assert all(report["seconds"][name] > 0 for name in parts), report["seconds"]
    assert report["seconds"]["compile"] >= 0  # none, where other tests have compiled the same
    assert report["seconds"]["total"] == pytest.approx(sum(report["seconds"].values()) / 2)
    assert {q["split"] for q in report["queries"]} == {"train", "held_out"}
    for query in report["queries"]:
        assert {"query", "split", "kl", "answer_full_context"} <= set(query)
        assert ({"answer_prompt", "answer_no_context"} <= set(query)) == (query["split"] == "held_out")
    assert report["compression"] == report["context_tokens"] / 4
    lines = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert "held_out_kl" in lines[0]
    assert "held_out_kl" in lines[2]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["kl=0.7,nll=0.3,temperature=2", "cosine_similarity", "topk_kl(k=20)"])
def test_any_objective_of_the_table_and_mixtures_train(compress, tmp_path, objective):
    code, _, err = compress("--objective", objective)
    assert code == 0, err
    out = tmp_path / "out"
    assert json.loads((out / "report.json").read_text())["objective"] == objective
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["training"]["objective"] == objective
    losses = [json.loads(x).get("loss") for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert (losses[1] < 0) == (objective == "cosine_similarity")  # a similarity is turned round
    assert (out / "plots" / "training.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_context_and_queries_in_other_forms(compress, tmp_path, monkeypatch):
    rows = [{"query": f"Q{i}?", "answer": "Yes." if i % 2 else None} for i in range(6)]
    for row in rows:
        if row["answer"] is None:
            del row["answer"]
    queries = tmp_path / "q.jsonl"
    queries.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    held_out = tmp_path / "held.txt"
    held_out.write_text("Another?\n")
    piped = io.TextIOWrapper(io.BytesIO(b"# A title\n\nSome facts about a tank of 1.2 litres."))
    monkeypatch.setattr("sys.stdin", piped)
    code, _, err = compress("--held-out", held_out, context="-", queries=queries)
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["held_out"]["queries"] == 1
    assert report["train"]["queries"] == 6


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("There is no file",)),
        (b"", ("is empty",)),
        (b" \n\n ", ("is empty",)),
        (b"a\0b", ("binary",)),
        ("Zürich".encode("latin-1"), ("not UTF-8", "byte 1")),
    ],
)
@pytest.mark.parametrize("which", ["context", "queries"])
def test_unreadable_files(compress, tmp_path, content, words, which):
    file = tmp_path / "file.txt"
    if content is not None:
        file.write_bytes(content)
    refused(compress(**{which: file}), str(file), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"query": "a?"}', '{"query": '], ("line 2", "not valid JSON")),
        (['{"query": "a?"}', '["b"]'], ("line 2", "expected")),
        (['{"query": "a?"}', "", '{"quest": "b?"}'], ("line 3", "the columns are quest.")),
        (['{"query": "a?", "anwser": "x"}'], ("line 1", "'anwser'")),
        (['{"query": "a?", "answer": ""}'], ("line 1", "answer")),
        (['{"query": " "}'], ("line 1", "empty")),
        (["only one?"], ("At least two queries", "got 1")),
        (["same?", "same?", "other?"], ("'same?'", "twice")),
    ],
)
def test_unusable_queries(compress, tmp_path, lines, words):
    file = tmp_path / "q.txt"
    file.write_text("\n".join(lines))
    # Held out: a draw in which both of the same query are on one side.
    refused(compress("--seed", 1, queries=file), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--length", 0), ("--prompt-length must be at least 1, not 0.",)),
        (("--length", 87), ("--prompt-length is 87", "87 tokens")),
        (("--objective", "klx"), ("Unknown objective 'klx'", "kl, reverse_kl")),
        (("--objective", "zero_one"), ("piecewise constant",)),
        (("--objective", "kl=0.7,nll=x"), ("'nll=x' can't be read", "like nll=0.7")),
        (("--dtype", "float8"), ("Unknown dtype 'float8'",)),
        (("--quantization", "int3"), ("--quantization", "int3", "int8")),
        (("--model", "gpt-17"), ("Unknown model 'gpt-17'",)),
        (("--parallel", "tpu"), ("Unknown parallel 'tpu'", "jit, pmap")),
        (("--initial", "zeros"), ("Unknown initial 'zeros'", "first, spread")),
        (("--optimizer", "lion"), ("Unknown optimizer 'lion'",)),
        (("--learning-rate", -1), ("--learning-rate must be above 0, not -1.0.",)),
        (("--batch-size", 0), ("--batch-size must be at least 1, not 0.",)),
        (("--steps", -3), ("--steps must be at least 0", "-3")),
        (("--warmup-fraction", 1.5), ("--warmup-fraction must be at least 0 and below 1, not 1.5.",)),
        (("--answers", "sampled:1"), ("--answers must be greedy or sampled:N", "not 'sampled:1'")),
        (("--on-policy", 1.5), ("--on-policy must be at least 0 and at most 1, not 1.5.",)),
        (("--on-policy", 0.5, "--objective", "nll"), ("--on-policy 0.5 needs an objective", "not nll")),
        (("--held-out", 1.5), ("fraction", "1.5")),
        (("--held-out", "nowhere.txt"), ("There is no file nowhere.txt",)),
        (("--max-answer-tokens", 500), ("window of 512", "Shorten the query")),
        (("--resume",), ("no run to resume",)),
        (("--resume", "--overwrite"), ("not both",)),
    ],
)
def test_unusable_options(compress, tmp_path, options, words):
    refused(compress(*options), *words)
    assert not (tmp_path / "out" / "prompt.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compress",), ("Missing: DOCUMENT; see jaxsp compress --help.",)),
        (("ask",), ("Missing: DIR; see jaxsp ask --help.",)),
        (("frobnicate",), ("There is no command 'frobnicate'; see jaxsp --help.",)),
        (("compres", "c.txt"), ("'compres'; did you mean compress? See jaxsp --help.",)),
        (
            ("compress", "c.txt", "--queries", "q.txt", "--lenght", "3"),
            ("There is no option --lenght; did you mean --length? See jaxsp compress --help.",),
        ),
        (("compress", "c.txt", "--querys=q.txt"), ("--querys; did you mean --queries?",)),
        (("compress", "c.txt", "--batchsize", "3"), ("did you mean --batch-size?",)),
        (
            ("compress", "c.txt", "--clip", "3"),
            ("There is no option --clip; it is called --max-grad-norm now; see jaxsp compress --help.",),
        ),
        (("plan", "--weights=int8"), ("--weights; it is called --quantization now",)),
        (("plan", "--out", "x"), ("There is no option --out; see jaxsp plan --help.",)),
        (("inspect", "a", "b"), ("b; see jaxsp inspect --help",)),
        (("demo", "--steps", "two"), ("--steps must be a whole number, not 'two'; see",)),
        (("compress", "c", "--queries", "q", "--learning-rate", "x"), ("must be a number, not 'x'",)),
    ],
)
def test_unusable_command_lines(jaxsp_command, arguments, words):
    result = jaxsp_command(*arguments)
    refused(result, *words)
    assert len(result[2].splitlines()) == 1
    assert result[1] == ""


def test_without_arguments_help_is_shown(jaxsp_command):
    code, out, err = jaxsp_command()
    assert (code, err) == (0, "")
    assert all(name in out for name in COMMANDS)
    assert "--tyro-print-completion" in out
    assert jaxsp_command("--help") == (code, out, err)
    assert jaxsp_command("--version") == (0, f"jaxsp {jaxsp.__version__}\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_can_be_parsed(jaxsp_command, name):
    code, out, _ = jaxsp_command(name, "--help")
    assert code == 0
    shown = out.partition("examples:")[2].splitlines()
    lines = [line.rpartition("|")[2].strip() for line in shown if line.strip()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "jaxsp"
        assert isinstance(parse(COMMANDS, arguments), COMMANDS[name])


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_mistake_is_one_sentence_in_every_encoding(python, encoding):
    done = python("-m", "jaxsp", "compress", "--length", "3", env={"PYTHONIOENCODING": encoding})
    assert done.stderr == "jaxsp: Missing: DOCUMENT; see jaxsp compress --help.\n"
    assert done.returncode == 2


def test_options_with_underscores_and_after_an_end_of_options():
    command = parse(COMMANDS, ["compress", "c", "--queries", "q", "--batch_size=3"])
    assert isinstance(command, Compress)
    assert command.training.batch_size == 3
    with pytest.raises(jaxsp.UserError, match="Unrecognized"):  # no option to be looked for
        parse(COMMANDS, ["inspect", "prompt", "--", "--lenght"])


def test_a_pipe_that_closes_early(python):
    """As in ``jaxsp compress --help | head -1``."""
    script = "import os, sys; sys.argv = ['jaxsp', 'compress', '--help']; from jaxsp.cli import main; main()"
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=closed, stderr=subprocess.PIPE, check=False
        )
    assert done.stderr == b""


def test_how_to_call_the_program_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "a b" / "bin" / "jaxsp"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert program() == "'a b/bin/jaxsp'"
    monkeypatch.setenv("PATH", str(script.parent))
    assert program() == "jaxsp"
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")  # the path is that of `uv run` alone
    assert program() == "'a b/bin/jaxsp'"
    monkeypatch.setattr(sys, "argv", ["/elsewhere/jaxsp/__main__.py"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert program() == ".venv/bin/python -m jaxsp"


def test_torch_is_not_loaded_where_it_is_installed(python, tiny_directory, job, tmp_path):
    """transformers would load it."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was loaded')")
    (tmp_path / "torch-99.dist-info").mkdir()
    (tmp_path / "torch-99.dist-info" / "METADATA").write_text("Name: torch\nVersion: 99.0\n")
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = ["compress", job["context"], "--queries", job["queries"], "--model", tiny_directory]
    done = python("-m", "jaxsp", *map(str, command), "--length", "500", env=environment)
    assert done.returncode == 2
    assert "500" in done.stderr  # more slots than the context has tokens, as its tokenizer said
    assert "torch" not in done.stderr


def test_help_is_shown(jaxsp_command):
    code, out, _ = jaxsp_command("compress", "--help")
    assert code == 0
    assert "--learning-rate" in out
    parts = [f"{part} options" for part in ("", "prompt", "teacher", "training", "devices", "output")]
    assert sorted(parts, key=out.index) == parts
    assert out.index("--queries") < out.index("--prompt-length")  # what must be given comes first


def test_plan_says_what_a_run_will_need(jaxsp_command, tiny_directory, tmp_path, monkeypatch):
    shutil.copy(tiny_directory / "config.json", tmp_path)  # no weights, no tokenizer
    options = (tmp_path, "--length", 4, "--context-tokens", 90, "--dtype", "float32")
    monkeypatch.setattr(plan, "largest", lambda *_, **__: 9)
    code, out, err = jaxsp_command("plan", *options, "--steps", 40, "--optimizer", "adam")
    assert code == 0, err
    assert re.search(r"Planning: \d+\.\d s", err)
    for words in ("rows of", "MiB of", "temporaries", "GFLOP/s, measured", "40 steps", "assumed"):
        assert words in out
    batch = re.search(r"batch +(\d+) rows of (\d+) tokens", out)
    assert batch is not None
    rows, tokens = map(int, batch.groups())
    assert rows < 9
    batch_size = re.search(r"largest batch +--batch-size (\d+)", out)
    assert batch_size is not None
    assert rows < int(batch_size.group(1)) <= 9 * tokens / 64  # a query's tokens, unless printed otherwise
    given = plan.Memory(2**40, 2**41, 3, 4)
    found = plan.Plan("cpu", 1, 3, 80, given, 2**38, 2e9, 1e9, 0.5, 4.0, 0, 0)
    monkeypatch.setattr(plan, "plan", lambda *_, **__: found)
    code, out, err = jaxsp_command("plan", *options)
    assert "3,072.00 GiB of 256.00 GiB: does not fit" in out
    assert "none fits; lower --batch-size, raise --grad-accumulation" in " ".join(out.split())
    code, out, err = jaxsp_command("plan", *options, "--json")
    printed = json.loads(out)
    assert printed == {**dataclasses.asdict(found), "memory": printed["memory"]}
    assert printed["memory"] == {**dataclasses.asdict(given), "total": given.total}
    elsewhere = "--device v6e-1 has room for them"
    found = dataclasses.replace(
        found, memory=None, compiled_for="v5e-1, by libtpu 0", room_elsewhere=elsewhere
    )
    code, out, err = jaxsp_command("plan", *options)
    words = " ".join(out.split())
    for said in (
        "compiled for v5e-1, by libtpu 0", "256.00 GiB, less than the update takes: does not fit",
        "GFLOP/s, at most", f"none fits; the weights take most of the memory, and {elsewhere}",
    ):  # fmt: skip
        assert said in words
    code, out, err = jaxsp_command("plan", *options, "--json")
    assert json.loads(out)["memory"] is None
    monkeypatch.undo()
    refused(jaxsp_command("plan", *options, "--query-tokens", 600), "window of 512")
    refused(jaxsp_command("plan", *options, "--batch-size", 0), "--batch-size must be at least 1")
    refused(jaxsp_command("plan", tmp_path / "nothing"), "Unknown model")


def out_of_memory(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nMore.")


@pytest.mark.slow
def test_a_device_without_memory(
    compress, jaxsp_command, monkeypatch, finished, job, tiny_directory, tmp_path
):
    """The advice is one sentence, by the options that the command has."""
    common = ("Out of memory allocating 99 bytes", "`jaxsp plan`")
    training = ("--batch-size", "--grad-accumulation", "--quantization int8", "--parallel mesh", *common)
    monkeypatch.setattr("jaxsp.training.drivers.JitDriver.step", out_of_memory)
    refused(compress(), *training)
    row = {"id": "a", "context": job["context"].read_text(), "queries": ["One?", "Two?", "Three?"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    many = ("compress-many", tmp_path / "rows.jsonl", "--model", tiny_directory, *FAST)
    refused(jaxsp_command(*many, "--out", tmp_path / "many"), "--at-once", *training)
    monkeypatch.setattr("jaxsp.teacher.targets.in_batches", out_of_memory)
    result = jaxsp_command("evaluate", finished, "--queries", job["queries"])
    refused(result, "take --dtype bfloat16", *common)
    assert "--batch-size" not in result[2]


def test_other_failures_of_a_device_are_not_taken_for_it(compress, monkeypatch):
    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr("jaxsp.training.drivers.JitDriver.step", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compress()


def test_prompts_at_once_are_checked_before_anything_is_read(jaxsp_command):
    options = ("nowhere.jsonl", "--model", "nothing", "--at-once", 0)
    refused(jaxsp_command("compress-many", *options), "--at-once must be at least 1, not 0.")


@pytest.mark.slow
def test_a_batch_in_parts(compress, tmp_path):
    """Trains, and a run goes on in other parts, or made when there were none."""
    refused(compress("--grad-accumulation", 0), "--grad-accumulation", "at least 1")
    code, _, err = compress("--grad-accumulation", 2)
    assert code == 0, err
    assert "grad_accumulation" not in (tmp_path / "out" / "run" / "settings.json").read_text()
    code, _, err = compress("--resume")
    assert code == 0, err


def test_query_on_both_sides(compress, tmp_path):
    held_out = tmp_path / "held.txt"
    held_out.write_text("What is fact 3?")
    refused(compress("--held-out", held_out), "'What is fact 3?'", "both")


def test_damaged_model_directories(compress, tmp_path):
    directory = tiny.write(tmp_path / "model")
    (directory / "model.safetensors").write_bytes(b"short")
    refused(compress(model=directory), "not a complete safetensors file")
    (directory / "model.safetensors").unlink()
    refused(compress(model=directory), "holds no weights")


@pytest.mark.slow
def test_the_layout_of_the_chat(compress, jaxsp_command, tmp_path):
    """It is the prompt's from then on: a run goes on with the same alone, and evaluate reads it."""
    refused(compress("--template-option", "thinking"), "takes NAME=VALUE", "'thinking'")
    refused(compress("--slot", "assistant"), "--slot")
    code, _, err = compress(
        "--system", "Be brief.", "--template-option", "enable_thinking=true", "--steps", 0
    )
    assert code == 0, err
    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["slots"]["before"] == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    refused(compress("--resume", "--steps", 0), "chat_options.system was 'Be brief.' and is now")
    report = json.loads((out / "report.json").read_text())
    queries = tmp_path / "held.txt"
    queries.write_text("\n".join(q["query"] for q in report["queries"] if q["split"] == "held_out"))
    _, shown, _ = jaxsp_command("evaluate", out, "--queries", queries, "--json", "--dtype", "float32")
    kl = [found["held_out"]["brackets"]["prompt"]["kl"] for found in (json.loads(shown), report)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-4)


def test_folder_in_use(compress, tmp_path, finished):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(compress(), "is not empty", "--overwrite", "--resume")
    code, _, err = compress("--overwrite")
    assert code == 0, err
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    refused(compress(out=tmp_path / "file"), "is a file")


def test_folder_that_cannot_be_written(compress, tmp_path, monkeypatch):
    # As root every folder can be written to, so the answer of the system is replaced.
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(compress(), "can't be written to", "--out")


def test_a_mistake_loses_nothing(compress, tmp_path):
    assert compress()[0] == 0
    before = (tmp_path / "out" / "report.json").read_bytes()
    refused(compress("--overwrite", "--length", 0), "--prompt-length")
    refused(compress("--overwrite", "--length", 500), "--prompt-length")
    assert (tmp_path / "out" / "report.json").read_bytes() == before


def test_resume_with_other_settings_shows_the_difference(compress, tmp_path, job):
    assert compress()[0] == 0
    refused(
        compress("--resume", "--steps", 5, "--learning-rate", 0.2),
        "steps was 2 and is now 5",
        "learning_rate was 0.02 and is now 0.2",
    )
    wide = tiny.write(tmp_path / "wide", hidden_size=48)
    # Of a folder the last part, as a project may be moved; which model it is, the weights say.
    refused(compress("--resume", model=wide), "and is now 'wide'; weights was")
    job["context"].write_text("Something else altogether, about as long as the context before it.")
    refused(compress("--resume"), "context was")


def test_resume_of_a_finished_run_changes_nothing(compress, tmp_path, monkeypatch):
    code, first, _ = compress()
    assert code == 0
    before = (tmp_path / "out" / "prompt.safetensors").read_bytes()
    monkeypatch.setattr("jaxsp.training.drivers.JitDriver.step", out_of_memory)  # none is done
    code, again, err = compress("--resume")
    assert code == 0, err
    figures = first.split("slots for")[0]  # what follows has the seconds
    assert again.startswith(figures)
    assert (tmp_path / "out" / "prompt.safetensors").read_bytes() == before


def test_a_run_of_an_older_version_is_not_gone_on_with(compress, tmp_path, finished):
    """0.1 wrote no version into a run's settings."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    settings = out / "run" / "settings.json"
    old = {k: v for k, v in json.loads(settings.read_text()).items() if k != "version"}
    settings.write_text(json.dumps(old))
    before = (out / "report.json").read_bytes()
    refused(compress("--resume"), "made by another version of jaxsp", "--overwrite")
    assert (out / "report.json").read_bytes() == before
    assert compress("--overwrite")[0] == 0


@pytest.mark.slow
def test_non_finite_loss_stops_at_the_last_good_state(compress, tmp_path):
    code, _, err = compress("--learning-rate", 1e38, "--max-grad-norm", 0, "--steps", 6)
    assert code == 2
    assert "Training stopped: step" in err
    assert "Lower" in err
    assert "best prompt" in err
    assert (tmp_path / "out" / "prompt.safetensors").is_file()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "is not finite" in report["error"]
    assert "held_out" not in report
    assert compress("--resume", "--learning-rate", 1e38, "--max-grad-norm", 0, "--steps", 6)[0] == 2
    assert compress("--overwrite")[0] == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["error"] is None


def test_ask_inspect_evaluate(jaxsp_command, finished, job, tmp_path, monkeypatch):
    code, out, err = jaxsp_command("ask", finished, "What now?", "--max-tokens", 5)
    assert code == 0, err
    quoted = jaxsp_command("ask", finished, "What", "now?", "--max-tokens", 5)
    assert quoted == (code, out, err)
    monkeypatch.setattr("sys.stdin", io.StringIO("What now?\n"))
    assert jaxsp_command("ask", finished / "prompt.safetensors", "-", "--max-tokens", 5) == quoted
    code, out, err = jaxsp_command("inspect", finished)
    assert code == 0
    assert "per_head, 4 slots" in out
    assert "kl, 2 steps" in out
    code, out, err = jaxsp_command("evaluate", finished, "--queries", job["queries"], "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["held_out"]["queries"] == 10
    assert report["held_out"]["brackets"]["full_context"]["kl"] == pytest.approx(0, abs=1e-6)
    own = tmp_path / "own"
    shutil.copytree(finished, own)
    code, out, err = jaxsp_command("evaluate", own, "--queries", job["queries"], "--calibrate")
    assert code == 0
    assert "closes" in out
    some = [row["certainty"] for row in report["queries"] if not row["trained_on"]]
    before, after = (jaxsp.SoftPrompt.load(folder).manifest["fallback"] for folder in (finished, own))
    assert before == json.loads((finished / "report.json").read_text())["fallback"]
    assert (len(before["certainties"]), after["certainties"]) == (2, some)
    lines = iter(["One?", "Two?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    code, out, err = jaxsp_command("ask", finished, "--max-tokens", 5)
    assert code == 0, err
    assert next(lines, "all asked") == "all asked"


def test_who_is_not_sure_reads_the_document(jaxsp_command, finished, tmp_path, monkeypatch, caplog):
    """The answer is the soft prompt's, or the one after the whole document; standard error says which."""
    prompt = jaxsp.SoftPrompt.load(finished)
    model = jaxsp.load_model(prompt.manifest["model"]["name"]).with_chat(prompt.chat)
    ids = np.array([[*prompt.manifest["slots"]["before_ids"], *model.encode_context(prompt.context or "")]])
    whole = jaxsp.distributions.context_prefix(model.params, model.config, ids)
    expected = "".join(model.stream_answer(whole, "What now?", max_tokens=5))
    in_pieces = functools.partial(decoder.read_long, longest=16)  # which change no answer
    monkeypatch.setattr(decoder, "read_long", in_pieces)
    read, sizes = decoder._read_chunk, list[int]()

    def read_chunk(params, config, room, ids, *rest):
        sizes.append(ids.shape[1])
        return read(params, config, room, ids, *rest)

    monkeypatch.setattr(decoder, "_read_chunk", read_chunk)
    command = ("ask", finished, "What now?", "--max-tokens", 5)
    plain = jaxsp_command(*command)
    assert plain[1] != f"{visible(expected)}\n"
    for values, answer, said in (
        ([-99.0, -98.0], plain[1], ""),
        ([-1e-6, -1e-7], f"{visible(expected)}\n", "σ is not sure of this; the whole document answers.\n"),
    ):
        own = tmp_path / str(values[0])
        shutil.copytree(finished, own)
        fallback = {**prompt.manifest["fallback"], "certainties": values}
        write_manifest(own, {**prompt.manifest, "fallback": fallback})
        code, out, err = jaxsp_command("ask", own, *command[2:], "--context-fallback", 0.5)
        assert (code, out, err) == (0, answer, said)
        assert (len(sizes) >= 3 and max(sizes) <= 16) if said else not sizes
        caplog.clear()
        found = jaxsp.ask(own, "What now?", max_tokens=5, context_fallback=0.5)
        assert (visible(found) + "\n", [f"{text}\n" for text in caplog.messages]) == (
            answer,
            [said] * bool(said),
        )
        assert jaxsp.ask(model, own, "What now?", max_tokens=5) + "\n" == plain[1]
    odd: list[Any] = [0, 1.5, float("nan"), "half"]
    for share in odd:
        with pytest.raises(jaxsp.UserError, match="--context-fallback must be "):
            jaxsp.ask(own, "What now?", context_fallback=share)
    (own / "context.txt").unlink()
    refused(jaxsp_command("ask", own, "Who?", "--context-fallback", 0.5), "not in the soft prompt's folder")
    with pytest.raises(jaxsp.UserError, match="not in the soft prompt's folder"):
        jaxsp.ask(own, "Who?", context_fallback=0.5)


@pytest.mark.slow
def test_int8_weights_stay_with_the_prompt(compress, jaxsp_command, job, tmp_path, tiny_model):
    """The later commands load what the prompt was trained for; another model is refused by name."""
    out = tmp_path / "out"
    code, _, err = compress("--quantization", "int8")
    assert code == 0, err
    assert json.loads((out / "manifest.json").read_text())["model"]["quantization"] == "int8"
    assert "(float32, quantization: int8)" in (out / "report.md").read_text()
    refused(compress("--resume"), "weights was 'int8:", "is now")
    assert jaxsp_command("ask", out, "What now?", "--max-tokens", 5)[0] == 0
    assert jaxsp_command("evaluate", out, "--queries", job["queries"], "--json")[0] == 0
    prompt = jaxsp.SoftPrompt.load(out)
    with pytest.raises(
        jaxsp.UserError, match=r"trained with quantization 'int8', .*'none'; load it with .*='int8'"
    ):
        prompt.check(tiny_model)
    del prompt.manifest["model"]["quantization"]  # as it was before there was a choice
    with pytest.raises(jaxsp.UserError, match="belongs to another model"):
        prompt.check(tiny_model)


def test_a_prompt_of_version_0_1_loads(jaxsp_command, finished, tmp_path):
    """Its manifest has other names for some keys."""
    old, new = tmp_path / "old", jaxsp.SoftPrompt.load(finished)
    shutil.copytree(finished, old)
    manifest = json.loads((old / "manifest.json").read_text())
    manifest |= {"format": 1, "length": manifest.pop("prompt_length")}
    manifest["model"]["weights"] = {"none": "full"}[manifest["model"].pop("quantization")]
    for name, before in (
        ("prompt_length", "length"),
        ("warmup_fraction", "warmup"),
        ("max_grad_norm", "clip"),
        ("grad_accumulation", "accumulate"),
    ):
        manifest["training"][before] = manifest["training"].pop(name)
    (old / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(jaxsp.UserError, match="is damaged"):  # 0.1 wrote no seal: this one is of today's file
        jaxsp.SoftPrompt.load(old)
    del manifest["seal"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    loaded = jaxsp.SoftPrompt.load(old)
    assert loaded.manifest == new.manifest
    assert (loaded.prompt_length, loaded.quantization) == (4, "none")
    manifest["model"]["weights"] = "int8"
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert jaxsp.SoftPrompt.load(old).quantization == "int8"
    assert f"{new.kind}, 4 slots" in jaxsp_command("inspect", old)[1]


def test_evaluate_repeats_the_reports_numbers(jaxsp_command, finished, tmp_path):
    report = json.loads((finished / "report.json").read_text())
    held = [q for q in report["queries"] if q["split"] == "held_out"]
    queries = tmp_path / "held.txt"
    queries.write_text("\n".join(q["query"] for q in held))
    _, out, _ = jaxsp_command("evaluate", finished, "--queries", queries, "--json", "--dtype", "float32")
    again = json.loads(out)
    assert again["gap_closed"]["value"] == pytest.approx(report["gap_closed"]["value"], abs=1e-4)
    for ours, theirs in zip(again["queries"], held, strict=True):
        assert ours["answer_prompt"] == theirs["answer_prompt"]
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-4)
        assert not ours["trained_on"]
    seen = next(q["query"] for q in report["queries"] if q["split"] == "train")
    queries.write_text(f"{seen.lower()}\nAnother one?")
    _, out, _ = jaxsp_command("evaluate", finished, "--queries", queries, "--json", "--dtype", "float32")
    marked = json.loads(out)
    assert [query["trained_on"] for query in marked["queries"]] == [True, False]
    assert "1 of these 2 queries were trained on" in marked["verdict"]["text"]


def test_where_there_is_no_gap_to_close_tables_say_so():
    from jaxsp import console

    report = {
        **dict.fromkeys(("id", "objective", "prompt_length", "context_tokens"), "x"),
        "gap_closed": dict.fromkeys(("value", "low", "high")),
        "held_out": {"brackets": {name: {"kl": 1e-6} for name in ("prompt", "no_context")}},
    }
    result: Any = SimpleNamespace(report=report, error=None)
    assert console.result_row(result)[-3:] == ["no gap to close", "0.000", "0.000"]


def test_report_writes_what_the_run_wrote(jaxsp_command, finished, tmp_path):
    reports = ["report.html", "report.md", "README.md"]
    names = [*reports, *(f"plots/{name}.png" for name in ("training", "by_position", "by_query"))]
    many = tmp_path / "many"
    for name in ("a", "b"):
        shutil.copytree(finished, many / name)
        for file in names:
            (many / name / file).unlink()
    (many / "b" / "README.md").write_text("My notes.")  # it stays, and is not among the written
    code, out, _ = jaxsp_command("report", many / "b")
    assert (many / "b" / "README.md").read_text() == "My notes."
    assert (code, out.splitlines()) == (0, [str(many / "b" / file) for file in reports[:2]])
    (many / "b" / "README.md").unlink()
    code, out, _ = jaxsp_command("report", many / "b")
    assert (code, out.splitlines()) == (0, [str(many / "b" / file) for file in reports])
    assert not (many / "a" / "report.md").exists()
    assert jaxsp_command("report", many)[1].splitlines() == [str(many / i / f) for i in "ab" for f in reports]
    for name in ("a", "b"):
        assert all((many / name / file).read_bytes() == (finished / file).read_bytes() for file in reports)
        assert all((many / name / file).is_file() for file in names)
    refused(jaxsp_command("report", tmp_path), "holds no finished run")
    report = json.loads((finished / "report.json").read_text())
    checksums = many / "a" / "run" / "checksums.json"
    kept = checksums.read_text()
    another_version = "damaged, or was written by another version"
    for damaged, words in (
        ("{", "is damaged: not valid JSON"),
        ("[]", "is damaged: not valid JSON (expected an object"),
        ("null", "is damaged: not valid JSON (expected an object"),
        (json.dumps(report | {"held_out": {}}), another_version),
        (json.dumps({"held_out": 3}), another_version),
    ):
        (many / "a" / "report.json").write_text(damaged)
        checksums.write_text(kept)
        refused(jaxsp_command("report", many / "a"), many / "a" / "report.json", "is damaged: its SHA-256")
        checksums.unlink()  # older runs have none
        refused(jaxsp_command("report", many / "a"), many / "a" / "report.json", words)
    (many / "a" / "report.json").write_text(json.dumps(report))
    (many / "a" / "prompt.safetensors").write_bytes(b"")
    code, out, err = jaxsp_command("report", many)
    assert out.splitlines() == [str(many / "b" / file) for file in reports]  # the others are written
    refused((code, out, err), many / "a" / "prompt.safetensors", "is damaged")
    shutil.copy(finished / "prompt.safetensors", many / "a")
    (many / "a" / "report.json").write_text(json.dumps({**report, "error": "The loss is not finite"}))
    refused(jaxsp_command("report", many / "a" / "report.json"), "training failed", "The loss is not finite")


@pytest.mark.slow
def test_a_nested_prompt_is_read_at_the_lengths_it_has(jaxsp_command, compress, tmp_path):
    code, _, err = compress("--kind", "nested", "--steps", 0)
    assert code == 0, err
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert list(report["by_length"]) == ["1", "2", "4"]
    assert report["by_length"]["4"] == pytest.approx(report["held_out"]["brackets"]["prompt"]["kl"], rel=1e-5)
    assert (out / "plots" / "by_length.png").is_file()
    queries = tmp_path / "held.txt"
    queries.write_text("\n".join(q["query"] for q in report["queries"] if q["split"] == "held_out"))
    code, shown, err = jaxsp_command(
        "evaluate", out, "--queries", queries, "--length", 2, "--json", "--dtype", "float32"
    )
    assert code == 0, err
    found = json.loads(shown)
    assert (found["prompt_length"], found["kind"]) == (2, "key_value")
    assert found["held_out"]["brackets"]["prompt"]["kl"] == pytest.approx(report["by_length"]["2"], rel=1e-4)
    whole, short = (jaxsp_command("ask", out, "What now?", *more) for more in ((), ("--length", 1)))
    assert whole[0] == short[0] == 0
    assert whole[1] != short[1]
    refused(jaxsp_command("ask", out, "Who?", "--length", 3), "none of 3", "read at 1, 2, 4 slots")
    refused(jaxsp_command("ask", out, "Who?", "--length", 8), "none of 8")


def test_only_nested_prompts_can_be_cut(jaxsp_command, finished):
    refused(jaxsp_command("ask", finished, "Who?", "--length", 2), "--kind nested")
    assert jaxsp.SoftPrompt.load(finished).cut(4).prompt_length == 4


def test_ranks_that_cannot_be(compress, tmp_path):
    refused(compress("--rank", 2), "--rank 2 is for --kind low_rank, not per_head")
    refused(compress("--kind", "low_rank", "--rank", 9), "--rank must be at most", "(--prompt-length 4)")
    refused(compress("--kind", "low_rank", "--rank", 0), "--rank must be at least 1")
    assert not (tmp_path / "out").exists()


def test_artifacts_that_cannot_be_used(jaxsp_command, finished, tmp_path, job):
    refused(jaxsp_command("ask", tmp_path, "Who?"), "holds no soft prompt")
    refused(jaxsp_command("ask", finished, " "), "question is empty")
    long = "word " * 200
    refused(jaxsp_command("ask", finished, long), "window of 512")
    other = tiny.write(tmp_path / "other", seed=5)
    refused(jaxsp_command("ask", finished, "Who?", "--model", other), "belongs to another model", "weights")
    refused(
        jaxsp_command("evaluate", finished, "--queries", job["queries"], "--model", other),
        "belongs to another model",
    )

    def damaged(name, change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(finished, copy)
        change(copy / name)
        return jaxsp_command("inspect", copy)

    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-9])

    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))

    refused(damaged("prompt.safetensors", cut), "damaged")
    refused(damaged("prompt.safetensors", flip), "damaged", "SHA-256")
    refused(damaged("manifest.json", cut), "damaged")
    refused(damaged("manifest.json", lambda f: f.write_text("{}")), "lacks")
    refused(damaged("manifest.json", lambda f: f.write_text("[1]")), "damaged")
    refused(damaged("manifest.json", Path.unlink), "holds no soft prompt")

    tokenizer = tmp_path / "tokenizer"
    directory = json.loads((finished / "manifest.json").read_text())["model"]["name"]
    shutil.copytree(directory, tokenizer)
    text = (tokenizer / "tokenizer.json").read_text("utf-8")
    swapped = text.replace('"A":', '"@@":').replace('"B":', '"A":').replace('"@@":', '"B":')
    (tokenizer / "tokenizer.json").write_text(swapped, "utf-8")
    refused(jaxsp_command("ask", finished, "Who?", "--model", tokenizer), "another model", "tokenizer")


def test_one_bit_of_the_weights_is_noticed(jaxsp_command, compress, finished, tiny_directory, tmp_path, job):
    """By every command that goes on with what was made with them."""
    other, out = tmp_path / "other", tmp_path / "out"
    shutil.copytree(tiny_directory, other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1234] ^= 1
    (other / "model.safetensors").write_bytes(data)
    words = ("another model", "weights")
    refused(jaxsp_command("ask", finished, "Who?", "--model", other), *words)
    asked = ("--queries", job["queries"], "--model", other)
    refused(jaxsp_command("evaluate", finished, *asked), *words)
    shutil.copytree(finished, out)
    refused(compress("--resume", model=other), "can't be resumed", "weights was")


def test_other_angles_of_the_same_weights_are_noticed(
    jaxsp_command, compress, finished, tiny_directory, tmp_path, job
):
    """A config.json that was edited: the same weights give other numbers."""
    other, out = tmp_path / tiny_directory.name, tmp_path / "out"
    shutil.copytree(tiny_directory, other)
    config = json.loads((other / "config.json").read_text())
    for name, value, said in (
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 5e5},
            r"ropes was '2 × Rope\(.* and is now",
        ),
        ("rms_norm_eps", 1e-3, r"norm_epsilon was 1e-0\d and is now 0.001"),
    ):
        (other / "config.json").write_text(json.dumps({**config, name: value}))
        asked = ("evaluate", finished, "--queries", job["queries"])
        for command in (("ask", finished, "Who?"), asked):
            code, _, err = jaxsp_command(*command, "--model", other)
            assert code == 2
            assert re.search(f"not what it was when this prompt was made: {said}", err), err
        shutil.copytree(finished, out, dirs_exist_ok=True)
        code, _, err = compress("--resume", model=other)
        assert code == 2
        assert re.search(f"can't be resumed with other settings: decoder.{said}", err), err


def test_memory_that_there_is_not(jaxsp_command, finished, monkeypatch):
    def too_much(*_):
        raise MemoryError("Unable to allocate 7.28 TiB for an array")

    monkeypatch.setattr(jaxsp.SoftPrompt, "load", too_much)
    refused(jaxsp_command("ask", finished, "Who?"), "not enough memory (Unable to allocate 7.28", "--dtype")
    refused(jaxsp_command("inspect", finished), "not enough memory (Unable to allocate 7.28")


def test_a_prompt_without_its_context(jaxsp_command, finished, tmp_path, job):
    shutil.copytree(finished, tmp_path / "copy")
    (tmp_path / "copy" / "context.txt").unlink()
    assert jaxsp_command("ask", tmp_path / "copy", "Who?", "--max-tokens", 2)[0] == 0
    refused(jaxsp_command("evaluate", tmp_path / "copy", "--queries", job["queries"]), "without its context")


@pytest.mark.slow
def test_questions_are_written_to_look_at_and_compress_takes_them(
    jaxsp_command, compress, job, calm_directory, heeded, tmp_path
):
    file = tmp_path / "z.jsonl"
    asked = ("questions", job["context"], "--model", calm_directory, "--dtype", "float32", "--count", 6)
    code, out, err = jaxsp_command(*asked, "--out", file)
    assert code == 0, err
    assert out == ""
    assert "sentences are asked for." in err
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 6
    assert all(row["seed"] in SEEDS for row in rows)
    refused(jaxsp_command(*asked, "--out", file), "is there already", "--overwrite")
    refused(jaxsp_command("questions", job["context"], "--count", 0), "--count must be at least 1, not 0")
    code, out, _ = jaxsp_command(*asked)
    assert (code, out) == (0, file.read_text())
    code, _, err = compress(queries=file)
    assert code == 0, err


@pytest.mark.slow
def test_a_document_alone_is_enough(jaxsp_command, job, calm_directory, heeded, tmp_path):
    alone = ("--model", calm_directory, "--dtype", "float32", "--out", tmp_path / "out", *FAST[:-2])
    code, _, err = jaxsp_command("compress", job["context"], *alone)
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["study"]["given"] == 0
    assert report["train"]["queries"] > 3
    refused(
        jaxsp_command("compress", job["context"], *alone[:-2], "--overwrite", "--study", "off"), "two queries"
    )
