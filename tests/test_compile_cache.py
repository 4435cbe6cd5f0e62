"""Compiled programs on disk: found again, the same to the bit, and never a reason to fail."""

from __future__ import annotations

import json
import os
import zlib

import jax
import pytest

from jaxsp import compile_cache
from tests.conftest import WITHOUT_TORCH

# A model's logits and a gradient, and what jax says about its cache.
RUN = (
    WITHOUT_TORCH
    + """
import collections, hashlib, json, sys
import jax, numpy as np
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.split("/")[-1]]))
import jaxsp
from jaxsp import compile_cache
from jaxsp.models import decoder
compile_cache.MIN_SECONDS = 0.0  # which programs are kept must not depend on how fast they compile here
model = jaxsp.load_model(sys.argv[1], dtype="float32")
ids = np.arange(3, 40)[None]
def loss(x):
    return decoder.prefill(model.params, model.config, x).values.sum()
results = model.logits(ids), jax.jit(jax.grad(loss))(model.embed(ids))
digest = hashlib.sha256(b"".join(np.asarray(result).tobytes() for result in results)).hexdigest()
print(json.dumps([digest, events["cache_hits"], events["cache_misses"]]))
"""
)
SETTINGS = """
import json, jax
from jaxsp import compile_cache
jax.config.update("jax_compilation_cache_max_size", 7)
compile_cache.enable(), compile_cache.enable()
print(json.dumps([jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size]))
"""


@pytest.fixture
def run(python, cache, monkeypatch):
    """Runs a script with warnings as errors; gives what it printed and what it said beside that."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)

    def run(script, *arguments, **environment):
        environment = {"JAXSP_CACHE": str(cache), "JAXSP_COMPILE_CACHE": "", **environment}
        done = python("-W", "error", "-c", script, *map(str, arguments), env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    return run


@pytest.mark.slow
def test_a_second_process_compiles_nothing_and_computes_the_same(run, cache, tiny_directory):
    (without, *counts), _ = run(RUN, tiny_directory, JAXSP_COMPILE_CACHE="off")
    assert counts == [0, 0]
    assert not cache.exists()
    (first, hits, misses), _ = run(RUN, tiny_directory)
    assert hits == 0
    assert misses > 2
    programs = cache / "programs"
    assert programs.stat().st_mode & 0o777 == 0o700
    (second, hits, new), _ = run(RUN, tiny_directory)
    assert (hits, new) == (misses, 0)
    assert without == first == second

    # A process that was killed while writing leaves half a file, and so does a disk that is full.
    half, torn = sorted(programs.glob("jit*-cache"), key=lambda file: file.stat().st_size)[-2:]
    half.write_bytes(half.read_bytes()[:100])
    torn.write_bytes(b"")
    (damaged, hits, new), said = run(RUN, tiny_directory)
    assert damaged == first
    assert (hits, new) == (misses - 2, 2)  # both are replaced
    assert half.stat().st_size > 100
    assert torn.stat().st_size
    assert run(RUN, tiny_directory)[0] == [first, misses, 0]
    assert said.replace("[transformers]", "").count("\n") <= 1


def test_the_programs_not_used_for_longest_go(run, cache, monkeypatch):
    programs = cache / "programs"
    programs.mkdir(parents=True)
    for number in range(3):
        file = programs / f"{number}-cache"
        file.write_bytes(zlib.compress(bytes(100)) + bytes(1000))
        os.utime(file, (number, number))
    monkeypatch.setattr(compile_cache, "MAX_BYTES", 2500)
    compile_cache._prepare(programs)
    assert sorted(file.name for file in programs.glob("*-cache")) == ["1-cache", "2-cache"]


def test_a_folder_that_cannot_be_made_is_one_line(run, cache):
    cache.write_text("a file")
    settings, said = run(SETTINGS)  # which calls it twice
    assert settings == [None, 7]
    assert said.startswith("Compiled programs are not kept for the next run: ")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_what_the_user_has_chosen_stays(run, cache, tmp_path):
    assert run(SETTINGS)[0] == [str(cache / "programs"), 7]
    assert run(SETTINGS, JAXSP_COMPILE_CACHE="OFF")[0] == [None, 7]
    own = str(tmp_path / "own")
    assert run(SETTINGS, JAX_COMPILATION_CACHE_DIR=own)[0] == [own, 7]
    several = "import jax; jax.process_count = lambda: 2\n" + SETTINGS
    assert run(several)[0] == [None, 7]


@pytest.mark.parametrize(
    ("platform", "version", "readable"),
    [
        ("linux", (0, 7, 2), True),
        ("darwin", (0, 7, 2), False),
        ("linux", (0, 9, 1), False),
        ("linux", (0, 10, 1), False),
        ("darwin", (0, 10, 2), True),
        ("linux", (0, 12, 0, 1), True),
    ],
)
def test_where_cpu_programs_can_be_read_back(monkeypatch, platform, version, readable):
    monkeypatch.setattr(compile_cache.sys, "platform", platform)
    assert compile_cache._readable(version) is readable


def test_a_cpu_whose_programs_cannot_be_read_back_has_no_cache(monkeypatch, cache):
    monkeypatch.setenv("JAXSP_COMPILE_CACHE", "")
    monkeypatch.setattr(jax, "__version_info__", (0, 9, 1))
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    compile_cache.enable()
    assert not cache.exists()


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXSP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compile_cache.cache_folder() == tmp_path / "xdg" / "jaxsp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(compile_cache.Path, "home", lambda: tmp_path)
    assert compile_cache.cache_folder() == tmp_path / ".cache" / "jaxsp"
    monkeypatch.setenv("JAXSP_CACHE", str(tmp_path / "here"))
    assert compile_cache.cache_folder() == tmp_path / "here"
