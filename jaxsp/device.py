"""The device that programs are for: this machine's own, or a TPU that is only described.

A TPU's compiler (libtpu) runs on machines without a TPU: it says what a program would take there, and whether
it fits. In ``programs_for(describe("v5e-1"))`` the described TPU is jax's default device, and whatever is
chosen by the functions of this file, as kernels and sizes are, is chosen as in a run there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import importlib.metadata
import os
import re
from collections.abc import Iterator
from typing import Any

import jax

from jaxsp.errors import UserError, in_a_line

Device = Any
"""A device as jax knows it: to type checkers its class is a variable."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip of a generation of TPUs.

    Attributes:
      memory: bytes.
      rate: greatest speed of bfloat16 matrix products, in floating-point operations a second.
    """

    memory: int
    rate: float


CHIPS = {"v5e": Chip(16 * 2**30, 197e12), "v6e": Chip(32 * 2**30, 918e12)}
"""Source: cloud.google.com/tpu/docs/v5e and cloud.google.com/tpu/docs/v6e."""

SLICES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
"""The layouts of so many chips that can be had."""

HOST = 8
"""Chips of one process, at most."""

_HOSTS = {1: (1, 1, 1), 8: (2, 4, 1)}
_USUAL_HOST = (2, 2, 1)
"""Layout of the chips of one process, in a system of so many."""

_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""So that libtpu does not ask the network which TPU this machine has, nor let one process alone compile."""

DEVICES = {f"{chip}-{count}": f"{chip}:{layout}" for chip in CHIPS for count, layout in SLICES.items()}
"""Names of the systems that can be described, with the compiler's own names of their topologies."""


@dataclasses.dataclass(frozen=True)
class Described:
    """A system of TPUs that programs can be compiled for and not run on.

    Attributes:
      name: a key of ``DEVICES``.
      chip: each of its chips.
      devices: these as jax knows them.
      compiler: the compiler and its version.
    """

    name: str
    chip: Chip
    devices: tuple[Device, ...]
    compiler: str

    @property
    def kind(self) -> str:
        """The name of a chip by its maker."""
        return self.devices[0].device_kind


@functools.cache
def describe(name: str) -> Described:
    """The system of this name.

    Args:
      name: a key of ``DEVICES``.

    Raises:
      UserError: there is none of this name, or its compiler is missing, of a version that the installed jax
        doesn't go with, or refuses.
    """
    if name not in DEVICES:
        *counts, last = map(str, SLICES)
        chips = " or ".join(f"{chip}-N" for chip in CHIPS)
        raise UserError(
            f"There is no --device {name!r} to compile for; choose {chips}, where N is"
            f" {', '.join(counts)} or {last}."
        )
    version = _check_compiler(name)
    chip, _, count = name.partition("-")
    host = _HOSTS.get(int(count), _USUAL_HOST)
    from jax.experimental import topologies

    try:
        with _environment():
            found = topologies.get_topology_desc(DEVICES[name], "tpu", chips_per_host_bounds=host)
    except (RuntimeError, ValueError, NotImplementedError) as error:  # jax's own kinds are of the first
        raise UserError(f"libtpu {version} can't describe a {name} ({in_a_line(error, 200)}).") from error
    return Described(name, CHIPS[chip], tuple(found.devices), f"libtpu {version}")


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """``_ENVIRONMENT``, where the user has set nothing else, as long as libtpu starts."""
    ours = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _check_compiler(name: str) -> str:
    """The version of libtpu that is installed.

    Raises:
      UserError: it is not the one that the installed jax names, or there is none.
    """
    wanted = wanted_compiler()
    install = f"pip install '{'libtpu' if wanted is None else f'libtpu=={wanted}'}'"
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"--device {name} needs the TPU's compiler, libtpu, which is not installed: {install} (or"
            " jaxsp[tpu]) brings it, also to a machine without a TPU."
        ) from None
    matches = (wanted is None or fnmatch.fnmatchcase(v, wanted) for v in (version, f"{version}."))
    if not any(matches):
        raise UserError(
            f"--device {name} needs the libtpu that goes with jax {jax.__version__}, not {version}:"
            f" {install}."
        )
    return version


def wanted_compiler() -> str | None:
    """The versions of libtpu that the installed jax names, as ``0.0.42.*``; ``None``: it names none."""
    required = importlib.metadata.requires("jax") or []
    found = (re.match(r"libtpu\s*==\s*([\d.]+(?:\.\*)?)\s*;", line) for line in required)
    return next((match[1] for match in found if match), None)


@contextlib.contextmanager
def programs_for(described: Described | None) -> Iterator[None]:
    """Programs are traced, lowered and compiled for a described system meanwhile; none can be run.

    Args:
      described: the system; ``None`` changes nothing.
    """
    with contextlib.nullcontext() if described is None else jax.default_device(described.devices[0]):
        yield


def platform() -> str:
    """The kind of device that the programs traced now are for: ``cpu``, ``gpu`` or ``tpu``.

    Kernels, dtypes and sizes are chosen by it, and not by ``jax.default_backend()``, which is this machine's
    own. jax keeps the programs of two default devices apart, so that none is taken for the other.

    Example:
      >>> with jax.default_device(jax.devices("cpu")[0]):
      ...     platform()
      'cpu'
    """
    chosen = _chosen()
    if chosen is None:
        return jax.default_backend()
    return chosen if isinstance(chosen, str) else chosen.platform


def current() -> Device:
    """The device that the programs traced now are for, the first of several."""
    chosen = _chosen()
    return every()[0] if chosen is None or isinstance(chosen, str) else chosen


def every() -> list[Device]:
    """All devices of the system that the programs traced now are for, those of all processes."""
    chosen = _chosen()
    if chosen is None or isinstance(chosen, str):
        return jax.devices(chosen)
    return chosen.client.devices()


def local() -> list[Device]:
    """Those of them that this process has; of a system that is only described, its first process."""
    return [one for one in every() if one.process_index == jax.process_index()]


def processes() -> int:
    """The number of processes that such a system has."""
    if _chosen() is None:
        return jax.process_count()
    return len({device.process_index for device in every()})


_DEFAULT = "jax_default_device"
"""An option of jax, which jax's types lack."""


def _chosen() -> Device | str | None:
    """The default device, where one is set."""
    return getattr(jax.config, _DEFAULT)
