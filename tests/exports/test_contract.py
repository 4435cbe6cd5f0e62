"""The contract of every entry of ``EXPORTS``, over all kinds of prompts, and families."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsp
from jaxsp import exports
from jaxsp.exports import EXPORTS, check, export
from jaxsp.exports.prefix import hold
from jaxsp.models.rope import rotate, rotation
from jaxsp.prompts import PROMPT_KINDS
from jaxsp.prompts.initializers import ABSENT
from jaxsp.typing import UserError
from tests.exports import consumer
from tests.exports.consumer import REPORT, model, prompt

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt2"]
SHORT = "The lid is of steel."
ASKED = ("How long is the cable?", "Naïve?", "<|im_end|>?")
with_torch = pytest.mark.skipif(not consumer.HAS_TORCH, reason="torch and PEFT are optional")


@pytest.fixture
def unread(monkeypatch):
    monkeypatch.setattr(check, "_read_there", lambda *_: {"missing": "torch"})


@pytest.fixture
def read_here(monkeypatch):
    monkeypatch.setattr(check, "_read_there", consumer.read_here)


def refusal(to, family, kind, bias=False) -> str:
    """The sentence by which the format must refuse it; empty, if it holds it."""
    if family == "gpt2" and kind != "embedding":
        return "gpt2 has learned positions, which can't be shifted: the question stands at 93, after 10 slots"
    if to == "vllm" and kind != "embedding":
        return f"vLLM takes input vectors alone, and this prompt is of kind {kind}; .* --kind embedding"
    if to == "vllm" and family in ("gemma2", "gemma3_text"):
        return f"{family} scales its input vectors"
    if to == "llama.cpp" and kind != "embedding":
        return f"llama.cpp takes input vectors alone, and this prompt is of kind {kind}: .* --kind embedding"
    if to == "llama.cpp" and family in ("gemma2", "gemma3_text"):
        return f"{family} scales its input vectors, which llama.cpp"
    if to == "llama.cpp":
        return f"llama.cpp reads GGUF files, and {family} was not loaded from one"
    if to == "peft" and kind != "embedding" and family in ("gemma2", "gemma3_text", "mistral"):
        return "a sliding window of the model is shorter than the document"
    if to == "peft" and kind != "embedding" and bias:
        return "PEFT can't hold this prompt of kind .* slots' biases; .* --kind embedding, or with --kind key"
    return ""


@pytest.mark.torch
@with_torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_the_consumer_gives_what_jaxsp_gives_or_it_is_refused(read_here, tmp_path, family, kind):
    for to in EXPORTS:
        for bias in (False, True):
            given, out = (prompt(family, kind, bias), model(family), to), tmp_path / f"{to}_{bias}"
            if said := refusal(to, family, kind, bias):
                with pytest.raises(UserError, match=said):
                    export(*given, out, report=REPORT)
                assert not list(tmp_path.glob(f"*{out.name}*"))
            else:
                found = export(*given, out, report=REPORT)
                assert found.kl is not None
                assert found.kl < 1e-9
                assert found.logit_difference is not None
                assert found.logit_difference < 1e-4
                assert f"KL from jaxsp's own distributions {found.kl:.2g}" in (out / "README.md").read_text()


@pytest.mark.torch
@with_torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_what_leaves_a_sliding_window_in_the_midst_of_an_answer(read_here, tmp_path, monkeypatch, family):
    """The chat's first tokens are nearer than they were: a mask keeps them as long as jaxsp does."""
    own = prompt(family, "key_value", context=SHORT), model(family)
    held = hold(*own)
    assert held.until is not None
    assert 0 < held.until.min() < 30
    found = export(*own, "transformers", tmp_path / "a", report=REPORT)
    assert found.logit_difference is not None
    assert found.logit_difference < 1e-4
    with pytest.raises(UserError, match="peft makes something else of this prompt: KL"):
        export(*own, "peft", tmp_path / "b", report=REPORT)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    monkeypatch.setattr(check, "LARGEST_KL", 1.0)
    export(*own, "peft", tmp_path / "b", report=REPORT)
    assert f"Exact for the first {held.until.min()} tokens" in (tmp_path / "b" / "README.md").read_text()


