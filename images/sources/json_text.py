"""JSON text of any size, record by record: an array, lines, or objects one after another. Values are what `json.loads` makes of them.

The standard library's decoder reads one record at a time out of a window that slides over the text. `ijson` and `orjson` read faster or
as lazily, and make floats of integers over 64 bits, refuse NaN, or see the keys of an object in another way.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from shards.errors import BadData

MAX_RECORD_CHARS = 64 * 2**20
"""Longest record. A broken file may seem to be a single one."""
_CHUNK_CHARS, _READ_BYTES = 2**20, 2**16
_LONGEST_TOKEN = len("-Infinity")
"""An error further than that from the end of the window stays one, whatever follows; strings aside, which may end anywhere."""
_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"[ \t\n\r]*")
_OPENS_OVER_LINES = re.compile(r"\{[ \t\r]*\n")
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_TOO_LONG = f"longer than {MAX_RECORD_CHARS >> 20} MiB, or not closed"


def decompressed(stream: BinaryIO) -> BinaryIO:
    """A stream, or what is in it where it begins as gzip or Zstandard do. Reading what is cut or broken raises OSError without errno."""
    head = stream.read(4)
    stream.seek(0)
    for magic, compression in _COMPRESSIONS.items():
        if head.startswith(magic):
            # Not by `gzip` and `zstandard`: the latter takes a cut file for a whole one.
            packed = pa.PythonFile(stream, "r")
            return pa.CompressedInputStream(packed, compression)  # type: ignore[no-any-return]
    return stream


class _Window:
    """The stretch of a text that is looked at: `text[at:]` comes next.

    `lines` counts the line breaks that `peek` passed over; `indent` is the white space before `at` where only that stands before it on
    its line, else None.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._failed: OSError | None = None
        self.text, self.at, self.lines = "", 0, 0
        self.indent: str | None = None

    def more(self) -> bool:
        """Twice as much of the text, from `at` on; False at its end. Raises OSError once all before it has been given."""
        if self._failed is not None:
            raise self._failed
        pieces = [self.text[self.at :]]
        wanted = max(_CHUNK_CHARS, len(pieces[0]))
        self.at = 0
        try:
            while wanted > 0 and (read := self._stream.read(min(wanted, _READ_BYTES))):
                pieces.append(self._decoder.decode(read))
                wanted -= len(read)
        except OSError as error:
            self._failed = error
        if wanted > 0:
            pieces.append(self._decoder.decode(b"", final=True))
        self.text = "".join(pieces)
        return len(self.text) > len(pieces[0]) or wanted <= 0 or self._failed is not None

    def peek(self) -> str:
        """The next character that is no white space, which `at` is moved to; nothing at the end."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            assert blank is not None
            *lines, last = blank[0].split("\n")
            if lines:
                self.lines += len(lines)
                self.indent = ""
            if self.indent is not None:
                self.indent += last
            self.at = blank.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def skip(self) -> None:
        """Move `at` over the character that `peek` gave."""
        self.at += 1
        self.indent = None

    def value(self) -> Any:
        """The JSON value at `at`, which is moved behind it. Raises BadData `bad_json`, and `at` stays."""
        while True:
            value, end = None, self.at
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                problem, cut = "", end + 3 > len(self.text)  # a number may go on, as 1 does with e+9
            except json.JSONDecodeError as error:
                problem = error.msg
                cut = problem.startswith("Unterminated") or error.pos + _LONGEST_TOKEN >= len(self.text)
            except (ValueError, RecursionError) as error:
                problem, cut = str(error), False
            if cut and len(self.text) - self.at > MAX_RECORD_CHARS:
                raise BadData("bad_json", _TOO_LONG)
            if cut:
                end -= self.at  # which `more` moves to 0
                if self.more():
                    continue
            if problem:
                raise BadData("bad_json", problem)
            self.at, self.indent = end, None
            return value

    def line(self) -> str | None:
        """The rest of the line, which `at` is moved behind; None at the end. Raises BadData `bad_json` for one that is too long."""
        too_long = False
        while (end := self.text.find("\n", self.at)) < 0:
            if len(self.text) - self.at > MAX_RECORD_CHARS:
                too_long, self.at = True, len(self.text)
            if not self.more():
                end = len(self.text)
                break
        line, self.at = self.text[self.at : end], end + 1
        if too_long:
            raise BadData("bad_json", _TOO_LONG)
        return line if line or end < len(self.text) else None

    def seek_line(self, indent: str | None) -> bool:
        """Move `at` before the next object that starts a line at this indent; False where records have no lines of their own.

        No string holds a line break, so the line is none within one. What lies deeper is indented further; without indent,
        which objects lie deeper shows in nothing but that records are written on one line.
        """
        if indent is None:
            return False
        start = re.compile("\n" + re.escape(indent) + (r"\{" if indent else r"\{[^\r\n]"))
        while (found := start.search(self.text, self.at)) is None:
            self.at = max(self.at, len(self.text) - len(indent) - 2)
            if not self.more():
                return False
        self.at = found.start()
        return True


def _elements(window: _Window) -> Iterator[tuple[int, Any]]:
    window.skip()
    number = 0
    follows = "," if window.peek() != "]" else "]"
    if follows == "]":
        window.skip()
    while follows == ",":
        window.peek()
        indent, value = window.indent, None
        try:
            value = window.value()
            follows = window.peek()
            if follows not in (",", "]"):
                yield number, value
                number += 1
                what = "no comma after the record before" if follows else "the array is not closed"
                raise BadData("bad_json", what)
        except BadData as error:
            yield number, error
            number += 1
            again = follows == "{" and window.indent == indent is not None
            if not again and not window.seek_line(indent):
                return
            follows = ","
            continue
        yield number, value
        number += 1
        window.skip()
    if window.peek():
        yield number, BadData("bad_json", "more text after the array")


def _lines(window: _Window) -> Iterator[tuple[int, Any]]:
    number = window.lines
    while True:
        try:
            line = window.line()
            if line is None:
                return
            if not _BLANK.fullmatch(line):
                yield number, json.loads(line)
        except BadData as error:
            yield number, error
        except (ValueError, RecursionError) as error:
            yield number, BadData("bad_json", str(error))
        number += 1


def _objects(window: _Window) -> Iterator[tuple[int, Any]]:
    number = 0
    while window.peek():
        try:
            yield number, window.value()
        except BadData as error:
            yield number, error
            return
        number += 1


def read_records(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(number, JSON value or BadData `bad_json`) of every record, compressed or not; a byte order mark is passed over.

    The text is an array, whose elements are counted; else, where it begins with a `{` alone on its line, objects one after another,
    counted too; else a record a line, and lines are counted. A line that is no JSON is one BadData. So is an element of an array, and
    reading goes on at the next one, where elements start lines of their own; otherwise it stands for the rest of the array. Bytes that
    are no UTF-8 come as lone surrogates. In memory: a record, or some MiB of them. Raises OSError.
    """
    window = _Window(decompressed(stream))
    first = window.peek()
    if len(window.text) - window.at < _LONGEST_TOKEN:
        window.more()
    if first == "[":
        yield from _elements(window)
    elif _OPENS_OVER_LINES.match(window.text, window.at):
        yield from _objects(window)
    elif first:
        yield from _lines(window)
