"""Where stop strings cut an answer: they are found in its text, and may begin within a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]


def stop_at(ids: list[int], stop_strings: Sequence[str], decode: Decode | None) -> int | None:
    """Number of tokens before the stop string that is complete first, if there is one."""
    if not stop_strings or decode is None:
        return None
    text = decode(ids)
    starts = [(text.find(stop), len(stop)) for stop in stop_strings]
    found = [(start + length, start) for start, length in starts if start >= 0]
    return _tokens_before(min(found)[1], ids, decode) if found else None


def certain(ids: list[int], stop_strings: Sequence[str], decode: Decode | None) -> int:
    """Number of tokens before anything that more tokens could make a stop string."""
    if not stop_strings or decode is None:
        return len(ids)
    text = decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")  # the bytes of half a character
    starts = range(max(0, len(text) - max(map(len, stop_strings))), len(text))
    begun = [at for at in starts if any(stop.startswith(text[at:]) for stop in stop_strings)]
    return _tokens_before(min(begun, default=len(text)), ids, decode)


def _tokens_before(end: int, ids: list[int], decode: Decode) -> int:
    """Number of tokens that decode to at most ``end`` characters."""
    return next(n for n in range(len(ids), -1, -1) if len(decode(ids[:n])) <= end)
