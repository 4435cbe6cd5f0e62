"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import pkgutil

import numpy as np
import pytest

import jaxsp
from jaxsp.artifact import make_artifact
from jaxsp.data.documents import Query
from jaxsp.models import load
from jaxsp.settings import make_settings
from jaxsp.teacher.problem import tokenize
from tests.conftest import CONTEXT, slow_beside

MODULES = [module.name for module in pkgutil.walk_packages(jaxsp.__path__, "jaxsp.")]
# They train: what they print is the same with a tiny model in the place of the embedded one.
ON_A_TINY_MODEL = {"jaxsp.api", "jaxsp.training", "jaxsp.training.drivers"}


@pytest.fixture
def tiny_instead(calm_model, heeded, monkeypatch):
    """The embedded model's name gives a tiny one."""
    _only(dataclasses.replace(calm_model, name="smollm2-135m-instruct"), monkeypatch)


@pytest.fixture
def embedded(optimized, smollm2, monkeypatch):
    """The embedded model, loaded once for all examples."""
    _only(smollm2, monkeypatch)


def _only(model, monkeypatch):
    def load_model(name, dtype=None):
        return model

    monkeypatch.setattr(jaxsp, "load_model", load_model, raising=False)
    monkeypatch.setattr(load, "_LOADED", {model})
    monkeypatch.setattr(load, "load_model", load_model)


@pytest.fixture
def demo_folder(tmp_path):
    """A saved prompt of two vectors: the context's first two, untrained."""
    model, settings = (
        jaxsp.load_model("smollm2-135m-instruct"),
        make_settings({"prompt_length": 2, "kind": "embedding"}),
    )
    job = tokenize(model, CONTEXT, [Query("How long is the cable?")], [], settings)
    sigma = {"embeddings": np.asarray(model.embed(job.context_ids[:2]), np.float32)}
    make_artifact(model, job, settings, sigma, CONTEXT, steps=0).save(tmp_path / "prompt")
    return tmp_path / "prompt"


SLOW = ("jaxsp.api", "jaxsp.artifact", "jaxsp.models.generation.live", "jaxsp.training")


@pytest.mark.parametrize("name", slow_beside(MODULES, *SLOW))
def test_examples(name, request):
    module = importlib.import_module(name)
    tests = [t for t in doctest.DocTestFinder().find(module) if t.examples]
    texts = [test.docstring or "" for test in tests]
    if any("load_model" in text or "demo_folder" in text for text in texts):
        request.getfixturevalue("tiny_instead" if name in ON_A_TINY_MODEL else "embedded")
    for test, text in zip(tests, texts, strict=True):
        if "demo_folder" in text:
            test.globs["demo_folder"] = request.getfixturevalue("demo_folder")
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        assert runner.run(test).failed == 0, test.name


def test_there_are_examples_in_the_public_interface():
    for thing in (jaxsp.load_model, jaxsp.compress, jaxsp.ask, jaxsp.SoftPrompt):
        assert ">>>" in (thing.__doc__ or "")
