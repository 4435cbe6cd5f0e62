"""Adapters of PEFT read as soft prompts: our own exports, those that PEFT writes, and all that is none."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxsp
from jaxsp.artifact import SoftPrompt
from jaxsp.data.examples import make_rows
from jaxsp.exports import check, export
from jaxsp.exports.from_peft import Adapter
from jaxsp.exports.prefix import hold
from jaxsp.models.decoder import embed
from jaxsp.typing import UserError
from tests import tiny
from tests.conftest import CONTEXT
from tests.exports.consumer import HAS_TORCH, QUESTION, SLOTS, model, prompt

ANSWER = "Steel."
with_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch and PEFT are optional")


@pytest.fixture(autouse=True)
def unread(monkeypatch):
    monkeypatch.setattr(check, "_read_there", lambda *_: {"missing": "torch"})


def exported(own: SoftPrompt, folder: Path, family: str = "llama") -> Path:
    return export(own, model(family), "peft", folder / "adapter").folder


def saved(own: SoftPrompt, folder: Path) -> SoftPrompt:
    """As it is read from a folder: its manifest has checksums."""
    own.save(folder)
    return SoftPrompt.load(folder)


def adapter(folder: Path, tensor: Any, peft_type: Any = "PROMPT_TUNING", **config: Any) -> Path:
    """A folder in PEFT's layout, for the tiny llama."""
    folder.mkdir()
    content = {
        "peft_type": peft_type, "task_type": "CAUSAL_LM", "num_virtual_tokens": len(tensor),
        "base_model_name_or_path": str(model("llama").directory),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({**content, **config}))
    save_file(
        {"prompt_embeddings": np.ascontiguousarray(tensor, np.float32)}, folder / "adapter_model.safetensors"
    )
    return folder


def random(rows: int, width: int = 32) -> np.ndarray:
    return np.random.RandomState(0).standard_normal((rows, width)).astype(np.float32)


def vectors(ids: Any) -> np.ndarray:
    own = model("llama")
    return np.asarray(embed(own.params, own.config, np.array(ids, np.int32)[None])[0])


def changed(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    tensor = load_file(file)["prompt_embeddings"]
    change(tensor)
    save_file({"prompt_embeddings": tensor}, file)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "embedding"), ("llama", "key_value"), ("llama", "per_head"), ("gemma2", "embedding")],
)
def test_our_own_export_is_the_prompt_that_it_was(tmp_path, family, kind):
    own = saved(prompt(family, kind), tmp_path / "own")
    own.manifest["held_out"] = {"kl": 0.1}
    found = jaxsp.import_peft(exported(own, tmp_path, family), model=model(family))
    assert found.kind == ("embedding" if kind == "embedding" else "key_value")
    expected, there = hold(own, model(family)), hold(found, model(family))
    assert (there.end, there.slots, there.bias) == (expected.end, expected.slots, None)
    np.testing.assert_allclose(there.keys, expected.keys, atol=1e-5)
    np.testing.assert_array_equal(there.values, expected.values)
    same = ["slots", "context_tokens", "training", "trained_on", "tokenizer", "held_out"]
    assert {name: found.manifest[name] for name in same} == {name: own.manifest[name] for name in same}
    assert "imported" not in found.manifest
    if kind == "embedding":
        np.testing.assert_array_equal(found.sigma["embeddings"], own.sigma["embeddings"])
        assert found.manifest == own.manifest
    elif kind == "key_value":
        np.testing.assert_allclose(found.sigma["keys"], own.sigma["keys"], atol=1e-5)
        np.testing.assert_array_equal(found.sigma["values"], own.sigma["values"])
        assert found.sigma["context_length"] == own.sigma["context_length"]


def test_a_prompt_that_was_rounded_is_rounded_again(tmp_path):
    own = prompt("llama", "key_value")
    rough = jax.tree.map(lambda x: np.asarray(jax.numpy.bfloat16(x), np.float32), own.sigma)
    own = SoftPrompt(rough, {**own.manifest, "dtype": "bfloat16"})
    found = jaxsp.import_peft(exported(own, tmp_path), model=model("llama"))
    assert found.manifest["dtype"] == "bfloat16"
    np.testing.assert_array_equal(found.sigma["keys"], own.sigma["keys"])