@pytest.mark.torch
@with_torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["key_value", "embedding"])
def test_answers_of_peft_are_those_of_ask(read_here, tmp_path, kind):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own, given = prompt("llama", kind), model("llama")
    out = export(own, given, "peft", tmp_path / "out", report=REPORT).folder
    hf = AutoModelForCausalLM.from_pretrained(given.directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(given.directory)
    question, load = consumer.script(out, "question"), consumer.script(out, "load")
    behind = load.load(hf)
    for asked in ASKED:
        assert question.encode(tokenizer, asked) == given.encode_query(asked, own.chat).tolist()
        assert load.answer(behind, tokenizer, asked, 12) == own.ask(asked, model=given, max_tokens=12)
    with torch.no_grad():
        hf.get_input_embeddings().get_parameter("weight").add_(0.01)
    with pytest.raises(ValueError, match="was trained for llama; this model has other weights"):
        question.check_weights(hf)


@pytest.mark.torch
@with_torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "bias"), [("embedding", False), ("per_head", True)])
def test_answers_of_transformers_are_those_of_ask(read_here, tmp_path, monkeypatch, kind, bias):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own, given = prompt("llama", kind, bias), model("llama")
    out = export(own, given, "transformers", tmp_path / "out", report=REPORT).folder
    hf: Any = AutoModelForCausalLM.from_pretrained(given.directory, dtype=torch.float32)
    hf.generation_config.update(repetition_penalty=1.5, do_sample=True, no_repeat_ngram_size=1)
    tokenizer = AutoTokenizer.from_pretrained(given.directory)
    if bias:
        consumer.script(out, "biases")
    load, read, generate = consumer.script(out, "load"), [], hf.generate

    def watched(ids, **options):
        read.append(ids[0].tolist())
        return generate(ids, **options)

    monkeypatch.setattr(hf, "generate", watched)
    slots, short = hold(own, given).slots, load.ASK["greedy"] | {"max_new_tokens": 12}
    for asked in ASKED:
        assert load.answer(hf, tokenizer, asked, short) == own.ask(asked, model=given, max_tokens=12)
        assert read.pop() == [0] * slots + given.encode_query(asked, own.chat).tolist()
    # The end of an answer isn't shown, also where it is no special token.
    monkeypatch.setattr(hf, "generate", lambda ids, **_: torch.cat([ids, torch.tensor([[5, 2]])], dim=1))
    monkeypatch.setitem(load.ASK, "ends", [2, 5])
    assert load.answer(hf, tokenizer, "Hi?") == ""
    tokenizer.add_tokens(["<think>"])  # it is none of the special ones: no option of a tokenizer splits it
    monkeypatch.setitem(load.ASK, "control_ids", [tokenizer.convert_tokens_to_ids("<think>")])
    with pytest.raises(ValueError, match="The question holds a control token of this model; take it out"):
        load.answer(hf, tokenizer, "Why <think>?")
    assert load.load_prefix(hf.to(torch.bfloat16)).layers[0].keys.dtype == torch.bfloat16
    with torch.no_grad():
        hf.get_input_embeddings().get_parameter("weight").add_(0.01)
    with pytest.raises(ValueError, match="was trained for llama; this model has other weights"):
        load.load_prefix(hf)


@pytest.mark.parametrize("to", [to for to in EXPORTS if to != "llama.cpp"])  # it needs a GGUF file
def test_writes_the_same_again_and_leaves_the_prompt_alone(unread, tmp_path, to):
    own = prompt("llama", "embedding")
    before, written = jax.tree.map(np.copy, own.sigma), []
    out = tmp_path / "out"
    for _ in range(2):
        export(own, model("llama"), to, out, overwrite=True)
        written.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert written[0] == written[1]
    assert {"README.md", "prompt.json", *EXPORTS[to].SCRIPTS} < set(written[0]) < set(exports._OURS)
    jax.tree.map(np.testing.assert_array_equal, own.sigma, before)
    export(own, model("llama"), "transformers", out, overwrite=True)
    assert {file.name for file in out.iterdir()} == {
        "README.md", "load.py", "prefix.safetensors", "prompt.json", "question.json",
    }  # fmt: skip


def test_learned_positions_that_need_no_shift():
    """The context is as long as the prompt: the question stands where it stood."""
    held = hold(prompt("gpt2", "key_value", context="Tank"), model("gpt2"))
    assert held.slots == 6 + consumer.SLOTS == held.prompt.prefix(model("gpt2")).end


