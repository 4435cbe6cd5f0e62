"""Makes ``logits.npz``: what Hugging Face's torch models compute, for machines without torch.

python -m tests.goldens.make_logits          (needs the group `torch` and the embedded model)
"""

from __future__ import annotations

import inspect
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
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
# How configs looked before transformers 5: rope_theta beside rope_scaling, no rope_parameters.
_OLD: dict[str, Any] = {"rope_parameters": None, "rope_theta": 5e5}

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied_head": {"tie_word_embeddings": True},
    "llama_one_key_head": {"num_key_value_heads": 1},
    "llama_biases": {"attention_bias": True, "mlp_bias": True},
    "llama_old_theta": _OLD,
    "llama3_rope": {"rope_parameters": {**_LLAMA3, "rope_theta": 5e5}},
    "llama3_rope_old_layout": {**_OLD, "rope_scaling": _LLAMA3},
    # Fields that other families have and this one does not heed.
    "llama_other_fields": {
        "partial_rotary_factor": 0.5,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral_other_fields": {"model_type": "mistral", "partial_rotary_factor": 0.5, "attention_bias": True},
    "gemma3_other_fields": {"model_type": "gemma3_text", "attn_logit_softcapping": 2.0},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}},
    "linear_rope_old_layout": {**_OLD, "rope_scaling": {"type": "linear", "factor": 8.0}},
    "mistral": {"model_type": "mistral"},
    "mistral_without_window": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_yarn": {"model_type": "qwen2", "rope_parameters": {**_YARN, "rope_theta": 1e6}},
    "qwen2_yarn_old_layout": {"model_type": "qwen2", **_OLD, "rope_scaling": _YARN},
    "qwen3": {"model_type": "qwen3"},
    "qwen3_yarn": {
        "model_type": "qwen3",
        "rope_parameters": {
            **_YARN,
            "rope_theta": 1e6,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
            "mscale": 1.2,
            "mscale_all_dim": 0.7,
        },
    },
    "gemma2": {"model_type": "gemma2"},
    "gemma3": {"model_type": "gemma3_text"},
    "gemma3_old_layout": {
        "model_type": "gemma3_text",
        "rope_parameters": None,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gpt2": {"model_type": "gpt2"},
    "phi3": {"model_type": "phi3"},
    "phi3_partial_rope": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
    "olmo2": {"model_type": "olmo2"},
    "smollm3": {"model_type": "smollm3"},
}
"""Tiny random models: every family, every rope type, both layouts of ``config.json``."""

_RANDOM = np.random.RandomState(1)
IDS = _RANDOM.randint(0, tiny.VOCAB, (1, 80))
PREFIX = 6
"""Length of the prefixes: the first embeddings of IDS, or random keys and values."""
POSITIONS, VOCABULARY = slice(PREFIX, None, 9), slice(0, None, 11)
"""The part of the logits that is kept."""
WEIGHTS = _RANDOM.standard_normal((IDS.shape[1] - PREFIX, tiny.VOCAB)).astype(np.float32)
"""The gradients are those of the sum of WEIGHTS · logits."""
SMOLLM2_TEXT = (
    "The harbour master of Bodø wrote, on 14 May 1932: 'Two boats came in at 6:45, one with herring.'"
)
SMOLLM2_VOCABULARY = slice(0, None, 97)


def random_prefix(layers: int, kv_heads: int, head_width: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values ``[L, PREFIX, G, F]`` of tokens that no model has read."""
    random = np.random.RandomState(2)
    shape = (2, layers, PREFIX, kv_heads, head_width)
    keys, values = random.standard_normal(shape).astype(np.float32)
    return keys, values


def load(directory: Path, dtype: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def torch_logits(directory: Path, ids: np.ndarray) -> np.ndarray:
    """Logits of Hugging Face's own implementation, float32."""
    import torch

    with torch.no_grad():
        return load(directory, "float32")(torch.tensor(ids)).logits.numpy()


def torch_answers(directory: Path, prefix: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    """A tiny model's outputs for IDS, computed by Hugging Face's own implementation in float64.

    In float32 each kind of processor rounds them in its own way, by 3e-6 of their range.

    ``logits``; ``embeddings_gradient`` with respect to the first PREFIX input vectors; and, where keys and
    values stand in for the first PREFIX tokens, ``prefix_logits``, ``keys_gradient``, ``values_gradient``.
    """
    import torch
    from transformers import DynamicCache

    model, ids, weights = load(directory, "float64"), torch.tensor(IDS), torch.tensor(WEIGHTS).double()
    # Gemma's embedding layer scales, and its model takes vectors as already scaled: so does ours.
    vectors = model.get_input_embeddings()(ids).detach()
    first = vectors[:, :PREFIX].requires_grad_()
    logits = model(inputs_embeds=torch.cat([first, vectors[:, PREFIX:]], dim=1)).logits
    (logits[0, PREFIX:] * weights).sum().backward()

    cache, given = DynamicCache(), [torch.tensor(part).double().requires_grad_() for part in prefix]
    for layer, (keys, values) in enumerate(zip(*given, strict=True)):
        cache.update(keys.swapaxes(0, 1)[None], values.swapaxes(0, 1)[None], layer)
    where = torch.arange(PREFIX, IDS.shape[1])[None]
    # Before transformers 5.24 the argument had another name.
    known = inspect.signature(model.forward).parameters
    past = {"cache" if "cache" in known else "past_key_values": cache}
    after = model(ids[:, PREFIX:], position_ids=where, **past).logits
    (after[0] * weights).sum().backward()
    answers = {
        "logits": logits[0],
        "embeddings_gradient": first.grad[0],
        "prefix_logits": after[0],
        "keys_gradient": given[0].grad,
        "values_gradient": given[1].grad,
    }
    return {name: answer.detach().numpy() for name, answer in answers.items()}


def sample(answers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The part that is stored: all of the gradients, some of the logits."""
    return {
        name: np.asarray(answer)[POSITIONS, VOCABULARY] if "logits" in name else np.asarray(answer)
        for name, answer in answers.items()
    }


def main() -> None:
    import jaxsp

    out = {}
    for case, changes in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            directory = tiny.write(Path(folder), with_tokenizer=False, **changes)
            config = jaxsp.load_model(directory, tokenizer=None).config
            prefix = random_prefix(config.layers, config.kv_heads, config.head_width)
            for name, answer in sample(torch_answers(directory, prefix)).items():
                out[f"{case}/{name}"] = answer.astype(np.float32)
    model = jaxsp.load_model("smollm2-135m-instruct", dtype="float32")
    assert model.tokenizer is not None
    ids = np.array([model.tokenizer(SMOLLM2_TEXT).input_ids])
    out["smollm2"] = torch_logits(model.directory, ids)[0][:, SMOLLM2_VOCABULARY]
    np.savez_compressed(Path(__file__).with_name("logits.npz"), **out)


if __name__ == "__main__":
    main()
