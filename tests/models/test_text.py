"""Texts as token ids, by every kind of tokenizer: no control token, and parts are those of the whole."""

from __future__ import annotations

import copy

import pytest

from jaxsp.models import text as text_module
from jaxsp.models.chat import ChatOptions, ChatTexts
from jaxsp.models.text import control_ids, encode
from tests.models.tokenizers_of_all_kinds import KINDS, SPECIAL, TEMPLATES, tokenizer

CONTEXT, QUERY = "The tank holds 1.2 litres.\n\n- The lid is made of steel", "How long is the cable?"
TEXTS = [
    *SPECIAL,
    "<think>",
    "Say <|user|> and </s>.",
    "</s> </s>",
    "x<|end|>y</s>",
    "The\n<|assistant|>\n",
    "[INST] <s>",
]


def whole(tokenizer, context, query, **options):
    message = {"role": "user", "content": f"{context}\n\n{query}"}
    return tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=False, **options
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_are_those_of_the_whole(kind, template):
    """But for one token, where the context and what follows it may merge."""
    own = tokenizer(kind, TEMPLATES[template])
    chat = ChatTexts.of(own)
    for context, query in ((CONTEXT, QUERY), ("the lid.", "why?"), (" The lid", "What ?  ")):
        parts = [chat.before_ids(own), chat.context_ids(own, context), chat.query_ids(own, query)]
        ours, theirs = [i for part in parts for i in part], whole(own, context, query)
        boundary = len(parts[0] + parts[1])
        assert ours[: boundary - 1] == theirs[: boundary - 1], own.convert_ids_to_tokens(theirs)
        after = len(parts[2]) - 1
        assert ours[-after:] == theirs[-after:], own.convert_ids_to_tokens(theirs)
        assert abs(len(ours) - len(theirs)) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_has_no_control_token(kind):
    own = tokenizer(kind)
    forbidden = {own.bos_token_id, own.eos_token_id, *own.added_tokens_decoder} - {own.unk_token_id}
    assert control_ids(own) == forbidden
    for text in TEXTS:
        for behind in ("", "a", "<|user|>", "[INST] "):
            ids = encode(own, text, behind=behind)
            assert ids
            assert forbidden.isdisjoint(ids), (text, own.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "byte" in kind or "added" in kind])
def test_nothing_of_a_text_is_lost(kind):
    own = tokenizer(kind)
    for text in [*TEXTS, CONTEXT, "Zürich 水箱 🙂"]:
        assert own.decode(encode(own, text, behind="a")).lstrip() == text.lstrip()


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_control_tokens_is_what_the_tokenizer_makes_of_it(kind):
    own = tokenizer(kind)
    assert encode(own, CONTEXT) == own.encode(CONTEXT, add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_in_pieces_is_what_the_whole_is(kind, monkeypatch):
    own = tokenizer(kind)
    odd = '"It\'s 90  cm", he said.\n\n\n    - a,b;c\n1.2 3\n'
    long = " ".join([CONTEXT, QUERY, odd, CONTEXT.upper()] * 9)
    behind = {before: encode(own, long, behind=before) for before in ("", "a", "x\n")}
    for size in (50, 77, 400):  # in the midst of all that there is
        monkeypatch.setattr(text_module, "AT_ONCE", size)
        for before, ids in behind.items():
            assert encode(own, long, behind=before) == ids, size
        assert len("".join(piece for piece, _ in text_module._pieces(long, ""))) == len(long)
    assert [piece for piece, _ in text_module._pieces("語" * 1000, "")] == [
        "語" * 400,
        "語" * 400,
        "語" * 200,
    ]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_given_answer_is_what_the_template_makes_of_it(kind, template):
    """From the end of the question to the control token that ends the turn."""
    own = tokenizer(kind, TEMPLATES[template])
    chat = ChatTexts.of(own)
    message = {"role": "user", "content": f"{CONTEXT}\n\n{QUERY}"}
    turns = [message, {"role": "assistant", "content": "The lid is steel"}]
    theirs = own.apply_chat_template(turns, tokenize=True, return_dict=False)
    answer = chat.answer_ids(own, "The lid is steel")
    assert answer[-1] == own.convert_tokens_to_ids("</s>" if template == "instructions" else "<|end|>")
    assert "".join(map(str, answer[1:-1])) in "".join(map(str, theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_are_those_of_the_whole_in_two_turns(kind):
    own = tokenizer(kind, TEMPLATES["turns"])
    chat = ChatTexts.of(own, ChatOptions(slot="system"))
    parts = [*chat.before_ids(own), *chat.context_ids(own, CONTEXT), *chat.query_ids(own, QUERY)]
    turns = [{"role": "system", "content": CONTEXT}, {"role": "user", "content": QUERY}]
    assert parts == own.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    ends = own.convert_tokens_to_ids("<|end|>")
    asked = chat.query_ids(own, "What is <|end|>?")
    assert asked.count(ends) == 2  # the template's


def test_the_document_in_the_system_turn_and_a_system_text():
    own = tokenizer("byte level", TEMPLATES["turns"])
    system = ChatTexts.of(own, ChatOptions(slot="system"))
    assert system.before == "<|user|>system\n"
    assert system.between == "<|end|>\n<|user|>user\n"
    given = ChatTexts.of(own, ChatOptions(system="Be brief."))
    assert given.before == "<|user|>system\nBe brief.<|end|>\n<|user|>user\n"


def test_what_knows_no_control_token_is_made_once(monkeypatch):
    """And anew when a token is added: to write a tokenizer out takes long."""
    own = copy.deepcopy(tokenizer("byte level"))
    made, disarmed = [], text_module._disarmed

    def counted(description, ids):
        made.append(ids)
        return disarmed(description, ids)

    monkeypatch.setattr(text_module, "_disarmed", counted)
    for _ in range(3):
        encode(own, "Say </s>.")
    assert len(made) == 1
    own.add_tokens(["<new>"])
    for _ in range(3):
        assert own.convert_tokens_to_ids("<new>") not in encode(own, "Say <new>.")
    assert len(made) == 2
