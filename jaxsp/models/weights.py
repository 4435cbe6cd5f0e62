"""Checkpoint files (safetensors, one or sharded) to a parameter tree, with nothing missing or left over."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from jaxsp.models.config import DecoderConfig
from jaxsp.models.decoder import parameter_shapes
from jaxsp.typing import Params, UserError

# Buffers that old checkpoints carry and that follow from the config.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order.

    Raises:
      UserError: there are none, or the index names one that is not there.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is not a valid weight index; download it again.") from error
        files = [directory / name for name in names]
        if absent := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{directory} lacks the weight file {absent[0]} that its index names.")
        return files
    file = directory / "model.safetensors"
    if not file.is_file():
        raise UserError(
            f"{directory} holds no weights: neither model.safetensors nor"
            " model.safetensors.index.json is there."
        )
    return [file]


class Checkpoint:
    """Open safetensors files as one mapping from tensor name to array, each read when asked for."""

    def __init__(self, files: list[Path], stack: contextlib.ExitStack) -> None:
        self._handles: dict[str, Any] = {}
        for file in files:
            try:
                handle = stack.enter_context(safe_open(file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file} is not a complete safetensors file ({error}); download it again."
                ) from error
            self._handles.update(dict.fromkeys(handle.keys(), handle))

    def names(self) -> set[str]:
        return set(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handles[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        return self._handles[name].get_tensor(name)


def load_params(files: list[Path], config: DecoderConfig, names: dict[str, str]) -> Params:
    """Reads a checkpoint into the decoder's parameter tree, in ``config.dtype``.

    Args:
      files: safetensors files, from ``weight_files``.
      config: the decoder that the weights are for.
      names: the family's ``WEIGHTS``.

    Returns:
      The parameter tree, on the default device; layers stacked along the first axis.

    Raises:
      UserError: a tensor is missing, left over or of another shape, or a file is truncated.
    """
    expected: dict[str, Any] = {
        "/".join(path): leaf for path, leaf in flatten_dict(parameter_shapes(config)).items()
    }
    tensors = {path: list(_tensor_names(names[path], config.layers)) for path in expected}
    with contextlib.ExitStack() as stack:
        checkpoint = Checkpoint(files, stack)
        present = {name for name in checkpoint.names() if not _DERIVED.fullmatch(name)}
        wanted = {name for group in tensors.values() for name in group}
        if config.tied_head:
            present = _without_tied_copy(checkpoint, present, names)
        if missing := sorted(wanted - present):
            raise UserError(
                f"The checkpoint lacks {_some(missing)}, which its config.json asks for."
            )
        if extra := sorted(present - wanted):
            raise UserError(
                f"The checkpoint holds {_some(extra)}, which its config.json has no place for."
            )
        params = {
            tuple(path.split("/")): _read(checkpoint, tensors[path], leaf, path.endswith("/kernel"))
            for path, leaf in expected.items()
        }
    return unflatten_dict(params)


def fingerprint(files: list[Path]) -> str:
    """SHA-256 over each tensor's name, shape, dtype and 16 blocks of its bytes spread over it.

    A full hash of a large model would take longer than using it; any training changes these blocks.
    """
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        checkpoint = Checkpoint(files, stack)
        for name in sorted(checkpoint.names()):
            data = checkpoint.read(name)
            digest.update(f"{name} {data.shape} {data.dtype}".encode())
            flat = data.reshape(-1).view(np.uint8)
            block = 4096
            starts = np.linspace(0, max(0, flat.size - block), 16).astype(np.int64)
            for start in starts:
                digest.update(flat[start : start + block].tobytes())
    return digest.hexdigest()


def _tensor_names(template: str, layers: int) -> Iterator[str]:
    if "{layer}" in template:
        yield from (template.format(layer=layer) for layer in range(layers))
    else:
        yield template


def _without_tied_copy(
    checkpoint: Checkpoint, present: set[str], names: dict[str, str]
) -> set[str]:
    # Some writers store a tied head a second time: harmless when it is the same matrix.
    head, table = names["lm_head/embedding"], names["embed_tokens/embedding"]
    if head in present and table in present:
        if not np.array_equal(checkpoint.read(head), checkpoint.read(table)):
            raise UserError(
                f"config.json says that the head is tied, but {head} differs from {table};"
                " set tie_word_embeddings to false if the head is meant."
            )
        return present - {head}
    return present


def _read(
    checkpoint: Checkpoint, group: list[str], leaf: jax.ShapeDtypeStruct, transpose: bool
) -> jax.Array:
    stacked = leaf.shape[0] == len(group) and len(leaf.shape) > 1 and "layers" in group[0]
    shape = leaf.shape[1:] if stacked else leaf.shape
    stored = shape[::-1] if transpose else shape
    out = np.empty(leaf.shape, leaf.dtype)
    places: Any = out if stacked else [out]
    for place, name in zip(places, group, strict=True):
        if checkpoint.shape(name) != stored:
            raise UserError(
                f"Tensor {name} has shape {list(checkpoint.shape(name))}, but config.json makes it"
                f" {list(stored)}."
            )
        tensor = checkpoint.read(name)
        place[...] = tensor.T if transpose else tensor
    return jnp.asarray(out)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ("tensor " if len(names) == 1 else "tensors ") + ", ".join(names[:3]) + more