@pytest.mark.parametrize("kind", ["embedding", "key_value"])
def test_one_that_was_trained_on_is_no_longer_what_was_measured(tmp_path, kind):
    own = saved(prompt("llama", kind), tmp_path / "own")
    own.manifest["held_out"] = {"kl": 0.1}
    folder, before = exported(own, tmp_path), len(own.manifest["slots"]["before_ids"])
    changed(folder, lambda tensor: np.add(tensor[before:], 0.01, out=tensor[before:]))
    found = jaxsp.import_peft(folder, model=model("llama"))
    assert "held_out" not in found.manifest
    assert found.manifest["imported"]["from"] == "PEFT"
    assert (found.manifest["slots"], found.prompt_length) == (own.manifest["slots"], SLOTS)
    changed(folder, lambda tensor: np.add(tensor, 0.1, out=tensor))  # the chat's text before it, too
    found = jaxsp.import_peft(folder, model=model("llama"))
    assert (found.chat.before, found.manifest["slots"]["before_ids"]) == ("", [])
    assert (found.chat.between, found.chat.after) == (own.chat.between, own.chat.after)
    assert found.prompt_length == before + SLOTS == hold(found, model("llama")).end


def test_virtual_tokens_of_the_chat_are_the_text_before_the_prompt(tmp_path):
    own, ids = model("llama"), model("llama").preamble_ids
    tensor = np.concatenate([vectors(ids), random(3)])
    found = jaxsp.import_peft(adapter(tmp_path / "a", tensor), context=CONTEXT)
    assert found.prompt_length == 3
    np.testing.assert_array_equal(found.sigma["embeddings"], tensor[len(ids) :])
    assert found.manifest["slots"]["before_ids"] == ids.tolist()
    assert found.chat == own.chat
    assert found.manifest["context_tokens"] == len(own.encode_context(CONTEXT))
    held = hold(found, own)
    keys = np.concatenate([held.keys, held.values], axis=1).reshape(2, 2, 2, -1, 8)  # [L, 2, G, N, F]
    flat = keys.transpose(3, 0, 1, 2, 4).reshape(len(tensor), -1)
    found = jaxsp.import_peft(adapter(tmp_path / "b", flat, "CARTRIDGE"))
    assert (found.kind, found.prompt_length, found.chat.before) == ("key_value", 3, own.chat.before)
    np.testing.assert_array_equal(hold(found, own).values, held.values)


def test_others_are_all_of_it_in_front_of_the_whole_chat(tmp_path):
    own = model("llama")
    found = jaxsp.import_peft(adapter(tmp_path / "a", random(3)))
    asked = [{"role": "user", "content": QUESTION}]
    tokenizer: Any = own.tokenizer
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert own.encode_query(QUESTION, found.chat).tolist() == list(ids)
    assert (found.prompt_length, found.manifest["slots"]["before_ids"]) == (3, [])
    assert "stands for" not in repr(found)
    assert repr(found).startswith("SoftPrompt(embedding, 3 slots, ")
    plain = jaxsp.import_peft(tmp_path / "a", plain=True)
    assert own.encode_query(QUESTION, plain.chat).tolist() == tokenizer.encode(QUESTION)


def test_a_model_without_a_chat_template_is_asked_plainly(tmp_path):
    folder = shutil.copytree(model("llama").directory, tmp_path / "plain")
    for file in folder.glob("chat_template*"):
        file.unlink()
    found = jaxsp.import_peft(adapter(tmp_path / "a", random(3)), model=folder)
    assert (found.chat.before, found.chat.between, found.chat.after) == ("", "", "")


