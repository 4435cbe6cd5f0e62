"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import jaxsp
from tests.conftest import CONTEXT

MODULES = [
    module.name
    for module in pkgutil.walk_packages(jaxsp.__path__, "jaxsp.")
    if module.name != "jaxsp.__main__"
]


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """A saved prompt of two vectors for the embedded model."""
    out = tmp_path_factory.mktemp("doctest") / "prompt"
    jaxsp.compress(
        jaxsp.load_model("smollm2-135m-instruct"), CONTEXT,
        ["How long is the cable?", "What does the tank hold?"], held_out=0.5, length=2, steps=1,
        batch_size=1, max_answer_tokens=4, out=out, progress=False,
    )  # fmt: skip
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
