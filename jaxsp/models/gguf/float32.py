"""A GGUF file with all its numbers unpacked to float32, for programs that would round otherwise."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def write_float32(file: Path, out: Path) -> None:
    """Writes a copy of a GGUF file whose tensors are float32; one tensor is in memory at a time.

    Args:
      file: one that ``converted`` has read: it is sound.
      out: the file to write.

    Raises:
      OSError: the disk is full.
    """
    reader = gguf.GGUFReader(file)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue  # which the writer has
        kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
        value = field.contents()
        if field.name == gguf.Keys.General.FILE_TYPE:
            value = int(gguf.LlamaFileType.ALL_F32)
        writer.add_key_value(field.name, value, kind, inner)
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        unpacked = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.write_tensor_data(np.ascontiguousarray(unpacked, np.float32))
    writer.close()
