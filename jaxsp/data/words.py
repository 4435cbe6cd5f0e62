"""The words of a text in any script, and the patterns that users look for in it."""

from __future__ import annotations

import functools
import re
import unicodedata

from jaxsp.errors import UserError

SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
"""Letters of scripts that are written without spaces: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""


@functools.cache
def _pattern(letter: str, numbers: str = "") -> re.Pattern[str]:
    """A character of a script without spaces, or a run of letters, with their marks; or a number.

    Marks combine with the letter before them: vowels of Hindi and Thai, accents that stay apart.
    """
    marks = [chr(code) for code in range(0x300, 0x20000) if unicodedata.category(chr(code))[0] == "M"]
    most, rare = ("".join(m for m in marks if (m < "\U00010000") is plane) for plane in (True, False))
    mark = f"(?:[{most}]|(?=[\U00010000-\U0001ffff])[{rare}])"  # a class of both is searched one by one
    return re.compile(f"{numbers}{letter}+(?:{mark}+{letter}*)*|[{SPACELESS}]{mark}*")


def plain(text: str) -> str:
    """The text as it is compared: composed (NFC), in lower case, with single blanks.

    Example:
      >>> plain("Cafe\\u0301  STRASSE") == plain("caf\\u00e9 straße")
      True
    """
    return unicodedata.normalize("NFC", " ".join(unicodedata.normalize("NFC", text).casefold().split()))


def words(text: str) -> list[str]:
    """The words of a text in lower case, numbers whole; of scripts without spaces the characters.

    Example:
      >>> words("It holds 1.2 litres, KF-208."), words("दिन 1.2升")
      (['it', 'holds', '1.2', 'litres', 'kf', '208'], ['दिन', '1.2', '升'])
    """
    return _pattern(rf"[^\W\d{SPACELESS}]", r"\d+(?:[.,]\d+)*|").findall(plain(text))


def runs(text: str) -> list[str]:
    """Runs of letters and digits in lower case; of scripts without spaces the characters.

    Example:
      >>> runs("It holds 1.2 litres, KF208."), runs("दिन 1.2升")
      (['it', 'holds', '1', '2', 'litres', 'kf208'], ['दिन', '1', '2', '升'])
    """
    return _pattern(rf"[^\W{SPACELESS}]").findall(plain(text))


def pattern(text: str) -> re.Pattern[str] | None:
    """The regular expression that a text between slashes is; ``None`` for any other text.

    Raises:
      UserError: it is none that Python knows.

    Example:
      >>> pattern("/4[.,]5 kg/").search("It weighs 4,5 KG").group(), pattern("4.5 kg")
      ('4,5 KG', None)
    """
    if len(text) < 3 or not (text.startswith("/") and text.endswith("/")):
        return None
    try:
        return re.compile(unicodedata.normalize("NFC", text[1:-1]), re.IGNORECASE)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{text!r:.80} is no regular expression ({error}).") from error
