"""Tiny random models in the layout of Hugging Face, made in a second: what most tests run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from experiments import random_llama
from experiments.random_llama import CHAT_TEMPLATE as CHAT_TEMPLATE, SPECIAL as SPECIAL, VOCAB, tokenizer
from jaxsp.models.decoder import parameter_shapes
from jaxsp.models.families import FAMILIES

_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "eos_token_id": 2,
    "bos_token_id": 0,
}
_GEMMA = {
    "num_hidden_layers": 3,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 12,
    "tie_word_embeddings": True,
}
# What each family has beyond the usual sizes, so that its peculiarities show.
_FAMILY: dict[str, dict[str, Any]] = {
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    "gemma3_text": {
        **_GEMMA,
        "rope_parameters": {
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        },
    },
    "mistral": {"sliding_window": 16},
    "phi3": {"sliding_window": 16, "pad_token_id": 0, "original_max_position_embeddings": 512},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "smollm3": {"no_rope_layers": [1, 0]},
}

# Families that are made of what others have, too.
ORDINARY = ("mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")


def config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """A ``config.json`` of two layers with grouped queries, or what comes next to it in a family."""
    if model_type == "gpt2":
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **_GPT2, **changes}
    return random_llama.config(model_type=model_type, **{**_FAMILY.get(model_type, {}), **changes})


def tensors(config: dict[str, Any], seed: int = 0, gain: float = 2.0) -> dict[str, np.ndarray]:
    """Random weights; RandomState, whose numbers never change, so that goldens can be stored.

    Matrices are ``gain`` times what keeps a signal's size: with 2 attention is sharp and no term too small
    to be seen, but training is chaotic: rounding grows five- to tenfold a step, whatever the optimizer.
    """
    from transformers import AutoConfig

    random = np.random.RandomState(seed)
    family = FAMILIES[config["model_type"]]
    decoder = family.config(AutoConfig.for_model(**config), "float32")
    places = family.tensors(decoder)
    out: dict[str, np.ndarray] = {}
    for path, leaf in sorted(flatten_dict(parameter_shapes(decoder), sep="/").items()):
        place, shape = places[path], list(leaf.shape)
        layers = shape.pop(0) if "{layer}" in place.name else 1
        if place.rows:  # one stored tensor holds several matrices: made when its last one comes
            if place.rows[1] != max(p.rows[1] for p in places.values() if p.rows and p.name == place.name):
                continue
            shape[-1] = place.rows[1]
        for name in dict.fromkeys(place.name.format(layer=i) for i in range(layers)):
            if path.endswith("kernel"):
                values = gain * random.standard_normal(shape) / shape[0] ** 0.5
                values = values.T if place.outputs_first else values
            elif path.endswith("embedding"):
                values = 3.0 * random.standard_normal(shape) / shape[1] ** 0.5
            else:
                mean = 1.0 - place.plus if path.endswith("norm/weight") else 0.0
                values = mean + 0.1 * random.standard_normal(shape)
            out[name] = np.ascontiguousarray(values, np.float32)
    return out


def write(
    directory: Path, seed: int = 0, *, gain: float = 2.0, with_tokenizer: bool = True, **changes: Any
) -> Path:
    """A whole model directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(**changes)))
    save_file(tensors(config(**changes), seed, gain), directory / "model.safetensors")
    if with_tokenizer:
        tokenizer().save_pretrained(directory)
    return directory
