"""A ``.gguf`` file, written out once as an ordinary model directory in the cache.

Weights are dequantised to float32, rows of the query and key projections put back into the order of
Hugging Face checkpoints (the converter of llama.cpp interleaves them), and the tokenizer rebuilt from
the file's vocabulary and merges, without torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxsp.typing import UserError

CONVERSION = 1  # raise when what is written changes: older conversions are then not reused

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cache_root() -> Path:
    """Where conversions are kept: ``$JAXSP_CACHE``, else ``jaxsp`` in the user's cache folder."""
    if chosen := os.environ.get("JAXSP_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxsp"


def converted(path: Path) -> Path:
    """The model directory made from a GGUF file; made now if the cache does not have it.

    Args:
      path: the ``.gguf`` file.

    Returns:
      A folder with ``config.json``, ``model.safetensors`` and the tokenizer's files.

    Raises:
      UserError: the file is damaged, or of an architecture, tokenizer or rope type not supported.
    """
    stat = path.stat()
    identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {CONVERSION}"
    target = cache_root() / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        try:
            _convert(path, scratch)
        except KeyError as error:
            raise UserError(f"{path} lacks the metadata field {error}.") from error
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same result
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(path: Path, directory: Path) -> None:
    import gguf
    from safetensors.numpy import save_file

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader raises whatever a damaged header runs into
        raise UserError(f"{path} is not a readable GGUF file ({error}).") from error
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path} holds a {architecture!r} model; jaxsp reads 'llama' from GGUF.")

    tensors = {}
    for tensor in reader.tensors:
        name = _hugging_face_name(tensor.name, path)
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise UserError(f"{path}: tensor {tensor.name} ({kind}) can't be read.") from error
        values = values.reshape(tuple(int(n) for n in tensor.shape[::-1]))
        if name.endswith("q_proj.weight"):
            values = _deinterleave(values, fields["llama.attention.head_count"])
        elif name.endswith("k_proj.weight"):
            values = _deinterleave(values, fields["llama.attention.head_count_kv"])
        tensors[name] = np.ascontiguousarray(values, np.float32)
    save_file(tensors, directory / "model.safetensors")

    config = _config(fields, tied="lm_head.weight" not in tensors, path=path)
    (directory / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    _tokenizer(fields, path).save_pretrained(directory)


def _hugging_face_name(name: str, path: Path) -> str:
    if name in _TENSORS:
        return _TENSORS[name]
    match name.split("."):
        case ["blk", layer, part, kind] if part in _LAYER_TENSORS:
            return f"model.layers.{layer}.{_LAYER_TENSORS[part]}.{kind}"
    raise UserError(f"{path} holds the tensor {name}, which a llama model has no place for.")


def _deinterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """``[H·F, D]`` with each head's pairs side by side, to halves as Hugging Face stores them."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _config(fields: dict[str, Any], tied: bool, path: Path) -> dict[str, Any]:
    if fields.get("llama.rope.scaling.type", "none") != "none":
        kind = fields["llama.rope.scaling.type"]
        raise UserError(f"{path} scales its rope by {kind!r}, which jaxsp does not read from GGUF.")
    heads = int(fields["llama.attention.head_count"])
    width = int(fields["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields.get("llama.attention.head_count_kv", heads)),
        "head_dim": int(fields.get("llama.rope.dimension_count", width // heads)),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "rms_norm_eps": float(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": tied,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
    }


def _tokenizer(fields: dict[str, Any], path: Path):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # llama.cpp's `pre` names the splitting rules; these give its exact ids.
    splitters = {
        "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True)],
        "gpt-2": list,
    }
    kind, pre = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in splitters:
        raise UserError(
            f"{path} has a {kind!r} tokenizer with splitting rules {pre!r}; from GGUF jaxsp reads"
            f" 'gpt2' tokenizers with {sorted(splitters)}. Use the model's original directory."
        )
    words = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", [])]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splitters[pre](), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control, user_defined = 3, 4  # llama.cpp's token types
    for word, word_type in zip(words, fields["tokenizer.ggml.token_type"], strict=True):
        if word_type == control:
            tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False)])
        elif word_type == user_defined:
            tokenizer.add_tokens([AddedToken(word, special=False, normalized=False)])

    def token(role: str) -> str | None:
        i = fields.get(f"tokenizer.ggml.{role}_token_id")
        return None if i is None else words[i]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=int(fields["llama.context_length"]),
        clean_up_tokenization_spaces=False,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
    )
