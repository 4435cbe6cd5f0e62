"""Host memory and time of loading a synthetic checkpoint of more than 1 GB.

python -m experiments.decoder_speed.loading [--dtype T]
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from jaxsp.artifact import environment
from tests import tiny

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Run:
    """Measure, print, and write loading.json."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """That the float32 checkpoint is loaded in."""
    out: Path = HERE


def memory(kind: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text("utf-8")
    found = re.search(rf"{kind}:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def child(directory: str, dtype: str) -> None:
    """Loads a model and prints what that took, beyond a process that has everything imported."""
    import jaxsp

    with tempfile.TemporaryDirectory() as folder:  # whatever must be imported is
        jaxsp.load_model(tiny.write(Path(folder), with_tokenizer=False), tokenizer=None)
    before, started = memory("VmRSS"), time.perf_counter()
    jaxsp.load_model(directory, dtype=dtype, tokenizer=None)
    print(json.dumps({"peak": memory("VmHWM") - before, "seconds": time.perf_counter() - started}))


def main() -> None:
    run = tyro.cli(Run)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tiny.write(
            Path(folder),
            with_tokenizer=False,
            vocab_size=64_000,
            hidden_size=1024,
            intermediate_size=4096,
            head_dim=256,
            num_hidden_layers=10,
        )
        size = (Path(folder) / "model.safetensors").stat().st_size
        for dtype in run.dtypes:
            module = "experiments.decoder_speed.loading"
            code = f"from {module} import child; child({folder!r}, {dtype!r})"
            done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            row = {"dtype": dtype, "checkpoint": size, **json.loads(done.stdout.splitlines()[-1])}
            rows.append({**row, "peak_of_checkpoint": row["peak"] / size})
            print(
                f"{dtype}: {size / 1e9:.2f} GB in {row['seconds']:.1f} s, peak"
                f" {rows[-1]['peak_of_checkpoint']:.2f} times the checkpoint"
            )
    file = run.out / "loading.json"
    result = {"rows": rows, "environment": environment()}
    file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"Written: {file}")


if __name__ == "__main__":
    main()