def by_peft(kind: str, folder: Path) -> Any:
    """An adapter as PEFT itself makes and saves it; gives its model."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    own = AutoModelForCausalLM.from_pretrained(model("llama").directory, dtype=torch.float32)
    made = {
        "PROMPT_TUNING": peft.PromptTuningConfig,
        "CARTRIDGE": peft.CartridgeConfig,
        "PREFIX_TUNING": peft.PrefixTuningConfig,
    }[kind](task_type="CAUSAL_LM", num_virtual_tokens=5)
    found = peft.get_peft_model(own, made)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
    found.save_pretrained(str(folder))
    return found.eval()


@pytest.mark.torch
@with_torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "CARTRIDGE", "PREFIX_TUNING"])
def test_what_peft_saves_gives_the_logits_that_peft_gives(tmp_path, kind):
    import torch

    theirs = by_peft(kind, tmp_path / "a")
    own = model("llama")
    found = jaxsp.import_peft(tmp_path / "a")
    assert found.prompt_length == 5
    asked = [{"role": "user", "content": QUESTION}]
    tokenizer: Any = own.tokenizer
    ids = list(tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False))
    answer = own.with_chat(found.chat).encode_answer(ANSWER).tolist()
    z = own.encode_query(QUESTION, found.chat).tolist()
    logits = check._logits(own.params, own.config, found.prefix(own), make_rows([z], [answer]))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([[*ids, *answer[:-1]]])).logits[0, -len(answer) :].numpy()
    np.testing.assert_allclose(logits[0, : len(answer)], expected, atol=1e-4)
    assert np.abs(expected).max() > 0.1


def sound(folder: Path) -> Path:
    return adapter(folder / "a", random(3))


def damaged(folder: Path, name: str, change: Any) -> Path:
    """An export with one file of JSON changed."""
    found = exported(prompt("llama", "embedding"), folder)
    content = json.loads((found / name).read_text())
    change(content)
    (found / name).write_text(json.dumps(content))
    return found


def pickled(folder: Path) -> Path:
    found = sound(folder)
    (found / "adapter_model.safetensors").rename(found / "adapter_model.bin")
    return found


WRONG = {
    "no adapter": (lambda f: f, "holds no adapter of PEFT (no adapter_config.json)"),
    "another type": (lambda f: adapter(f / "a", random(3), "LORA"), "PEFT's type 'LORA', which is no soft"),
    "no type": (lambda f: adapter(f / "a", random(3), peft_type=[1]), "type [1], which is no soft prompt"),
    "another task": (
        lambda f: adapter(f / "a", random(3), task_type="SEQ_CLS"),
        "holds an adapter for 'SEQ_CLS', not for a causal language model",
    ),
    "an encoder, too": (
        lambda f: adapter(f / "a", random(3), task_type="SEQ_2_SEQ_LM", num_transformer_submodules=2),
        "holds an adapter for 'SEQ_2_SEQ_LM', not for a causal",
    ),
    "another width": (
        lambda f: adapter(f / "a", random(3, 33)),
        "belongs to another model: a virtual token of it has 33 numbers, one for llama (a width of 32) would",
    ),
    "other layers": (
        lambda f: adapter(f / "a", random(3, 96), "CARTRIDGE"),
        "has 96 numbers, one for llama (2 layers of 2 heads, 8 wide) would have 64",
    ),
    "another count": (
        lambda f: adapter(f / "a", random(3), num_virtual_tokens=4),
        "it has 3 × 32 numbers, by adapter_config.json 4 virtual tokens",
    ),
    "not finite": (lambda f: adapter(f / "a", random(3) / 0.0), "has entries that are not finite"),
    "a pickle": (pickled, "is a pickle, which may run any code and isn't read"),
    "no tensors": (lambda f: (sound(f) / "adapter_model.safetensors").unlink() or f / "a", "is missing"),
    "no model": (
        lambda f: adapter(f / "a", random(3), base_model_name_or_path=None),
        "names no model; say which it was with --model",
    ),
    "a model that is gone": (
        lambda f: adapter(f / "a", random(3), base_model_name_or_path="/gone/model"),
        "/gone/model, which is not there; say where it is now (--model",
    ),
    "the chat alone": (
        lambda f: adapter(f / "a", vectors(model("llama").preamble_ids)),
        "holds the chat template's tokens alone, and no soft prompt",
    ),
    "an older export": (lambda f: damaged(f, "prompt.json", lambda x: x.pop("end")), "an older version of"),
    "a changed manifest": (
        lambda f: damaged(f, "prompt.json", lambda x: x["manifest"].update(context_tokens=1)),
        "prompt.json is damaged: it is not as it was written",
    ),
    "a changed end": (lambda f: damaged(f, "prompt.json", lambda x: x.update(end=2)), "damaged: end is 2"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_none_is_one_sentence(tmp_path, name):
    make, said = WRONG[name]
    with pytest.raises(UserError) as caught:
        jaxsp.import_peft(make(tmp_path))
    assert said in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_another_model_is_refused(tmp_path):
    other = jaxsp.load_model(tiny.write(tmp_path / "other", seed=1), dtype="float32")
    folder = exported(prompt("llama", "embedding"), tmp_path)
    with pytest.raises(UserError, match="belongs to another model: its model weights are those of"):
        jaxsp.import_peft(folder, model=other)
    own = saved(prompt("llama", "embedding"), tmp_path / "own")
    folder = export(own, model("llama"), "peft", tmp_path / "adapter", overwrite=True).folder
    with pytest.raises(UserError, match="was trained for another document than this one"):
        jaxsp.import_peft(folder, model=model("llama"), context="Another text.")
    assert jaxsp.import_peft(folder, model=model("llama"), context=CONTEXT).context == CONTEXT


def test_questions_that_would_have_other_ids_are_refused(tmp_path, monkeypatch):
    """Texts of a tokenizer that begins a text in another way than it goes on."""
    own = dataclasses.replace(model("llama"), tokenizer=model("llama").tokenizer)
    found = Adapter.load(adapter(tmp_path / "a", random(3)))
    monkeypatch.setattr("jaxsp.exports.from_peft.encode", lambda *_, **__: [1])
    with pytest.raises(UserError, match="other ids behind a soft prompt than by itself"):
        found.soft_prompt(own)


def test_from_the_command_line_to_an_answer(tmp_path, jaxsp_command):
    folder, out = adapter(tmp_path / "a", random(3)), tmp_path / "a" / "jaxsp"
    (tmp_path / "c.txt").write_text(CONTEXT)
    code, said, err = jaxsp_command("import-peft", folder, "--document", tmp_path / "c.txt")
    assert code == 0, err
    assert said.splitlines()[:2] == [
        f"{out}: 3 slots of kind embedding, σ.",
        r"It is read as σ '<|im_start|>user\n' QUESTION '<|im_end|>\n<|im_start|>assistant\n'.",
    ]
    assert f"ask {out}" in said
    assert (
        "3 slots of kind embedding were learnt by another program and stand"
        in (out / "README.md").read_text()
    )
    code, said, err = jaxsp_command("inspect", out)
    assert (code, "trained by PEFT, PROMPT_TUNING" in " ".join(said.split())) == (0, True), err
    code, said, err = jaxsp_command("ask", out, QUESTION, "--max-tokens", 2, "--dtype", "float32")
    assert code == 0, err
    code, _, err = jaxsp_command("import-peft", folder)
    assert (code, "jaxsp is there already; replace it with --overwrite" in err) == (2, True)
    code, said, err = jaxsp_command("import-peft", folder, "--overwrite", "--plain")
    assert (code, "It is read as σ QUESTION." in said) == (0, True), err
    assert not (out / "context.txt").exists()
    code, said, err = jaxsp_command("inspect", out)
    assert "not known" in said
    assert "The document is not in this folder" in (out / "README.md").read_text()
    (out / "notes").touch()
    code, _, err = jaxsp_command("import-peft", folder, "--overwrite")
    assert (code, "holds other files than a prompt's" in err) == (2, True)


@pytest.mark.slow
def test_one_that_was_imported_is_evaluated_and_served(tmp_path):
    from jaxsp.serve.served import Shelf

    unknown = jaxsp.import_peft(adapter(tmp_path / "a", random(3)), model=model("llama"))
    found = jaxsp.import_peft(tmp_path / "a", model=model("llama"), context=CONTEXT)
    report = jaxsp.evaluate(model("llama"), found, ["How long is the cable?"], progress=False)
    assert report["held_out"]["brackets"]["full_context"]["kl"] < 1e-5
    assert (report["objective"], report["steps"]) == (None, None)
    for own, saved_tokens in (found, found.manifest["context_tokens"] - 3), (unknown, 0):
        served = Shelf(model("llama"), [(tmp_path / "p", own)])["p"]
        assert served.usage(2, 1)["prompt_tokens_details"]["saved_tokens"] == saved_tokens
