"""Whether answers keep the facts: decisive tokens, expected texts, and what stands in the document."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Collection, Sequence

from jaxsp.data.documents import Query
from jaxsp.data.words import pattern, plain, words


def says(answer: str, fact: str) -> bool:
    """Whether the words of ``fact`` stand in the answer, one after the other; or a fact without words does.

    Example:
      >>> says("It costs 249 euros.", "249 Euros"), says("It costs 12.249 euros.", "249 euros")
      (True, False)
      >>> says("Good ±", "±"), says("Good", "±")
      (True, False)
    """
    found, wanted = words(answer), words(fact)
    if not wanted:
        return plain(fact) in plain(answer)
    return any(found[i : i + len(wanted)] == wanted for i in range(len(found) - len(wanted) + 1))


def has_expected(answer: str, query: Query) -> bool:
    """Whether an answer has all that the query expects: its texts, as ``says`` finds them, and its patterns.

    Example:
      >>> asked = Query("How heavy is it?", expect=("/4[.,]5/", "kg"))
      >>> has_expected("It weighs 4,5 kg.", asked), has_expected("It weighs 5 kg.", asked)
      (True, False)
    """
    composed = unicodedata.normalize("NFC", answer)
    patterns = {text: pattern(text) for text in query.expect}
    return all(own.search(composed) if own else says(answer, text) for text, own in patterns.items())


def is_right(answer: str, query: Query) -> bool | None:
    """Whether an answer has all that the query expects, and the answer given for it; ``None``: not known.

    Example:
      >>> asked = Query("How much?", expect=("249 euros",))
      >>> is_right("It is 249 euros.", asked), is_right("It is 249 euros.", Query("How much?"))
      (True, None)
    """
    if not query.expect and query.answer is None:
        return None
    return has_expected(answer, query) and (query.answer is None or says(answer, query.answer))


def lost(
    reference: Sequence[int], decisive: Sequence[bool], answer: Sequence[int], stop_ids: Collection[int] = ()
) -> list[bool]:
    """Whether each token of the reference is decisive and lost: an answer has runs of them in their order.

    Args:
      reference: the teacher's answer, as token ids.
      decisive: whether each of its tokens is decisive.
      answer: the answer looked at.
      stop_ids: ids that end an answer; none is a fact.

    Example:
      >>> lost([5, 2, 4, 9, 7], [False, True, True, True, False], [8, 2, 4, 9]), lost([5, 2], [0, 1], [4])
      ([False, False, False, False, False], [False, True])
    """
    marked = [(bool(d) and i not in stop_ids, i) for i, d in zip(reference, decisive, strict=True)]
    start, found = 0, list[bool]()
    for is_decisive, run in itertools.groupby(marked, key=lambda pair: pair[0]):
        ids = [i for _, i in run]
        places = range(start, len(answer) - len(ids) + 1) if is_decisive else ()
        place = next((p for p in places if list(answer[p : p + len(ids)]) == ids), None)
        found += [is_decisive and place is None] * len(ids)
        start = start if place is None else place + len(ids)
    return found


def agrees(
    reference: Sequence[int], decisive: Sequence[bool], answer: Sequence[int], stop_ids: Collection[int] = ()
) -> bool:
    """Whether an answer has every decisive token of the reference; arguments as in ``lost``."""
    return not any(lost(reference, decisive, answer, stop_ids))


def whole_words(pieces: Sequence[str], marked: Sequence[bool]) -> list[str]:
    """The words that marked tokens are a part of, those next to each other as one text.

    Args:
      pieces: the text of each token.
      marked: whether it is one.

    Example:
      >>> whole_words(["It", " costs", " 2", "49", " euros", " in", " Oslo", "."], [0, 0, 0, 1, 1, 0, 1, 0])
      ['249 euros', 'Oslo']
    """
    text = "".join(pieces)
    ends = list(itertools.accumulate(map(len, pieces)))
    spans = [(end - len(piece), end) for piece, end, m in zip(pieces, ends, marked, strict=True) if m]
    found, last = list[str](), -2
    for number, word in enumerate(re.finditer(r"\S+", text)):
        if any(start < word.end() and word.start() < end for start, end in spans):
            if number == last + 1:
                found[-1] += f" {word[0]}"
            else:
                found.append(word[0])
            last = number
    return [some.strip(".,;:!?") or some for some in found]


def figures_and_names(text: str) -> set[str]:
    """The numbers of a text, and its words in capitals that don't begin a sentence, in lower case.

    Example:
      >>> sorted(figures_and_names("The K7 is made in Norway. It costs 249 euros."))
      ['249', '7', 'k', 'norway']
    """
    text = unicodedata.normalize("NFC", text)
    inside = re.sub(r"(^|[.!?:]\s+|\n\s*(?:[-*#]+\s*)?)([^\W\d_][^\W\d_]+)", r"\1", text)
    found = re.findall(r"\d+(?:[.,]\d+)*|\b[^\W\d_a-z][^\W\d_]*", inside)
    return {part.casefold() for part in found if part[0].isdigit() or part[0].isupper()}


def stands_in(answer: str, *sources: str) -> bool | None:
    """Whether all figures and names of an answer stand in the sources; ``None`` if it has none.

    Example:
      >>> stands_in("Made in Norway.", "Country: Norway"), stands_in("It costs 12 euros.", "249 euros")
      (True, False)
    """
    found = figures_and_names(answer)
    return found <= {word for source in sources for word in words(source)} if found else None
