"""Exports of a saved prompt to what other programs read: one file a format, one line each in ``EXPORTS``.

An export is read by its consumer before it is left: its distributions must be jaxsp's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import secrets
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxsp.artifact import CARD, SoftPrompt
from jaxsp.errors import suggestion
from jaxsp.exports import check, llamacpp, peft, transformers, vllm
from jaxsp.exports.card import UNNAMED, card
from jaxsp.exports.prefix import Held, hold
from jaxsp.exports.question import DESCRIPTION, description
from jaxsp.files import atomic_write, os_errors_as_user_errors
from jaxsp.hub import is_remote
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.load import gguf_file, hub_id
from jaxsp.models.weights import weight_files
from jaxsp.typing import UserError


class Export(Protocol):
    """Contents of a module in this folder."""

    @property
    def SCRIPTS(self) -> Mapping[str, str]:
        """Files of the export, and the scripts in ``consumers`` that they are."""
        ...

    @property
    def NEEDS(self) -> tuple[str, ...]:
        """Packages of the consumer."""
        ...

    @property
    def LOADED_BY(self) -> str:
        """Markdown in a line: what loads an export, and which kinds of prompts it takes."""
        ...

    @property
    def USE(self) -> str:
        """Markdown for people: how the export is used; with the words that ``write`` gives in braces."""
        ...

    def write(self, held: Held, out: Path, queries: Sequence[str] = ()) -> Mapping[str, str]:
        """Writes the format's own files into a folder; changes nothing else.

        Args:
          held: the soft prompt.
          out: the folder.
          queries: questions that are known, for what depends on how they are encoded.

        Raises:
          UserError: the format can't hold a prompt of this kind, or of this model.
        """
        ...

    def place(self, model: LanguageModel) -> str:
        """The name by which the consumer loads the model: an id of the hub, or a path of this machine."""
        ...

    def weights(self, model: LanguageModel, scratch: Path) -> Path:
        """The place where the consumer finds the model when it is checked.

        Args:
          model: the model.
          scratch: a folder that lasts as long as the check, for files that are made for it.
        """
        ...


EXPORTS: dict[str, Export] = {"peft": peft, "transformers": transformers, "vllm": vllm, "llama.cpp": llamacpp}

MODEL = "model"
_OURS = (
    DESCRIPTION, CARD, MODEL, "load.py", "biases.py", "question.py", "question.json", "prefix.safetensors",
    "adapter_config.json", "adapter_model.safetensors", "client.py", "request.json", "prompt_embeds.npy",
)  # fmt: skip
"""Everything that an export may write."""

_OF_A_MODEL = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclasses.dataclass(frozen=True)
class Exported:
    """An export.

    Attributes:
      folder: where it lies.
      kl: KL from jaxsp's distributions to the consumer's, in nats a token; ``None``: it is unchecked.
      logit_difference: the largest difference of a logit; likewise.
      queries: questions that it was measured on.
      missing: the package without which it couldn't be checked.
      check: the commands that check it where that is installed.
      model: where its consumer finds the model: a path of this machine, or an id of the model hub.
    """

    folder: Path
    kl: float | None
    logit_difference: float | None
    queries: int
    missing: str | None
    check: str
    model: str


def check_beforehand(prompt: SoftPrompt, to: str, out: Path, *, overwrite: bool = False) -> None:
    """Raises ``UserError`` for what can't become an export, before a model is loaded."""
    if to not in EXPORTS:
        meant = suggestion(to, EXPORTS) or f"; choose one of {', '.join(EXPORTS)}."
        raise UserError(f"There is no format {to!r}{meant}")
    if prompt.quantization != "none":
        raise UserError(
            f"This prompt was trained for a model quantized to {prompt.quantization} by jaxsp, which no other"
            " program computes; train one with --quantization none."
        )
    if out.is_file():
        raise UserError(f"{out} is a file; choose another folder with --out.")
    if out.is_dir() and any(out.iterdir()):
        if not (out / DESCRIPTION).is_file():
            raise UserError(f"{out} holds other files and no export; choose another folder with --out.")
        if not overwrite:
            raise UserError(f"{out} is there already; replace it with --overwrite, or choose another --out.")


