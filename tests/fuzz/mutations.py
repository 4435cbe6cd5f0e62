"""Damage and malice, seeded: bytes changed at random, and JSON that says odd things."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

EXTREME = [
    0,
    1,
    2,
    7,
    127,
    128,
    255,
    256,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**63,
]
EXTREME += [2**64 - 1]
WORDS = [
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xf4\x90\x80\x80", "\u2028".encode(), b"\r", b"\n\n",
    b"\\ud800", b"1e999", b"NaN", b"-0", b"9" * 5000, b"[" * 5000, b'{"a":' * 5000, b"<div>" * 2000, b"<!--",
    b"-->", b"]]>", b"<![", b"&#x110000;", b"{{", b"{%", b"%}", b"{% for x in y %}", b'"', b"'",
    b"```", b"\x1b[31m",
    b"(a+)+$", b"(?P<", b"\\1", b"{1,99999}", b"*", b"(?i)", b"\\", b"|", b"\t", b";", b",", b"true",
    b"null", b"[]",
    b"{}", b"-1", b"%PDF", b"PAR1", b"<table>", b"<li>", b"<pre>", b"endobj", b"stream", b" " * 3000,
]  # fmt: skip
"""Inserted into texts."""

RAW = "\ue000"
"""Stands for JSON that can't be made of Python's objects."""
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 3.5, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 1e308, 1e-320,
    float("nan"),
    float("inf"), "", " ", "\0", "\ud800", "σ", "../x", "/etc/passwd", "x" * 3000, "{{ 1 }}", "none",
    "float32",
    [], {}, [[]], [None], [1, "a"], {"": 0}, {"a": {"b": []}}, RAW, ["a"] * 300,
]  # fmt: skip
_DEEP = ["[" * 3000 + "]" * 3000, '{"a":' * 900 + "0" + "}" * 900, "9" * 5000, "-0.0", "1e999", "1E-999"]


def of_bytes(data: bytes, draw: Random, others: Sequence[bytes]) -> bytes:
    """Some bytes changed, cut out, put in or taken from another input."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        draw.choice(_CHANGES)(changed, draw, others)
    return bytes(changed)


def _place(data: bytearray, draw: Random) -> int:
    """Mostly in the first part: headers stand there."""
    return draw.randrange(len(data) + 1 if draw.random() < 0.5 else min(len(data), 2000) + 1)


def _flip(data: bytearray, draw: Random, others: Sequence[bytes]) -> None:
    if data:
        data[min(_place(data, draw), len(data) - 1)] ^= 1 << draw.randrange(8)


def _overwrite(data: bytearray, draw: Random, others: Sequence[bytes]) -> None:
    place = _place(data, draw)
    data[place : place + 1] = bytes([draw.randrange(256)])


def _number(data: bytearray, draw: Random, others: Sequence[bytes]) -> None:
    size = draw.choice((1, 2, 4, 4, 8, 8))
    place = _place(data, draw)
    place -= place % size if draw.random() < 0.3 else 0
    order = draw.choice(("little", "little", "big"))
    data[place : place + size] = (draw.choice(EXTREME) % (1 << 8 * size)).to_bytes(size, order)


def _cut(data: bytearray, draw: Random, others: Sequence[bytes]) -> None:
    del data[_place(data, draw) :]


def _take_out(data: bytearray, draw: Random, others: Sequence[bytes]) -> None:
    place = _place(data, draw)
    del data[place : place + draw.choice((1, 1, 2, 8, 100))]


def _repeat(data: bytearray, draw: Random, others: Sequence[bytes]) -> None:
    place, size = _place(data, draw), draw.choice((1, 4, 30, 200))
    data[place:place] = data[place : place + size] * draw.choice((1, 2, 20))


def _insert(data: bytearray, draw: Random, others: Sequence[bytes]) -> None:
    place = _place(data, draw)
    data[place:place] = draw.choice(WORDS) if draw.random() < 0.8 else draw.randbytes(draw.choice((1, 8, 64)))


def _splice(data: bytearray, draw: Random, others: Sequence[bytes]) -> None:
    other = draw.choice(others)
    data[_place(data, draw) :] = other[draw.randrange(len(other) + 1) :]


_CHANGES = [_flip, _flip, _overwrite, _number, _number, _cut, _take_out, _repeat, _insert, _insert, _splice]


def of_json(text: bytes, draw: Random, others: Sequence[bytes]) -> bytes:
    """A value, a name or an element that is another, is missing, or is there twice."""
    holder = [json.loads(text)]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        _change(holder, draw)
    return _dumped(holder[0], draw)


def of_lines(text: bytes, draw: Random, others: Sequence[bytes]) -> bytes:
    """JSON lines: one of them changed, missing, twice, or in another place."""
    lines = text.splitlines()
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    what = draw.random()
    if what < 0.7:
        lines[i] = of_json(lines[i], draw, others)
    elif what < 0.8:
        del lines[i]
    else:
        lines.insert(j, lines[i] if what < 0.9 else lines.pop(i))
    return b"\n".join(lines) + b"\n"


def of_safetensors(data: bytes, draw: Random, others: Sequence[bytes]) -> bytes:
    """The JSON of the header changed, and its length mended."""
    size = int.from_bytes(data[:8], "little")
    header = of_json(data[8 : 8 + size], draw, others)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _change(holder: list[Any], draw: Random) -> None:
    places = list(_places(holder))
    inside, key = draw.choice(places)
    what = draw.random()
    if what < 0.55 or inside is holder:
        inside[key] = copy.deepcopy(draw.choice(ODD))
    elif what < 0.65:
        del inside[key]
    elif what < 0.75:
        other, name = draw.choice(places)
        inside[key] = copy.deepcopy(other[name])
    elif what < 0.85:
        inside[key] = draw.choice(
            [[inside[key]], {"a": inside[key]}, str(inside[key])[:3000], draw.choice(EXTREME)]
        )
    elif isinstance(inside, dict):
        inside[draw.choice([f"{key}x", "", "σ", key.upper()])] = inside.pop(key)
    else:
        inside.insert(key, copy.deepcopy(inside[key]))


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    keys = (
        list(node) if isinstance(node, dict) else range(min(len(node), 40)) if isinstance(node, list) else ()
    )
    for key in keys:
        yield node, key
        yield from _places(node[key])


def _dumped(value: Any, draw: Random) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    except RecursionError:
        text = _DEEP[0]
    text = text.replace(json.dumps(RAW), RAW).replace(f'"{RAW}"', RAW)
    return text.replace(RAW, draw.choice(_DEEP)).encode("utf-8", "surrogatepass")


FORMS: dict[str, Callable[[bytes, Random, Sequence[bytes]], bytes]] = {
    "bytes": of_bytes, "json": of_json, "lines": of_lines, "safetensors": of_safetensors,
}  # fmt: skip
"""By the form of a reader's inputs; each input may be changed as bytes, too."""


def mutated(form: str, inputs: Sequence[bytes], seed: str) -> bytes:
    """One of the inputs, changed; the same for the same seed."""
    draw = Random(seed)
    data = draw.choice(inputs)
    change = FORMS[form] if draw.random() < 0.6 else of_bytes
    try:
        return change(data, draw, inputs)
    except (ValueError, IndexError):  # an input that is not of the form
        return of_bytes(data, draw, inputs)
