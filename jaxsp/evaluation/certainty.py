"""Certainty of σ: how sure it is of an answer, and below which certainty the whole document is asked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsp.artifact import MANIFEST, SoftPrompt, write_manifest
from jaxsp.errors import Damaged
from jaxsp.files import as_path
from jaxsp.typing import AnyArray, UserError

SIGNAL = "lowest_log_probability"
"""The name of what ``certainty`` gives, as it is stored."""

SHARE = 0.1
"""The share of requests for which a report says what a fallback would catch."""

ROOM = 64
"""Tokens of an answer that there must be room for behind the document, if so many are wanted; where there is
not, σ answers however unsure it is."""


def certainty(log_probs: Sequence[float] | AnyArray) -> float:
    """Certainty of an answer: the logarithm of the probability of its least probable token.

    It only falls while an answer grows, so that an answer can be given up before it has ended. It costs
    nothing: the probabilities are those by which the tokens are chosen.

    Args:
      log_probs: natural logarithms of the probabilities of the most probable tokens at each place of the
        answer, which are its own where nothing is drawn at random.

    Returns:
      At most 0, which means quite sure.

    Example:
      >>> certainty([-0.5, -2.0, -0.25]), certainty([])
      (-2.0, 0.0)

    Reference:
      Jiang et al. 2023, Active Retrieval Augmented Generation (arXiv:2305.06983): a model that reads more
      where a token is improbable.
    """
    return min(map(float, log_probs), default=0.0)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Certainties of σ on held-out queries, and which of its answers are wrong.

    Attributes:
      certainties: one an answer.
      wrong: whether the answer is wrong; where no facts are known, whether it lacks what the document
        decides.
    """

    certainties: tuple[float, ...]
    wrong: tuple[bool, ...]

    @classmethod
    def of_queries(cls, queries: Iterable[Mapping[str, Any]]) -> Calibration | None:
        """The calibration of a report's queries; ``None`` if none of them was held out.

        Args:
          queries: as the report has them; those that σ was trained on say nothing of others.
        """
        some = [q for q in queries if "certainty" in q and not q.get("trained_on")]
        known = [q["captured"] if (right := q.get("right_prompt")) is None else right for q in some]
        return cls(tuple(q["certainty"] for q in some), tuple(not r for r in known)) if some else None

    @classmethod
    def of(cls, prompt: SoftPrompt) -> Calibration:
        """The calibration that is stored in a saved prompt.

        Raises:
          UserError: there is none, or it is of another version.
          Damaged: it can't be read.
        """
        found = prompt.manifest.get("fallback")
        if found is None:
            raise UserError(
                "The prompt does not say when it is not sure: it was made by an older version, or is one of"
                " the shorter ones of a nested prompt, which are not calibrated. A whole one in a folder is,"
                " by jaxsp evaluate --calibrate."
            )
        if not isinstance(found, dict) or not isinstance(found.get("signal"), str):
            raise Damaged(f"The prompt's {MANIFEST} is damaged: fallback is {found!r:.60}")
        if found["signal"] != SIGNAL:
            raise UserError(
                f"The prompt was calibrated by {found['signal']!r:.60}, which this version of jaxsp doesn't"
                " know; upgrade it, or compress the document anew."
            )
        values, wrong = _list(found, "certainties", float), _list(found, "wrong", bool)
        if not values or len(values) != len(wrong) or not all(map(math.isfinite, values)):
            raise Damaged(f"The prompt's {MANIFEST} is damaged: fallback has no certainties of answers")
        return cls(tuple(values), tuple(wrong))

    def threshold(self, share: float) -> float:
        """The certainty below which an answer is not given, so that about this share is not.

        Args:
          share: the expected share of answers to other queries like these, above 0 and below 1.

        Example:
          >>> Calibration((-4.0, -1.0, -3.0, -2.0), (True, False, False, False)).threshold(0.2)
          -4.0

        Reference:
          Hyndman & Fan 1996, Sample Quantiles in Statistical Packages: the sixth, by which the expected
          share is the one asked for.
        """
        return float(np.quantile(self.certainties, share, method="weibull"))

    def caught(self, share: float) -> tuple[float, float | None]:
        """The share of these answers that are below the threshold, and that of the wrong ones.

        Args:
          share: as in ``threshold``.

        Returns:
          Both shares; the second is ``None`` if no answer is wrong.

        Example:
          >>> Calibration((-4.0, -1.0, -3.0, -2.0), (True, False, True, False)).caught(0.3)
          (0.25, 0.5)
        """
        below = np.array(self.certainties) < self.threshold(share)
        wrong = np.array(self.wrong)
        return float(below.mean()), float(below[wrong].mean()) if wrong.any() else None


def calibrate(directory: str | Path, report: Mapping[str, Any]) -> None:
    """Writes the calibration of an evaluation's queries into a saved prompt.

    Args:
      directory: the prompt's folder; a file in it will do.
      report: what ``jaxsp.evaluate`` gave for all of its slots.

    Raises:
      UserError: the prompt was trained on all of the queries, or the folder can't be read.
    """
    if (found := report["fallback"]) is None:
        raise UserError("The prompt was trained on all of these queries: calibrate it on others.")
    folder = as_path(directory, "The prompt")
    folder = folder.parent if folder.is_file() else folder
    write_manifest(folder, {**SoftPrompt.load(folder).manifest, "fallback": found})


def mark(queries: Sequence[dict[str, Any]], values: Sequence[float] | None) -> dict[str, Any] | None:
    """Says of each held-out query how sure σ is of its answer; gives the ``summary``.

    Args:
      queries: as the report has them.
      values: the certainties, in the order of the held-out queries; ``None``: not measured.
    """
    held_out = [query for query in queries if query["split"] == "held_out"]
    for query, value in zip(held_out, values or (), strict=values is not None):
        query["certainty"] = value
    return summary(queries)


def summary(queries: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The calibration of a report's queries as it is stored, with a sentence; ``None`` if there is none.

    Args:
      queries: as ``Calibration.of_queries`` takes them.
    """
    found = Calibration.of_queries(queries)
    if found is None:
        return None
    (sent, _), wrong, count = found.caught(SHARE), sum(found.wrong), len(found.wrong)
    below = round(sent * count)
    least = sorted(zip(found.certainties, found.wrong, strict=True))[:below]
    text = (
        f"With --context-fallback {SHARE:g} the {below} of {count} held-out queries on which σ is least sure"
        f" would be asked of the whole document; {sum(bad for _, bad in least)} of its {wrong} wrong answers"
        " are among them."
    )
    lists = {name: list(values) for name, values in vars(found).items()}
    return {"signal": SIGNAL, **lists, "text": text}


def _list(found: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """The values under a name, if they are a list of this kind."""
    values: Any = found.get(name)
    good = isinstance(values, list) and all(isinstance(value, kind) for value in values)
    return list(values) if good else []
