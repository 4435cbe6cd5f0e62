"""A cache of keys and values for transformers alone, with a loader.

One form for all kinds: of input vectors, too, what the model makes of them is stored. So there is one loader,
which also holds biases, and the question is all that is left to read; ``peft`` and ``vllm`` hold the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from jaxsp.exports.prefix import NEVER, Held, weights as weights
from jaxsp.files import atomic_write

SCRIPTS = {"load.py": "transformers.py", "question.py": "question.py"}
NEEDS = ("torch", "transformers", "safetensors")
LOADED_BY = "`transformers/load.py`, as a `DynamicCache`: every kind"
USE = """\
```sh
pip install torch transformers safetensors
python load.py "How long is the cable?"
```

`load_prefix` in `load.py` gives the cache, `answer` the greedy answer. The model may be in any dtype. Where
the soft prompt has biases, they are added to the attention mask, in eager attention."""


def write(held: Held, out: Path, queries: Sequence[str] = ()) -> dict[str, str]:
    """Writes ``prefix.safetensors``: ``keys`` and ``values`` ``[L, G, N, F]``; where they are needed also
    ``bias`` ``[L, H, N]`` and ``until`` ``[L, N]``.
    """
    arrays, config = {"keys": held.keys, "values": held.values}, held.model.config
    if held.bias is not None or held.until is not None:
        G, N = held.keys.shape[1:3]
        bias = np.zeros((config.layers, G, N), np.float32) if held.bias is None else held.bias
        arrays["bias"] = np.repeat(bias, config.heads // G, axis=1)
        arrays["until"] = np.full((config.layers, N), NEVER) if held.until is None else held.until
    atomic_write(out / "prefix.safetensors", save({k: np.ascontiguousarray(v) for k, v in arrays.items()}))
    return {}