def export(
    prompt: SoftPrompt,
    model: LanguageModel,
    to: str,
    out: Path,
    *,
    source: Path | str | None = None,
    report: dict[str, Any] | None = None,
    length: int | None = None,
    overwrite: bool = False,
    with_model: bool = False,
) -> Exported:
    """Writes a soft prompt for another program, and measures it there.

    Args:
      prompt: the soft prompt.
      model: that it was trained for, in float32.
      to: a key of ``EXPORTS``.
      out: the folder.
      source: the folder that the prompt lies in, if it does.
      report: the run's ``report.json``, if it is known.
      length: the slots that were cut out of a nested prompt, if any were: for the command that checks it.
      overwrite: replace an earlier export in ``out``.
      with_model: copy the model's weights and tokenizer, too.

    Raises:
      UserError: the format can't hold the prompt, or what its consumer makes of it isn't what jaxsp does;
        nothing is then written.
    """
    check_beforehand(prompt, to, out, overwrite=overwrite)
    held, rows = hold(prompt, model), check.rows_of(prompt, report)
    queries, chosen = [query for query, _ in rows], EXPORTS[to]
    with os_errors_as_user_errors(out, "choose another --out"), _scratch(out) as folder:
        words = {"model": MODEL if with_model else hub_id(model.name) or UNNAMED}
        words |= chosen.write(held, folder, queries)
        written = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}
        described = {**description(prompt, model, queries), "end": held.end, "sha256": written}
        text = json.dumps(described, indent=2, ensure_ascii=False)
        atomic_write(folder / DESCRIPTION, text + "\n")
        for name, script in chosen.SCRIPTS.items():
            if name not in written:  # else the format has one of its own for this prompt
                shutil.copyfile(Path(__file__).parent / "consumers" / script, folder / name)
        if with_model:
            words |= _copy_model(model, folder / MODEL, to)
        found = check.measure(held, to, folder, rows, chosen.weights)
        if found.get("kl", 0.0) > check.LARGEST_KL:
            raise UserError(
                f"{to} makes something else of this prompt: KL {found['kl']:.2g} from jaxsp's own"
                f" distributions, more than {check.LARGEST_KL:g}; nothing was written."
            )
        again = functools.partial(check_command, to, length=length, with_model=with_model)
        elsewhere = again("DIR" if source is None or not is_remote(source) else source, f"{to}/")
        own = card(held, to, chosen.USE.format(**words), found, elsewhere, report, with_model)
        atomic_write(folder / CARD, own)
        _move(folder, out)
    figures = found.get("kl"), found.get("logit_difference"), len(rows), found.get("missing")
    place = out / MODEL if with_model else chosen.place(model)
    return Exported(out, *figures, again("DIR" if source is None else source, out), str(place))


def check_command(
    to: str, source: Path | str, out: Path | str, *, length: int | None = None, with_model: bool = False
) -> str:
    """The command that checks an export, where its consumer is installed: it is written anew.

    Args:
      to: the format.
      source: the prompt.
      out: the export.
      length: slots, if they are not all of the prompt's.
      with_model: whether the model is in the export.

    Example:
      >>> print(check_command("peft", "DIR", "peft/", with_model=True))
      pip install torch transformers peft
      jaxsp export DIR --to peft --out peft/ --with-model --overwrite
    """
    options = f" --length {length}" * (length is not None) + " --with-model" * with_model
    where, there = (shlex.quote(str(each)) for each in (source, out))
    packages = " ".join(EXPORTS[to].NEEDS)
    return f"pip install {packages}\njaxsp export {where} --to {to} --out {there}{options} --overwrite"


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder beside the one asked for; it is gone in the end."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.{secrets.token_hex(4)}.part"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, out: Path) -> None:
    """Puts all files in place of an earlier export's; the description, by which one is known, last."""
    out.mkdir(exist_ok=True)
    for name in _OURS:
        old = out / name
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    for file in sorted(folder.iterdir(), key=lambda file: file.name == DESCRIPTION):
        file.replace(out / file.name)


def _copy_model(model: LanguageModel, folder: Path, to: str) -> dict[str, str]:
    """Copies a model's files; gives the words of ``USE`` that name them in the export."""
    folder.mkdir()
    words: dict[str, str] = {}
    files = {*weight_files(model.directory), *(f for p in _OF_A_MODEL for f in model.directory.glob(p))}
    if to == "llama.cpp" and (own := gguf_file(model.name)) is not None:
        files, words = {own}, {"file": shlex.quote(f"{MODEL}/{own.name}")}
    for file in sorted(files):
        shutil.copyfile(file, folder / file.name)
    return words
