"""The READMEs of an export and of a saved prompt: what each is, what was measured, how to use it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import jaxsp
from jaxsp.artifact import SoftPrompt
from jaxsp.exports.prefix import NEVER, Held
from jaxsp.hub import is_remote
from jaxsp.models.load import EMBEDDED, gguf_file, hub_id
from jaxsp.teacher.another import name_of_kl
from jaxsp.terminal import visible

UNNAMED = "MODEL"
"""Word for a model's folder, which lies elsewhere on each machine."""

MOST_LOST = 10
"""Queries that are named as lost, at most."""


_REFUSES = "`load.py` refuses a model with other embeddings."
_OTHER_WEIGHTS = {
    "vllm": "A server can't tell: under this name with other weights the answers are others.",
    "llama.cpp": "`load.py` can't tell others of the same width: with them the answers are others.",
}
_OF_THE_CHECK = {
    "vllm": " vLLM itself was not run: its input was read by transformers, as `inputs_embeds`.",
    "llama.cpp": " For the check the GGUF file's numbers are unpacked to float32, the cache's, too: with a"
    " quantized matrix llama.cpp rounds what it multiplies to eight bits, whatever the prompt is.",
}


def card(
    held: Held,
    to: str,
    use: str,
    measured: Mapping[str, Any],
    check: str,
    report: Mapping[str, Any] | None,
    with_model: bool,
) -> str:
    """The text.

    Args:
      held: the soft prompt.
      to: the format.
      use: how it is used there.
      measured: what ``check.measure`` found.
      check: the command that checks it.
      report: the run's ``report.json``, if it is known.
      with_model: whether the model's files lie in the export.
    """
    prompt, model = held.prompt, held.model
    parts = [
        f"# A soft prompt for {model.short_name}, for {to}",
        f"{prompt.prompt_length} slots of kind {prompt.kind} {_origin(prompt)}. With it the"
        " model answers questions about the document, each by itself; it is of"
        " use with this one model.",
        "## Use",
        use,
        "## The model",
        f"{_weights(held, to, with_model)} {_OTHER_WEIGHTS.get(to, _REFUSES)}",
        "## Checked",
        _checked(measured, to, check),
    ]
    if limit := _limit(held, to):
        parts.append(limit)
    if report is not None and "held_out" in report:
        parts += ["## Measured by jaxsp", _brackets(report)]
    return "\n\n".join(parts) + "\n"


def _origin(prompt: SoftPrompt) -> str:
    tokens = prompt.manifest["context_tokens"]
    learnt = "were learnt by another program" if "imported" in prompt.manifest else "were learnt by jaxsp"
    return f"{learnt} and stand in for a document of {tokens} tokens" if tokens else learnt


def _weights(held: Held, to: str, with_model: bool) -> str:
    model = held.model
    found, file = hub_id(model.name), gguf_file(model.name)
    text = f"Weights with the fingerprint `{model.fingerprint}` (jaxsp's SHA-256 over all tensors). "
    if with_model:
        text += "They lie in `model/`."
    elif to == "llama.cpp":
        assert file is not None
        text += (
            f"They are those of the file `{file.name}`; export with `--with-model` to have it in `model/`."
        )
    elif found:
        text += f"`{found}` had them on the model hub when this was written."
    else:
        origin = "a folder" if file is None else "a GGUF file"
        text += (
            f"They come from {origin}, `{model.short_name}`. {UNNAMED} stands for the folder that has them as"
            " safetensors: `jaxsp export` says which one that is on its machine, and with `--with-model`"
            " copies them into `model/`. A model of this name on a hub may have others."
        )
    return text


def _checked(measured: Mapping[str, Any], to: str, check: str) -> str:
    own, told = _OF_THE_CHECK.get(to, ""), " (DIR: the folder of the saved prompt)" * (" DIR " in check)
    if "missing" in measured:
        found = (
            f"**Unchecked**: {measured['missing']} was missing.{own} Where it is installed, this measures it"
        )
    else:
        reader, count = "transformers" if to == "vllm" else to, measured["queries"]
        found = (
            f"Read by {reader} in float32, on {count} question{'s' * (count != 1)}:"
            f" KL from jaxsp's own distributions {measured['kl']:.2g} nats a token, largest difference of a"
            f" logit {measured['logit_difference']:.2g}.{own} This measures it again"
        )
    return f"{found}{told}:\n\n```sh\n{check}\n```"


