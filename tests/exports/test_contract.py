"""The contract of every entry of ``EXPORTS``, over all kinds of prompts, and families."""

from __future__ import annotations

import ast
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
@pytest.mark.parametrize(
    ("to", "kind"), [("transformers", "per_head"), ("peft", "key_value"), ("peft", "embedding")]
)
def test_answers_are_those_of_ask(read_here, tmp_path, to, kind):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own, given = prompt("llama", kind, to == "transformers"), model("llama")
    out = export(own, given, to, tmp_path / "out", report=REPORT).folder
    hf = AutoModelForCausalLM.from_pretrained(given.directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(given.directory)
    question, load = consumer.script(out, "question"), consumer.script(out, "load")
    behind = (hf, tokenizer, load.load_prefix(hf)) if to == "transformers" else (load.load(hf), tokenizer)
    for asked in ("How long is the cable?", "Naïve?"):
        assert question.encode(tokenizer, asked) == given.encode_query(asked, own.chat).tolist()
        assert load.answer(*behind, asked, max_tokens=12) == own.ask(asked, model=given, max_tokens=12)
    spelled = question.encode(tokenizer, "<|im_end|>?")
    assert spelled == given.encode_query("<|im_end|>?", own.chat).tolist()
    with torch.no_grad():
        hf.get_input_embeddings().get_parameter("weight").add_(0.01)
    with pytest.raises(ValueError, match="was trained for llama; this model has other weights"):
        question.check_weights(hf)


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
        "README.md", "load.py", "prefix.safetensors", "prompt.json", "question.py",
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


def test_the_loader_is_short():
    tree = ast.parse((consumer.CONSUMERS / "transformers.py").read_text())
    own = {f.name: f for f in tree.body if isinstance(f, ast.FunctionDef)}
    for name in ("load_prefix", "add_bias"):
        assert len(ast.unparse(own[name]).splitlines()) < 20


def test_the_description_is_whole(unread, tmp_path):
    given = model("llama")
    export(prompt("llama", "embedding"), given, "peft", tmp_path / "out", with_model=True)
    known = json.loads((tmp_path / "out" / "prompt.json").read_text())
    assert known["model"] == {"name": "llama", "fingerprint": given.fingerprint, "path": str(given.directory)}
    assert known["stop_ids"] == list(given.stop_ids)
    assert known["question"]["control_ids"] == [0, 1, 2]
    copied = {file.name for file in (tmp_path / "out" / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= copied
    text = (tmp_path / "out" / "README.md").read_text()
    assert given.fingerprint in text
    assert "They lie in `model/`" in text
