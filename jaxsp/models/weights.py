"""Checkpoint files (safetensors, one or sharded) to a parameter tree, with nothing missing or left over."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open

from jaxsp.errors import in_a_line
from jaxsp.files import parse_json, read_json
from jaxsp.models.config import DecoderConfig
from jaxsp.models.decoder import parameter_shapes
from jaxsp.typing import Array, Params, UserError

READERS, READ_BYTES = 4, 2 * 2**20
"""Tensors read at the same time, and the longest piece of one read at once: beside the parameters, loading
holds two of it for each reader."""

_DTYPES = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}  # safetensors' F32 is NumPy's float32

_ALL = slice(None)
_Index = tuple[slice, ...] | None  # what is cut out of an array; None: all of it

# Buffers that old checkpoints carry and that follow from the config: rotary frequencies, GPT-2's masks.
_DERIVED = re.compile(
    r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    r"|(transformer\.)?h\.\d+\.attn\.(masked_)?bias"
)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order.

    Raises:
      UserError: there are none, or the index names one that is not there.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            files = [directory / name for name in names]
            outside = [name for name in names if not _is_inside(directory, name)]
            absent = [file.name for file in files if not file.is_file()]
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise UserError(f"{index} is not a valid weight index; download it again.") from error
        if outside:
            raise UserError(f"{index} names the file {outside[0]!r:.120}, which is not in its folder.")
        if absent:
            raise UserError(f"{directory} lacks the weight file {absent[0]} that its index names.")
        return files
    file = directory / "model.safetensors"
    if not file.is_file():
        raise UserError(
            f"{directory} holds no weights: neither model.safetensors nor"
            " model.safetensors.index.json is there."
        )
    return [file]


def _is_inside(directory: Path, name: str) -> bool:
    """Whether a file of this name is the folder's own: no other folder's, and no link to one.

    In a snapshot of the model hub files are links into the folder of blobs beside it.
    """
    own = directory.resolve()
    homes = [own, own.parents[1] / "blobs"] if own.parent.name == "snapshots" else [own]
    return Path(name).name == name and (directory / name).resolve().parent in homes


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a parameter of the decoder stands in a checkpoint.

    Attributes:
      name: name of the tensor; ``{layer}`` where the layer's number stands.
      rows: which outputs are meant, where several matrices are stored as one.
      outputs_first: a matrix stands there as ``[outputs, inputs]``, as torch's ``Linear`` has it.
      plus: added to what is stored; Gemma stores norm weights less one.
    """

    name: str
    rows: tuple[int, int] | None = None
    outputs_first: bool = True
    plus: float = 0.0


class Content(NamedTuple):
    """A tensor's bytes, summed up."""

    sha256: str
    largest: float
    """Its greatest magnitude; NaN or infinity if it holds one. 0 where it holds no floats."""


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    dtype: str
    """NumPy's name of it; of a type that NumPy does not know, safetensors' own in lower case."""
    shape: tuple[int, ...]
    start: int
    """The file's byte that is the tensor's first."""
    size: int
    """In bytes."""

    def read(self, rows: slice = _ALL) -> np.ndarray:
        """A copy of the tensor, or of some of its rows; no others are read."""
        first, stop, _ = rows.indices(self.shape[0])
        start = self.start + first * (self.size // self.shape[0])
        count = (stop - first) * math.prod(self.shape[1:])
        return np.fromfile(self.file, self.dtype, count, offset=start).reshape(-1, *self.shape[1:])

    def content(self) -> Content:
        """Reads all of it, ``READ_BYTES`` at a time."""
        digest, largest = hashlib.sha256(), 0
        bits = np.dtype(f"u{np.dtype(self.dtype).itemsize}") if "float" in self.dtype else None
        for start in range(0, self.size, READ_BYTES):
            count = min(READ_BYTES, self.size - start)
            data = np.fromfile(self.file, np.uint8, count, offset=self.start + start)
            digest.update(data.data)
            if bits is not None:
                # Without its sign a float's bits, as a number, grow with it; those of NaN are the greatest.
                numbers = data.view(bits)
                numbers &= np.iinfo(bits).max >> 1
                largest = max(largest, int(numbers.max()))
        if bits is None:
            return Content(digest.hexdigest(), 0.0)
        return Content(digest.hexdigest(), float(np.array(largest, bits).view(self.dtype)))


Checkpoint = Mapping[str, Stored]
"""Its tensors by name."""


def stored_tensors(files: list[Path]) -> dict[str, Stored]:
    """Safetensors files as one mapping from name to tensor; no weights are read.

    Raises:
      UserError: a file is damaged.
    """
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy"):  # checks the header, and that the file is as long
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} is not a complete safetensors file ({in_a_line(error)}); download it again."
            ) from error
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = parse_json(opened.read(length), file)
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            first, end = tensor["data_offsets"]
            dtype = re.sub(r"^(BF|F|I|U)(?=\d+$)", lambda kind: _DTYPES[kind[0]], tensor["dtype"]).lower()
            found[name] = Stored(file, dtype, tuple(tensor["shape"]), 8 + length + first, end - first)
    return found


