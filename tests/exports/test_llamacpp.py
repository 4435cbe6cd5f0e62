"""Input vectors for llama.cpp: the file, the loader, and the check; by the real one where it is installed."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

import jaxsp
from jaxsp.exports import check, export
from jaxsp.exports.prefix import hold
from jaxsp.models.gguf.float32 import write_float32
from jaxsp.models.load import gguf_file
from jaxsp.typing import UserError
from tests.exports import llama_stand_in
from tests.exports.consumer import CONSUMERS, QUESTION, REPORT, make_prompt, model, prompt
from tests.gguf_files import write_gguf

HAS_LLAMA_CPP = importlib.util.find_spec("llama_cpp") is not None
QUANTIZED = "blk.0.ffn_up.weight"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A prompt and a model that was read from GGUF, with a quantized matrix."""
    folder = tmp_path_factory.mktemp("gguf")
    matrix = np.random.RandomState(0).standard_normal((48, 32)).astype(np.float32)
    stored = {QUANTIZED: (gguf.quantize(matrix, Kind.Q4_1), Kind.Q4_1)}
    write_gguf(folder / "small.gguf", tensors=stored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXSP_CACHE", str(folder / "cache"))
        patch.setenv("JAXSP_COMPILE_CACHE", "off")
        own = jaxsp.load_model(folder / "small.gguf", dtype="float32")
    return make_prompt(own, "embedding"), own


@pytest.fixture
def stand_in(given, monkeypatch):
    """In place of the module and of the check's own process."""
    found = llama_stand_in.module(given[1], size=7)
    monkeypatch.setitem(sys.modules, "llama_cpp", found)
    read = []

    def read_here(to, folder, weights, expected):
        read.append(weights)
        return fresh(CONSUMERS, "check").main(to, str(folder), str(weights), str(expected))

    monkeypatch.setattr(check, "_read_there", read_here)
    found.__dict__["weights"] = read
    return found


def fresh(folder, name):
    """A Python file, run anew."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_file_holds_the_chats_text_before_the_prompt_and_the_prompt(given, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_read_there", lambda *_: {"missing": "llama_cpp"})
    own, model = given
    out, written, found = tmp_path / "out", [], None
    for _ in range(2):
        found = export(own, model, "llama.cpp", out, overwrite=True, with_model=True)
        written.append({file.name: file.read_bytes() for file in out.iterdir() if file.is_file()})
    assert written[0] == written[1]
    assert set(written[0]) == {"README.md", "load.py", "prompt.json", "prompt_embeds.npy", "question.py"}
    vectors = np.load(io.BytesIO(written[0]["prompt_embeds.npy"]), allow_pickle=False)
    np.testing.assert_array_equal(vectors, hold(own, model).vectors)
    assert [file.name for file in (out / "model").iterdir()] == ["small.gguf"]
    text = written[0]["README.md"].decode()
    assert "python load.py model/small.gguf " in text
    assert str(Path(model.name).parent) not in text
    assert "**Unchecked**: llama_cpp was missing" in text
    assert found is not None
    assert found.check.startswith("pip install llama-cpp-python\njaxsp export DIR --to llama.cpp --out ")


def test_the_loader_gives_what_jaxsp_gives(given, stand_in, tmp_path):
    """Batches of 7: the vectors are read in two, the questions in several."""
    own, model = given
    found = export(own, model, "llama.cpp", tmp_path / "out", report=REPORT)
    assert found.kl is not None
    assert found.kl < 1e-9
    assert not stand_in.kept
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Read by llama.cpp in float32, on 1 question:" in text
    assert f"python load.py {Path(model.name).name} " in text
    assert str(Path(model.name).parent) not in text
    (weights,) = stand_in.weights
    assert not weights.exists()
    question, load = (fresh(tmp_path / "out", name) for name in ("question", "load"))
    llm = load.load("small.gguf")
    assert llm.options == {"n_ctx": 4096, "verbose": False}
    assert llm.ctx.batches == [7, 3]
    for asked in (QUESTION, "How long is the cable?", QUESTION):  # the cache is cut back to the prompt
        assert load.answer(llm, asked, max_tokens=6) == own.ask(asked, model=model, max_tokens=6)
    with pytest.raises(RuntimeError, match="can't read 2 more tokens"):
        load.batch(llm, 1, [1, 2])
    assert (
        question.encode(load.Tokenizer(llm), "<|im_end|>?")
        == model.encode_query("<|im_end|>?", own.chat).tolist()
    )


def test_other_tokens_there_are_refused(given, stand_in, tmp_path, monkeypatch):
    def other(self, text, **_):
        return [5, 6, 7]

    monkeypatch.setattr(stand_in.Llama, "tokenize", other)
    with pytest.raises(SystemExit, match=r"it gives other tokens to the question 'Hi?"):
        export(given[0], given[1], "llama.cpp", tmp_path / "out", report=REPORT)
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_width_is_refused_by_the_loader(given, stand_in, tmp_path, monkeypatch):
    export(given[0], given[1], "llama.cpp", tmp_path / "out")
    fresh(tmp_path / "out", "question")
    monkeypatch.setattr(stand_in.Llama, "n_embd", lambda self: 7)
    with pytest.raises(ValueError, match=r"was trained for small\.gguf; this is another model"):
        fresh(tmp_path / "out", "load").load("other.gguf")


def test_what_llama_cpp_can_not_hold_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"llama.cpp takes input vectors alone, and this prompt is of kind per_"
    ):
        export(prompt("llama", "per_head"), model("llama"), "llama.cpp", tmp_path / "out")
    with pytest.raises(UserError, match=r"llama.cpp reads GGUF files, and llama was not loaded from one"):
        export(prompt("llama", "embedding"), model("llama"), "llama.cpp", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_unpacked_to_float32_the_model_is_the_same(given, tmp_path, cache):
    write_float32(Path(given[1].name), tmp_path / "wide.gguf")
    kinds = {tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "wide.gguf").tensors}
    assert kinds == {Kind.F32}
    wide = jaxsp.load_model(tmp_path / "wide.gguf", dtype="float32")
    assert wide.config == given[1].config
    jax.tree.map(np.testing.assert_array_equal, wide.params, given[1].params)
    assert wide.tokenizer is not None
    assert given[1].tokenizer is not None
    assert wide.tokenizer.get_vocab() == given[1].tokenizer.get_vocab()
    assert wide.chat == given[1].chat


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LLAMA_CPP, reason="llama-cpp-python must be compiled")
def test_llama_cpp_itself_gives_what_jaxsp_gives_of_the_embedded_model(optimized, smollm2, tmp_path):
    own = make_prompt(smollm2, "embedding")
    found = export(own, smollm2, "llama.cpp", tmp_path / "out")
    assert (found.missing, found.queries) == (None, 1)
    assert found.kl is not None
    assert found.kl < check.LARGEST_KL
    load = tmp_path / "out" / "load.py"
    done = subprocess.run(
        [sys.executable, str(load), str(gguf_file(smollm2.name)), "How long is the cable?"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip()
