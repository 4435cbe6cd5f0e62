"""Saved prompts: which model they belong to, and where it is."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import jaxsp
from jaxsp import api, terminal
from jaxsp.artifact import SoftPrompt, named_model, tokenizer_fingerprint
from jaxsp.cli import Ask
from jaxsp.models.weights import old_fingerprint
from jaxsp.prompts.storage import DTYPES
from jaxsp.typing import UserError


def saved_for(model: jaxsp.LanguageModel, fingerprint: str) -> SoftPrompt:
    tokenizer = {"fingerprint": tokenizer_fingerprint(model.tokenizer)}
    return SoftPrompt({}, {"model": {"name": model.name, "fingerprint": fingerprint}, "tokenizer": tokenizer})


def test_a_prompt_of_0_1_knows_its_model_by_what_0_1_hashed(tiny_model, tiny_directory, tmp_path):
    shutil.copytree(tiny_directory, tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    data = np.fromfile(file, np.uint8)
    data[-1] ^= 1
    data.tofile(file)
    known = old_fingerprint([tiny_directory / "model.safetensors"])
    saved_for(tiny_model, known).check(tiny_model)
    saved_for(tiny_model, tiny_model.fingerprint).check(tiny_model)
    with pytest.raises(UserError, match="another model: its model weights"):
        saved_for(tiny_model, old_fingerprint([file])).check(tiny_model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_of_other_weights_is_refused_in_every_dtype(tiny_model, tmp_path, dtype):
    """Read from its files, before any question."""
    sigma = {"embeddings": np.linspace(-1, 1, 3 * tiny_model.config.width, dtype=np.float32).reshape(3, -1)}
    whole = saved_for(tiny_model, "0" * 64).manifest | {
        "format": 2, "kind": "embedding", "prompt_length": 3, "dtype": dtype, "context_tokens": 9,
        "slots": {"before": "a", "between": "b", "after": "c", "before_ids": [1]},
    }  # fmt: skip
    SoftPrompt(sigma, whole).save(tmp_path)
    loaded = SoftPrompt.load(tmp_path)
    np.testing.assert_allclose(loaded.sigma["embeddings"], sigma["embeddings"], atol=0.01)
    for used in (loaded.prefix, loaded.check):
        with pytest.raises(UserError, match=r"another model: its model weights are those of .* \(0{12}\)"):
            used(tiny_model)


ASKS = {
    "ask": lambda prompt, model: prompt.ask("Who?"),
    "jaxsp ask": lambda prompt, model: Ask(directory="there").load(prompt),
    "the teacher's": lambda prompt, model: api._teacher_of(prompt, model, None),
}


@pytest.mark.parametrize("name", ASKS)
def test_a_download_that_only_a_manifest_asks_for_is_said_first(tiny_model, monkeypatch, caplog, name):
    import huggingface_hub

    said = []

    def unreachable(*_, **__):
        said.append(caplog.text)
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    terminal.say_once.cache_clear()
    named = {"name": "somebody/some-model", "quantization": "none"}
    with pytest.raises(UserError, match="can't be reached for 'somebody/some-model'"):
        ASKS[name](SoftPrompt({}, {"model": named, "teacher": named}), tiny_model)
    assert len(said) == 1
    assert said[0].count("names the model somebody/some-model, which is looked for on the model hub") == 1


def test_a_model_that_is_not_where_it_was(tmp_path, tiny_directory):
    with pytest.raises(UserError, match=r"was .*gone, which is not there; say where it is now \(--model"):
        named_model({"name": str(tmp_path / "gone")})
    assert named_model({"name": str(tiny_directory)}) == str(tiny_directory)
