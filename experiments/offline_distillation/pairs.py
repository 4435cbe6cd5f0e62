"""Pairs of a teacher and a student of one vocabulary, and the texts that both read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxsp
from experiments import random_llama
from experiments.offline_distillation.recipe import Model
from experiments.suite import HERE
from jaxsp import demo
from jaxsp.models import decoder
from jaxsp.models.config import DecoderConfig
from jaxsp.typing import Array, Bool, Int, PyTree

LAYERS = 12
"""Layers of the student: of the teacher's 30 the first and the last, as many of each."""
HELD_OUT = ("cabin", "museum")
"""Documents that the student is measured on and never trained on."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A teacher, and a student at its start."""

    name: str
    teacher: Model
    student: Model
    teacher_weights: PyTree
    student_weights: PyTree
    """Float32, whatever the dtype that the student computes in."""
    model: jaxsp.LanguageModel
    """The teacher once more, with its tokenizer."""

    @property
    def vocabulary(self) -> int:
        return self.model.config.vocab_size


class Pieces:
    """Texts as token ids, cut into rows of one length.

    Attributes:
      ids: ``[n, t]``; the end of a text's last row is filled with zeros.
      mask: ``[n, t]``, False there.
    """

    def __init__(
        self, model: jaxsp.LanguageModel, texts: list[str], length: int, most: int | None = None
    ) -> None:
        rows = []
        for text in texts:
            ids = model.encode_context(text)
            rows += [ids[i : i + length] for i in range(0, len(ids), length)]
        rows = rows[:most]
        self.ids: Int[np.ndarray, "n t"] = np.zeros((len(rows), length), np.int32)
        self.mask: Bool[np.ndarray, "n t"] = np.zeros((len(rows), length), bool)
        for row, ids in enumerate(rows):
            self.ids[row, : len(ids)], self.mask[row, : len(ids)] = ids, True


def smollm2() -> Pair:
    """SmolLM2-135M-Instruct in bfloat16, and a student of its outer layers, whose head is tied."""
    model = jaxsp.load_model("smollm2-135m-instruct", dtype="bfloat16")
    config = model.config.replace(layers=LAYERS, ropes=model.config.ropes[:LAYERS])
    ends = np.r_[: LAYERS // 2, -LAYERS // 2 : 0]
    weights = {**model.params, "layers": jax.tree.map(lambda x: x[ends], model.params["layers"])}
    return _pair(f"{model.name}: {LAYERS} of {model.config.layers} layers", model, config, weights)


def random_llamas(folder: Path) -> Pair:
    """Two random Llamas of other widths and depths, each with a head of its own."""
    wider = random_llama.write(folder / "teacher", hidden_size=48, num_hidden_layers=3)
    teacher, student = (
        jaxsp.load_model(model, dtype="float32") for model in (wider, random_llama.write(folder / "student"))
    )
    return _pair("random Llamas", teacher, student.config, student.params)


def _pair(name: str, teacher: jaxsp.LanguageModel, config: DecoderConfig, weights: PyTree) -> Pair:
    exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), weights)
    sides = as_functions(teacher.config), as_functions(config)
    return Pair(name, *sides, teacher.params, exact, teacher)


def as_functions(config: DecoderConfig) -> Model:
    """A decoder of this configuration; float32 weights are rounded to its dtype where they are used."""

    def hidden(weights: PyTree, ids: Array) -> Array:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return decoder.hidden(weights, config, decoder.embed(weights, config, ids), positions)[0]

    def head(weights: PyTree) -> Array:
        return decoder.unembedding(weights, config).astype(config.dtype)

    return Model(hidden, head)


def texts() -> tuple[list[str], list[str]]:
    """The repository's documents with the questions about them: those to train on, and those held out."""
    folders = [p for kind in ("documents", "instructions") for p in sorted((HERE / kind).iterdir())]
    folders += [Path(demo.__file__).parent]
    train, held_out = [], []
    for folder in folders:
        files = [p for p in sorted(folder.glob("*")) if p.suffix in (".md", ".txt", ".jsonl")]
        if files:
            text = "\n".join(file.read_text("utf-8") for file in files)
            (held_out if folder.name in HELD_OUT else train).append(text)
    return train, held_out
