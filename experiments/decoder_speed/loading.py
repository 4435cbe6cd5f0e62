"""Host memory and time of loading a synthetic checkpoint of more than 1 GB."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments import random_llama

SIZES = {
    "vocab_size": 64_000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "head_dim": 256,
    "num_hidden_layers": 10,
}


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
        jaxsp.load_model(random_llama.write(Path(folder)), tokenizer=None)
    before, started = memory("VmRSS"), time.perf_counter()
    jaxsp.load_model(directory, dtype=dtype, tokenizer=None)
    print(json.dumps({"peak": memory("VmHWM") - before, "seconds": time.perf_counter() - started}))


def measure(full: bool) -> dict[str, Any]:
    """Loads a float32 checkpoint in both dtypes, each in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        random_llama.write(Path(folder), **SIZES if full else {})
        size = (Path(folder) / "model.safetensors").stat().st_size
        for dtype in ("float32", "bfloat16"):
            code = f"from {__name__} import child; child({folder!r}, {dtype!r})"
            done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            row = {"dtype": dtype, "checkpoint": size, **json.loads(done.stdout.splitlines()[-1])}
            rows.append({**row, "peak_of_checkpoint": row["peak"] / size})
    return {"rows": rows}


def line(found: dict[str, Any]) -> str:
    """The results in a sentence."""
    loads = (
        f"as {row['dtype']} {row['seconds']:.1f} s, {row['peak_of_checkpoint']:.2f} times the checkpoint at"
        " the peak"
        for row in found["rows"]
    )
    return (
        f"Loading {found['rows'][0]['checkpoint'] / 1e9:.2f} GB of float32 safetensors: {'; '.join(loads)}."
    )
