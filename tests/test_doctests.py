"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import numpy as np
import pytest

import jaxsp
from jaxsp.artifact import make_artifact
from jaxsp.data.documents import Query
from jaxsp.settings import make_settings
from jaxsp.teacher.problem import tokenize
from tests.conftest import CONTEXT

pytestmark = pytest.mark.usefixtures("optimized")
MODULES = [
    module.name
    for module in pkgutil.walk_packages(jaxsp.__path__, "jaxsp.")
    if module.name != "jaxsp.__main__"
]


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """A saved prompt of two vectors for the embedded model: the context's first two, untrained."""
    model, settings = jaxsp.load_model("smollm2-135m-instruct"), make_settings({"prompt_length": 2})
    job = tokenize(model, CONTEXT, [Query("How long is the cable?")], [], settings)
    sigma = {"embeddings": np.asarray(model.embed(job.context_ids[:2]), np.float32)}
    out = tmp_path_factory.mktemp("doctest") / "prompt"
    make_artifact(model, job, settings, sigma, CONTEXT, steps=0).save(out)
    return out


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, request):
    module = importlib.import_module(name)
    tests = [t for t in doctest.DocTestFinder().find(module) if t.examples]
    for test in tests:
        if "demo_folder" in test.docstring:
            test.globs["demo_folder"] = request.getfixturevalue("demo_folder")
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        assert runner.run(test).failed == 0, test.name


def test_there_are_examples_in_the_public_interface():
    for thing in (jaxsp.load_model, jaxsp.compress, jaxsp.ask, jaxsp.SoftPrompt):
        assert ">>>" in thing.__doc__
