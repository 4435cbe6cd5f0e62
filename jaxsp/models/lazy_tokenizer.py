"""``LazyTokenizer``: a ``transformers`` tokenizer, loaded when more is asked of it than an answer needs.

Importing transformers takes longer than reading a small model's weights. The ``tokenizers`` library, which
does the work inside, encodes and decodes without it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from jaxsp.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class LazyTokenizer:
    """A tokenizer in a folder of our own making, where ``tokenizer.json`` holds all of it.

    It has whatever a ``transformers`` tokenizer has, and gives the same; the methods below do not load it.

    Args:
      directory: where ``tokenizer.json`` and ``tokenizer_config.json`` are.

    Raises:
      Exception: a file is absent or damaged; the tokenizers library raises no narrower kind.

    Example:
      >>> import jaxsp
      >>> tokenizer = jaxsp.load_model("smollm2-135m-instruct").tokenizer
      >>> tokenizer.decode(tokenizer.encode("How long is the cable?"))
      'How long is the cable?'
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._settings = read_json(directory / "tokenizer_config.json", finite=False)

    @functools.cached_property
    def _whole(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        whole = AutoTokenizer.from_pretrained(self._directory, trust_remote_code=False)
        self._backend = whole.backend_tokenizer  # so that both know a token that is added
        return whole

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self._whole, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self._whole, name, value)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._whole(*args, **options)

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=False)

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer:
        return self._backend

    @property
    def special_tokens_map(self) -> dict[str, str]:
        if "_whole" in self.__dict__:
            return self._whole.special_tokens_map
        return {
            name: word for name, word in self._settings.items() if name in _ROLES and isinstance(word, str)
        }

    @property
    def all_special_ids(self) -> list[int]:
        found = (self._backend.token_to_id(word) for word in self.special_tokens_map.values())
        return [i for i in found if i is not None]

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens_map.get("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._id("unk_token")

    def _id(self, role: str) -> int | None:
        word = self.special_tokens_map.get(role)
        return None if word is None else self._backend.token_to_id(word)

    @property
    def chat_template(self) -> Any:
        if "_whole" in self.__dict__:
            return self._whole.chat_template
        file = self._directory / "chat_template.jinja"
        return file.read_text("utf-8") if file.is_file() else self._settings.get("chat_template")

    def get_vocab(self) -> dict[str, int]:
        return self._backend.get_vocab()

    def convert_ids_to_tokens(self, ids: Any, *args: Any, **options: Any) -> Any:
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        return self._whole.convert_ids_to_tokens(ids, *args, **options)

    def encode(self, text: Any, *args: Any, **options: Any) -> list[int]:
        plain = {"add_special_tokens": True, "split_special_tokens": False}
        if args or not isinstance(text, str) or not options.keys() <= plain.keys():
            return self._whole.encode(text, *args, **options)
        options = plain | options
        self._backend.encode_special_tokens = options["split_special_tokens"]
        return self._backend.encode(text, add_special_tokens=options["add_special_tokens"]).ids

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> Any:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if options or not all(isinstance(i, int | np.integer) for i in ids):
            return self._whole.decode(token_ids, skip_special_tokens=skip_special_tokens, **options)
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
