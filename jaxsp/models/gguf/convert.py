"""A ``.gguf`` file, written out as an ordinary model directory.

Tensors get the names, the order of rows and the norm weights of Hugging Face checkpoints. Float
tensors keep their precision; quantised ones become float32, as 16 bits would round them a second time.
All is done in pieces, so that memory does not grow with the model.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from jaxsp.errors import in_a_line
from jaxsp.files import parse_json
from jaxsp.models.chat import turn_ends
from jaxsp.models.families import FAMILIES
from jaxsp.models.gguf import tokenizer
from jaxsp.models.gguf.reader import Metadata, StoredTensor, read
from jaxsp.models.rope import ROPE_TYPES
from jaxsp.models.weights import Destination, destinations_of
from jaxsp.typing import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PIECE = 1 << 20  # elements written at a time


ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
"""llama.cpp's names of families; and their ``model_type`` and class in ``config.json``."""

_HEAD = "output.weight"  # absent when it is the embedding
# In files of the architecture llama their rows have the two coordinates of a rotary pair side by side.
_PAIRED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes an element of what is written

# Llama 3.1 and later stretch the slow rotary pairs; the file holds only the resulting factors.
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Tokens that end a turn, in files whose metadata names only the one that ends a text.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


@dataclasses.dataclass(frozen=True)
class _Output:
    """A tensor of the checkpoint, made from one of the file."""

    stored: StoredTensor
    heads: int
    """Number of heads that have their rows in pairs, to be put in halves; 0 for none."""
    offset: float
    """To be taken off every element."""

    @property
    def dtype(self) -> str:
        kind = self.stored.kind.name
        return kind if kind in _WIDTHS and not self.offset else "F32"

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The bytes of the tensor, in order."""
        rows, kind = self.stored.rows, self.stored.kind
        order = np.arange(len(rows))
        if self.heads:
            order = order.reshape(self.heads, -1, 2).swapaxes(1, 2).ravel()
        step = max(1, _PIECE * len(rows) // math.prod(self.stored.shape))
        for start in range(0, len(rows), step):
            piece = rows[order[start : start + step]]
            if self.dtype != kind.name or self.offset:
                try:
                    # Types are decoded block by block: one long row is the fastest.
                    with np.errstate(all="ignore"):
                        piece = gguf.dequantize(piece.reshape(1, -1), kind)
                except (NotImplementedError, ValueError) as error:
                    raise UserError(f"its tensor {name} is of type {kind.name}") from error
                piece = piece - np.float32(self.offset) if self.offset else piece
            yield piece


def convert(path: Path, directory: Path) -> None:
    """Writes ``config.json``, ``model.safetensors`` and the tokenizer's files into a folder.

    Raises:
      UserError: the file is damaged, or of an architecture, tokenizer or rope type not supported.
      OSError: the disk is full.
    """
    metadata, tensors = read(path)
    name = metadata.read("general.architecture", str)
    if name not in ARCHITECTURES:
        raise UserError(f"it holds a {name!r} model, but from GGUF jaxsp reads {', '.join(ARCHITECTURES)}")
    if (parts := metadata.read("split.count", int, 1)) != 1:
        raise UserError(f"it is one of {parts} parts of a model; join them with llama-gguf-split")
    config, destinations = _described(_config(metadata, name, tensors))
    outputs = _outputs(name, config, tensors, destinations)
    own = _tokenizer(metadata, config)
    own.save_pretrained(directory)
    config["eos_token_id"] = _stops(metadata, own)
    (directory / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    _write_safetensors(directory / "model.safetensors", outputs)


def _config(metadata: Metadata, name: str, tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """The content of ``config.json``; takes the factors of the rotary pairs out of ``tensors``."""

    def size(field: str, default: int | None = None) -> int:
        value = metadata.read(f"{name}.{field}", int, default)
        if not 0 < value < 1 << 31:
            raise UserError(f"the metadata field {name}.{field} is {value}")
        return value

    if "token_embd.weight" not in tensors:
        raise UserError("it lacks the tensor token_embd.weight")
    words = metadata.read("tokenizer.ggml.tokens", list)
    vocabulary, *wide = tensors["token_embd.weight"].shape
    layers, width, heads = map(size, ("block_count", "embedding_length", "attention.head_count"))
    if wide != [width]:
        raise UserError(f"its embeddings have the width {wide}, but by its metadata {width}")
    if layers > len(tensors):
        raise UserError(f"it has {len(tensors)} tensors for {layers} layers")
    if len(words) > vocabulary:
        raise UserError(f"it has {len(words)} tokens, but embeddings of only {vocabulary}")
    head = size("attention.key_length", width // heads)
    if head > 16 * width:  # no model's; what is made of it would take its size
        raise UserError(f"its heads are {head} wide, the model {width}")
    if head % 2 or size("rope.dimension_count", head) != head:
        raise UserError("its rotary embedding does not turn whole heads")
    if not metadata.read(f"{name}.attention.causal", bool, True):
        raise UserError("its attention is not causal, so it is no language model")
    model_type, class_name = ARCHITECTURES[name]
    config = {
        # Without a version some releases take the tokenizer for one of old, with a known mistake.
        "transformers_version": importlib.metadata.version("transformers"),
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": head,
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": _positive(metadata, f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(metadata, name, head, tensors.pop(_ROPE_FACTORS, None)),
        "tie_word_embeddings": _HEAD not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    match name:
        case "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in tensors
            config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
        case "gemma3":
            config |= _gemma3(metadata, config)
    return config


def _gemma3(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """Sliding windows, which turn by a base of their own, and the scale of attention."""
    layers, head = config["num_hidden_layers"], config["head_dim"]
    window = metadata.read("gemma3.attention.sliding_window", int, 0)
    field = "gemma3.attention.sliding_window_pattern"
    if isinstance(given := metadata.get(field), np.ndarray):
        slides = given[: layers + 1].astype(bool).tolist()  # of one that is too long, enough to see it
    else:
        every = metadata.read(field, int, 6)
        slides = [not every or layer % every != 0 for layer in range(1, layers + 1)]
    if not 0 <= window < 1 << 31 or len(slides) != layers:
        raise UserError(f"its sliding window is {window}, in {len(slides)} of {layers} layers")
    base = _positive(metadata, "gemma3.rope.freq_base_swa", 10000.0)
    cap = metadata.read("gemma3.final_logit_softcapping", float, 0.0)
    # The model with 62 layers (27B) scales by the width of a head it would have without its own.
    scaled_by = config["hidden_size"] // config["num_attention_heads"] if layers == 62 else head
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scaled_by,
        "sliding_window": window or None,
        "layer_types": ["sliding_attention" if window and its else "full_attention" for its in slides],
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": base},
        },
        "final_logit_softcapping": cap or None,
    }


def _rope(metadata: Metadata, name: str, head: int, factors: StoredTensor | None) -> dict[str, Any]:
    """``rope_parameters`` of ``config.json``."""
    scaling = f"{name}.rope.scaling."
    fields = {
        "factor": f"{scaling}factor",
        "original_max_position_embeddings": f"{scaling}original_context_length",
        "beta_fast": f"{scaling}yarn_beta_fast",
        "beta_slow": f"{scaling}yarn_beta_slow",
    }
    known = {f"{scaling}type", f"{scaling}finetuned", *fields.values()}
    unknown = [key for key in metadata if key.startswith(f"{name}.rope.scal") and key not in known]
    kind = metadata.read(f"{scaling}type", str, "linear")
    if unknown or kind not in ("none", "linear", "yarn"):
        raise UserError(f"it scales its rope by {kind!r} {' '.join(unknown)}, which jaxsp can't read")
    plain = {"rope_theta": _positive(metadata, f"{name}.rope.freq_base", 10000.0)}
    given = {theirs: _positive(metadata, ours) for theirs, ours in fields.items() if ours in metadata}
    scaled = kind != "none" and given.get("factor", 1.0) != 1.0
    if factors is not None:
        if scaled:
            raise UserError(f"it scales its rope by both {_ROPE_FACTORS} and {kind!r}")
        return plain | _llama3(factors, plain["rope_theta"], head)
    if not scaled:
        return {"rope_type": "default"} | plain
    if kind == "linear":
        return {"rope_type": "linear", "factor": given["factor"]} | plain
    window = metadata.read(fields["original_max_position_embeddings"], int)
    return {"rope_type": "yarn"} | plain | given | {"original_max_position_embeddings": window}


def _llama3(factors: StoredTensor, theta: float, head: int) -> dict[str, Any]:
    """The parameters that give these factors; Llama's models differ in the largest alone."""
    if factors.shape != (head // 2,) or factors.kind != gguf.GGMLQuantizationType.F32:
        raise UserError(f"its {_ROPE_FACTORS} is not one float32 for each rotary pair")
    found = factors.rows.view(np.float32)[:, 0]
    parameters = {"rope_type": "llama3", "factor": float(found.max()), **_LLAMA3}
    frequencies = theta ** -(np.arange(0, head, 2) / head)
    with np.errstate(all="ignore"):
        expected = frequencies / ROPE_TYPES["llama3"](frequencies, parameters)[0]
    if not np.allclose(found, expected, rtol=1e-4, atol=0.0):
        raise UserError(f"its {_ROPE_FACTORS} scales the rope in a way that is not Llama 3's")
    return parameters


def _positive(metadata: Metadata, field: str, default: float | None = None) -> float:
    value = metadata.read(field, float, default)
    if not 1e-30 < value < 1e30:
        raise UserError(f"the metadata field {field} is {value}")
    return float(str(np.float32(value)))  # 1e-05 and not the float32 next to it


def _stops(metadata: Metadata, own: PreTrainedTokenizerFast) -> int | list[int] | None:
    """The tokens that end a turn or a text, by the file, by their names, and by the chat template."""
    named = [*_TURN_ENDS, *(tokenizer.special_token(metadata, role) for role in ("eos", "eot"))]
    vocabulary = own.get_vocab()
    stops = sorted({*(vocabulary[word] for word in named if word in vocabulary), *turn_ends(own)})
    return stops[0] if len(stops) == 1 else stops or None


def _described(config: dict[str, Any]) -> tuple[dict[str, Any], Iterable[Destination]]:
    """The configuration with the defaults of transformers, and the destinations of the model's tensors."""
    from transformers import AutoConfig

    family = FAMILIES[config["model_type"]]
    try:
        config = parse_json(AutoConfig.for_model(**config).to_json_string(use_diff=False), "config.json")
        decoder = family.config(SimpleNamespace(**config), "float32")
        return config, destinations_of(decoder, family.tensors(decoder)).values()
    except Exception as error:  # what the libraries make of sizes that no model has
        raise UserError(f"its metadata describe no model ({in_a_line(error)})") from error


def _outputs(
    name: str, config: dict[str, Any], tensors: dict[str, StoredTensor], destinations: Iterable[Destination]
) -> dict[str, _Output]:
    """The checkpoint's tensors by name, each of the shape that the configuration implies."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], config["num_hidden_layers"])
    known = {}
    for destination in destinations:
        for theirs in destination.names:
            stem, _, kind = theirs.rpartition(".")
            known[f"{names.get_name(stem)}.{kind}"] = theirs, destination
    if missing := known.keys() - tensors.keys():
        raise UserError(f"it lacks the tensor {min(missing)}")
    if extra := tensors.keys() - known.keys():
        raise UserError(f"it holds the tensor {min(extra)}, which jaxsp has no place for")
    outputs = {}
    for ours, tensor in tensors.items():
        theirs, destination = known[ours]
        if tensor.shape != destination.stored_shape:
            raise UserError(
                f"its tensor {ours} is {tensor.shape}, but by its metadata {destination.stored_shape}"
            )
        part = ours.split(".")[-2]
        heads = config[_PAIRED[part]] if name == "llama" and part in _PAIRED else 0
        outputs[theirs] = _Output(tensor, heads, destination.tensor.plus)
    return outputs


def _write_safetensors(path: Path, tensors: dict[str, _Output]) -> None:
    """The length of a JSON header, the header, and the tensors' bytes one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.stored.shape) * _WIDTHS[tensor.dtype]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.stored.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            for piece in tensor.pieces(name):
                file.write(piece.data)


def _tokenizer(metadata: Metadata, config: dict[str, Any]) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.build(metadata),
        chat_template=metadata.read("tokenizer.chat_template", str, "") or None,
        model_max_length=config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        bos_token=tokenizer.special_token(metadata, "bos"),
        eos_token=tokenizer.special_token(metadata, "eos"),
        unk_token=tokenizer.special_token(metadata, "unknown"),
        pad_token=tokenizer.special_token(metadata, "padding"),
    )
