"""A saved prompt: ``prompt.safetensors`` holds its arrays, ``manifest.json`` what gives them meaning."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from jaxsp import device, distributions, hub, prompts
from jaxsp.data.documents import normal_form
from jaxsp.errors import RENAMED, Damaged, check_text, in_a_line
from jaxsp.files import atomic_write, read_json, read_whole, remove_signed, sealed, unsealed
from jaxsp.models.chat import ChatTexts
from jaxsp.models.config import DecoderConfig, Quantization
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.load import EMBEDDED, as_model, hub_id
from jaxsp.prompts import PROMPT_KINDS, storage
from jaxsp.settings import Settings, differences, plain
from jaxsp.terminal import say_once
from jaxsp.typing import Array, KeyValues, Params, PyTree, UserError

if TYPE_CHECKING:
    from jaxsp.teacher.problem import TokenizedJob

FORMAT = 2
"""Format of the manifest; 0.1 wrote 1, with some keys by other names."""

ARRAYS, MANIFEST, CONTEXT, CARD = "prompt.safetensors", "manifest.json", "context.txt", "README.md"
FILES = (ARRAYS, MANIFEST, CONTEXT)
_REQUIRED = {
    "format": int, "kind": str, "prompt_length": int, "model": dict, "tokenizer": dict, "slots": dict,
    "sha256": str, "context_tokens": int,
}  # fmt: skip
_OPTIONAL = {"dtype": str, "training": dict, "versions": dict, "held_out": dict}
_STORED = {"float32": {"float32"}, "bfloat16": {"float32", "bfloat16"}}  # int8: these, and itself


@dataclasses.dataclass(frozen=True, eq=False)
class SoftPrompt:
    """A trained soft prompt σ and where it belongs.

    Attributes:
      sigma: its float32 arrays, in nested dicts.
      manifest: kind, prompt_length, the model and tokenizer it was trained for, the texts around it, how it
        was trained, and its held-out metrics.
      context: the text it stands for, kept beside it so that it can be measured again; ``None`` if
        the file was taken away.

    Example:
      >>> import jaxsp
      >>> prompt = jaxsp.SoftPrompt.load(demo_folder)
      >>> prompt.kind, prompt.sigma["embeddings"].shape
      ('embedding', (2, 576))
    """

    sigma: dict[str, Any]
    manifest: dict[str, Any]
    context: str | None = None

    def __repr__(self) -> str:
        tokens, model = self.manifest["context_tokens"], self.manifest["model"]["name"]
        stands_for = f" for {tokens} tokens" if tokens else ""  # of one that was imported it is not known
        return f"SoftPrompt({self.kind}, {self.prompt_length} slots{stands_for}, {model})"

    @property
    def kind(self) -> str:
        """A key of ``jaxsp.prompts.PROMPT_KINDS``."""
        return self.manifest["kind"]

    @property
    def prompt_length(self) -> int:
        """K, in slots."""
        return self.manifest["prompt_length"]

    @property
    def quantization(self) -> Quantization:
        """That of the model that it was trained for: see ``load_model``."""
        return self.manifest["model"].get("quantization", "none")

    @property
    def teacher(self) -> dict[str, Any] | None:
        """The model that taught it, if that is another: name, fingerprint and more."""
        return self.manifest.get("teacher")

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end an answer beside the model's own: those of its teacher."""
        return (self.teacher or {}).get("stop_ids", [])

    @property
    def chat(self) -> ChatTexts:
        """The texts around the prompt and the query."""
        slots = self.manifest["slots"]
        return ChatTexts(**{f.name: slots[f.name] for f in dataclasses.fields(ChatTexts) if f.name in slots})

    def was_trained_on(self, query: str) -> bool:
        """Whether a query is one of those that the prompt was trained on, but for capitals and signs.

        Args:
          query: the text.

        Example:
          >>> import jaxsp
          >>> jaxsp.SoftPrompt.load(demo_folder).was_trained_on("What is my name?")
          False
        """
        return _digest(query) in self.manifest.get("trained_on", ())

    def prefix(self, model: LanguageModel) -> KeyValues:
        """The keys and values that the model attends to in place of the context.

        Raises:
          UserError: the prompt belongs to another model or tokenizer, or does not fit this one.
        """
        self.check(model)
        before = self.manifest["slots"]["before_ids"]
        size = model.config.vocab_size
        if odd := [i for i in [*before, *self.stop_ids] if not (type(i) is int and 0 <= i < size)]:
            raise Damaged(
                f"The prompt's {MANIFEST} is damaged: the id {odd[0]!r} is outside the model's vocabulary of"
                f" {size}"
            )
        try:
            return _prefix(model.params, model.config, np.array([before], np.int32), self.sigma, self.kind)
        except (UserError, TypeError, ValueError) as error:
            raise Damaged(f"The prompt's arrays don't fit its model ({in_a_line(error, 120)})") from error

    def check(self, model: LanguageModel) -> None:
        """Raises ``UserError`` with the difference if the prompt belongs to another model or tokenizer."""
        if self.quantization != model.config.quantization:
            raise UserError(
                f"This prompt was trained with quantization {self.quantization!r}, the model was loaded with"
                f" {model.config.quantization!r}; load it with quantization={self.quantization!r}."
            )
        name, weights = self.manifest["model"]["name"], self.manifest["model"]["fingerprint"]
        own, tokens = tokenizer_fingerprint(model.tokenizer), self.manifest["tokenizer"]["fingerprint"]
        for what, theirs, actual, same in (
            ("model weights", weights, model.fingerprint, model.has_weights(weights)),
            ("tokenizer", tokens, own, tokens == own),
        ):
            if not same:
                raise UserError(
                    f"This prompt belongs to another model: its {what} are those of {name} ({theirs[:12]}),"
                    f" the loaded model is {model.name} ({actual[:12]})."
                )
        check_decoder(self.manifest["model"], model)

    def cut(self, length: int) -> SoftPrompt:
        """One of the shorter prompts that a nested one holds: its first slots.

        Args:
          length: number of slots.

        Raises:
          UserError: it holds no prompt of this length.

        Example:
          >>> import jaxsp
          >>> jaxsp.SoftPrompt.load(demo_folder).cut(2).prompt_length
          2
        """
        kind, sigma = prompts.cut(self.kind, self.sigma, length)
        manifest = {**self.manifest, "kind": kind, "prompt_length": length}
        if length != self.prompt_length:
            manifest.pop("held_out", None)  # measured on all of it
            manifest.pop("fallback", None)
        return dataclasses.replace(self, sigma=dict(sigma), manifest=manifest)

    def ask(
        self, question: str, *, model: LanguageModel | str | Path | None = None, max_tokens: int = 128
    ) -> str:
        """The greedy answer to a question, with the prompt in place of the context.

        Args:
          question: the input z.
          model: that it was trained for, or where it is now; by default by the name it had then. A model in
            memory is used again.
          max_tokens: longest answer.

        Raises:
          UserError: the prompt belongs to another model, or the question is too long.

        Example:
          >>> import jaxsp
          >>> isinstance(jaxsp.SoftPrompt.load(demo_folder).ask("How long is the cable?"), str)
          True
        """
        check_text(question, "The question")
        named = named_model(self.manifest["model"]) if model is None else model
        model = as_model(named, self.quantization)
        model = model.stopping_at(self.stop_ids)
        return "".join(model.stream_answer(self.prefix(model), question, self.chat, max_tokens=max_tokens))

    def save(self, directory: str | Path) -> None:
        """Writes the files into ``directory``, the manifest last; jaxsp's README of an earlier one goes."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        remove_signed(directory / CARD)
        data = save(storage.named_arrays(storage.pack(self.sigma, self.manifest["dtype"])))
        manifest = {**self.manifest, "sha256": hashlib.sha256(data).hexdigest()}
        if self.context is not None:
            manifest["context_sha256"] = hashlib.sha256(self.context.encode()).hexdigest()
            atomic_write(directory / CONTEXT, self.context)
        atomic_write(directory / ARRAYS, data)
        write_manifest(directory, manifest)

    @classmethod
    def load(cls, directory: str | Path) -> SoftPrompt:
        """Reads a saved prompt.

        Args:
          directory: the folder; a file in it will do, and ``hf://OWNER/NAME``, a repository of the hub.

        Raises:
          UserError: the folder holds none, or it is of a later version.
          Damaged: its files are not as they were written, or do not belong together.
        """
        directory = hub.local(directory, FILES)
        if not (directory / MANIFEST).is_file() or not (directory / ARRAYS).is_file():
            raise Damaged(f"{directory} holds no soft prompt ({ARRAYS} and {MANIFEST})")
        manifest = check_manifest(read_json(directory / MANIFEST), directory / MANIFEST)
        if manifest["kind"] not in PROMPT_KINDS:
            raise UserError(
                f"{directory} holds a prompt of kind {manifest['kind']!r}, which this version of jaxsp can't"
                " read; upgrade it."
            )
        file, text = directory / CONTEXT, None
        if hashlib.sha256(read_whole(directory / ARRAYS)).hexdigest() != manifest["sha256"]:
            raise Damaged(
                f"{directory / ARRAYS} is damaged or does not belong to the manifest beside it"
                " (its SHA-256 differs)"
            )
        if file.is_file():
            advice = "put back the text that the prompt was trained for, or take the file away"
            try:
                text = read_whole(file, manifest.get("context_sha256"), advice=advice).decode("utf-8")
            except UnicodeDecodeError as error:
                raise Damaged(f"{file} is damaged (not UTF-8 at byte {error.start})", advice) from error
        return cls(_read_sigma(directory / ARRAYS, manifest), manifest, text)


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Writes a manifest beside the files that it is of, sealed."""
    text = json.dumps(sealed(dict(manifest)), indent=2, ensure_ascii=False)
    atomic_write(directory / MANIFEST, text + "\n")