def test_keys_are_turned_by_what_the_question_is_nearer():
    own, given = prompt("qwen3", "key_value"), model("qwen3")
    held, found = hold(own, given), own.prefix(given)
    shift = found.end - held.slots
    assert shift == 83
    where = rotation(jnp.full((1, held.slots), shift), given.config.ropes[0])
    back = rotate(jnp.asarray(held.keys[0].swapaxes(0, 1)[None]), where)
    np.testing.assert_allclose(back, found.keys[0], atol=1e-5)


def test_heads_with_fewer_slots_are_named_as_what_peft_lacks(unread, tmp_path):
    own = prompt("llama", "key_value", True)
    own = type(own)({**own.sigma, "bias": own.sigma["bias"].copy()}, own.manifest, own.context)
    own.sigma["bias"][0, 0, 0] = ABSENT
    with pytest.raises(UserError, match="no place for heads with different numbers of slots"):
        export(own, model("llama"), "peft", tmp_path / "out")


def test_slots_that_no_head_has_stay_behind():
    """Those of ``per_head`` that are nowhere: it has four times as many as a head may need."""
    assert hold(prompt("llama", "per_head"), model("llama")).slots == 6 + consumer.SLOTS


def test_what_is_shipped_is_short(unread, tmp_path):
    """All of it: imports and docstrings, too."""
    plain = export(prompt("llama", "embedding"), model("llama"), "transformers", tmp_path / "plain").folder
    biased = export(prompt("llama", "per_head", True), model("llama"), "transformers", tmp_path / "b").folder
    client = export(prompt("llama", "embedding"), model("llama"), "vllm", tmp_path / "vllm").folder
    lines = {
        file: sum(bool(line.strip()) for line in file.read_text().splitlines())
        for folder in (plain, biased, client)
        for file in folder.glob("*.py")
    }
    assert set(lines) == {plain / "load.py", biased / "load.py", biased / "biases.py", client / "client.py"}
    assert lines.pop(client / "client.py") <= 10
    assert max(lines.values()) <= 20
    assert "biases" not in (plain / "load.py").read_text()
    assert "biases.py" in (biased / "README.md").read_text()


@pytest.mark.parametrize("to", [to for to in EXPORTS if to != "llama.cpp"])
def test_no_folder_of_this_machine_is_named(unread, tmp_path, to):
    given = model("llama")
    own = prompt("llama", "embedding")
    own.save(tmp_path / "prompt")
    out = tmp_path / "out"
    found = jaxsp.export(tmp_path / "prompt", to, out=out, model=given)
    assert found.model == str(given.directory)
    assert found.check.endswith(f"jaxsp export {tmp_path / 'prompt'} --to {to} --out {out} --overwrite")
    text = (out / "README.md").read_text()
    assert f"\njaxsp export DIR --to {to} --out {to}/ --overwrite\n" in text
    assert "Where it is installed, this measures it (DIR: the folder of the saved prompt):" in text
    assert "MODEL stands for the folder" in text
    assert own.manifest["model"]["name"] == str(given.directory)
    for file in out.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
        assert str(given.directory.parent).encode() not in file.read_bytes()
    found = jaxsp.export(tmp_path / "prompt", to, out=out, model=given, overwrite=True, with_model=True)
    assert found.model == str(out / "model")
    text = (out / "README.md").read_text()
    assert f"\njaxsp export DIR --to {to} --out {to}/ --with-model --overwrite\n" in text
    assert "MODEL" not in text


def test_the_description_is_whole(unread, tmp_path):
    given = model("llama")
    export(prompt("llama", "embedding"), given, "peft", tmp_path / "out", with_model=True)
    known = json.loads((tmp_path / "out" / "prompt.json").read_text())
    assert known["model"] == {"name": "llama", "fingerprint": given.fingerprint}
    assert known["stop_ids"] == list(given.stop_ids)
    assert known["question"]["control_ids"] == [0, 1, 2]
    copied = {file.name for file in (tmp_path / "out" / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= copied
    text = (tmp_path / "out" / "README.md").read_text()
    assert given.fingerprint in text
    assert "They lie in `model/`" in text
