"""Input vectors for vLLM's OpenAI-compatible server (``--enable-prompt-embeds``), and a client for them.

The server lays out the chat, so the vectors are σ alone. They stand in a content part of the user's turn, and
the question in the next one. How a server joins the two is a matter of the model's chat template.
"""

from __future__ import annotations

import base64
import io
import json
import shlex
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from jaxsp.exports.prefix import Held, place as place, weights as weights
from jaxsp.exports.question import ORDINARY
from jaxsp.files import atomic_write
from jaxsp.models.chat import THINKING, conversation
from jaxsp.models.text import control_ids
from jaxsp.typing import Float, UserError

SCRIPTS = {"client.py": "vllm.py"}
NEEDS = ("torch", "transformers")
LOADED_BY = (
    "`vllm/client.py`, as `prompt_embeds` of `vllm serve --enable-prompt-embeds`: kind `embedding` alone"
)
USE = """\
```sh
vllm serve {model} --served-model-name {served} --enable-prompt-embeds --chat-template-content-format {form}
pip install openai
OPENAI_API_KEY=EMPTY python client.py http://localhost:8000/v1 "How long is the cable?"
```

The server must be one that takes `prompt_embeds` as a part of a chat's message (vLLM's documentation:
"Prompt Embedding Inputs"). `request.json` is the whole request but for the question: the soft prompt's
vectors, `prompt_embeds`, as base64 of a torch file, and options for the greedy answer. It has no system text:
the chat's template adds what belongs there. `client.py` refuses a question with one of the control tokens in
`refused`, as the server would take them for such, and asks for the model by the name above, which has the
weights' fingerprint in it: a server that was started for another model refuses."""

_STAND_IN = "<prompt_embeds>"
"""The word that vLLM puts in the place of vectors, as one token of its own."""


def write(held: Held, out: Path, queries: Sequence[str] = ()) -> dict[str, str]:
    """Writes ``request.json``: the request but for the question, and the words that none may have.

    Returns:
      Words to fill ``USE`` with.

    Raises:
      UserError: the prompt has no input vectors, the model scales them, or a server would lay out another
        chat.
    """
    model, chat = held.model, held.prompt.chat
    if held.vectors is None:
        raise UserError(
            f"vLLM takes input vectors alone, and this prompt is of kind {held.prompt.kind}; export --to"
            " transformers, or train with --kind embedding."
        )
    if model.config.embedding_scale != 1:
        raise UserError(
            f"{model.short_name} scales its input vectors, which vLLM does or doesn't do anew, by its version"
            " and model; export --to peft or transformers."
        )
    for form in ("string", "openai"):
        lead = chat.between if form == "openai" else chat.between.removeprefix("\n")
        content = _Content(form, lead)
        if (form == "openai" or lead != chat.between) and content.reads_as(held, [*ORDINARY, *queries]):
            break
    else:
        raise UserError(
            f"A server would not lay out the chat with {model.short_name} as this prompt was trained with it"
            " (its chat template has changed or is missing, or there was --system, --slot or"
            " --template-option); export --to peft or transformers."
        )
    tokenizer: Any = model.tokenizer
    ids = {*control_ids(tokenizer), tokenizer.unk_token_id} - {None}  # a server has no plain form of either
    words = tokenizer.convert_ids_to_tokens(sorted(ids))
    ends = sorted({*model.stop_ids, *held.prompt.stop_ids})
    sigma = held.vectors[len(held.prompt.manifest["slots"]["before_ids"]) :]
    data = base64.b64encode(torch_file(sigma)).decode()
    content = [{"type": "prompt_embeds", "data": data}, {"type": "text", "text": lead}]
    more = {"stop_token_ids": ends, "repetition_penalty": 1, "chat_template_kwargs": {THINKING: False}}
    served = f"{Path(model.short_name).name}-{model.fingerprint[:8]}"
    request = {"model": served, "messages": [{"role": "user", "content": content}], "max_tokens": 128,
               "temperature": 0, "extra_body": more, "refused": [*words, _STAND_IN]}  # fmt: skip
    atomic_write(out / "request.json", json.dumps(request, indent=2, ensure_ascii=False) + "\n")
    return {"form": form, "served": shlex.quote(served)}


class _Content:
    """The user's turn: vectors, and the question; ``form`` is vLLM's ``--chat-template-content-format``."""

    def __init__(self, form: str, lead: str) -> None:
        self.form, self.lead = form, lead

    def reads_as(self, held: Held, queries: Sequence[str]) -> bool:
        """Whether the token ids around the vectors are those that the prompt was trained with."""
        model, slots = held.model, held.prompt.manifest["slots"]
        core = getattr(model.tokenizer, "backend_tokenizer", None)
        if not isinstance(core, tokenizers.Tokenizer):
            return False
        core = tokenizers.Tokenizer.from_str(core.to_str())
        core.encode_special_tokens = False
        core.add_special_tokens([tokenizers.AddedToken(_STAND_IN, special=True)])
        place = core.token_to_id(_STAND_IN)
        for query in queries:
            try:
                text = conversation(model.tokenizer, [{"role": "user", "content": self._content(query)}])
            except UserError:  # the template takes no such content
                return False
            expected = [*slots["before_ids"], place, *held.prompt.chat.query_ids(model.tokenizer, query)]
            if text is None or core.encode(text, add_special_tokens=False).ids != expected:
                return False
        return True

    def _content(self, query: str) -> Any:
        texts = _STAND_IN, self.lead + query
        return "\n".join(texts) if self.form == "string" else [{"type": "text", "text": t} for t in texts]


def torch_file(array: Float[np.ndarray, "n d"]) -> bytes:
    """The bytes of a file that ``torch.load`` reads as a float32 tensor, always the same; torch isn't needed.

    Args:
      array: the tensor.
    """

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little")

    (n, d), data = array.shape, array.astype("<f4")
    # A pickle in its machine's words: a tensor rebuilt of a storage, an offset, shape, strides and hooks.
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(n * d) + b"tQ"
    )
    shape = number(0) + number(n) + number(d) + b"\x86" + number(d) + number(1) + b"\x86"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    pickle = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + shape + hooks + b"tR."
    parts = {"data.pkl": pickle, "byteorder": b"little", "data/0": data.tobytes(), "version": b"3\n"}
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w") as archive:
        for name, content in parts.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
    return box.getvalue()
