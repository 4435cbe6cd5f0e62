"""An adapter of PEFT: ``PROMPT_TUNING`` of input vectors, ``CARTRIDGE`` of keys and values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from jaxsp.exports.prefix import Held, place as place, weights as weights
from jaxsp.files import atomic_write
from jaxsp.models.load import hub_id
from jaxsp.prompts.initializers import ABSENT
from jaxsp.typing import UserError

CONFIG, ARRAYS = "adapter_config.json", "adapter_model.safetensors"
SCRIPTS = {"load.py": "peft.py", "question.py": "question.py"}
NEEDS = ("torch", "transformers", "peft")
LOADED_BY = '`PeftModel.from_pretrained(model, "peft/")`: input vectors, or keys and values without biases'
USE = """\
```sh
pip install torch transformers peft
python load.py {model} "How long is the cable?"
```

`PeftModel.from_pretrained(model, folder)` puts the soft prompt, and the chat's text before it, in front of
what the model reads. What it then reads must be what `encode` in `question.py` gives: the text between the
soft prompt and the question, the question, and the text that the answer begins after. `load.py` does that.

`answer` in `load.py` reads all anew for each token. PEFT's `generate` is not used: PEFT 0.21.2 with
transformers 5.24 puts the soft prompt in front of every new token again, and so gives another answer.

`jaxsp import-peft` reads this folder again, also when PEFT has trained the adapter further in it."""


def write(held: Held, out: Path, queries: Sequence[str] = ()) -> dict[str, str]:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
      UserError: the prompt has biases, which PEFT has no place for.
    """
    config = held.model.config
    if held.vectors is not None:
        tensor = held.vectors
        own = {"peft_type": "PROMPT_TUNING", "token_dim": config.width, "num_attention_heads": config.heads,
               "prompt_tuning_init": "RANDOM"}  # fmt: skip
    else:
        _check_biases(held)
        L, G, N, F = held.keys.shape
        both_NLXGF = np.stack([held.keys, held.values], axis=1).transpose(3, 0, 1, 2, 4)
        tensor = both_NLXGF.reshape(N, L * 2 * G * F)
        own = {"peft_type": "CARTRIDGE", "token_dim": G * F, "num_attention_heads": G,
               "num_frozen_tokens": 0}  # fmt: skip
    adapter = {
        **own,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub_id(held.model.name),
        "inference_mode": True,
        "num_layers": config.layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": held.slots,
    }
    atomic_write(out / CONFIG, json.dumps(adapter, indent=2, sort_keys=True) + "\n")
    arrays = {"prompt_embeddings": np.ascontiguousarray(tensor, np.float32)}
    atomic_write(out / ARRAYS, save(arrays, {"format": "pt"}))
    return {}


def _check_biases(held: Held) -> None:
    if held.until is not None and not held.until.all():
        raise UserError(
            "PEFT can't hold this prompt: a sliding window of the model is shorter than the document, and"
            " hides the chat's first tokens from the question; export --to transformers, or train with --kind"
            " embedding."
        )
    if held.bias is not None:
        what = "heads with different numbers of slots" if (held.bias < ABSENT / 2).any() else "slots' biases"
        raise UserError(
            f"PEFT can't hold this prompt of kind {held.prompt.kind}: it has no place for {what}; export --to"
            " transformers, or train with --kind embedding, or with --kind key_value --initial first --rates"
            " bias=0."
        )
