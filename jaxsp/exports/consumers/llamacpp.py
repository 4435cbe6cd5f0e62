"""Answers questions with the soft prompt of this folder, by llama.cpp (llama-cpp-python).

python load.py MODEL.gguf "How long is the cable?"
"""

import ctypes
import sys

import llama_cpp  # pyright: ignore[reportMissingImports] (it is compiled by whoever uses it)
import numpy as np
from question import HERE, PROMPT, encode

VECTORS = np.load(HERE / "prompt_embeds.npy")


class Tokenizer:
    """llama.cpp's tokenizer, as question.py asks for one."""

    def __init__(self, model):
        self.model = model

    def encode(self, text, **_):
        return self.model.tokenize(text.encode(), add_bos=False, special=False)


def load(path, **options):
    """The model with the soft prompt, and the chat's text before it, in its cache."""
    model = llama_cpp.Llama(path, **{"n_ctx": 4096, "verbose": False, **options})
    if model.n_embd() != VECTORS.shape[1]:
        raise ValueError(f"The soft prompt was trained for {PROMPT['model']['name']}; this is another model.")
    read(model, 0, VECTORS)
    return model


def read(model, first, inputs):
    """Logits [T, V] at token ids [T], none at vectors [T, D]. From ``first`` on the cache then holds them."""
    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(model.ctx), 0, first, -1)
    found, size = [], model.n_batch
    for start in range(0, len(inputs), size):
        found += batch(model, first + start, inputs[start : start + size])
    return np.array(found)


def batch(model, first, inputs):
    count, width = len(inputs), np.ndim(inputs) - 1 and np.shape(inputs)[1]
    made = llama_cpp.llama_batch_init(count, width, 1)
    try:
        made.n_tokens = count
        values = np.ascontiguousarray(inputs, np.float32 if width else np.int32)
        ctypes.memmove(made.embd if width else made.token, values.ctypes.data, values.nbytes)
        for i in range(count):
            made.pos[i], made.n_seq_id[i], made.seq_id[i][0], made.logits[i] = first + i, 1, 0, not width
        if code := llama_cpp.llama_decode(model.ctx, made):
            raise RuntimeError(f"llama.cpp can't read {count} more tokens (code {code}).")
        rows = (llama_cpp.llama_get_logits_ith(model.ctx, i) for i in range(0 if width else count))
        return [np.ctypeslib.as_array(row, (model.n_vocab(),)).copy() for row in rows]
    finally:
        llama_cpp.llama_batch_free(made)


def answer(model, question, max_tokens=128):
    """The greedy answer."""
    found, place, ids = [], len(VECTORS), encode(Tokenizer(model), question)
    while len(found) < max_tokens:
        logits, place = read(model, place, ids), place + len(ids)
        ids = [int(logits[-1].argmax())]
        if ids[0] in PROMPT["stop_ids"]:
            break
        found += ids
    return model.detokenize(found).decode(errors="ignore")


if __name__ == "__main__":
    print(answer(load(sys.argv[1]), " ".join(sys.argv[2:])))