def load_params(
    files: list[Path],
    config: DecoderConfig,
    tensors: Mapping[str, Tensor],
    sharding: Callable[[str, tuple[int, ...]], Sharding] | None = None,
) -> tuple[Params, str]:
    """Reads a checkpoint into the decoder's parameter tree, each tensor straight into its place.

    Beside the parameters themselves the host holds ``READ_BYTES`` of each tensor that is being read, and one
    device's shard of that parameter where the device has a memory of its own.

    Args:
      files: safetensors files, from ``weight_files``.
      config: the decoder that the weights are for.
      tensors: the family's ``tensors(config)``.
      sharding: sharding of the parameter with this path and shape; by default all is on the default device.

    Returns:
      The parameter tree, layers stacked along the first axis; and the weights' ``fingerprint``.

    Raises:
      UserError: a tensor is missing, left over, of another shape or not of floats, or holds what is no number
        in the decoder's dtype; or a file is damaged.
    """
    checkpoint = stored_tensors(files)
    tensors = _as_named(checkpoint, tensors)
    destinations = destinations_of(config, tensors)
    _check_names(checkpoint, destinations, tensors, config)
    for destination in destinations.values():
        destination.check(checkpoint)

    def load(path: str, leaf: jax.ShapeDtypeStruct) -> Array:
        destination = destinations[path.replace("/scale", "/kernel")]
        if config.quantization == "int8" and path.endswith(("/kernel", "/scale")):
            read = functools.partial(destination.read_int8, leaf, checkpoint)
        else:
            read = functools.partial(destination.read, checkpoint)
        if sharding:
            return jax.make_array_from_callback(leaf.shape, sharding(path, leaf.shape), read)
        # Without a wish the arrays stay uncommitted: they follow what they are used with.
        return jax.device_put(read(None), may_alias=True)

    leaves = _leaves(config)
    with ThreadPoolExecutor(READERS) as pool:  # copying a tensor leaves Python to the others, hashing it too
        contents = _contents(checkpoint, pool)
        for destination in destinations.values():
            destination.check_range(contents)
        params = dict(zip(leaves, pool.map(load, leaves, leaves.values()), strict=True))
    return unflatten_dict(params, sep="/"), _fingerprint(checkpoint, contents)


_FULL = ":full"  # what a fingerprint of all bytes ends in; those of 0.1 were of some


def fingerprint(files: list[Path]) -> str:
    """SHA-256 over each tensor's name, shape, dtype and all of its bytes.

    Raises:
      UserError: a file is damaged.
    """
    checkpoint = stored_tensors(files)
    with ThreadPoolExecutor(READERS) as pool:
        return _fingerprint(checkpoint, _contents(checkpoint, pool))


def _contents(checkpoint: Checkpoint, pool: ThreadPoolExecutor) -> dict[str, Content]:
    return dict(zip(checkpoint, pool.map(Stored.content, checkpoint.values()), strict=True))


