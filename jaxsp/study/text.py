"""The document in pieces: its sentences, each where it stands, and chunks of them under their headings."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

import markdown_it
import sentencex

from jaxsp.data.words import SPACELESS, words

_BLOCKS = markdown_it.MarkdownIt("commonmark").enable("table")
_MARKS = re.compile(r"^\s*(?:(?:[-*+>#]+|\d+[.)])\s+)*")
"""Marks of Markdown before the words of a line: of lists, quotes, headings."""
_TAGS = re.compile(r"<!--.*?(?:-->|\Z)|<[^>]*>", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A sentence, an item of a list, a row of a table or a line of code.

    Attributes:
      text: its words, on one line, without the marks of Markdown before them.
      start: where it begins in the document.
      end: where what follows begins: ``document[:start] + document[end:]`` is the document without it.
      headings: the headings above it, the outermost first.
      block: number of the paragraph, list or table that it is part of.
      columns: the head of its table, where it is a row of one.
    """

    text: str
    start: int
    end: int
    headings: tuple[str, ...] = ()
    block: int = 0
    columns: str = ""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Sentences that stand together under the same headings.

    Attributes:
      text: their text as it stands in the document, with the headings above it.
      sentences: their numbers in the document's list of sentences.
      headings: the headings above them, the outermost first.
    """

    text: str
    sentences: tuple[int, ...]
    headings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Document:
    """A document, and its pieces.

    Attributes:
      text: the whole.
      sentences: all of them, in their order.
      chunks: all of them, each of some sentences.
    """

    text: str
    sentences: list[Sentence]
    chunks: list[Chunk]

    @classmethod
    def of(cls, text: str, tokens: Callable[[str], int], most: int = 160) -> Document:
        """A document in chunks of up to ``most`` tokens, which ``tokens`` counts in a text."""
        found = sentences(text)
        return cls(text, found, chunks(text, found, tokens, most))

    @functools.cached_property
    def _counts(self) -> collections.Counter[str]:
        return collections.Counter(words(self.text))

    def alike(self, sentence: int) -> set[int]:
        """The sentences with the same words: who asks for one asks for all."""
        return self._alike[self.sentences[sentence].text]

    @functools.cached_property
    def _alike(self) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for i, sentence in enumerate(self.sentences):
            found.setdefault(sentence.text, set()).add(i)
        return found

    @functools.cached_property
    def distinct(self) -> set[int]:
        """The first sentence of each text."""
        return {min(numbers) for numbers in self._alike.values()}

    def begins_one(self, beginning: str) -> bool:
        """Whether the sentences that begin so have one text."""
        at = bisect.bisect_left(self._in_order, beginning)
        return not any(text.startswith(beginning) for text in self._in_order[at + 1 : at + 2])

    @functools.cached_property
    def _in_order(self) -> list[str]:
        return sorted(self._alike)

    def count(self, word: str) -> int:
        """Number of times that it has a word, in lower case."""
        return self._counts[word]

    def having(self, word: str) -> Sequence[int]:
        """Numbers of the sentences that have a word, in lower case."""
        return self._having.get(word, ())

    @functools.cached_property
    def _having(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for i, sentence in enumerate(self.sentences):
            for word in set(words(sentence.text)):
                found.setdefault(word, []).append(i)
        return found

    @functools.cached_property
    def telling(self) -> dict[str, set[int]]:
        """By word the sentence that alone has it, with those of the same text: figures, names, long words.

        Of scripts without spaces, by pairs of characters.
        """
        everywhere = collections.Counter(terms(self.text))
        found: dict[str, set[int]] = {}
        for text, numbers in self._alike.items():
            names = {
                word.casefold() for word in re.findall(r"(?<=[^.!?:\s]\s)\w\w+", text) if word[0].isupper()
            }
            for term, times in collections.Counter(terms(text)).items():
                tells = term in names or len(term) >= (2 if _BARE.search(term) else LONG)
                if tells and times * len(numbers) == everywhere[term]:
                    found[term] = numbers
        return found

    @functools.cached_property
    def is_english(self) -> bool:
        """Whether it is written in English."""
        return is_english(self._counts)

    def rare_words(self, sentence: int) -> list[str]:
        """The words of a sentence that the document has once, the longest first; none that is very short."""
        here = re.findall(r"[^\W_][\w'’.@-]*[^\W_]", self.sentences[sentence].text)

        def is_once(word: str) -> bool:
            if re.search(f"[{SPACELESS}]", word):  # a clause: its characters stand elsewhere, too
                return self.text.count(word) == 1
            return all(self._counts[part] == 1 for part in words(word))

        return sorted((w for w in dict.fromkeys(here) if len(w) > 2 and is_once(w)), key=len, reverse=True)

    def facts_of(self, sentence: int) -> list[str]:
        """Parts of a sentence that a question may ask for: what stands after a colon or in a table's cells,
        figures with their unit, names, then the words that the document has once.
        """
        here = self.sentences[sentence]
        value = re.search(r":\s+(\S.*?)[.;]?$", here.text)
        cells = here.text.split(" | ")[1:] if here.columns else []
        figures = re.findall(rf"{FIGURE}(?:\s?(?:[^\W\d_]+|[%€$£°]))?", here.text)
        codes = re.findall(r"(?=\S*\d)(?=\S*[^\W\d])[^\W_]\S*\w|\d[\d-]*-[\d-]*\d", here.text)
        names = re.findall(r"(?<=[^.!?:]\s)[^\W\d_a-z][\w@-]*(?:\s[^\W\d_a-z][\w@-]*)*", here.text)
        found = [*cells, *(value.groups() if value else ())]
        found += [*codes, *figures, *names, *self.rare_words(sentence)]
        new: list[str] = []
        for fact in found:
            own = set(words(fact))
            is_rare = own and min(map(self.count, own)) <= RARE
            if is_rare and not any(own & set(words(other)) for other in new):
                new.append(fact)
        return new

    def false_variant(self, sentence: int) -> str:
        """The sentence with another sentence's figure in place of its first; empty if it can't be."""
        here = self.sentences[sentence].text
        found = re.search(FIGURE, here)
        if not found:
            return ""
        others = [other.text for i, other in enumerate(self.sentences) if i != sentence]
        after = others[sentence:] + others[:sentence]
        figures = [figure for text in after for figure in re.findall(FIGURE, text)]
        other = next((figure for figure in figures if figure not in here), "")
        return other and here[: found.start()] + other + here[found.end() :]

    def span(self, numbers: Sequence[int]) -> tuple[int, int]:
        """The place in it from the first to the last of some sentences."""
        some = [self.sentences[i] for i in numbers]
        return min(s.start for s in some), max(s.end for s in some)

    def with_heading(self, sentence: int) -> str:
        """A sentence after its heading, and of a table after the table's head."""
        here = self.sentences[sentence]
        return ": ".join(filter(None, [*here.headings[-1:], here.columns, here.text]))

    def name_of(self, chunk: Chunk) -> str:
        """The name of a chunk's part of the document."""
        if chunk.headings:
            return f'the part "{chunk.headings[-1]}"'
        return f'the part that begins with "{" ".join(self.sentences[chunk.sentences[0]].text.split()[:6])}"'


