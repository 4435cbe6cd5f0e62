"""The drafts completed: the model writes the rest of each, at a temperature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxsp.data.words import words
from jaxsp.models import decoder
from jaxsp.models.chat import encode
from jaxsp.models.generation import Sampling, generate
from jaxsp.models.language_model import LanguageModel
from jaxsp.study.seeds import Draft
from jaxsp.typing import Array, KeyValues

SLOTS = 64
MOST_TOKENS = 24
"""Tokens of a query that the model writes; one without an end by then is left out."""

TEMPERATURE, TOP_P = 0.3, 0.95

EXAMPLES = """\
Text: The bridge over the Aare was built in 1932 and is 210 metres long.
Answer: 1932
Question: When was the bridge over the Aare built?

Text: The bridge over the Aare was built in 1932 and is 210 metres long.
Answer: 210 metres
Question: How long is the bridge?

Text: Colour of the roof: red
Answer: red
Question: What colour is the roof?

Text: Dogs must stay outside, but cats are welcome.
Answer: cats
Question: Which animals may come inside?

"""
"""Texts with a question each: by them models know what is wanted that follow no instructions, too."""
ENDS = "?", "\n"
"""Texts that end a question."""

_NEWLINES = "Ċ", "<0x0A>"
"""The ways in which vocabularies write the end of a line."""

FOREIGN = {"bridge", "aare", "roof", "dog", "dogs", "cat", "cats", "animal", "animals"}
"""Their own words: a query that has one is not about the document."""


def completed(
    model: LanguageModel,
    preamble: KeyValues,
    drafts: Sequence[Draft],
    document: str,
    key: Array,
    on_written: Callable[[int], None] = lambda tokens: None,
) -> list[str | None]:
    """The text of each draft; ``None`` where the model came to no end, or wrote about the examples.

    Args:
      model: the model that writes.
      preamble: the prefix before a context.
      drafts: those complete stay as they are.
      document: what they are about.
      key: random key of the draws.
      on_written: called as each is finished, with the number of its tokens.
    """
    texts: list[str | None] = [draft.text for draft in drafts]
    if not any(draft.source for draft in drafts):
        return texts
    tokenizer = model.tokenizer
    assert tokenizer is not None  # it has encoded the context
    examples = model.encode_context(EXAMPLES)
    if len(model.preamble_ids) + len(examples) + MOST_TOKENS > model.config.window:
        return [None if draft.source else draft.text for draft in drafts]
    prefix = decoder.read_long(model.params, model.config, examples[None], preamble)

    def request(draft: Draft) -> list[int]:
        text = f"Text: {draft.source}\nAnswer: {draft.expect}\nQuestion: {draft.text}".rstrip()
        return model.check_ids(encode(tokenizer, text, behind=model.chat.before)).tolist()

    room = model.config.window - prefix.end - MOST_TOKENS
    requests = {i: request(draft) for i, draft in enumerate(drafts) if draft.source}
    texts = [None if i in requests else text for i, text in enumerate(texts)]
    # Requests that are read together are about equally long.
    unfinished = sorted(
        (i for i, ids in requests.items() if len(ids) <= room), key=lambda i: len(requests[i])
    )
    if not unfinished:
        return texts
    sampling = Sampling(
        temperature=TEMPERATURE,
        top_p=TOP_P,
        stop_ids=(*model.stop_ids, *_end_ids(model)),
        stop_strings=ENDS,
        max_tokens=MOST_TOKENS,
    )
    written = generate(
        model.params,
        model.config,
        prefix,
        [requests[i] for i in unfinished],
        sampling,
        slots=SLOTS,
        key=key,
        decode=lambda ids: str(tokenizer.decode(ids)),
        together=True,
        on_finished=lambda index, ids: on_written(len(ids)),
    )
    foreign = FOREIGN - set(words(document))
    for i, ids in zip(unfinished, written, strict=True):
        text = f"{drafts[i].text}{tokenizer.decode(ids, skip_special_tokens=True)}".strip(" \n\"'*-")
        good = len(ids) < MOST_TOKENS and text and not foreign & set(words(text))
        if good:
            texts[i] = text if text.endswith((".", "!")) else f"{text}?"
    return texts


def _end_ids(model: LanguageModel) -> list[int]:
    """Tokens that end a question: a slot is then free at once, and not when the host looks at the texts."""
    tokenizer: Any = model.tokenizer
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    signs = (*ENDS, *_NEWLINES)
    found = (i for text, i in vocabulary.items() if any(sign in text for sign in signs))
    return sorted(i for i in found if i < model.config.vocab_size)
