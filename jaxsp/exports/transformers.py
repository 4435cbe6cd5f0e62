"""A cache of keys and values for transformers alone, with a loader.

One form for all kinds: of input vectors, too, what the model makes of them is stored. So there is one loader,
a model's own scale of its input vectors doesn't matter, and the question is all that is left to read;
``peft`` and ``vllm`` hold the vectors. The loader is as short as can be: what it needs lies beside it in the
form in which it is used, and biases are added by a file of its own, in exports that have some.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from jaxsp.exports.prefix import NEVER, Held, place as place, weights as weights
from jaxsp.exports.question import around, stop_ids, weights_probe
from jaxsp.files import atomic_write

CONSUMERS = Path(__file__).parent / "consumers"
SCRIPTS = {"load.py": "transformers.py"}
NEEDS = ("torch", "transformers", "safetensors")
LOADED_BY = "`transformers/load.py`, as a `DynamicCache`: every kind"
USE = """\
With `pip install torch transformers safetensors`, in this folder:

```python
from load import answer
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (auto.from_pretrained("{model}") for auto in (AutoModelForCausalLM, AutoTokenizer))
print(answer(model, tokenizer, "How long is the cable?"))
```

The model may be in any dtype, on any device. `load_prefix(model)` in `load.py` gives a new cache, which
`generate` or the model itself goes on from; `answer` answers greedily, as `jaxsp ask` does.{biases}"""

_BIASES = """

This soft prompt has slots with biases, or some that a sliding window leaves out: `biases.py` adds both to the
attention's mask, in eager attention."""

_PLAIN = {
    "from transformers import DynamicCache": "from biases import biased_cache",
    "return DynamicCache(": "return biased_cache(model, ARRAYS, ",
}
"""Lines of the loader where there is no bias, and in their place where there is one."""

GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""Options of ``generate`` for the answer of ``ask``: those that a model's own defaults often change."""


def write(held: Held, out: Path, queries: Sequence[str] = ()) -> dict[str, str]:
    """Writes ``prefix.safetensors``, ``question.json`` and, where there are biases, a loader of its own.

    The arrays are ``keys_values`` ``[2, L, 1, G, N, F]``; ``rows`` and ``entries`` of the embedding table;
    with biases ``bias`` ``[L, H, N]`` and ``until`` ``[L, N]``.

    Returns:
      Words to fill ``USE`` with.
    """
    config, words = held.model.config, {"biases": ""}
    rows, entries = weights_probe(held.model)
    arrays = {"keys_values": np.stack([held.keys, held.values])[:, :, None], "rows": rows, "entries": entries}
    if held.bias is not None or held.until is not None:
        G, N = held.keys.shape[1:3]
        bias = np.zeros((config.layers, G, N), np.float32) if held.bias is None else held.bias
        arrays["bias"] = np.repeat(bias, config.heads // G, axis=1)
        arrays["until"] = np.full((config.layers, N), NEVER) if held.until is None else held.until
        words["biases"] = _BIASES
        _write_biased(out)
    atomic_write(out / "prefix.safetensors", save({k: np.ascontiguousarray(v) for k, v in arrays.items()}))
    known, ends = around(held.prompt, held.model, queries), stop_ids(held.prompt, held.model)
    # Of the tokens in the cache, ``generate`` counts the ids and reads none.
    known["before_ids"] = [0] * held.slots + known["before_ids"]
    known |= {
        "model": held.model.short_name,
        "plain": {"add_special_tokens": False, "split_special_tokens": True},
        "ends": ends,
        "greedy": {**GREEDY, "max_new_tokens": 128, "eos_token_id": ends or None, "pad_token_id": 0},
    }
    atomic_write(out / "question.json", json.dumps(known, indent=2, ensure_ascii=False) + "\n")
    return words


def _write_biased(out: Path) -> None:
    text = (CONSUMERS / SCRIPTS["load.py"]).read_text("utf-8")
    for plain, biased in _PLAIN.items():
        assert text.count(plain) == 1
        text = text.replace(plain, biased)
    atomic_write(out / "load.py", text)
    atomic_write(out / "biases.py", (CONSUMERS / "biases.py").read_text("utf-8"))
