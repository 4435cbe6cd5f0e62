"""Whether answers keep the facts: decisive tokens, expected texts, and what stands in the document."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence

from jaxsp.data.documents import Query
from jaxsp.data.parts import words as words


def says(answer: str, fact: str) -> bool:
    """Whether the words of ``fact`` stand in the answer, one after the other.

    Example:
      >>> says("It costs 249 euros.", "249 Euros"), says("It costs 12.249 euros.", "249 euros")
      (True, False)
    """
    found, wanted = words(answer), words(fact)
    return any(found[i : i + len(wanted)] == wanted for i in range(len(found) - len(wanted) + 1))


def is_right(answer: str, query: Query) -> bool | None:
    """Whether an answer has all that the query expects, and the answer given for it; ``None``: not known.

    Example:
      >>> asked = Query("How much?", expect=("249 euros",))
      >>> is_right("It is 249 euros.", asked), is_right("It is 249 euros.", Query("How much?"))
      (True, None)
    """
    known = [*query.expect, *filter(None, [query.answer])]
    return all(says(answer, fact) for fact in known) if known else None


def agrees(
    reference: Sequence[int], decisive: Sequence[bool], answer: Sequence[int], stop_ids: Collection[int] = ()
) -> bool:
    """Whether an answer has every decisive token of the reference: each run of them, in their order.

    Args:
      reference: the teacher's answer, as token ids.
      decisive: whether each of its tokens is decisive.
      answer: the answer looked at.
      stop_ids: ids that end an answer; none is a fact.

    Example:
      >>> agrees([5, 2, 4, 9, 7], [False, True, True, True, False], [8, 2, 4, 9]), agrees([5, 2], [0, 1], [4])
      (True, False)
    """
    marked = [(bool(d) and i not in stop_ids, i) for i, d in zip(reference, decisive, strict=True)]
    start = 0
    for is_decisive, run in itertools.groupby(marked, key=lambda pair: pair[0]):
        ids = [i for _, i in run]
        if not is_decisive:
            continue
        places = range(start, len(answer) - len(ids) + 1)
        place = next((p for p in places if list(answer[p : p + len(ids)]) == ids), None)
        if place is None:
            return False
        start = place + len(ids)
    return True


def figures_and_names(text: str) -> set[str]:
    """The numbers of a text, and its words in capitals that don't begin a sentence, in lower case.

    Example:
      >>> sorted(figures_and_names("The K7 is made in Norway. It costs 249 euros."))
      ['249', '7', 'k', 'norway']
    """
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
