"""A soft prompt from an adapter's folder: our own export to PEFT, or one that PEFT has written.

PEFT puts its virtual tokens in front of everything. Where they begin with those of the chat template, these
become the text before σ, and σ stands in the user's turn. Else all of them are σ, in front of the whole chat.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from jaxsp.artifact import SoftPrompt, check_manifest, made_for, named_model
from jaxsp.distributions import context_prefix
from jaxsp.errors import Damaged
from jaxsp.exports.peft import ARRAYS, CONFIG
from jaxsp.exports.prefix import ropes, turned
from jaxsp.exports.question import DESCRIPTION, ORDINARY
from jaxsp.files import as_path, read_json, read_whole
from jaxsp.models.chat import ChatTexts
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.text import encode
from jaxsp.prompts import storage
from jaxsp.typing import Float, KeyValues, UserError

KINDS = {"PROMPT_TUNING": "embedding", "CARTRIDGE": "key_value", "PREFIX_TUNING": "key_value"}
"""PEFT's types, and what they are here."""

_ROUNDED = 1 / 128
"""Part of a number by which another one may differ and be taken for it: both may have been bfloat16."""


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter as it lies in a folder.

    Attributes:
      folder: the folder.
      peft_type: a key of ``KINDS``.
      tensor: ``[N, W]`` float32, the virtual tokens: input vectors, or the keys and values of all layers.
      base: PEFT's name of the model; ``None``: it has none.
      manifest: of the prompt, if jaxsp has exported it.
      end: the position of the question in jaxsp, likewise.
      untouched: whether the tensor is the one that jaxsp has exported.
    """

    folder: Path
    peft_type: str
    tensor: Float[np.ndarray, "n w"]
    base: str | None
    manifest: dict[str, Any] | None
    end: int
    untouched: bool

    @classmethod
    def load(cls, directory: str | Path) -> Adapter:
        """Reads an adapter.

        Args:
          directory: the folder.

        Raises:
          UserError: the folder holds none of a type that can be read, or it is damaged.
        """
        folder = as_path(directory, "The adapter")
        folder = folder.parent if folder.is_file() else folder
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder} holds no adapter of PEFT (no {CONFIG}).")
        config = read_json(folder / CONFIG)
        peft_type, parts = config.get("peft_type"), config.get("num_transformer_submodules")
        if not isinstance(peft_type, str) or peft_type not in KINDS:
            raise UserError(
                f"{folder} holds an adapter of PEFT's type {peft_type!r:.60}, which is no soft prompt;"
                f" jaxsp reads {', '.join(KINDS)}."
            )
        if config.get("task_type", "CAUSAL_LM") not in ("CAUSAL_LM", None) or parts not in (1, None):
            raise UserError(
                f"{folder} holds an adapter for {config.get('task_type')!r:.60}, not for a causal language"
                " model (CAUSAL_LM)."
            )
        data = _tensor_file(folder)
        tensor = _tensor(folder / ARRAYS, data, config.get("num_virtual_tokens"))
        base = config.get("base_model_name_or_path")
        base = base if isinstance(base, str) and base else None
        if not (folder / DESCRIPTION).is_file():
            return cls(folder, peft_type, tensor, base, None, len(tensor), False)
        known = read_json(folder / DESCRIPTION)
        return cls(folder, peft_type, tensor, base, *_ours(known, folder / DESCRIPTION, data))

    @property
    def model_name(self) -> str:
        """The model that it was made for, as ``load_model`` takes it.

        Raises:
          UserError: the folder names none, or one that is not there any more.
        """
        if self.manifest is not None:
            return named_model(self.manifest["model"])
        if self.base is None:
            raise UserError(f"{self.folder / CONFIG} names no model; say which it was with --model.")
        return named_model({"name": self.base})

    def soft_prompt(
        self, model: LanguageModel, context: str | None = None, *, plain: bool = False
    ) -> SoftPrompt:
        """The soft prompt.

        Args:
          model: that it was made for, in float32.
          context: the text that it stands for, if it is known; of our own exports that which it was trained
            for.
          plain: a question stands behind σ as it is, without the chat template's texts; not of our own
            exports, whose texts are known.

        Raises:
          UserError: the adapter belongs to another model, or questions can't be put behind it.
        """
        kind = KINDS[self.peft_type]
        if model.config.quantization != "none":
            raise UserError(
                "PEFT has no model that jaxsp has quantized; load it with quantization='none' to import one"
                " of its adapters."
            )
        if self.manifest is not None:
            SoftPrompt({}, self.manifest).check(model)
        held = _Held(self, model)
        chat, before, end = self._place(held, plain)
        sigma = held.sigma(len(before), end)
        length = len(self.tensor) - len(before)
        if length < 1:
            raise UserError(f"{self.folder} holds the chat template's tokens alone, and no soft prompt.")
        made = made_for(model, chat, before)
        tokens = 0 if context is None else len(chat.context_ids(model.tokenizer, context))
        own = self.manifest or {**made, "teacher": None, "trained_on": [], "context_tokens": tokens}
        if not self.untouched:  # what was measured, and how it was trained, is another prompt's
            own = {name: value for name, value in own.items() if name not in ("held_out", "fallback")}
            own |= {"training": {}, "imported": {"from": "PEFT", "type": self.peft_type}}
        same = self.untouched and own["kind"] == kind and own.get("dtype") == "bfloat16"
        manifest = {
            **own,
            "model": made["model"],
            "slots": made["slots"],
            "kind": kind,
            "prompt_length": length,
            "dtype": "bfloat16" if same else "float32",
        }
        document = own.get("context_sha256")
        if context is not None and document not in (None, hashlib.sha256(context.encode()).hexdigest()):
            raise UserError(f"The prompt in {self.folder} was trained for another document than this one.")
        return SoftPrompt(storage.rounded(sigma, manifest["dtype"]), manifest, context)

    def _place(self, held: _Held, plain: bool) -> tuple[ChatTexts, list[int], int]:
        """The texts around σ, the token ids before it, and the question's position."""
        model, count = held.model, len(self.tensor)
        if self.manifest is not None:
            slots = self.manifest["slots"]
            chat, before = SoftPrompt({}, self.manifest).chat, slots["before_ids"]
            if self.untouched or held.begins_with(before, self.end):
                return chat, before, self.end
            return dataclasses.replace(chat, before="", lead=""), [], count  # PEFT has trained them, too
        tokenizer: Any = model.tokenizer
        plain = plain or tokenizer.chat_template is None
        if plain:
            chat = ChatTexts(before="", between=_beginning(tokenizer), after="")
        else:
            before = model.preamble_ids.tolist()
            if held.begins_with(before, count):
                return model.chat, before, count
            opening = model.chat.before + model.chat.lead
            chat = dataclasses.replace(model.chat, before="", between=opening, lead="")
        _check_questions(tokenizer, chat, plain)
        return chat, [], count


