"""Random Llamas in the layout of Hugging Face, of any size, with a token for each byte."""

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
    """A ``config.json`` of two layers with grouped queries."""
    return {
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
        "bos_token_id": 0,
        "pad_token_id": None,
        **changes,
    }


def tokenizer(chat_template: str | None = CHAT_TEMPLATE):
    """One token a byte, and three control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
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


def write(directory: Path, **changes: Any) -> Path:
    """A whole model directory; matrices keep a signal's size."""
    directory.mkdir(parents=True, exist_ok=True)
    sizes = config(**changes)
    (directory / "config.json").write_text(json.dumps(sizes))
    save_file(_tensors(sizes), directory / "model.safetensors")
    tokenizer().save_pretrained(directory)
    return directory


def _tensors(sizes: dict[str, Any]) -> dict[str, np.ndarray]:
    random, width = np.random.default_rng(0), sizes["hidden_size"]
    heads, kv = (sizes[f"num_{name}_heads"] * sizes["head_dim"] for name in ("attention", "key_value"))
    q, k, inner = (heads, width), (kv, width), (sizes["intermediate_size"], width)
    layer = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": k, "self_attn.o_proj": q[::-1]}
    layer |= {"mlp.gate_proj": inner, "mlp.up_proj": inner, "mlp.down_proj": inner[::-1]}
    layer |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    shapes = {"model.embed_tokens": (sizes["vocab_size"], width), "lm_head": (sizes["vocab_size"], width)}
    shapes |= {
        f"model.layers.{i}.{name}": shape
        for i in range(sizes["num_hidden_layers"])
        for name, shape in layer.items()
    }

    def values(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return random.standard_normal(shape, np.float32) / np.float32(shape[1] ** 0.5)

    return {f"{name}.weight": values(shape) for name, shape in {**shapes, "model.norm": (width,)}.items()}
