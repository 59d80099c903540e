"""Lists of urls: one a line, or rows with a header that names a column `url`.

Without a header a line is a url, or a url, a tab and a caption; commas belong to urls. With one, by tabs or commas as it is, `caption` or
`text` holds captions, `sha256` what the bytes hash to, and every other column travels. Upper and lower case of a header are one.
"""

import csv
import io
import math
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

from images.files import Files
from images.sources.records import sample_of
from images.sources.source import Source, Unreadable
from shards.errors import BadData
from shards.records import MediaRef, Origin, SourceImage, SourceSample

SCHEMES = ("http", "https")
MAX_LINE_CHARACTERS = 1 << 20
MAX_URL_CHARACTERS = 8192
"""Four times what sitemaps.org allows; url and all are a name in every row about the image."""
_CAPTIONS = ("caption", "text")
_HEX = re.compile("[0-9a-f]{64}")
_NO_URL_HOLDS = re.compile(r"[\x00-\x20\x7f]")


class _Lines:
    """The lines of a file and the number of the last one, from 1. A line beyond MAX_LINE_CHARACTERS is cut there, and told by its number."""

    def __init__(self, stream: io.TextIOBase) -> None:
        self._stream, self.number, self.cut = stream, 0, 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_LINE_CHARACTERS)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) == MAX_LINE_CHARACTERS and not line.endswith(("\n", "\r")):
            self.cut = self.number
            while (rest := self._stream.readline(MAX_LINE_CHARACTERS)) and not rest.endswith(("\n", "\r")):
                pass
        return line


def checked_url(url: str) -> str:
    """The url. Raises BadData `bad_url` where it is none of http or https, names no host, is endless, or holds spaces or control characters."""
    if len(url) > MAX_URL_CHARACTERS:
        raise BadData("bad_url", f"{url[:200]!r}...: longer than {MAX_URL_CHARACTERS} characters")
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port
        url.encode()
    except ValueError as error:
        raise BadData("bad_url", f"{url[:200]!r}: {error}") from error
    if parts.scheme not in SCHEMES or not parts.hostname or _NO_URL_HOLDS.search(url):
        raise BadData("bad_url", f"{url[:200]!r}: not of the form http(s)://HOST/...")
    return url


def _passed_over(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")


def _header(line: str, column: str) -> tuple[list[str], str]:
    """The columns that a first line names, in lower case, and what parts them; none where it is no header."""
    for delimiter in "\t,":
        try:
            cells = [cell.strip().lower() for cell in next(csv.reader([line], delimiter=delimiter), [])]
        except csv.Error:
            break
        if column in cells:
            return cells, delimiter
    return [], ""


def _rows(lines: _Lines, column: str) -> Iterator[tuple[int, dict[str, str] | BadData]]:
    """(line number, non-empty cells by column) of each row."""
    first = next((line for line in lines if not _passed_over(line)), "")
    columns, delimiter = _header(first, column)
    if not columns:
        line: str | None = first
        while line:
            if lines.cut == lines.number:
                yield (
                    lines.number,
                    BadData("bad_record", f"a line of more than {MAX_LINE_CHARACTERS} characters"),
                )
            elif not _passed_over(line):
                url, _, caption = line.strip().partition("\t")
                yield lines.number, {column: url.strip()} | ({"caption": caption} if caption else {})
            line = next(lines, None)
        return
    reader = csv.reader(lines, delimiter=delimiter)
    while True:
        start = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield start, BadData("bad_record", str(error))
            continue
        if lines.cut >= start:
            yield start, BadData("bad_record", f"a line of more than {MAX_LINE_CHARACTERS} characters")
        elif len(cells) > len(columns):
            yield start, BadData("bad_record", f"{len(cells)} cells under {len(columns)} columns")
        elif cells and not cells[0].startswith("#"):
            yield start, {name: cell for name, cell in zip(columns, cells, strict=False) if cell}


def _sample(source: Source, origin: Origin, row: Mapping[str, str], column: str) -> SourceSample:
    record: dict[str, Any] = dict(row)
    url = checked_url(record.pop(column, ""))
    sha256 = record.pop("sha256", "").lower()
    if sha256 and not _HEX.fullmatch(sha256):
        raise BadData("bad_record", f"sha256 {sha256[:80]!r} is not 64 hex digits")
    columns = {role: name.lower() for role, name in source.columns.items()}
    weight = columns.get("weight", "weight")
    if weight in record:
        record[weight] = _number(record[weight])
    columns.setdefault("caption", next((name for name in _CAPTIONS if name in record), "caption"))
    image = SourceImage(origin._replace(name=url, offset=0), MediaRef(url, 0, -1), sha256)
    return sample_of(source._replace(columns=columns), origin, record, lambda _: [image], ())


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadData("bad_record", f"weight {text[:80]!r} is no number")
    return number


def read(source: Source, uri: str, origin: Origin, files: Files) -> Iterator[SourceSample | Unreadable]:
    """The samples of one list; origins are line numbers from 1. Blank lines and those that begin with `#` are none.

    In memory: one row. Codes: `bad_url`, `bad_record`.
    """
    column = source.columns.get("url", "url").lower()
    stream = io.TextIOWrapper(files.open(uri), encoding="utf-8-sig", errors="surrogateescape", newline="")
    with stream:
        for number, row in _rows(_Lines(stream), column):
            place = origin._replace(offset=number)
            try:
                if isinstance(row, BadData):
                    raise row
                yield _sample(source, place, row, column)
            except BadData as error:
                yield Unreadable(place, error)
