"""Where the context and the query stand in a model's prompt: text before, the context, text after.

The texts come from the tokenizer's own chat template with the document in the user turn (there the
models that were measured use it best). The pieces are tokenised one by one, the user's text never as
control tokens, so the context can be replaced by vectors without moving a token around it.
"""

from __future__ import annotations

import dataclasses

from jaxsp.typing import UserError

_CONTEXT = "\N{SYMBOL FOR NULL}context\N{SYMBOL FOR NULL}"
_QUERY = "\N{SYMBOL FOR NULL}query\N{SYMBOL FOR NULL}"
_SEPARATOR = "\n\n"


@dataclasses.dataclass(frozen=True)
class ChatTexts:
    """The fixed texts around a context and a query.

    The sequence is ``before · context · between · query · after · answer``.

    Example:
      >>> import jaxsp
      >>> tokenizer = jaxsp.load_model("smollm2-135m-instruct").tokenizer
      >>> chat = ChatTexts.of(tokenizer)
      >>> chat.between, chat.after
      ('\\n\\n', '<|im_end|>\\n<|im_start|>assistant\\n')
      >>> tokenizer.decode(chat.query_ids(tokenizer, "How long?"))
      '\\n\\nHow long?<|im_end|>\\n<|im_start|>assistant\\n'
    """

    before: str
    between: str
    after: str

    @classmethod
    def of(cls, tokenizer) -> ChatTexts:
        """The texts of a tokenizer's chat template, or a plain layout if it has none.

        Raises:
          UserError: the template changes or drops the user's text.
        """
        if tokenizer.chat_template is None:
            return cls(before=tokenizer.bos_token or "", between=_SEPARATOR, after="\n")
        message = {"role": "user", "content": f"{_CONTEXT}{_SEPARATOR}{_QUERY}"}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        if text.count(_CONTEXT) != 1 or text.count(_QUERY) != 1:
            raise UserError(
                "The tokenizer's chat template does not keep the user's text as it is; remove the"
                " template to use the plain layout."
            )
        before, rest = text.split(_CONTEXT)
        between, after = rest.split(_QUERY)
        return cls(before, between, after)

    def before_ids(self, tokenizer) -> list[int]:
        """Token ids of what stands before the context."""
        return encode(tokenizer, self.before, control=True)

    def query_ids(self, tokenizer, query: str) -> list[int]:
        """Token ids of what stands after the context, up to where the answer starts."""
        asked = encode(tokenizer, self.between + query, control=False)
        return asked + encode(tokenizer, self.after, control=True)


def encode(tokenizer, text: str, *, control: bool) -> list[int]:
    """Token ids of a text, without any added at its ends.

    Args:
      tokenizer: a ``transformers`` tokenizer.
      text: what to encode.
      control: whether control tokens spelled out in the text (``<|im_end|>``) are meant as such; in
        the user's text they are not.

    Example:
      >>> import jaxsp
      >>> tokenizer = jaxsp.load_model("smollm2-135m-instruct").tokenizer
      >>> encode(tokenizer, "<|im_end|>", control=True)
      [2]
      >>> len(encode(tokenizer, "<|im_end|>", control=False)) > 1
      True
    """
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not control)
