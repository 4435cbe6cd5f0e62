"""Every program of a compression compiles for a TPU, fits one chip, and reads by the Splash kernels.

The TPU's own compiler does it, on a machine without a TPU (``jaxsp/device.py``).
"""

from __future__ import annotations

import importlib
import logging
import pkgutil

import jax
import pytest

import jaxsp
from jaxsp import device
from jaxsp.models import attention
from jaxsp.plan.room import FILL
from jaxsp.training import state
from tests import programs
from tests.tpu_programs import PROGRAMS, TWICE

pytestmark = pytest.mark.tpu

COLAB = {"v5e-1": list(PROGRAMS), "v6e-1": TWICE}
"""The chips that a notebook gets, with the programs compiled for each."""
ROOM = FILL * device.CHIPS["v5e"].memory


WITHIN = {
    "jaxsp.distributions.prompt_prefix",
    "jaxsp.losses.chunked_head._in_chunks",
    "jaxsp.losses.fused._best",
    "jaxsp.models.decoder.embed",
    "jaxsp.models.decoder.empty_prefix",
    "jaxsp.models.decoder.hidden",
    "jaxsp.models.decoder.unembed",
    "jaxsp.typing._grown",
    "jaxsp.typing._joined",
}
"""Parts of the programs of the table, which are also called by themselves."""
ELSEWHERE = {
    "jaxsp.exports.check._logits",
    "jaxsp.exports.from_peft._prefix",
    "jaxsp.models.generation.engine._resized",
    "jaxsp.models.generation.live._put",
    "jaxsp.models.language_model._logits",
}
"""No compression uses them."""


@pytest.fixture(autouse=True)
def in_less_time():
    """Compiled for running it is not: that takes a third longer, and as much memory but for a hundredth."""
    name = "jax_exec_time_optimization_effort"
    before = getattr(jax.config, name)
    jax.config.update(name, -1.0)
    yield
    jax.config.update(name, before)


@pytest.mark.parametrize(("name", "chip"), [(name, chip) for chip, some in COLAB.items() for name in some])
def test_a_program_compiles(name, chip, optimized, caplog):
    attention._say_once.cache_clear()
    made = PROGRAMS[name]()
    with device.programs_for(device.describe(chip)):
        program = made.trace().lower().compile()
    memory = programs.memory(program)
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes < ROOM
    kernels = programs.text(program).count('custom_call_target="tpu_custom_call"')
    assert (kernels > 0) == made.reads
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_no_program_is_left_out():
    """Every jitted function of the package is in the table, or has its reason not to be."""
    found = {}
    for module in pkgutil.walk_packages(jaxsp.__path__, "jaxsp."):
        for name, thing in vars(importlib.import_module(module.name)).items():
            if isinstance(thing, type(state.put)) and thing.__module__ == module.name:
                found[f"{module.name}.{name}"] = thing
    covered = {make().function for make in PROGRAMS.values()}
    left_out = {name for name, thing in found.items() if thing not in covered}
    assert left_out == WITHIN | ELSEWHERE
