"""llama-cpp-python's part that an export uses, computed by jaxsp: CI has no compiled llama.cpp."""

from __future__ import annotations

import ctypes
import importlib.machinery
import types
from typing import Any

import numpy as np

import jaxsp

ROOM = 128
"""Positions that there are."""


class Batch(ctypes.Structure):
    """As in llama.h."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Context:
    """The tokens read so far, as input vectors by their positions; the logits of the last batch."""

    def __init__(self, model: jaxsp.LanguageModel) -> None:
        self.model = model
        self.read: dict[int, np.ndarray] = {}
        self.logits: dict[int, np.ndarray] = {}
        self.batches: list[int] = []

    def decode(self, batch: Batch) -> int:
        count, width = batch.n_tokens, self.model.config.width
        if batch.embd:
            vectors = np.ctypeslib.as_array(batch.embd, (count, width)).copy()
        else:
            ids = np.ctypeslib.as_array(batch.token, (count,)).copy()
            vectors = np.asarray(self.model.embed(ids[None])[0])
        places = [batch.pos[i] for i in range(count)]
        if places != [*range(len(self.read), len(self.read) + count)]:
            return -1
        assert all((batch.n_seq_id[i], batch.seq_id[i][0]) == (1, 0) for i in range(count))
        self.read |= dict(zip(places, vectors, strict=True))
        self.batches.append(count)
        whole = np.zeros((ROOM, width), np.float32)  # one size, one program
        whole[: len(self.read)] = [*self.read.values()]
        found = self.model.logits(embeddings=whole[None])[0]
        self.logits = {i: np.array(found[place]) for i, place in enumerate(places) if batch.logits[i]}
        return 0


def module(model: jaxsp.LanguageModel, size: int = 512) -> Any:
    """A module ``llama_cpp`` whose only model is this one, and which takes batches of this size."""
    kept: dict[int, Any] = {}

    def llama_batch_init(n_tokens: int, embd: int, n_seq_max: int) -> Batch:
        rows = [(ctypes.c_int32 * n_seq_max)() for _ in range(n_tokens)]
        pointers = [ctypes.cast(row, ctypes.POINTER(ctypes.c_int32)) for row in rows]
        parts = {
            "token": None if embd else (ctypes.c_int32 * n_tokens)(),
            "embd": (ctypes.c_float * (n_tokens * embd))() if embd else None,
            "pos": (ctypes.c_int32 * n_tokens)(),
            "n_seq_id": (ctypes.c_int32 * n_tokens)(),
            "seq_id": (ctypes.POINTER(ctypes.c_int32) * n_tokens)(*pointers),
            "logits": (ctypes.c_int8 * n_tokens)(),
        }
        batch = Batch(0)
        kinds: Any = Batch._fields_[1:]
        for name, kind in kinds:
            if parts[name] is not None:
                setattr(batch, name, ctypes.cast(parts[name], kind))
        kept[id(batch)] = rows, parts
        return batch

    class Llama:
        def __init__(self, path: str, **options: Any) -> None:
            self.path, self.options, self.ctx, self.n_batch = path, options, Context(model), size

        def n_embd(self) -> int:
            return model.config.width

        def n_vocab(self) -> int:
            return model.config.vocab_size

        def tokenize(self, text: bytes, add_bos: bool, special: bool) -> list[int]:
            assert not add_bos
            assert not special
            own: Any = model.tokenizer
            return own.encode(text.decode(), add_special_tokens=False, split_special_tokens=True)

        def detokenize(self, ids: list[int]) -> bytes:
            own: Any = model.tokenizer
            return own.decode(ids, skip_special_tokens=True).encode()

    def llama_memory_seq_rm(context: Context, sequence: int, first: int, last: int) -> bool:
        assert (sequence, last) == (0, -1)
        context.read = {place: vector for place, vector in context.read.items() if place < first}
        return True

    def llama_get_logits_ith(context: Context, i: int) -> Any:
        row = context.logits[i]
        return row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    found = types.ModuleType("llama_cpp")
    found.__spec__ = importlib.machinery.ModuleSpec("llama_cpp", None)
    vars(found).update(
        Llama=Llama,
        llama_batch_init=llama_batch_init,
        llama_batch_free=lambda batch: kept.pop(id(batch)),
        llama_decode=Context.decode,
        llama_get_logits_ith=llama_get_logits_ith,
        llama_get_memory=lambda context: context,
        llama_memory_seq_rm=llama_memory_seq_rm,
        kept=kept,
    )
    return found
