"""The README's Python runs, on a tiny model instead of the embedded one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import CONTEXT

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs(number, calm_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("manual.md").write_text(CONTEXT)
    code = BLOCKS[number].replace('"smollm2-135m-instruct"', repr(str(calm_directory)))
    exec(compile(code.replace("prompt_length=16", "prompt_length=8"), f"README block {number}", "exec"), {})


def test_the_loop_of_ones_own_is_short():
    (loop,) = (block for block in BLOCKS if "PmapDriver" in block)
    assert len([line for line in loop.splitlines() if line.strip()]) <= 25
