"""``LanguageModel``: weights, hyper-parameters and tokenizer, and what most callers want of them."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsp.models import decoder, sharding
from jaxsp.models.chat import ChatOptions, ChatTexts
from jaxsp.models.config import DecoderConfig
from jaxsp.models.generation import Sampling, stream
from jaxsp.models.weights import is_old, old_fingerprint, weight_files
from jaxsp.settings import check_limits
from jaxsp.typing import AnyArray, Array, Float, Int, KeyValues, Params, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A frozen language model: weights, hyper-parameters and tokenizer.

    The pure functions in ``jaxsp.models.decoder`` do the work and take ``params`` and ``config``;
    the methods here are the convenient form.
    """

    name: str
    config: DecoderConfig
    params: Params
    tokenizer: PreTrainedTokenizerBase | None
    directory: Path
    stop_ids: tuple[int, ...]
    """Token ids that end a turn or a text."""
    fingerprint: str = ""
    """Identifies the weights: two models with the same fingerprint give the same logits."""
    load_seconds: float = 0.0
    """The time that loading took, in seconds."""
    chat_options: ChatOptions = ChatOptions()
    """The layout of a chat, where the tokenizer's template leaves it open."""
    saved_chat: ChatTexts | None = None
    """The texts around a context and a query, if not those that the template gives now."""

    def embed(self, ids: Any) -> Float[Array, "*b t d"]:
        """Input vectors of token ids ``[*b, t]``: the space of a soft prompt.

        Raises:
          UserError: an id is none of the model's.
        """
        return decoder.embed(self.params, self.config, self.check_ids(ids))

    def logits(
        self, ids: Any = None, *, embeddings: Float[AnyArray, "*b t d"] | None = None
    ) -> Float[Array, "*b t v"]:
        """Next-token logits, float32, of token ids ``[*b, t]`` or of input vectors ``[*b, t, d]``.

        Raises:
          UserError: both or neither are given; there is no token, or more than the model's window; an id
            is none of the model's.
        """
        if (ids is None) == (embeddings is None):
            raise UserError("LanguageModel.logits takes either ids or embeddings=..., not both.")
        inputs = self.embed(ids) if embeddings is None else jnp.asarray(embeddings)
        if inputs.ndim < 2 or not inputs.size:
            raise UserError(f"Logits of no tokens: the inputs have the shape {inputs.shape}.")
        self.config.check_length(inputs.shape[-2])
        logits = _logits(self.params, self.config, inputs.reshape(-1, *inputs.shape[-2:]))
        return logits.reshape(*inputs.shape[:-1], -1)

    @functools.cached_property
    def chat(self) -> ChatTexts:
        """The texts around a context and a query, by the tokenizer's chat template.

        Raises:
          UserError: there is no tokenizer, or its template changes the user's text.

        Example:
          >>> import jaxsp
          >>> jaxsp.load_model("smollm2-135m-instruct").chat.after
          '<|im_end|>\\n<|im_start|>assistant\\n'
        """
        return self.saved_chat or ChatTexts.of(self._tokenizer, self.chat_options)

    @functools.cached_property
    def preamble_ids(self) -> Int[np.ndarray, " n"]:
        """Token ids int32 ``[n]`` of what the chat template puts before the context.

        Raises:
          UserError: as ``chat``; or an id is none of the model's.

        Example:
          >>> import jaxsp
          >>> model = jaxsp.load_model("smollm2-135m-instruct")
          >>> model.tokenizer.decode(model.preamble_ids)[-17:]
          '<|im_start|>user\\n'
        """
        return self.check_ids(self.chat.before_ids(self._tokenizer))

    def encode_context(self, text: str) -> Int[np.ndarray, " c"]:
        """Token ids int32 ``[C]`` of a context; control tokens spelled out in it stay plain text.

        Raises:
          UserError: there is no tokenizer, or an id is none of the model's.

        Example:
          >>> import jaxsp
          >>> model = jaxsp.load_model("smollm2-135m-instruct")
          >>> model.encode_context("The cable is long.").tolist()
          [504, 11045, 314, 986, 30]
        """
        return self.check_ids(self.chat.context_ids(self._tokenizer, text))

    def encode_answer(self, text: str) -> Int[np.ndarray, " a"]:
        """Token ids int32 ``[A]`` of an answer that is given, with the token that ends it.

        Raises:
          UserError: as ``preamble_ids``.

        Example:
          >>> import jaxsp
          >>> model = jaxsp.load_model("smollm2-135m-instruct")
          >>> model.tokenizer.decode(model.encode_answer("Yes."))
          'Yes.<|im_end|>'
        """
        return self.check_ids(self.chat.answer_ids(self._tokenizer, text))

    def encode_query(self, text: str, chat: ChatTexts | None = None) -> Int[np.ndarray, " z"]:
        """Token ids int32 ``[Z]`` of all that stands between the context and the answer.

        Args:
          text: the query.
          chat: the texts around it, if not the model's own: those of a saved prompt.

        Raises:
          UserError: as ``preamble_ids``.

        Example:
          >>> import jaxsp
          >>> model = jaxsp.load_model("smollm2-135m-instruct")
          >>> model.tokenizer.decode(model.encode_query("How long?"))
          '\\n\\nHow long?<|im_end|>\\n<|im_start|>assistant\\n'
        """
        return self.check_ids((chat or self.chat).query_ids(self._tokenizer, text))

    def stream_answer(
        self, prefix: KeyValues, query: str, chat: ChatTexts | None = None, *, max_tokens: int = 128
    ) -> Iterator[str]:
        """The pieces of the greedy answer's text as they come.

        Args:
          prefix: what the model has read before the query: a context, or a soft prompt's ``prefix``.
          query: the text.
          chat: as in ``encode_query``.
          max_tokens: longest answer.

        Raises:
          UserError: as ``encode_query``; or the query is too long.

        Example:
          >>> import jaxsp
          >>> model = jaxsp.load_model("smollm2-135m-instruct", dtype="float32")
          >>> prefix = jaxsp.distributions.context_prefix(
          ...     model.params, model.config, model.preamble_ids[None])
          >>> "".join(model.stream_answer(prefix, "What is the capital of France?"))
          'The capital of France is Paris.'
        """
        answer: list[int] = []
        shown = ""
        ids, sampling = self.greedy_request(prefix, query, chat, max_tokens=max_tokens)
        for token in stream(self.params, self.config, prefix, ids, sampling):
            answer.append(token)
            text = self.decode(answer)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: wait for the rest
                yield text[len(shown) :]
                shown = text
        if rest := self.decode(answer)[len(shown) :]:
            yield rest  # the answer ends in the midst of a character

    def greedy_request(
        self, prefix: KeyValues, query: str, chat: ChatTexts | None = None, *, max_tokens: int = 128
    ) -> tuple[list[int], Sampling]:
        """The token ids of a query and the rule of its greedy answer, as ``generate`` takes them.

        Args:
          prefix: what the model has read before the query.
          query: the text.
          chat: as in ``encode_query``.
          max_tokens: longest answer; it is shorter where the window leaves less.

        Raises:
          UserError: as ``stream_answer``.
        """
        check_limits("max_tokens", max_tokens, at_least=1)
        ids = self.encode_query(query, chat).tolist()
        room = self.config.window - prefix.end - len(ids)
        if room < 1:
            raise UserError(
                f"The question has {len(ids)} tokens, more than the model's window of {self.config.window}"
                " leaves; ask a shorter one."
            )
        return ids, Sampling(stop_ids=self.stop_ids, max_tokens=min(max_tokens, room))

    def decode(self, ids: list[int]) -> str:
        """The text of an answer, without its control tokens.

        Args:
          ids: token ids.

        Raises:
          UserError: there is no tokenizer.
        """
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise UserError("The model was loaded without a tokenizer; load it with one.")
        return self.tokenizer

    def check_ids(self, ids: Any) -> Int[np.ndarray, "*b"]:
        """The token ids as an int32 array of their shape.

        Raises:
          UserError: the model has no embedding for one of them.
        """
        ids = np.asarray(ids, np.int64)
        odd = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if odd.size:
            known = self.tokenizer is not None and odd[0] >= 0
            word = self._tokenizer.convert_ids_to_tokens(int(odd[0])) if known else "?"
            raise UserError(
                f"Token {word!r} has the id {odd[0]}, outside the model's vocabulary of"
                f" {self.config.vocab_size}; take it out of the text."
            )
        return ids.astype(np.int32)

    def on(self, mesh: Mesh) -> LanguageModel:
        """The same model with its weights spread over a mesh (of several processes, over its own part).

        Raises:
          UserError: it can't be cut in so many parts.
        """
        own = sharding.local(mesh)
        return dataclasses.replace(self, params=sharding.place(self.params, self.config, own))

    def with_chat(self, chat: ChatTexts) -> LanguageModel:
        """The same model with these texts around a context and a query: those of a saved prompt."""
        return dataclasses.replace(self, saved_chat=chat)

    def stopping_at(self, ids: Iterable[int]) -> LanguageModel:
        """The same model, whose answers end at these tokens, too."""
        ends = tuple(sorted({*self.stop_ids, *ids}))
        return self if ends == self.stop_ids else dataclasses.replace(self, stop_ids=ends)

    @property
    def short_name(self) -> str:
        """Its name; of a folder or a file the last part, which stays when a project is moved."""
        return Path(self.name).name if os.path.isabs(self.name) else self.name

    def has_weights(self, fingerprint: str) -> bool:
        """Whether a fingerprint is that of these weights; one of version 0.1 tells of a part of them.

        Args:
          fingerprint: as a saved prompt has it.

        Example:
          >>> import jaxsp
          >>> model = jaxsp.load_model("smollm2-135m-instruct")
          >>> model.has_weights(model.fingerprint), model.has_weights("0" * 64)
          (True, False)
        """
        if not is_old(fingerprint):
            return fingerprint == self.fingerprint
        kind = "" if self.config.quantization == "none" else f"{self.config.quantization}:"
        return fingerprint == kind + old_fingerprint(weight_files(self.directory))


@functools.partial(jax.jit, static_argnames="config")
def _logits(params: Params, config: DecoderConfig, inputs: Array) -> Array:
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape[:2])
    last, _ = decoder.hidden(params, config, inputs, positions)
    return decoder.unembed(params, config, last)
