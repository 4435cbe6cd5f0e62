"""Shared fixtures. Eight fake devices for all tests: set before jax starts."""

import gc
import importlib.metadata
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# A program's code in one piece: cut up for several threads, tiny ones take a third longer. Those of the real
# model, optimised at level 1, compile in half the time and run as fast.
flags = [
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_backend_optimization_level=1",
]
# Tiny models: compiling is nearly all of the time. A test of the real model asks for `optimized`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # XLA's older emitters compile in half the time; later versions don't have them.
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(flags))
os.environ["JAXSP_TEACHER_CACHE"] = "off"  # what one test's teacher says, no other one reads

import jaxtyping
import numpy as np
import pytest

from tests.annotations import check

# Before jaxsp is imported: each of its functions is checked from then on.
jaxtyping.install_import_hook("jaxsp", f"{check.__module__}.{check.__name__}")

from tests import tiny

gc.set_threshold(100_000, 50, 100)  # tracing makes many objects, nearly all without cycles

# Begins the code of a process that loads models: transformers would load torch, for seconds.
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None\n"

CONTEXT = "The tank holds 1.2 litres. The cable is 90 cm long. The lid is made of steel and glass."
QUERIES = [f"What is fact {i}?" for i in range(10)]


def slow_beside(table: Iterable[Any], *slow: Any) -> list[Any]:
    """A table's entries as parameters; those named run with the slow tests, as others show the same.

    A new entry is not among them.
    """
    entries = list(table)
    assert set(slow) <= set(entries), set(slow) - set(entries)
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in entries]


def assert_same_sigma(ours: Any, theirs: Any, within: float = 0.0, atol: float = 0.0) -> None:
    """The parameters of two prompts are equal: bit for bit, ``within`` times an array's largest entry, or
    ``atol``."""
    import jax

    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=max(atol, within * np.abs(b).max()))


# They take minutes: begun last, one worker would wait for another.
LONGEST_FIRST = [
    "test_smollm2",
    "test_processes",
    "test_objectives",
    "test_colab",
    "test_drivers",
    "test_resume",
    "test_many",
    "test_update",
    "test_doctests",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny_directory: Path):
    import jaxsp

    return jaxsp.load_model(tiny_directory, dtype="float32")


@pytest.fixture(scope="session")
def calm_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("model") / "calm", gain=1.0)


@pytest.fixture(scope="session")
def calm_model(calm_directory: Path):
    """For runs that are to be equal but for rounding: it doesn't grow from step to step."""
    import jaxsp

    return jaxsp.load_model(calm_directory, dtype="float32")


@pytest.fixture(scope="session")
def smollm2():
    import jaxsp

    return jaxsp.load_model("smollm2-135m-instruct", dtype="float32")


@pytest.fixture
def optimized(monkeypatch: pytest.MonkeyPatch):
    """The real model takes longer to run than to compile: here, and in processes started here."""
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    monkeypatch.delenv(name.upper())
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Path]:
    """A context and its queries as files."""
    files = {"context": tmp_path / "context.txt", "queries": tmp_path / "queries.txt"}
    files["context"].write_text(CONTEXT)
    files["queries"].write_text("\n".join(QUERIES))
    return files


@pytest.fixture
def jaxsp_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command line in this process; gives (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        from jaxsp.cli import main

        monkeypatch.setattr(sys, "argv", ["jaxsp", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def python():
    """Runs Python code, or a module, in a process of its own."""

    def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **options.pop("env", {})}
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=environment, **options
        )

    return run


def mapped_regions() -> int:
    """Regions of memory mapped by this process; 0 where Linux's file of them isn't there."""
    file = Path("/proc/self/maps")
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Compiled programs stay for the next file, but Linux lets a process map no more than 65,530 regions.

    A program takes dozens, a file up to 25,000. Clearing takes seconds, and all is compiled anew.
    """
    yield
    if "jax" in sys.modules and mapped_regions() > 30_000:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def heeded(monkeypatch: pytest.MonkeyPatch):
    """Small models with random weights hardly heed a document: let it matter to every query."""
    from jaxsp.study import coverage, questions

    monkeypatch.setattr(questions, "MATTERS", 0.0)
    monkeypatch.setattr(coverage, "CHANGED", 0.0)


@pytest.fixture(scope="session", autouse=True)
def given_alone():
    """Tests give queries and mean these alone: what a document adds to them takes seconds of compiling."""
    from jaxsp.runs import job

    before, job.BESIDE_GIVEN = job.BESIDE_GIVEN, False
    yield
    job.BESIDE_GIVEN = before


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch):
    """The document adds to the queries given, as it does for users."""
    monkeypatch.setattr("jaxsp.runs.job.BESIDE_GIVEN", True)


@pytest.fixture
def unchecked():
    """Arrays of a wrong shape or type reach jaxsp's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def frugal():
    """The test may not need much memory, whatever its file says."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 << 20