@dataclasses.dataclass(frozen=True, eq=False)
class _Held:
    """The virtual tokens, as the model holds them.

    Raises:
      UserError: they are those of a model of other sizes.
    """

    adapter: Adapter
    model: LanguageModel

    def __post_init__(self) -> None:
        config, width = self.model.config, self.adapter.tensor.shape[1]
        if self.is_vectors:
            own, sizes = config.width, f"a width of {config.width}"
        else:
            own = config.layers * 2 * config.kv_heads * config.head_width
            sizes = f"{config.layers} layers of {config.kv_heads} heads, {config.head_width} wide"
        if width != own:
            raise UserError(
                f"The adapter in {self.adapter.folder} belongs to another model: a virtual token of it has"
                f" {width} numbers, one for {self.model.short_name} ({sizes}) would have {own}; say which"
                " model it was with --model."
            )

    @property
    def is_vectors(self) -> bool:
        return KINDS[self.adapter.peft_type] == "embedding"

    @functools.cached_property
    def key_values(self) -> tuple[Float[np.ndarray, "l n g f"], Float[np.ndarray, "l n g f"]]:
        """Keys and values, as ``exports.peft`` has joined them."""
        config, N = self.model.config, len(self.adapter.tensor)
        both = self.adapter.tensor.reshape(N, config.layers, 2, config.kv_heads, config.head_width)
        keys, values = both.transpose(2, 1, 0, 3, 4)
        return keys, values

    def begins_with(self, ids: Sequence[int], end: int) -> bool:
        """Whether the first ones are these tokens, as the model reads them; of keys and values, at positions
        that let the question stand at ``end``."""
        model, n = self.model, len(ids)
        if not n or n > len(self.adapter.tensor):
            return not n
        if self.is_vectors:
            found = np.asarray(model.embed([list(ids)])[0])
            return _alike(self.adapter.tensor[:n], found)
        prefix = _read(model, ids)
        keys, values = self.key_values
        back = self._turned(keys[:, :n], end)
        return _alike(back, np.asarray(prefix.keys[:, 0])) and _alike(
            values[:, :n], np.asarray(prefix.values[:, 0])
        )

    def sigma(self, before: int, end: int) -> dict[str, Any]:
        """The prompt's arrays: all virtual tokens but the first ``before``."""
        if self.is_vectors:
            return {"embeddings": self.adapter.tensor[before:]}
        keys, values = (array[:, before:] for array in self.key_values)
        bias, length = np.zeros(keys.shape[:3], np.float32), np.float32(end - before)
        keys = self._turned(keys, end)
        return {"keys": keys, "values": np.array(values), "bias": bias, "context_length": length}

    def _turned(self, keys: Float[np.ndarray, "l n g f"], end: int) -> Float[np.ndarray, "l n g f"]:
        """Keys as they are where the question stands at ``end``."""
        if not (shift := end - len(self.adapter.tensor)):
            return np.array(keys)
        return np.stack([turned(*of, shift) for of in zip(keys, ropes(self.model), strict=True)])


