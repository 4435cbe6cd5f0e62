"""Input vectors for llama.cpp, which reads them in place of tokens (``llama_batch.embd``), and a loader.

Keys and values can't go there: the form of llama.cpp's state files changes from version to version, and has
no place for biases.
"""

from __future__ import annotations

import importlib.util
import io
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxsp.exports.prefix import Held
from jaxsp.files import atomic_write
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.load import gguf_file
from jaxsp.typing import UserError

SCRIPTS = {"load.py": "llamacpp.py", "question.py": "question.py"}
NEEDS = ("llama-cpp-python",)
LOADED_BY = "`llama.cpp/load.py`, as `llama_batch.embd`: kind `embedding` alone, of a model in a GGUF file"
USE = """\
```sh
pip install llama-cpp-python
python load.py {file} "How long is the cable?"
```

`load` in `load.py` reads the chat's text before the soft prompt and the soft prompt once, as a batch of input
vectors; each question is then read behind them, in the same cache. Programs over llama.cpp that take text
alone, its server among them, can't be given vectors."""


def write(held: Held, out: Path, queries: Sequence[str] = ()) -> dict[str, str]:
    """Writes ``prompt_embeds.npy``, float32 ``[N, D]``: the tokens before the prompt, and σ.

    Returns:
      Words to fill ``USE`` with.

    Raises:
      UserError: the prompt has no input vectors, or the model scales them or was not read from GGUF.
    """
    model = held.model
    if held.vectors is None:
        raise UserError(
            f"llama.cpp takes input vectors alone, and this prompt is of kind {held.prompt.kind}: its state"
            " files change from version to version, and have no place for biases; export --to transformers,"
            " or train with --kind embedding."
        )
    if model.config.embedding_scale != 1:
        raise UserError(
            f"{model.short_name} scales its input vectors, which llama.cpp does or doesn't do anew, by its"
            " version; export --to peft or transformers."
        )
    file = gguf_file(model.name)
    if file is None:
        raise UserError(
            f"llama.cpp reads GGUF files, and {model.short_name} was not loaded from one; train the prompt"
            " for the GGUF file, or export --to peft or transformers."
        )
    box = io.BytesIO()
    np.save(box, np.ascontiguousarray(held.vectors, np.float32), allow_pickle=False)
    atomic_write(out / "prompt_embeds.npy", box.getvalue())
    return {"file": shlex.quote(file.name)}


def place(model: LanguageModel) -> str:
    """The GGUF file of the model."""
    return str(gguf_file(model.name))


def weights(model: LanguageModel, scratch: Path) -> Path:
    """The GGUF file that the check reads: the model's own in float32, where llama.cpp is there.

    With a quantized matrix it rounds what it multiplies to eight bits, whatever the soft prompt is.
    """
    file = gguf_file(model.name)
    assert file is not None
    if importlib.util.find_spec("llama_cpp") is None:
        return file
    from jaxsp.models.gguf.float32 import write_float32

    write_float32(file, scratch / "model.gguf")
    return scratch / "model.gguf"
