"""A tiny random model in the layout of Hugging Face, made in a second: what most tests run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 256 + len(SPECIAL)


def config(**changes: Any) -> dict[str, Any]:
    """A ``config.json`` for a two-layer llama with grouped queries."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        **changes,
    }


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights; RandomState, whose numbers never change, so that goldens can be stored."""
    random = np.random.RandomState(seed)
    width, mlp, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)

    def vector(size: int, mean: float) -> np.ndarray:
        return (mean + 0.1 * random.standard_normal(size)).astype(np.float32)

    out = {"model.embed_tokens.weight": 3.0 * matrix(config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        out[f"{at}.input_layernorm.weight"] = vector(width, 1.0)
        out[f"{at}.post_attention_layernorm.weight"] = vector(width, 1.0)
        for name, rows, columns in (
            ("q", q, width),
            ("k", kv, width),
            ("v", kv, width),
            ("o", width, q),
        ):
            out[f"{at}.self_attn.{name}_proj.weight"] = 2.0 * matrix(rows, columns)
            if config.get("attention_bias"):
                out[f"{at}.self_attn.{name}_proj.bias"] = vector(rows, 0.0)
        for name, rows, columns in (("gate", mlp, width), ("up", mlp, width), ("down", width, mlp)):
            out[f"{at}.mlp.{name}_proj.weight"] = matrix(rows, columns)
            if config.get("mlp_bias"):
                out[f"{at}.mlp.{name}_proj.bias"] = vector(rows, 0.0)
    out["model.norm.weight"] = vector(width, 1.0)
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = 3.0 * matrix(config["vocab_size"], width)
    return out


def tokenizer(chat_template: str | None = CHAT_TEMPLATE):
    """One token a byte, and three control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        word: i for i, word in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    core = Tokenizer(models.BPE(words, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=chat_template,
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def write(directory: Path, seed: int = 0, *, with_tokenizer: bool = True, **changes: Any) -> Path:
    """A whole model directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(**changes)))
    save_file(tensors(config(**changes), seed), directory / "model.safetensors")
    if with_tokenizer:
        tokenizer().save_pretrained(directory)
    return directory
