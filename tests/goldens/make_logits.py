"""Makes ``logits.npz``: logits of Hugging Face's torch models, for machines without torch.

python -m tests.goldens.make_logits          (needs the group `torch` and the embedded model)
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests import tiny

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "grouped_queries": {},
    "tied_head": {"tie_word_embeddings": True},
    "one_key_head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3_rope": {"rope_parameters": {**_LLAMA3, "rope_theta": 5e5}},
    # How configs looked before transformers 5.
    "llama3_rope_old_layout": {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": _LLAMA3},
    "old_theta": {"rope_parameters": None, "rope_theta": 1e6},
}
IDS = np.random.RandomState(1).randint(0, tiny.VOCAB, (1, 80))
SMOLLM2_TEXT = (
    "The harbour master of Bodø wrote, on 14 May 1932: 'Two boats came in at 6:45, one with"
    " herring.'"
)
SMOLLM2_VOCABULARY = slice(0, None, 97)


def torch_logits(directory: Path, ids: np.ndarray) -> np.ndarray:
    """Logits of Hugging Face's own implementation, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits.numpy()


def main() -> None:
    import jaxsp

    out = {}
    for name, changes in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            directory = tiny.write(Path(folder), with_tokenizer=False, **changes)
            out[name] = torch_logits(directory, IDS)
    model = jaxsp.load_model("smollm2-135m-instruct", dtype="float32")
    ids = np.array([model.tokenizer(SMOLLM2_TEXT).input_ids])
    out["smollm2"] = torch_logits(model.directory, ids)[0][:, SMOLLM2_VOCABULARY]
    np.savez_compressed(Path(__file__).with_name("logits.npz"), **out)


if __name__ == "__main__":
    main()
