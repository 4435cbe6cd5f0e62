"""``LazyTokenizer``: it gives what the whole tokenizer gives, and an answer needs no transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxsp.models.gguf import converted
from jaxsp.models.lazy_tokenizer import LazyTokenizer
from tests.gguf_files import SPM, write_gguf

TEXTS = ["", " ", "12 words", "<|im_start|>user\nDon't\t“stop”<|im_end|>", "naïve 你好 🙂", "</s><s>a  b"]


@pytest.fixture(params=[{}, pytest.param(SPM, marks=pytest.mark.slow)], ids=["byte-level", "sentence-piece"])
def directory(request, tmp_path, cache):
    changes: dict[str, Any] = {"vocab_size": 259} if request.param else {}
    write_gguf(tmp_path / "m.gguf", fields=request.param, **changes)
    return converted(tmp_path / "m.gguf")


def test_it_gives_what_the_whole_tokenizer_gives(directory):
    lazy, whole = LazyTokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        for added in (True, False):
            for split in (True, False):
                options = {"add_special_tokens": added, "split_special_tokens": split}
                ids = lazy.encode(text, **options)
                assert ids == whole.encode(text, **options), (text, options)
                for skip in (True, False):
                    expected = whole.decode(ids, skip_special_tokens=skip)
                    assert lazy.decode(ids, skip_special_tokens=skip) == expected
                    assert lazy.decode(np.array(ids), skip) == expected
        assert lazy.encode(text) == whole.encode(text, split_special_tokens=False)
    assert lazy.decode(5) == whole.decode(5)
    assert lazy.get_vocab() == whole.get_vocab()
    assert (len(lazy), lazy.vocab_size) == (len(whole), whole.vocab_size)
    assert lazy.eos_token_id == whole.eos_token_id
    for token in (0, 5, len(whole)):
        assert lazy.convert_ids_to_tokens(token) == whole.convert_ids_to_tokens(token)
    assert "_whole" not in vars(lazy)

    assert lazy.encode(["a", "b"]) == whole.encode(["a", "b"])
    assert lazy.decode([[5], [6, 7]]) == whole.decode([[5], [6, 7]])
    assert lazy.decode([5], clean_up_tokenization_spaces=True) == whole.decode([5])
    assert lazy.convert_ids_to_tokens([5, 6]) == whole.convert_ids_to_tokens([5, 6])
    assert lazy(TEXTS).input_ids == whole(TEXTS).input_ids
    assert lazy.chat_template == whole.chat_template
    assert lazy.bos_token == whole.bos_token


def test_what_is_changed_holds_for_both(directory):
    lazy: Any = LazyTokenizer(directory)
    lazy.chat_template = "{{ messages[0].content }}!"
    assert lazy.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    lazy.add_tokens(["<new>"])
    assert lazy.decode(lazy.encode("<new>", add_special_tokens=False)) == "<new>"
    assert len(lazy.encode("<new>", add_special_tokens=False)) == 1
    with pytest.raises(AttributeError, match="no_such"):
        _ = lazy.no_such
    with pytest.raises(AttributeError, match="_private"):
        _ = lazy._private


@pytest.mark.slow
def test_an_answer_does_without_transformers(directory, python):
    script = """
import sys, jaxsp, numpy
model = jaxsp.load_model(sys.argv[1], dtype="float32")
prefix = jaxsp.distributions.context_prefix(model.params, model.config, numpy.array([[1, 2]]))
chat = jaxsp.models.chat.ChatTexts("", " ", "!")
print(len(list(model.stream_answer(prefix, "hi", chat, max_tokens=3))), "transformers" in sys.modules)
"""
    done = python("-c", script, str(directory))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "False", done.stdout
