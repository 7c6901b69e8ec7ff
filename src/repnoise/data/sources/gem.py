"""Text-to-data tasks of the GEM benchmark, on which the paper measures trainability (its table 4).

Each record becomes one harmless row in the paper's direction, text to data: the prompt is "Description: <text>\\n
Meaning Representation:" ("User Query: <query>\\nTree String:" for the weather), the answer the structured meaning.
`e2e:PATH` reads a file, `viggo:hub:GEM/viggo` with `split: train` the hub's copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from ...errors import DataError
from ..readers import Record
from . import SOURCES, Fields, Source


class Gem(Source):
    """One text column and one column with its meaning; no source itself, since it names no data set.

    Data sets of this kind hold several texts for one meaning (E2E's test file: 4693 texts, 630 meanings), one record
    each. They are taken as they are: several prompts may have one answer.

    Args:
        references: "all": every text is a row; "first": only the first text of each meaning, so that test rows are
            independent of each other.
    """

    texts: ClassVar[tuple[str, ...]] = ("target",)
    """Names that the text's column has in one or the other release."""
    meanings: ClassVar[tuple[str, ...]] = ("meaning_representation",)
    prompt: ClassVar[str] = "Description: {}\nMeaning Representation:"

    def __init__(self, target: str, *, split: str | None = None, references: str = "all") -> None:
        super().__init__(target, split=split)
        if references not in ("all", "first"):
            raise DataError(f"{type(self).__name__}: references is {references!r}; allowed: all, first.")
        self.references = references
        self._seen: set[str] = set()

    def row(self, record: Fields) -> Fields | None:
        text = _column(record, self.texts)
        meaning = self.meaning(record)
        if self.references == "first" and meaning in self._seen:
            return None
        self._seen.add(meaning)
        return {"prompt": self.prompt.format(text), "answer": meaning}

    def meaning(self, record: Fields) -> str:
        return _column(record, self.meanings)


@SOURCES.register("e2e")
class E2E(Gem):
    """E2E NLG: restaurants. The challenge's csv files (mr, ref) and GEM's columns."""

    texts = ("ref", "target")
    meanings = ("mr", "meaning_representation")


@SOURCES.register("viggo")
class Viggo(Gem):
    """ViGGO: video games."""


@SOURCES.register("dart")
class Dart(Gem):
    """DART: sets of triples; the answer is the list as Python prints it, as in the paper's code."""

    meanings = ("tripleset",)

    def meaning(self, record: Fields) -> str:
        triples = record.get("tripleset")
        if isinstance(triples, str):  # a csv file holds the printed list
            return _column(record, self.meanings)
        if not isinstance(triples, list) or not triples:
            raise ValueError("'tripleset' is missing or no list of triples")
        return str(triples)


@SOURCES.register("cacapo")
class Cacapo(Gem):
    """CACAPO for end-to-end models: `output` is the text there, `input` its data."""

    texts = ("output",)
    meanings = ("input",)


@SOURCES.register("weather")
class Weather(Gem):
    """Conversational weather: the user's query to the tree of the reply.

    Its tsv files have no header: id, query, tree, annotated reply. The tree says what the *reply* must hold (place,
    forecast), which no query tells, so scores stay low for every model (paper: 0.25 after training).
    """

    COLUMNS = ("id", "user_query", "tree_str_mr", "response")
    texts = ("user_query",)
    meanings = ("tree_str_mr",)
    prompt = "User Query: {}\nTree String:"

    def records(self) -> Iterator[Record]:
        if self.target.startswith("hub:") or not self.target.lower().endswith(".tsv"):
            return super().records()
        if self.split is not None:
            raise DataError(f"{self.target}: a tsv file of the weather data is one split; leave `split` out.")
        return self._lines()

    def _lines(self) -> Iterator[Record]:
        try:
            # Not through csv: the reply's quotation marks are text.
            with open(self.target, encoding="utf-8-sig", newline="\n") as stream:
                for number, line in enumerate(stream, 1):
                    cells = line.rstrip("\r\n").split("\t")
                    if number == 1 and "user_query" in cells:
                        raise DataError(f"{self.target} has a header; save it as .csv or .jsonl with those columns.")
                    if len(cells) != len(self.COLUMNS):
                        yield f"line {number}", ValueError(f"has {len(cells)} columns, not {len(self.COLUMNS)}")
                    else:
                        yield f"line {number}", dict(zip(self.COLUMNS, cells, strict=True))
        except OSError as error:
            raise DataError(f"cannot read {self.target}: {error.strerror}. Give a file of the weather data.") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{self.target}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None


def _column(record: Fields, names: tuple[str, ...]) -> str:
    """The first of these columns that the record has, without blanks around it."""
    for name in names:
        value = record.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"'{name}' is a {type(value).__name__}, not a string")
        if not value.strip():
            raise ValueError(f"'{name}' is empty")
        return value.strip()
    raise ValueError(f"{' or '.join(repr(name) for name in names)} is missing")