LONG = 6
"""Letters of a word from which it is hardly one of those that any sentence may have."""

_SPACELESS = re.compile(f"[{SPACELESS}]")
_BARE = re.compile(rf"[\d{SPACELESS}]")

RARE = 2
"""Times that a document may have a word that tells one of its facts from others."""

ENGLISH = ("the", "of", "and", "to", "a", "in", "is", "that", "it", "for", "was", "on", "with", "are", "be")
"""The commonest words of English."""
FIGURE = r"(?<![\w.])\d+(?:[.,:]\d+)*(?![\w])"


def is_english(counts: collections.Counter[str]) -> bool:
    """Whether a text with these words has the commonest ones of English as often as English has."""
    return sum(counts[word] for word in ENGLISH) > 0.15 * counts.total()


def terms(text: str) -> list[str]:
    """The words of a text; of scripts without spaces each character, and each with the next one.

    Example:
      >>> terms("It holds 1.2 litres."), terms("水箱容")
      (['it', 'holds', '1.2', 'litres'], ['水', '箱', '容', '水箱', '箱容'])
    """
    own = words(text)
    return own + [a + b for a, b in itertools.pairwise(own) if _SPACELESS.match(a) and _SPACELESS.match(b)]


def first_words(sentence: str, part: float) -> str:
    """The first part of a sentence, in whole words; empty if it has too few.

    Example:
      >>> first_words("The lid is made of steel.", 1 / 3), first_words("水箱容量为1.2升。", 1 / 2)
      ('The lid', '水箱容量')
    """
    own = list(re.finditer(rf"[{SPACELESS}]|[^\s{SPACELESS}]+", sentence))
    count = max(2, round(part * len(own)))
    return sentence[: own[count - 1].end()] if count < len(own) else ""


