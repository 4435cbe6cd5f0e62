"""Every program of a compression compiles for a TPU, fits one chip, and reads by the Splash kernels.

The TPU's own compiler does it, on a machine without a TPU (``jaxsp/device.py``).
"""

from __future__ import annotations

import logging

import jax
import pytest

from jaxsp import device
from jaxsp.models import attention
from jaxsp.plan.room import FILL
from tests import programs
from tests.tpu_programs import PROGRAMS, TWICE

pytestmark = pytest.mark.tpu

COLAB = {"v5e-1": list(PROGRAMS), "v6e-1": TWICE}
"""The chips that a notebook gets, with the programs compiled for each."""
ROOM = FILL * device.CHIPS["v5e"].memory


@pytest.fixture(autouse=True)
def in_less_time():
    """Compiled for running it is not: that takes a third longer, and as much memory but for a hundredth."""
    name = "jax_exec_time_optimization_effort"
    before = jax.config.read(name)
    jax.config.update(name, -1.0)
    yield
    jax.config.update(name, before)


@pytest.mark.parametrize(("name", "chip"), [(name, chip) for chip, some in COLAB.items() for name in some])
def test_a_program_compiles(name, chip, optimized, caplog):
    attention._say_once.cache_clear()
    made = PROGRAMS[name]()
    with device.programs_for(device.describe(chip)):
        program = made.lower().compile()
    memory = programs.memory(program)
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes < ROOM
    kernels = programs.text(program).count('custom_call_target="tpu_custom_call"')
    assert (kernels > 0) == made.reads
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
