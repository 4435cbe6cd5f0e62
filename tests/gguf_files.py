"""Small GGUF files, written by the gguf package: what the tests of the reader run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from jaxsp.models.gguf import converted
from tests import tiny

# What tiny's models have that GGUF can't hold: windows in Qwen 2, any scale of Gemma's attention.
CONFIGS = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False},
    "qwen3": {"model_type": "qwen3"},
    "gemma3": {"model_type": "gemma3_text", "query_pre_attn_scalar": 8},
}


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order that llama.cpp's converter gives query and key rows of a llama."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def metadata(architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """The fields that llama.cpp's converter writes for a configuration."""
    vocabulary = tiny.tokenizer().get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    rope = config["rope_parameters"]
    fields: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    if "full_attention" in rope:
        fields["rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
        fields["attention.sliding_window"] = config["sliding_window"]
        fields["attention.sliding_window_pattern"] = [
            kind == "sliding_attention" for kind in config["layer_types"]
        ]
        rope = rope["full_attention"]
    fields["rope.freq_base"] = rope["rope_theta"]
    if "factor" in rope:
        fields |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    tokenizer = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": words,
        "token_type": [3 if word in tiny.SPECIAL else 1 for word in words],
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
    }
    return {
        **{f"{architecture}.{name}": value for name, value in fields.items()},
        **{f"tokenizer.ggml.{name}": value for name, value in tokenizer.items()},
        "tokenizer.chat_template": tiny.CHAT_TEMPLATE,
    }


def write_gguf(
    path: Path,
    architecture: str = "llama",
    fields: dict[str, Any] | None = None,
    tensors: dict[str, tuple[np.ndarray, Kind]] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """The tiny model as llama.cpp's converter would write it; gives its configuration.

    Args:
      fields: more metadata, or other; ``None`` for a field that is to be missing.
      tensors: more tensors, or others, by their names in GGUF, as stored.
      changes: to the configuration.
    """
    config = tiny.config(**{**CONFIGS.get(architecture, {}), **changes})
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**metadata(architecture, config), **(fields or {})}.items():
        if value is not None:
            add = {
                bool: writer.add_bool,
                int: writer.add_uint32,
                float: writer.add_float32,
                str: writer.add_string,
                list: writer.add_array,
            }[type(value)]
            add(name, value)
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], config["num_hidden_layers"])
    stored = {}
    for name, tensor in tiny.tensors(config).items():
        its = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if architecture == "llama" and "q_proj" in name:
            tensor = interleave(tensor, config["num_attention_heads"])
        elif architecture == "llama" and "k_proj" in name:
            tensor = interleave(tensor, config["num_key_value_heads"])
        elif architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        stored[its] = tensor, Kind.F32
    for name, (tensor, kind) in {**stored, **(tensors or {})}.items():
        writer.add_tensor(name, tensor, raw_dtype=None if kind == Kind.F32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((converted(path) / "config.json").read_text("utf-8"))


BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPM = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *BYTES],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256],
    "tokenizer.ggml.scores": [0.0] * 259,
}
