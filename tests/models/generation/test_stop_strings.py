"""Where an answer is cut, and how much of it is certain before it ends."""

from __future__ import annotations

from jaxsp.models.generation.stop_strings import certain, stop_at


def test_the_stop_string_that_is_complete_first_counts():
    """Whether the text is looked at after every token or at its end."""
    decode = lambda ids: "".join(map(chr, ids))  # noqa: E731
    ids = [ord(letter) for letter in "xabcdy"]
    for n in (4, 5, 6):
        assert stop_at(ids[:n], ("abcd", "bc"), decode) == 2
    assert stop_at(ids[:3], ("abcd", "bc"), decode) is None


def test_tokens_that_may_begin_a_stop_string_are_held_back():
    decode = lambda ids: bytes(ids).decode("utf-8", "replace")  # noqa: E731
    stops = ("stop", "é")
    for text, sure in [("a", 1), ("as", 1), ("ast", 1), ("asto", 1), ("asts", 3), ("asta", 4)]:
        assert certain([*text.encode()], stops, decode) == sure
    assert certain([97, 0xC3], stops, decode) == 1  # half an é
    assert stop_at([97, *"é".encode()], stops, decode) == 1
    assert certain([97, *"è".encode()], stops, decode) == 3