def _limit(held: Held, to: str) -> str | None:
    if held.until is None or to == "transformers" or held.vectors is not None or held.until.min() == NEVER:
        return None
    return (
        f"Exact for the first {held.until.min()} tokens of a question and its answer: after them a sliding"
        " window would leave out the chat's first tokens, which are nearer here."
    )


def _brackets(report: Mapping[str, Any], *, with_queries: bool = True) -> str:
    rows = [
        f"| {name.replace('_', ' ')} | {found['kl']:.3f} |"
        for name, found in report["held_out"]["brackets"].items()
        if isinstance(found.get("kl"), float)
    ]
    measure = name_of_kl(taught_by := report.get("taught_by"))
    text = f"| held-out queries with | {measure}, nats a token |\n|---|---:|\n" + "\n".join(rows)
    if taught_by:
        text = f"Taught by `{visible(taught_by['name'])}`.\n\n{text}"
    elif teacher := report.get("teacher", {}).get("text"):  # another one's name may be a path
        text += f"\n\n{visible(teacher)}"
    if verdict := report.get("verdict", {}).get("text"):
        text += f"\n\n{visible(verdict)}"
    lost = [q["query"] for q in report.get("queries", []) if q.get("captured") is False]
    if lost:
        if not with_queries:
            return f"{text}\n\nHeld-out queries whose facts are lost: {len(lost)}."
        shown = "\n".join(f"- {' '.join(visible(query).split())}" for query in lost[:MOST_LOST])
        more = f"\n- and {len(lost) - MOST_LOST} more" if len(lost) > MOST_LOST else ""
        text += f"\n\nHeld-out queries whose facts are lost ({len(lost)}):\n\n{shown}{more}"
    return text


def prompt_card(
    prompt: SoftPrompt, here: str, report: Mapping[str, Any] | None, engines: Mapping[str, str]
) -> str:
    """The README of a saved prompt.

    Args:
      prompt: the soft prompt, as it will lie there.
      here: the place as commands name it: ``hf://OWNER/NAME``, or ``.`` for the folder that the README is in.
      report: the run's ``report.json``, if it is known.
      engines: by the names of exports what loads them, as Markdown.
    """
    named = prompt.manifest["model"]
    model = hub_id(named["name"])
    short = os.path.basename(named["name"]) if os.path.isabs(named["name"]) else named["name"]
    head = ["library_name: jaxsp", "tags: [jax, soft-prompt, prompt-compression]"]
    if model:
        head.insert(0, f"base_model: {json.dumps(model)}")
    remote = is_remote(here)
    where = "" if model or named["name"].lower() == EMBEDDED or not remote else " --model DIR"
    place = "this repository" if remote else "this folder"
    brings = "lies beside it" if prompt.context is not None else f"is not in {place}"
    parts = [
        "---\n" + "\n".join(head) + "\n---",
        f"# A soft prompt for {visible(short)}",
        f"{prompt.prompt_length} slots of kind {prompt.kind} {_origin(prompt)}. It is a prompt of jaxsp"
        f" {jaxsp.__version__}, of use with this one model. The document {brings}; what it says may be read"
        " out of the prompt by asking.",
        "## Use" if remote else "## Use, in this folder",
        f'```sh\npip install jaxsp\njaxsp ask {here}{where} "How long is the cable?"\n'
        f"jaxsp serve {here}{where}    # OpenAI's HTTP interface\n```",
        "## Other programs",
        "Each takes what it can hold, and `jaxsp export` refuses the rest with the reason. The README of an"
        " export says more.",
        "| program | export | loaded there by |\n|---|---|---|\n"
        + "\n".join(
            f"| {name} | `jaxsp export {here}{where} --to {name} --out {name}/` | {loaded} |"
            for name, loaded in engines.items()
        ),
        "## The model",
        f"`{visible(named['name'])}`, weights with the fingerprint `{named['fingerprint']}` (jaxsp's SHA-256"
        " over all tensors). jaxsp refuses other ones."
        + ("" if remote else " Where they lie in another place, add `--model DIR`."),
    ]
    if report is not None and report.get("error"):
        parts += ["## Not measured", f"Its training failed: {visible(report['error'])}"]
    elif report is not None and "held_out" in report:
        shows_queries = prompt.context is not None or not remote
        parts += ["## Measured by jaxsp", _brackets(report, with_queries=shows_queries)]
    return "\n\n".join(parts) + "\n"
