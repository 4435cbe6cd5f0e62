"""A GGUF file as metadata and tensors, with no number in it taken on trust.

Counts, lengths and offsets are checked against the size of the file before anything is done with
them, so that a damaged file costs an error message and neither time nor memory.

Reference: the GGUF specification, versions 2 and 3 (docs/gguf.md of the ggml repository).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np

from jaxsp.typing import UserError, ceil_div

_T = TypeVar("_T")

# Types of metadata values, by their number in the file, as codes that struct and numpy share.
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_TIMES, _ANYWAY = 16, 64 << 20
"""Bound of all that is built from metadata: so many times the file's size, and so many bytes anyway."""
_TEXT, _TENSOR = 100, 1500  # bytes that each takes in memory, beside its characters


class Metadata(dict[str, Any]):
    """The key-value pairs of a file, asked for by name and type."""

    room: float = math.inf
    """Bytes of memory that may yet be taken by what is built from them."""

    def spend(self, size: int) -> None:
        """Notes that something of so many bytes is built.

        Raises:
          UserError: there is no room for it.
        """
        self.room -= size
        if self.room < 0:
            raise UserError("its metadata would take far more memory than the file is large")

    def read(self, name: str, kind: type[_T], default: _T | None = None) -> _T:
        """The value of a field, or ``default`` where the file does not have it.

        Raises:
          UserError: it is absent and has no default, or it is of another type.
        """
        value: Any = self.get(name, default)
        if value is None:
            raise UserError(f"the metadata field {name!r} is missing")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"the metadata field {name!r} is not of type {kind.__name__}")
        return value


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in the file."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    rows: np.ndarray
    """Bytes ``[rows, bytes of a row]``, a view of the mapped file; a vector's rows are its elements."""


def read(path: Path) -> tuple[Metadata, dict[str, StoredTensor]]:
    """Metadata and tensors of a file; the tensors' data stays on disk until it is used.

    Raises:
      UserError: the file is no GGUF file, of a version not supported, or damaged.
    """
    if path.stat().st_size == 0:
        raise UserError("the file is empty")
    data = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    metadata = Metadata()
    metadata.room = _TIMES * data.size + _ANYWAY
    cursor = _Cursor(data.data, metadata)
    if cursor.take(4) != b"GGUF":
        raise UserError("this is not a GGUF file")
    version = cursor.number("I")
    if version not in (2, 3):
        raise UserError(f"GGUF version {version} is not supported, only little-endian 2 and 3")
    tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
    for _ in range(field_count):
        name = cursor.text()
        if name in metadata:
            raise UserError(f"the metadata field {name!r} appears twice")
        metadata[name] = cursor.value(cursor.number("I"))
    headers: dict[str, tuple[list[int], int, int]] = {}
    for _ in range(tensor_count):
        name = cursor.text()
        if name in headers:
            raise UserError(f"the tensor {name!r} appears twice")
        metadata.spend(_TENSOR)
        dimensions = [cursor.number("Q") for _ in range(min(cursor.number("I"), 5))]
        headers[name] = dimensions, cursor.number("I"), cursor.number("Q")
    alignment = metadata.read("general.alignment", int, 32)
    if alignment < 1 or alignment & (alignment - 1):
        raise UserError(f"the alignment {alignment} is not a power of two")
    start = ceil_div(cursor.at, alignment) * alignment
    tensors = {name: _tensor(data[start:], name, *header) for name, header in headers.items()}
    spans = sorted((header[2], tensors[name].rows.size) for name, header in headers.items())
    for (offset, size), (following, _) in itertools.pairwise(spans):
        if offset + size > following:
            raise UserError("its tensors overlap")
    return metadata, tensors


class _Cursor:
    """Reads forward through bytes, never past their end."""

    def __init__(self, data: memoryview, metadata: Metadata) -> None:
        self.data, self.metadata, self.at = data, metadata, 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise UserError("the file ends in the middle of its header; download it again")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        content = self.take(self.number("Q"))
        self.metadata.spend(_TEXT + len(content))
        try:
            return str(content, "utf-8")
        except UnicodeDecodeError:
            raise UserError("a text in its header is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise UserError(f"its metadata has a value of unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        if kind not in _NUMBERS:
            raise UserError(f"its metadata has an array of elements of type {kind}")
        dtype = np.dtype(f"<{_NUMBERS[kind]}")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)


def _tensor(data: np.ndarray, name: str, dimensions: list[int], kind: int, offset: int) -> StoredTensor:
    if not 1 <= len(dimensions) <= 4 or 0 in dimensions:
        raise UserError(f"the tensor {name!r} has impossible dimensions {dimensions}")
    try:
        quantization = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
    except (ValueError, KeyError):
        raise UserError(f"the tensor {name!r} is of unknown type {kind}") from None
    *outer, width = shape = tuple(reversed(dimensions))
    if not outer:
        outer, width = [width], 1
    if width % block:
        raise UserError(f"the tensor {name!r} has {width} columns, not a multiple of {block}")
    row_bytes = width // block * block_bytes
    size = math.prod(outer) * row_bytes
    if offset + size > data.size:
        raise UserError(f"the file ends before the tensor {name!r} does; download it again")
    return StoredTensor(shape, quantization, data[offset : offset + size].reshape(-1, row_bytes))
