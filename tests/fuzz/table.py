"""The table of readers: the file, what makes sound inputs, what reads them, how many are tried."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxsp.models.load import _stop_ids, model_config
from jaxsp.models.weights import fingerprint, stored_tensors, weight_files
from jaxsp.runs.folder import RunFolder
from jaxsp.study.questions import Study
from jaxsp.teacher import samples
from tests import tiny
from tests.fuzz import documents, readers as r

ARRAYS, STATES = "prompt.safetensors", "checkpoints/3/default/states.safetensors"


@dataclasses.dataclass(frozen=True)
class Reader:
    """Something that reads a file.

    Attributes:
      file: its name in a folder.
      write: makes sound inputs, or the folder with one of them in its file.
      read: what is read of the folder, once the file is there.
      count: inputs of a whole run.
      form: of the inputs: a key of ``mutations.FORMS``.
      checked: there is a checksum: what is read is as it was, or there is an error.
      times: the memory that may be taken, in sizes of the file, beside ``MEMORY``.
    """

    file: str
    write: Callable[[Path], list[bytes] | None]
    read: Callable[[Path], Any]
    count: int
    form: str = "bytes"
    checked: bool = False
    times: int = 4

    def inputs(self, folder: Path) -> list[bytes]:
        """The sound inputs; the folder is made ready for them."""
        found = self.write(folder)
        file = folder / self.file
        file.parent.mkdir(parents=True, exist_ok=True)
        return [file.read_bytes()] if found is None else found


def given(*inputs: bytes | str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [text.encode() if isinstance(text, str) else text for text in inputs]


def saved(folder: Path) -> None:
    r.whole_prompt().save(folder)


def started(folder: Path) -> None:
    RunFolder(folder).start(r.SETTINGS)


READERS: dict[str, Reader] = {
    # A model's files
    "GGUF": Reader("a.gguf", r.small_ggufs, r.gguf_header, 10_000, times=16),
    "GGUF as a model": Reader("a.gguf", r.ggufs, r.gguf_model, 500, times=16),
    "conversion's mark": Reader("model/converted_by_jaxsp", r.conversion, r.converted_model, 1_000, "json"),
    "conversion's weights": Reader(
        "model/model.safetensors", r.conversion, r.converted_model, 500, "safetensors", checked=True
    ),
    "safetensors": Reader(
        "model.safetensors",
        r.model,
        lambda f: stored_tensors([f / "model.safetensors"]),
        8_000,
        "safetensors",
    ),
    "fingerprint": Reader(
        "model.safetensors", r.model, lambda f: fingerprint([f / "model.safetensors"]), 2_000, "safetensors"
    ),
    "weights": Reader("model.safetensors", r.model, r.read_weights, 2_000, "safetensors"),
    "weight index": Reader("model.safetensors.index.json", r.model, weight_files, 2_000, "json"),
    "config.json": Reader("config.json", r.configs, lambda f: model_config(f, "float32"), 2_000, "json"),
    "generation_config.json": Reader(
        "generation_config.json", r.model, lambda f: _stop_ids(f, None), 1_000, "json"
    ),
    "tokenizer.json": Reader("tokenizer.json", r.model, r.plain_tokenizer, 2_000, "json"),
    "tokenizer_config.json": Reader("tokenizer_config.json", r.model, r.plain_tokenizer, 1_500, "json"),
    "tokenizer of transformers": Reader("tokenizer.json", r.model, r.whole_tokenizer, 300, "json"),
    "its settings": Reader("tokenizer_config.json", r.model, r.whole_tokenizer, 300, "json"),
    "chat template": Reader("t.jinja", given(tiny.CHAT_TEMPLATE, *documents.TEMPLATES), r.template, 150),
    # A saved prompt
    "manifest": Reader("manifest.json", saved, r.read_prompt, 2_500, "json", checked=True),
    "stranger's manifest": Reader("given.json", r.save_stranger, r.stranger_prompt, 1_000, "json"),
    "arrays": Reader(ARRAYS, saved, r.read_prompt, 1_500, "safetensors", checked=True),
    "stranger's arrays": Reader(
        "given.safetensors", r.save_stranger, r.stranger_arrays, 1_000, "safetensors"
    ),
    "context.txt": Reader("context.txt", saved, r.read_prompt, 1_000, checked=True),
    # An adapter of PEFT
    "adapter_config.json": Reader("adapter_config.json", r.adapter, r.read_adapter, 1_500, "json"),
    "adapter's tensor": Reader("adapter_model.safetensors", r.adapter, r.read_adapter, 1_500, "safetensors"),
    "an export's prompt.json": Reader("prompt.json", r.adapter, r.read_adapter, 1_500, "json"),
    # A run's folder
    "report.json": Reader("report.json", r.result, r.read_result, 1_500, "json", checked=True),
    "metrics.jsonl": Reader("metrics.jsonl", r.result, r.read_result, 1_500, "lines", checked=True),
    "checksums.json": Reader("run/checksums.json", r.result, r.read_result, 1_500, "json", checked=True),
    "older report.json": Reader("report.json", r.older_result, r.read_older_result, 2_000, "json"),
    "older metrics.jsonl": Reader("metrics.jsonl", r.older_result, r.read_older_result, 2_000, "lines"),
    "report anew": Reader("report.json", r.finished, r.rewritten_report, 30, "json"),
    "tokens anew": Reader("tokens.json", r.finished, r.rewritten_report, 30, "json"),
    "report compared": Reader("report.json", r.finished, r.compared, 300, "json"),
    "settings.json": Reader("run/settings.json", started, r.read_settings, 2_500, "json", checked=True),
    "checkpoint": Reader(STATES, r.states, r.read_states, 3_000, "safetensors", checked=True),
    "checkpoint's sum": Reader(STATES.replace("safetensors", "sha256"), r.states, r.read_states, 2_000),
    "older checkpoint": Reader(
        STATES, r.states, functools.partial(r.read_states, checksum=False), 3_000, "safetensors"
    ),
    # The teacher's store
    **{
        f"teacher's {name}": Reader(f"store/key/{name}", r.entry, r.read_entry, 800, form, checked=True)
        for name, form in {
            "manifest.json": "json",
            "answers.json": "json",
            "signals.json": "json",
            "hidden-0-00000.bin": "bytes",
        }.items()
    },
    "cache list": Reader("store/key/manifest.json", r.entry, r.list_entries, 100, "json"),
    **{
        f"kept {name}": Reader(
            f"store/{name}/{name}.json", r.small_entries, r.read_small(name, read), 800, "json", checked=True
        )
        for name, read in {"study": Study.read, "samples": samples._read}.items()
    },
    # What users give
    "queries, lines": Reader("q.txt", given(*documents.LINES), r.queries("q.txt"), 8_000),
    "queries, JSON lines": Reader(
        "q.jsonl", given(*documents.JSON_LINES), r.queries("q.jsonl"), 3_000, "lines"
    ),
    "queries, JSON": Reader("q.json", given(*documents.ARRAYS), r.queries("q.json"), 4_000, "json"),
    "queries, csv": Reader("q.csv", given(*documents.CSV), r.queries("q.csv"), 7_000),
    "queries, tsv": Reader("q.tsv", given(*documents.TSV), r.queries("q.tsv", "question"), 5_000),
    "queries, Parquet": Reader("q.parquet", documents.parquets, r.queries("q.parquet"), 6_000),
    "document, text": Reader("d.md", given(*documents.TEXTS, *documents.PAGES), r.document("d.md"), 5_000),
    "document, HTML": Reader("d.html", given(*documents.PAGES), r.document("d.html"), 9_000),
    "document, notebook": Reader(
        "d.ipynb", given(*documents.NOTEBOOKS), r.document("d.ipynb"), 2_500, "json"
    ),
    "document, PDF": Reader("d.pdf", given(documents.PDF), r.document("d.pdf"), 1_000),
    "expected answers": Reader("expect.json", given(*documents.EXPECTED), r.expected, 2_500, "json"),
    "jobs": Reader(
        "jobs.jsonl", given("".join(json.dumps(job) + "\n" for job in documents.JOBS)), r.jobs, 300, "lines"
    ),
    "chat to a server": Reader("chat.json", given(*documents.CHATS), r.chat, 3_000, "json"),
    "completion of a server": Reader("text.json", given(*documents.COMPLETIONS), r.completion, 1_000, "json"),
    "command line": Reader("words", given(*documents.COMMANDS), r.command, 150),
}