def sentences(document: str) -> list[Sentence]:
    """The sentences of a document in Markdown or plain text, in their order; headings are none.

    Example:
      >>> found = sentences("# Cups\\n\\nA cup is small. It is red.\\n\\n- Price: 3 euros\\n")
      >>> [(s.text, s.headings) for s in found][1:3]
      [('It is red.', ('Cups',)), ('Price: 3 euros', ('Cups',))]
    """
    lines = document.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    found: list[Sentence] = []
    headings: list[tuple[int, str]] = []
    columns, top = "", 0
    for token in _BLOCKS.parse(document):
        top += token.level == 0 and token.nesting >= 0
        if token.map is None:
            continue
        first, last = starts[token.map[0]], starts[min(token.map[1], len(lines))]
        if token.type == "heading_open":
            level = int(token.tag[1:])
            headings = [h for h in headings if h[0] < level] + [(level, _plain(document[first:last]))]
        elif token.type == "thead_open":
            columns = _plain(document[first:last])
        elif token.type == "tr_open" and _plain(document[first:last]) != columns:
            found += _whole(document, first, last, headings, top, columns)
        elif token.type == "paragraph_open":
            found += _split(document, first, last, headings, top)
        elif token.type in ("fence", "code_block", "html_block"):
            block = document[first:last]
            if token.type == "html_block":
                block = _without_tags(block)
            for start, end in itertools.pairwise(starts):
                line = block[start - first : end - first] if first <= start < last else ""
                if line and not line.lstrip().startswith(("```", "~~~")):
                    found += _whole(document, start, end, headings, top, "", line)
    return found


def _split(
    document: str, first: int, last: int, headings: list[tuple[int, str]], block: int
) -> Iterator[Sentence]:
    # Compiled, without types.
    pieces = sentencex.segment("en", document[first:last])  # pyright: ignore[reportAttributeAccessIssue]
    start = first
    for i, piece in enumerate(pieces):
        end = start + len(piece)
        if pieces[1:]:  # what is left stays a line of its own
            marks = _MARKS.match(piece) if i == 0 else None
            here, there = start + (marks.end() if marks else 0), start + len(piece.rstrip("\n"))
            yield from _whole(document, here, there, headings, block, "")
        else:
            yield from _whole(document, start, end, headings, block, "")
        start = end


def _whole(
    document: str,
    start: int,
    end: int,
    headings: list[tuple[int, str]],
    block: int,
    columns: str,
    text: str = "",
) -> Iterator[Sentence]:
    text = _plain(text or document[start:end])
    if re.search(r"\w", text):
        yield Sentence(text, start, end, tuple(text for _, text in headings), block, columns)


def _without_tags(html: str) -> str:
    """The text of HTML, each character where it was; what is a tag or a comment is blank."""
    return _TAGS.sub(lambda found: re.sub(r"\S", " ", found[0]), html)


def _plain(text: str) -> str:
    """The words on one line; of a table's row without the lines around its cells."""
    text = " ".join(_MARKS.sub("", text).split()).rstrip("#").strip()
    if text.startswith("|"):
        text = " | ".join(cell.strip() for cell in text.strip("|").split("|"))
    return text


def chunks(document: str, found: Sequence[Sentence], tokens: Callable[[str], int], most: int) -> list[Chunk]:
    """Chunks of whole sentences, none across a heading.

    Args:
      document: the text.
      found: its sentences.
      tokens: counts the tokens of a text.
      most: tokens of a chunk, headings included; a single sentence may have more.
    """
    groups: list[list[int]] = []
    size = 0
    for i, sentence in enumerate(found):
        own = tokens(sentence.text)
        new = not groups or found[groups[-1][-1]].headings != sentence.headings or size + own > most
        if new:
            groups.append([])
            size = tokens("\n".join(sentence.headings))
        groups[-1].append(i)
        size += own
    return [_chunk(document, found, group) for group in groups]


def _chunk(document: str, found: Sequence[Sentence], group: list[int]) -> Chunk:
    first, last = found[group[0]], found[group[-1]]
    head = list(first.headings)
    if first.columns:
        head.append(first.columns)
    body = document[first.start : last.end].strip("\n")
    return Chunk("\n".join([*head, body]), tuple(group), first.headings)
