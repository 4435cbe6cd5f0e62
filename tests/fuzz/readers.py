"""All that reads files, or words, that others may have written; and what writes sound ones."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import jaxsp
from jaxsp import console
from jaxsp.arguments import parse
from jaxsp.artifact import SoftPrompt
from jaxsp.cli import COMMANDS
from jaxsp.data.documents import Query, read_context, read_queries
from jaxsp.data.examples import make_rows
from jaxsp.errors import Damaged, UserError
from jaxsp.evaluation import table
from jaxsp.evaluation.facts import has_expected
from jaxsp.evaluation.report import as_json
from jaxsp.exports.from_peft import Adapter
from jaxsp.files import parse_json, sealed
from jaxsp.models.chat import render
from jaxsp.models.families import FAMILIES
from jaxsp.models.gguf import _damaged, convert as gguf_convert, converted, reader as gguf_reader
from jaxsp.models.lazy_tokenizer import LazyTokenizer
from jaxsp.models.load import _load_tokenizer, model_config
from jaxsp.models.weights import load_params
from jaxsp.prompts import storage
from jaxsp.runs.compared import compare_folders
from jaxsp.runs.folder import Result, RunFolder, write_reports
from jaxsp.runs.job import check_jobs, read_rows
from jaxsp.serve.messages import texts_in_turn
from jaxsp.serve.refusal import Refusal
from jaxsp.serve.schema import read_chat, read_completion
from jaxsp.study.questions import Study
from jaxsp.teacher import samples, store, targets
from jaxsp.teacher.store import Store
from tests import tiny
from tests.evaluation.test_page import token
from tests.evaluation.test_report import example
from tests.gguf_files import SPM, metadata, write_gguf
from tests.test_files import prompt, result

Read = Callable[[Path], Any]
Inputs = list[bytes] | None


def quietly(function: Callable[..., Any], *arguments: Any) -> str:
    """The words that are printed."""
    box = io.StringIO()
    with contextlib.redirect_stdout(box), contextlib.redirect_stderr(io.StringIO()):
        function(*arguments)
    return box.getvalue()


# GGUF


def ggufs(folder: Path) -> list[bytes]:
    """Two kinds of tokenizers, without a chat template: that takes a process of its own."""
    sizes: dict[str, Any] = {
        "num_hidden_layers": 1, "hidden_size": 8, "head_dim": 4, "intermediate_size": 8,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    known = metadata("llama", tiny.config())
    merged = {
        "tokenizer.ggml.tokens": [*known["tokenizer.ggml.tokens"], "ab", "abc"],
        "tokenizer.ggml.token_type": [*known["tokenizer.ggml.token_type"], 1, 4],
        "tokenizer.ggml.merges": ["a b", "ab c"],
    }
    found = []
    kinds: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("llama", merged, {"vocab_size": 261}),
        ("gemma3", SPM, {"layer_types": ["full_attention"]}),
        ("qwen2", {}, {}),
    ]
    for architecture, fields, more in kinds:
        write_gguf(folder / "m", architecture, {"tokenizer.chat_template": None, **fields}, **sizes, **more)
        found.append((folder / "m").read_bytes())
    return found


def small_ggufs(folder: Path) -> list[bytes]:
    """With few tokens: the reader takes them as they come."""
    found = []
    for fields in ({}, {"a": [0.5], "b": True, "d": [True, False], "e": [7, 8]}):
        tokens = {"tokens": ["a", "b", "ab"], "token_type": [1, 3, 1], "merges": ["a b"]}
        named = {f"tokenizer.ggml.{name}": value for name, value in tokens.items()}
        write_gguf(folder / "m", "llama", {**named, **fields}, num_hidden_layers=1, hidden_size=8, head_dim=4)
        found.append((folder / "m").read_bytes())
    return found


def gguf_header(folder: Path) -> Any:
    metadata, tensors = gguf_reader.read(folder / "a.gguf")
    return len(metadata), [tensor.shape for tensor in tensors.values()]


def gguf_model(folder: Path) -> None:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    gguf_convert.convert(folder / "a.gguf", out)


def conversion(folder: Path) -> None:
    os.environ["JAXSP_CACHE"] = str(folder / "cache")
    (folder / "a.gguf").write_bytes(ggufs(folder)[0])
    converted(folder / "a.gguf").rename(folder / "model")


def converted_model(folder: Path) -> Any:
    """A damaged mark or file is made anew."""
    directory = folder / "model"
    if (damaged := _damaged(directory, weights=True)) is not None:
        raise Damaged(damaged)
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name != "converted_by_jaxsp"}


# A model's folder


def model(folder: Path) -> None:
    tiny.write(
        folder, num_hidden_layers=1, hidden_size=8, head_dim=4, intermediate_size=8, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    index = {
        "metadata": {"total_size": 3},
        "weight_map": {"a": "model.safetensors", "b": "model.safetensors"},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def configs(folder: Path) -> list[bytes]:
    return [json.dumps(tiny.config(family)).encode() for family in FAMILIES]


def read_weights(folder: Path) -> Any:
    config = _config(folder)
    return load_params([folder / "model.safetensors"], config, FAMILIES["llama"].tensors(config))[1]


@functools.cache
def _config(folder: Path) -> Any:
    return model_config(folder, "float32")


def plain_tokenizer(folder: Path) -> Any:
    """A tokenizer asked for all that is there."""
    try:
        found = LazyTokenizer(folder)
        return found.encode("a b"), found.eos_token_id, found.special_tokens_map, found.chat_template
    except UserError:
        raise
    except Exception as error:  # as load.py has it
        raise UserError(f"no tokenizer ({' '.join(str(error).split())})") from error


def whole_tokenizer(folder: Path) -> Any:
    return len(_load_tokenizer(folder).encode("a b"))


def template(folder: Path) -> Any:
    text = (folder / "t.jinja").read_bytes().decode("utf-8", "replace")
    asked = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    return render(text, asked, {"bos_token": "<s>", "add_generation_prompt": True})


# A saved prompt


def whole_prompt() -> SoftPrompt:
    versions = {
        "versions": {"jaxsp": "0.2"},
        "training": {"objective": "kl", "steps": 2, "learning_rate": 0.1, "seed": 0},
    }
    held_out = {"held_out": {"gap_closed": {"value": 0.5, "low": None, "high": None}, "kl": 0.3}}
    found = prompt(**versions, **held_out)
    found.manifest["slots"]["position_offset"] = 2
    return found


def read_prompt(folder: Path) -> Any:
    """All that is read without a model."""
    found = SoftPrompt.load(folder)
    arrays = [(name, array.tobytes()) for name, array in storage.named_arrays(found.sigma).items()]
    return (
        arrays,
        found.manifest,
        found.context,
        found.chat,
        found.stop_ids,
        repr(found),
        quietly(console.print_prompt, found),
    )


def stranger_prompt(folder: Path) -> Any:
    """Whoever makes a prompt can make its checksums, too."""
    parts = parse_json((folder / "given.json").read_bytes(), "given.json", object, finite=False)
    if isinstance(parts, dict):
        parts["sha256"] = hashlib.sha256((folder / "prompt.safetensors").read_bytes()).hexdigest()
        with contextlib.suppress(RecursionError):
            parts = sealed({name: value for name, value in parts.items() if name != "seal"})
    try:
        text = json.dumps(parts)
    except RecursionError:
        text = "[" * 5000
    (folder / "manifest.json").write_text(text)
    return read_prompt(folder)


def stranger_arrays(folder: Path) -> Any:
    data = (folder / "given.safetensors").read_bytes()
    (folder / "prompt.safetensors").write_bytes(data)
    manifest = {**whole_prompt().manifest, "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
    return read_prompt(folder)


def save_stranger(folder: Path) -> None:
    whole_prompt().save(folder)
    (folder / "given.json").write_bytes((folder / "manifest.json").read_bytes())
    (folder / "given.safetensors").write_bytes((folder / "prompt.safetensors").read_bytes())


# An adapter of PEFT


def adapter(folder: Path) -> None:
    """As jaxsp exports one."""
    tensor = np.arange(40, dtype=np.float32).reshape(5, 8)
    save_file({"prompt_embeddings": tensor}, folder / "adapter_model.safetensors")
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    config |= {"base_model_name_or_path": "a/b", "num_transformer_submodules": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    manifest = sealed({"sha256": "", **whole_prompt().manifest})
    known = {"manifest": manifest, "end": 9, "sha256": {"adapter_model.safetensors": "0"}}
    (folder / "prompt.json").write_text(json.dumps(known))


def read_adapter(folder: Path) -> Any:
    found = Adapter.load(folder)
    return found.peft_type, found.tensor.tolist(), found.base, found.manifest, found.end, found.untouched


# A run's folder


def read_result(folder: Path) -> Any:
    found = Result.load(folder)
    return found.report, found.lines, found.prompt.manifest


def older_result(folder: Path) -> None:
    result(folder)
    (folder / "run" / "checksums.json").unlink()


def read_older_result(folder: Path) -> Any:
    found = Result.load(folder)
    try:
        return table.row(found.report), found.error
    except (KeyError, TypeError, AttributeError) as error:  # as resume.py has it
        raise Damaged(f"{error!r:.60}") from error


def finished(folder: Path) -> None:
    """The files of a finished run."""
    older_result(folder)
    report = {**example(), "steps": 1, "by_position": {"prompt": [0.5, 0.25], "no_context": [1.0, 2.0]}}
    report["by_length"] = {"2": 0.5, "4": 0.25}
    for part in (report["held_out"], report["train"]):
        row = part["brackets"]["prompt"]
        part["brackets"] |= dict.fromkeys(("full_context", "truncated_context", "no_context"), row)
    report["held_out"]["kl_intervals"] = {"prompt": {"value": 0.5, "low": 0.25, "high": 0.75}}
    (folder / "report.json").write_text(as_json(report))
    (folder / "tokens.json").write_text(json.dumps([token(0, "yes", " |", "")]))


def compared(folder: Path) -> Any:
    """A run beside one that is whole."""
    other = folder / "other"
    other.mkdir(exist_ok=True)
    finished(other)
    return len(compare_folders([str(other), str(folder)], folder / "compare.html")[2])


def rewritten_report(folder: Path) -> None:
    _, problems = write_reports(folder)
    if problems:
        raise UserError("; ".join(problems) + ".")


SETTINGS = {"steps": 2, "chat": {"before": "a", "between": "b", "after": "c"}, "teacher_chat": None}


def read_settings(folder: Path) -> Any:
    run = RunFolder(folder)
    run.check_same(SETTINGS)
    return run.chats()


def states(folder: Path) -> None:
    from jaxsp.training.checkpoint import _Content, _Handler

    place = folder / "checkpoints" / "3" / "default"
    place.mkdir(parents=True)
    states: Any = {"a": np.arange(6, dtype=np.float32)}
    _Handler().save(place, _Content(states, {"jobs": ["a"], "tick": 3}))


def read_states(folder: Path, *, checksum: bool = True) -> Any:
    from jaxsp.training.checkpoint import Checkpoints

    if not checksum:
        (folder / "checkpoints/3/default/states.sha256").unlink(missing_ok=True)
    found: Any = Checkpoints.__new__(Checkpoints)  # orbax's part would take most of the time
    found._directory = folder / "checkpoints"
    found._manager = type("Manager", (), {"all_steps": lambda self: [3]})()
    number, unreadable = found._newest_readable()
    if number is None:
        raise UserError(unreadable[0][1] or "nothing")
    arrays, block = found._content(number)
    return {name: array.tobytes() for name, array in arrays.items()}, block


# The teacher's store

ROWS = make_rows([[5, 6], [7]], [[8, 2], [9, 10, 2]])


def entry(folder: Path) -> None:
    from jaxsp.data.ragged import Ragged

    values = Ragged([np.arange(8, dtype=np.float32).reshape(2, 4), np.ones((3, 4), np.float32)])
    said = [("hidden", np.arange(2), values)]
    about = store.about("teacher", "m", "A document.", 2, tokens=3)
    found = Store(folder / "store").write(
        "key", about, lambda place: targets.write(place, ROWS, [[8, 2], [9, 10, 2]], said), read_targets
    )
    assert found is not None


def read_targets(place: Path) -> Any:
    rows, answers = targets.read(place, lambda answers: ROWS)
    return [row.tobytes() for row in rows.targets["hidden"].rows], answers


def read_entry(folder: Path) -> Any:
    content = Store(folder / "store").read("key", read_targets, "")
    if content is None:
        raise UserError("there is none")
    return content


def list_entries(folder: Path) -> str:
    return quietly(console.print_entries, store.entries(folder / "store"), folder, 0.0)


def small_entries(folder: Path) -> None:
    study = Study([Query("a?", "b", seed="facts", span=(0, 3))], [Query("c?")], {"facts": 3}, ["A."], [0])
    for name, write, read in (
        ("study", study.write, Study.read),
        ("samples", lambda place: samples._write(place, [[1, 2]]), samples._read),
    ):
        Store(folder / "store").write(name, {}, write, read)


def read_small(name: str, read: Callable[[Path], Any]) -> Read:
    def found(folder: Path) -> Any:
        content = Store(folder / "store").read(name, read, "")
        if content is None:
            raise UserError("there is none")
        return content if name == "samples" else content.as_json()

    return found


# What users give


def queries(name: str, column: str | None = None) -> Read:
    return lambda folder: [query.as_row() for query in read_queries(folder / name, column)]


def document(name: str) -> Read:
    return lambda folder: read_context(folder / name)


def expected(folder: Path) -> Any:
    answer = f"It weighs 4,5 kg and costs 249 euros {'a' * 40}."
    return [has_expected(answer, query) for query in read_queries(folder / "expect.json")]


@functools.cache
def tiny_model() -> Any:
    import tempfile

    return jaxsp.load_model(tiny.write(Path(tempfile.mkdtemp())), dtype="float32")


def jobs(folder: Path) -> Any:
    found, problems = check_jobs(tiny_model(), read_rows(folder / "jobs.jsonl"), {})
    if problems and not found:
        raise UserError(" ".join(problems))
    assert all("\n" not in problem for problem in problems), problems
    return [job.id for job in found]


def command(folder: Path) -> Any:
    """The command that is read; none is run."""
    text = (folder / "words").read_bytes().decode("utf-8", "surrogateescape").replace("\0", "")
    words = [word for word in text.split("\n") if word]
    try:
        return quietly(lambda: print(parse(COMMANDS, words)))
    except SystemExit as stop:
        if stop.code:
            raise AssertionError(stop.code) from stop
        return None


# Requests to a server


def chat(folder: Path) -> Any:
    with _refusals_as_user_errors():
        wish = read_chat(parse_json((folder / "chat.json").read_bytes(), "The body"))
        return wish, texts_in_turn(wish.messages or [], lambda text: False)


def completion(folder: Path) -> Any:
    with _refusals_as_user_errors():
        return read_completion(parse_json((folder / "text.json").read_bytes(), "The body"))


@contextlib.contextmanager
def _refusals_as_user_errors() -> Iterator[None]:
    try:
        yield
    except Refusal as refusal:
        json.loads(refusal.body)  # it can be sent
        raise UserError(str(refusal)) from None