def check_manifest(manifest: dict[str, Any], file: Path) -> dict[str, Any]:
    """A manifest as it was written, with the keys of today.

    Args:
      manifest: as JSON has it, with its seal.
      file: where it was read from.

    Raises:
      UserError: it is of a later version, or not as it was written.
    """
    if isinstance(version := manifest.get("format"), int) and version > FORMAT:
        raise UserError(
            f"{file.parent} holds a prompt in format {version}, which this version of jaxsp can't read;"
            " upgrade it."
        )
    manifest = _renamed(unsealed(manifest, file))
    if missing := _REQUIRED.keys() - manifest.keys():
        raise Damaged(f"{file} is damaged: it lacks {min(missing)!r}")
    for name, kind in (_REQUIRED | _OPTIONAL).items():
        if name in manifest and type(manifest[name]) is not kind:
            raise Damaged(f"{file} is damaged: {name} is {manifest[name]!r:.60}")
    model, slots = manifest["model"], manifest["slots"]
    texts = [model.get("name"), model.get("fingerprint"), manifest["tokenizer"].get("fingerprint")]
    # Older ones have the first three alone.
    texts += [
        slots.get(field.name, None if field.default is dataclasses.MISSING else "")
        for field in dataclasses.fields(ChatTexts)
        if field.type == "str"
    ]
    decoders = [named.get("decoder", {}) for named in (model, manifest.get("teacher") or {})]
    typed = [(texts, str), ([slots.get("before_ids")], list), (decoders, dict)]
    if not all(isinstance(value, kind) for values, kind in typed for value in values):
        raise Damaged(f"{file} is damaged: what it says of model, tokenizer or slots is no text")
    return manifest


