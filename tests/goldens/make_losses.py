"""Writes losses.npz: value and gradient of every objective on the tests' problem, by the float64 oracle.

python -m tests.goldens.make_losses
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxsp.losses import OBJECTIVES
from tests.losses import oracle
from tests.losses.problem import INPUTS

FILE = Path(__file__).parent / "losses.npz"


def main() -> None:
    arrays = {}
    for name, entry in OBJECTIVES.items():
        arrays[name] = oracle.ORACLES[name](INPUTS)
        if entry.differentiable:
            student = next(i for i in entry.inputs if i.startswith("student"))
            arrays[f"{name}/gradient"] = oracle.gradient(name, INPUTS, student)
    np.savez_compressed(FILE, **arrays)
    print(FILE)


if __name__ == "__main__":
    main()