@functools.partial(jax.jit, static_argnames="config")
def _prefix(params: Any, config: Any, ids: Any) -> KeyValues:
    return context_prefix(params, config, ids)


def _read(model: LanguageModel, ids: Sequence[int]) -> KeyValues:
    return _prefix(model.params, model.config, model.check_ids([list(ids)]))


def _alike(given: np.ndarray, expected: np.ndarray) -> bool:
    """Whether numbers are the same but for rounding, of their own size or of those beside them."""
    size = np.sqrt(np.mean(np.square(expected), axis=-1, keepdims=True))
    return bool((np.abs(given - expected) <= _ROUNDED * (np.abs(expected) + size)).all())


def _tensor_file(folder: Path) -> bytes:
    """The bytes of the adapter's tensors; never a pickle."""
    file = folder / ARRAYS
    if not file.is_file() and (other := folder / "adapter_model.bin").is_file():
        raise UserError(
            f"{other} is a pickle, which may run any code and isn't read; save it anew with PEFT's"
            " save_pretrained(DIR, safe_serialization=True)."
        )
    return read_whole(file)


def _tensor(file: Path, data: bytes, count: Any) -> Float[np.ndarray, "n w"]:
    try:
        array = load(data)["prompt_embeddings"].astype(np.float32)
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise Damaged(f"{file} is damaged ({error!r:.120})") from error
    if array.ndim != 2 or not array.size or count not in (None, len(array)):
        shape = " × ".join(map(str, array.shape))
        raise Damaged(f"{file} is damaged: it has {shape} numbers, by {CONFIG} {count!r:.20} virtual tokens")
    if not np.isfinite(array).all():
        raise Damaged(f"{file} is damaged: it has entries that are not finite")
    return array


def _ours(known: dict[str, Any], file: Path, data: bytes) -> tuple[dict[str, Any], int, bool]:
    """The manifest in the description that jaxsp has written, the question's position, and whether the
    tensors are those that it has written, too."""
    manifest, end, written = (known.get(name) for name in ("manifest", "end", "sha256"))
    if not isinstance(manifest, dict) or type(end) is not int or not isinstance(written, dict):
        raise Damaged(f"{file} is damaged, or of an older version of jaxsp", "export the prompt anew")
    own = check_manifest(manifest, file)
    before = own["slots"]["before_ids"]
    if not (all(type(i) is int and 0 <= i < 1 << 31 for i in before) and len(before) < end < 1 << 31):
        raise Damaged(f"{file} is damaged: end is {end}, after {len(before)} tokens before the prompt")
    return own, end, written.get(ARRAYS) == hashlib.sha256(data).hexdigest()


def _beginning(tokenizer: Any) -> str:
    """The control tokens that a tokenizer puts before every text."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=added) for added in (False, True))
    return "".join(map(tokenizer.convert_ids_to_tokens, whole[: len(whole) - len(plain)]))


def _check_questions(tokenizer: Any, chat: ChatTexts, plain: bool) -> None:
    """Raises ``UserError`` if a question behind σ has other ids than it has by itself, as PEFT reads it."""
    for query in ORDINARY:
        whole = f"{chat.between}{query}{chat.after}"
        alone = tokenizer.encode(query) if plain else encode(tokenizer, whole, control=True)
        if chat.query_ids(tokenizer, query) != alone:
            raise UserError(
                f"This model's tokenizer gives a question such as {query!r} other ids behind a soft prompt"
                " than by itself, as PEFT reads it; such an adapter can't be imported."
            )