def _read_sigma(file: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """σ, which must be what the manifest says."""
    kind, dtype = PROMPT_KINDS[manifest["kind"]], manifest.get("dtype", "int8")
    try:
        stored = load_file(file)
        sigma = storage.unpack(storage.nested(stored))
        length = kind.prompt_length(sigma)
    except (SafetensorError, KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise Damaged(f"{file} is damaged ({error!r:.120})") from error
    if length != manifest["prompt_length"]:
        raise Damaged(f"{file} is damaged: it has {length} slots, its manifest {manifest['prompt_length']}")
    for name, array in stored.items():
        if array.dtype.name not in _STORED.get(dtype, {"float32", "bfloat16", "int8"}):
            raise Damaged(f"{file} is damaged: {name} is {array.dtype.name}, by its manifest {dtype}")
        if not np.isfinite(array.astype(np.float32)).all():
            raise Damaged(f"{file} is damaged: {name} has entries that are not finite")
    return sigma


def check_decoder(named: Mapping[str, Any], model: LanguageModel) -> None:
    """Raises ``UserError`` if a model with the same weights computes something else with them.

    Args:
      named: what a manifest says of a model; written by versions that didn't know, it says nothing.
      model: the model that is there.
    """
    config = model.config.identity
    if changed := differences(named.get("decoder", config), config):
        raise UserError(
            f"{model.name} is not what it was when this prompt was made: {'; '.join(changed)}. Give it the"
            " config.json that it had, or make the prompt anew."
        )


def named_model(named: Mapping[str, Any]) -> str:
    """The model that a manifest names, to be loaded; a download that nobody else asked for is said first.

    Args:
      named: the manifest's entry of it, with a ``name``.

    Raises:
      UserError: it is a folder or a file that is not there any more.

    Example:
      >>> import jaxsp
      >>> named_model(jaxsp.SoftPrompt.load(demo_folder).manifest["model"])
      'smollm2-135m-instruct'
    """
    name = named["name"]
    if name.lower() != EMBEDDED and hub_id(name) is None and not os.path.exists(os.path.expanduser(name)):
        raise UserError(
            f"The model that this prompt names was {name}, which is not there; say where it is now (--model,"
            " of a teacher --teacher)."
        )
    if (download := hub_id(name)) is not None:
        say_once(f"The prompt names the model {download}, which is looked for on the model hub.")
    return name


def _renamed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest of format 1 with the keys that format 2 has."""
    if manifest.get("format") != 1:
        return manifest
    found = {RENAMED.get(name, name): value for name, value in manifest.items()}
    for part in ("model", "training"):
        if isinstance(found.get(part), dict):
            found[part] = {RENAMED.get(name, name): value for name, value in found[part].items()}
            if found[part].get("quantization") == "full":
                found[part]["quantization"] = "none"
    return {**found, "format": FORMAT}


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def _prefix(params: Params, config: DecoderConfig, ids: Array, sigma: PyTree, kind: str) -> KeyValues:
    preamble = distributions.context_prefix(params, config, ids)
    return distributions.prompt_prefix(params, config, sigma, preamble, kind)


def make_artifact(
    model: LanguageModel,
    job: TokenizedJob,
    settings: Settings,
    sigma: PyTree,
    context: str,
    *,
    steps: int,
    teacher: dict[str, Any] | None = None,
) -> SoftPrompt:
    """A prompt as it is saved, with its manifest, but for the held-out figures.

    Args:
      model: that it was trained for.
      job: what it was trained on.
      settings: how.
      sigma: its arrays.
      context: the text it stands for.
      steps: updates done.
      teacher: the teacher, if it is another model: ``Teacher.summary``.
    """
    manifest = {
        **made_for(model, job.chat, job.preamble_ids.tolist()),
        "kind": settings.prompt.kind,
        "prompt_length": settings.prompt.prompt_length,
        "teacher": teacher,
        "dtype": settings.prompt.artifact_dtype,
        "context_tokens": len(job.context_ids),
        "part_tokens": [len(part.ids) for part in job.parts],
        "training": {**plain(settings), "steps": steps},
        "trained_on": [_digest(q.text) for q, train in zip(job.queries, job.is_train, strict=True) if train],
    }
    return SoftPrompt(storage.rounded(sigma, settings.prompt.artifact_dtype), manifest, context)


def made_for(model: LanguageModel, chat: ChatTexts, before_ids: list[int]) -> dict[str, Any]:
    """The part of a manifest that the model decides, and what stands before σ."""
    slots = {"before_ids": before_ids, "position_offset": len(before_ids)}
    return {
        "format": FORMAT,
        "model": {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "decoder": model.config.identity,
            "quantization": model.config.quantization,
        },
        "tokenizer": {"fingerprint": tokenizer_fingerprint(model.tokenizer)},
        "slots": {**dataclasses.asdict(chat), **slots},
        "model_dtype": model.config.dtype,
        "versions": environment()["versions"],
    }


def _digest(query: str) -> str:
    """A query as the manifest keeps it: recognised, and not to be read."""
    return hashlib.sha256(normal_form(query).encode()).hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Python, device and package versions."""
    packages, found = ("jaxsp", "jax", "flax", "optax", "transformers"), importlib.metadata.distributions
    return {
        "python": platform.python_version(),
        "device": device.current().device_kind,
        "devices": len(device.local()),
        "versions": {  # of a copy of jaxsp's source there is none
            name: next((d.version for d in found(name=name)), "not installed") for name in packages
        },
    }


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 over a tokenizer's vocabulary and how it splits a probing text."""
    probe = "The 12,345 naïve co-operators' don't\tsay  “hello”\n\n<|x|> 你好 🙂."
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    text = json.dumps([vocabulary, tokenizer.encode(probe, add_special_tokens=False)])
    return hashlib.sha256(text.encode()).hexdigest()
