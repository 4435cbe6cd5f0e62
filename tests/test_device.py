"""The device that programs are for decides, described or not; and what can't be described."""

from __future__ import annotations

import importlib.metadata
import os
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax.experimental import topologies

from jaxsp import device, plan
from jaxsp.models.sharding import as_mesh
from jaxsp.typing import UserError


@pytest.fixture
def compiler(monkeypatch):
    """Pretends that the installed libtpu has a version, or that there is none."""
    ask, device_of = importlib.metadata.version, device.describe
    device_of.cache_clear()

    def pretend(version: str | None, wanted: str | None = "0.0.42.*"):
        def found(name: str) -> str:
            if name != "libtpu":
                return ask(name)
            if version is None:
                raise importlib.metadata.PackageNotFoundError
            return version

        required = ["numpy>=2", *([f'libtpu=={wanted}; extra == "tpu"'] if wanted else [])]
        monkeypatch.setattr(importlib.metadata, "version", found)
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)

    yield pretend
    device_of.cache_clear()


def refused(name: str) -> str:
    with pytest.raises(UserError) as error:
        device.describe(name)
    said = str(error.value)
    assert "\n" not in said
    assert said.endswith(".")
    return said


@pytest.mark.parametrize("name", ["h100", "v5e", "v5e-3", "v5e-", "v9-4", "v5e:2x2", "", "V5E-1", "v6e-512"])
def test_a_device_that_there_is_not(name, compiler):
    compiler("0.0.42.1")
    said = refused(name)
    assert repr(name) in said
    assert "v5e-N or v6e-N, where N is 1, 4, 8, 16, 32, 64, 128 or 256." in said


def test_a_compiler_that_is_missing_or_another(compiler):
    compiler(None)
    assert "not installed: pip install 'libtpu==0.0.42.*'" in refused("v5e-1")
    compiler("0.0.421.1")
    assert f"goes with jax {jax.__version__}, not 0.0.421.1: pip install 'libtpu==0.0.42.*'." in refused(
        "v5e-1"
    )
    compiler(None, wanted=None)
    assert "pip install 'libtpu'" in refused("v5e-1")


@pytest.mark.parametrize(
    ("version", "wanted"), [("0.0.42.1", "0.0.42.*"), ("0.0.42", "0.0.42.*"), ("0.0.6", "0.0.6"), ("9", None)]
)
def test_a_compiler_that_fits(compiler, monkeypatch, version, wanted):
    (cpu, *_), asked = jax.devices(), []
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)

    def describe(*names: str, **options: Any) -> SimpleNamespace:
        asked.append((names, options, os.environ["TPU_SKIP_MDS_QUERY"]))
        return SimpleNamespace(devices=[cpu])

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    compiler(version, wanted)
    found = device.describe("v5e-8")
    assert asked == [(("v5e:2x4", "tpu"), {"chips_per_host_bounds": (2, 4, 1)}, "1")]
    assert "TPU_SKIP_MDS_QUERY" not in os.environ
    assert (found.compiler, found.devices, found.kind) == (f"libtpu {version}", (cpu,), cpu.device_kind)
    assert found.chip.memory == 2**34


def test_a_topology_that_the_compiler_refuses(compiler, monkeypatch):
    def describe(*_: Any, **__: Any) -> None:
        raise RuntimeError("INVALID_ARGUMENT: no such\ntopology.")

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    compiler("0.0.42.1")
    said = "libtpu 0.0.42.1 can't describe a v6e-4 (INVALID_ARGUMENT: no such topology)."
    assert refused("v6e-4") == said


def test_the_devices_described_are_real_topologies():
    """Each has as many chips as its name says."""
    assert len(device.DEVICES) == 16
    for name, topology in device.DEVICES.items():
        chip, _, count = name.partition("-")
        kind, _, layout = topology.partition(":")
        a, b = map(int, layout.split("x"))
        assert (kind, a * b) == (chip, int(count))


def test_the_default_device_decides_and_not_the_backend(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert device.platform() == "tpu"
    cpu = jax.devices()[3]
    with jax.default_device(cpu):
        assert (device.platform(), device.current()) == ("cpu", cpu)
        assert device.every() == jax.devices()
        assert (len(device.local()), device.processes()) == (8, 1)
    with jax.default_device("gpu"):
        assert device.platform() == "gpu"
    with jax.default_device("cpu"):
        assert (device.platform(), device.current()) == ("cpu", jax.devices()[0])
    assert device.current() == jax.devices()[0]


def test_programs_are_traced_anew_for_another_device(monkeypatch):
    """A choice made for this machine is never taken for a described one."""
    asked = []

    @jax.jit
    def choice(x):
        asked.append(device.platform())
        return x

    x = jax.ShapeDtypeStruct((3,), "float32")
    own = device.Described("v5e-1", device.CHIPS["v5e"], tuple(jax.devices()[1:2]), "libtpu 0")
    choice.trace(x)
    with device.programs_for(own):
        choice.trace(x)
        choice.trace(x)
    with device.programs_for(None):
        choice.trace(x)
    assert len(asked) == 2


def test_a_mesh_over_processes_that_does_not_fit_names_one_that_does(monkeypatch):
    monkeypatch.setattr(device, "every", lambda: [None] * 16)
    monkeypatch.setattr(device, "processes", lambda: 4)
    with pytest.raises(UserError, match="model=8 doesn't, data=4,model=4 does"):
        as_mesh("model=8")


def test_the_devices_of_this_process_are_its_own(monkeypatch):
    """A plan's memory and a manifest's device are those of the default device's system."""
    every = [
        SimpleNamespace(process_index=i // 2, memory_stats=lambda i=i: {"bytes_limit": i}) for i in range(4)
    ]
    monkeypatch.setattr(device, "every", lambda: every)
    assert device.local() == every[:2]
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert device.local() == every[2:]
    assert plan.device_memory(2) == 2