def _fingerprint(checkpoint: Checkpoint, contents: Mapping[str, Content]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.items()):
        digest.update(f"{name} {tensor.shape} {tensor.dtype} {contents[name].sha256}\n".encode())
    return digest.hexdigest() + _FULL


def is_old(fingerprint: str) -> bool:
    """Whether a fingerprint is one that ``old_fingerprint`` gives."""
    return not fingerprint.endswith(_FULL)


def old_fingerprint(files: list[Path]) -> str:
    """The fingerprint that 0.1 put into its prompts: of 16 blocks of each tensor.

    Raises:
      UserError: a file is damaged.
    """
    digest, block = hashlib.sha256(), 4096
    contents = {file: np.memmap(file, np.uint8, mode="r") for file in files}
    for name, tensor in sorted(stored_tensors(files).items()):
        digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
        data = contents[tensor.file][tensor.start : tensor.start + tensor.size]
        for start in np.linspace(0, max(0, tensor.size - block), 16).astype(np.int64):
            digest.update(data[start : start + block].tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Destination:
    """A parameter and the tensors that it is read from: one a layer, or one."""

    leaf: jax.ShapeDtypeStruct
    tensor: Tensor
    transposed: bool
    outputs: int
    """Outputs of the whole stored tensor, which may hold other matrices, too."""

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.tensor.name

    @property
    def names(self) -> list[str]:
        layers = self.leaf.shape[0] if self.stacked else 1
        return [self.tensor.name.format(layer=layer) for layer in range(layers)]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of each of these tensors."""
        shape = (*self.leaf.shape[self.stacked : -1], self.outputs)
        return shape[::-1] if self.transposed else shape

    def check(self, checkpoint: Checkpoint) -> None:
        for name in self.names:
            if (shape := checkpoint[name].shape) != self.stored_shape:
                raise UserError(
                    f"Tensor {name} has shape {list(shape)}, but config.json makes it"
                    f" {list(self.stored_shape)}."
                )
            if "float" not in (dtype := checkpoint[name].dtype):
                raise UserError(
                    f"Tensor {name} holds {dtype}, not floats: jaxsp reads no quantised safetensors."
                    " Use the original checkpoint, or a GGUF file."
                )

    def check_range(self, contents: Mapping[str, Content]) -> None:
        most = float(jnp.finfo(self.leaf.dtype).max)
        for name in self.names:
            largest = contents[name].largest
            if not math.isfinite(largest):
                raise UserError(
                    f"Tensor {name} holds NaN or infinity; the file is damaged, or its training failed: use"
                    " another checkpoint."
                )
            if largest > most:
                raise UserError(
                    f"Tensor {name} holds {largest:.3g}, but {self.leaf.dtype} ends at {most:.3g}; load it"
                    " with another dtype."
                )

    def read(self, checkpoint: Checkpoint, index: _Index) -> np.ndarray:
        """The part of the parameter that ``index`` cuts out."""
        cut = _cut(index, self.leaf.shape)
        out = _aligned([part.stop - part.start for part in cut], self.leaf.dtype)
        names = self.names[cut.pop(0)] if self.stacked else self.names
        if self.tensor.rows:
            first = self.tensor.rows[0]
            cut[-1] = slice(cut[-1].start + first, cut[-1].stop + first)
        stored = tuple(cut[::-1] if self.transposed else cut)
        for part, name in zip(out if self.stacked else [out], names, strict=True):
            target = part.T if self.transposed else part
            for rows in _chunks(target):
                first = slice(stored[0].start + rows.start, stored[0].start + rows.stop)
                data = checkpoint[name].read(first)[(_ALL, *stored[1:])]
                if self.tensor.plus:
                    data = data.astype(np.float32) + self.tensor.plus
                target[rows] = data
        return out

    def read_int8(self, leaf: Any, checkpoint: Checkpoint, index: _Index) -> np.ndarray:
        """The part of a quantised kernel, or of its scales, that ``index`` cuts out.

        An output's scale needs all its inputs, so whole columns are read, a few at a time.
        """
        exact = dataclasses.replace(self, leaf=jax.ShapeDtypeStruct(self.leaf.shape, jnp.float32))
        layers, *inputs, outputs = _cut(index, leaf.shape)
        out = _aligned([part.stop - part.start for part in (layers, *inputs, outputs)], leaf.dtype)
        step = max(1, READ_BYTES // (4 * self.leaf.shape[1]))
        for i, layer in enumerate(range(layers.start, layers.stop)):
            for first in range(outputs.start, outputs.stop, step):
                columns = slice(first, min(first + step, outputs.stop))
                kernel = exact.read(checkpoint, (slice(layer, layer + 1), slice(None), columns))[0]
                largest = np.abs(kernel).max(axis=0)
                scale = np.maximum(largest, np.finfo(np.float32).tiny) / 127  # an output may be all 0
                target = out[i, ..., first - outputs.start : columns.stop - outputs.start]
                target[:] = np.rint(kernel[inputs[0]] / scale) if inputs else scale
        return out


@functools.cache  # tracing the model takes longer than reading a small one
def _leaves(config: DecoderConfig) -> dict[str, Any]:
    return flatten_dict(parameter_shapes(config), sep="/")


def _cut(index: _Index, shape: tuple[int, ...]) -> list[slice]:
    index = index or (slice(None),) * len(shape)
    return [slice(*part.indices(n)[:2]) for part, n in zip(index, shape, strict=True)]


def _chunks(array: np.ndarray) -> Iterator[slice]:
    """Runs of rows that hold at most ``READ_BYTES``."""
    rows = max(1, READ_BYTES * len(array) // max(array.nbytes, 1))
    return (slice(i, min(i + rows, len(array))) for i in range(0, len(array), rows))


def _aligned(shape: list[int], dtype: Any) -> np.ndarray:
    # On a CPU, jax takes an array that starts at a multiple of 64 bytes as its own, without a copy.
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _as_named(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    # Some checkpoints were saved from the model without its head, one level further down.
    prefix = tensors["embed_tokens/embedding"].name.split(".")[0] + "."
    if any(name.startswith(prefix) for name in checkpoint):
        return tensors
    return {
        path: dataclasses.replace(tensor, name=tensor.name.removeprefix(prefix))
        for path, tensor in tensors.items()
    }


def destinations_of(config: DecoderConfig, tensors: Mapping[str, Tensor]) -> dict[str, Destination]:
    """Each parameter of a decoder without quantization, by its path, and the tensors that it is read from."""
    leaves = _leaves(config.replace(quantization="none"))
    found = [(path, leaf, tensors[path]) for path, leaf in leaves.items()]
    outputs: dict[str, int] = {}
    for _, leaf, tensor in found:
        last = tensor.rows[1] if tensor.rows else leaf.shape[-1]
        outputs[tensor.name] = max(last, outputs.get(tensor.name, 0))
    return {
        path: Destination(
            leaf, tensor, tensor.outputs_first and path.endswith("/kernel"), outputs[tensor.name]
        )
        for path, leaf, tensor in found
    }


def _check_names(
    checkpoint: Checkpoint,
    destinations: dict[str, Destination],
    tensors: Mapping[str, Tensor],
    config: DecoderConfig,
) -> None:
    present = {name for name in checkpoint if not _DERIVED.fullmatch(name)}
    wanted = {name for destination in destinations.values() for name in destination.names}
    if config.tied_head:
        head, table = (tensors[path].name for path in ("lm_head/embedding", "embed_tokens/embedding"))
        # Some writers store a tied head a second time: harmless when it is the same matrix.
        if {head, table} <= present:
            if not np.array_equal(checkpoint[head].read(), checkpoint[table].read()):
                raise UserError(
                    f"config.json says that the head is tied, but {head} differs from {table};"
                    " set tie_word_embeddings to false if the head is meant."
                )
            present.remove(head)
    if missing := sorted(wanted - present):
        raise UserError(f"The checkpoint lacks {_some(missing)}, which its config.json asks for.")
    if extra := sorted(present - wanted):
        raise UserError(f"The checkpoint holds {_some(extra)}, which its config.json has no place for.")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ("tensor " if len(names) == 1 else "tensors ") + ", ".join(names[:3]) + more
