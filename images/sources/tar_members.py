"""The members of a tar, plain or compressed, one after the other: headers are read, what lies between them is passed over.

Headers are parsed by `tarfile.TarInfo`, what extends them (PAX, GNU long names) here: `tarfile.TarFile` takes a damaged header for the
end of the archive, remembers every member, and reads an extension of any size whole. Nothing is ever extracted.
"""

import bz2
import contextlib
import gzip
import lzma
import tarfile
import urllib.parse
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import zstandard

from images.files import Files
from shards.errors import BadData

MAX_EXTENSION_BYTES = 1 << 20
"""A PAX header or GNU long name beyond this costs its member."""
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
_PADDING = 64 << 10
"""An archive ends where this many zeros follow an empty header: writers pad it to a multiple of 10,240 bytes or, with large blocking
factors, a few times that. Anything else is an archive appended to another, or damage."""
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
)
_NO_MEMBERS = (tarfile.DIRTYPE, b"V", b"D")
"""Folders, and GNU's volume labels and folder listings."""
_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
    tarfile.DIRTYPE,
)
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")


class Member(NamedTuple):
    """A member: where its first header and its bytes begin, and that it is the `ordinal`-th, folders and links counted too.

    `error` is set for what is no plain file. `name` is text that any column takes: percent-encoded where it is not UTF-8.
    """

    name: str
    offset: int
    ordinal: int
    data_offset: int
    num_bytes: int
    error: BadData | None = None


class Damage(NamedTuple):
    """Where the archive cannot be followed as it was meant. `name` is what the damaged header calls its member, empty where none is left.

    Code `corrupt_record`: some member is lost. `truncated_archive`: all from here on is. `is_doubtful`: the name may be damaged too.
    """

    name: str
    offset: int
    ordinal: int
    error: BadData
    is_doubtful: bool = False

    @property
    def is_end(self) -> bool:
        """Whether nobody can say if the sample before it was whole."""
        return self.error.code == "truncated_archive" and not self.name


class Archive:
    """An open tar. `is_compressed` ones are read from front to end; of others only headers and what `payload` is asked for is read."""

    def __init__(self, stream: IO[bytes], num_bytes: int | None) -> None:
        """`num_bytes`: the size of a plain archive, None for a compressed one, whose end is found by coming to it."""
        self._stream, self._num_bytes = stream, num_bytes
        self._position, self._ahead = 0, b""
        self.is_compressed = num_bytes is None

    def members(self) -> Iterator[Member | Damage]:
        """All members in order, folders left out. After damage, goes on with the next header that can be found."""
        ordinal = 0
        try:
            while (item := self._next(ordinal)) is not None:
                ordinal += isinstance(item, Member)
                if not isinstance(item, Member) or item.error or not item.name.endswith("/"):
                    yield item
                if isinstance(item, Damage) and item.error.code == "truncated_archive":
                    return
                self._skip_to(self._after)
        except BadData as error:
            yield Damage("", self._position, ordinal, error)

    def payload(self, member: Member) -> bytes:
        """The bytes of the member that `members` gave last. Raises BadData `truncated_archive`, `corrupt_record`."""
        self._skip_to(member.data_offset)
        data = self._read(member.num_bytes)
        if len(data) < member.num_bytes:
            raise BadData("truncated_archive", "ends within a member")
        return data

    def _next(self, ordinal: int) -> Member | Damage | None:
        """The member whose headers begin here; `_after` is where the next one's do."""
        start, pax, long_name, too_long = self._position, dict[str, bytes](), b"", 0
        while True:
            self._after = self._position + _BLOCK
            block = self._read(_BLOCK)
            if block == bytes(_BLOCK):
                if self._ends_here():
                    return None
                if start + _BLOCK == self._position and self._header_ahead():
                    start = self._position  # an archive appended to another
                    continue
                return self._search(Damage("", start, ordinal, _corrupt("all zeros"), True))
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                if info.size < 0:
                    raise tarfile.HeaderError("negative size")
            except tarfile.HeaderError as error:
                if len(block) < _BLOCK:
                    return Damage("", start, ordinal, _cut("ends without an end mark"))
                name = block[:100].split(b"\0")[0].decode("utf-8", "surrogateescape")
                return self._search(Damage(_text(name), start, ordinal, _corrupt(str(error)), True))
            if info.type not in _EXTENSIONS:
                break
            data_offset = self._position
            if info.size > MAX_EXTENSION_BYTES:
                too_long = max(too_long, info.size)
            elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                pax |= _pax(self._read(info.size))
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = self._read(info.size).split(b"\0")[0]
            self._skip_to(data_offset + _padded(info.size))
        return self._member(info, block, start, ordinal, pax, long_name, too_long)

    def _member(
        self,
        info: tarfile.TarInfo,
        block: bytes,
        start: int,
        ordinal: int,
        pax: dict[str, bytes],
        long_name: bytes,
        too_long: int,
    ) -> Member | Damage:
        raw = pax.get("GNU.sparse.name") or pax.get("path") or long_name
        name = _text(raw.decode("utf-8", "surrogateescape") if raw else info.name)
        is_sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in pax)
        if info.type == tarfile.GNUTYPE_SPARSE:
            more = block[482]  # further blocks of the map of holes follow
            while more:
                extended = self._read(_BLOCK)
                more = len(extended) == _BLOCK and extended[504]
        num_bytes = (
            int(pax["size"]) if pax.get("size", b"").isdigit() and len(pax["size"]) < 20 else info.size
        )
        num_bytes = 0 if info.type in _WITHOUT_DATA else num_bytes
        data_offset = self._position
        self._after = data_offset + _padded(num_bytes)
        if self._num_bytes is not None and data_offset + num_bytes > self._num_bytes:
            return Damage(name, start, ordinal, _cut("ends within a member"))
        if too_long:
            error = BadData("bad_record", f"a header of {too_long} bytes, the limit is {MAX_EXTENSION_BYTES}")
            return Member(name, start, ordinal, data_offset, num_bytes, error)
        if info.type in _NO_MEMBERS or (info.type in tarfile.REGULAR_TYPES and name.endswith("/")):
            return Member(f"{name.rstrip('/')}/", start, ordinal, data_offset, num_bytes)
        what = "a file with holes" if is_sparse else "a link, a device or of an unknown kind"
        plain = info.type in tarfile.REGULAR_TYPES and not is_sparse
        error_of = None if plain else BadData("not_a_file", what)
        return Member(name, start, ordinal, data_offset, num_bytes, error_of)

    def _ends_here(self) -> bool:
        return not self._peek(_PADDING).strip(b"\0")

    def _header_ahead(self) -> bool:
        """Goes to the first block that is not zeros; whether it is a header."""
        ahead = self._peek(_PADDING)
        zeros = (len(ahead) - len(ahead.lstrip(b"\0"))) // _BLOCK * _BLOCK
        if not _is_header(ahead[zeros : zeros + _BLOCK]):
            return False
        self._skip_to(self._position + zeros)
        return True

    def _search(self, damage: Damage) -> Damage:
        """Goes on to the next header that says it is one (POSIX's and GNU's do). `_after` is there, or at the end."""
        while True:
            chunk = self._peek(_CHUNK)
            for block in range(0, len(chunk) - _BLOCK + 1, _BLOCK):
                if chunk[block + 257 : block + 262] == b"ustar" and _is_header(chunk[block : block + _BLOCK]):
                    self._after = self._position + block
                    return damage
            if len(chunk) < _CHUNK:
                self._after = self._position + len(chunk) // _BLOCK * _BLOCK
                if chunk[-2 * _BLOCK :].strip(b"\0") or not chunk:
                    return damage._replace(error=_cut(f"{damage.error}; no header follows"))
                self._after = max(self._position, self._after - 2 * _BLOCK)
                return damage
            self._skip_to(self._position + len(chunk))

    def _fill(self, num_bytes: int) -> bytes:
        """That many bytes of the stream, fewer at its end."""
        parts, left = [], num_bytes
        try:
            while left and (part := self._stream.read(min(left, _CHUNK))):
                parts.append(part)
                left -= len(part)
        except EOFError as error:
            raise _cut("the compressed stream ends early") from error
        except (zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
            raise BadData("truncated_archive", f"the compressed stream is damaged: {error}") from error
        except OSError as error:
            if error.errno is not None:
                raise
            raise BadData("truncated_archive", f"the compressed stream is damaged: {error}") from error
        return b"".join(parts)

    def _peek(self, num_bytes: int) -> bytes:
        if len(self._ahead) < num_bytes:
            self._ahead += self._fill(num_bytes - len(self._ahead))
        return self._ahead[:num_bytes]

    def _read(self, num_bytes: int) -> bytes:
        data, self._ahead = self._ahead[:num_bytes], self._ahead[num_bytes:]
        if len(data) < num_bytes:
            data += self._fill(num_bytes - len(data))
        self._position += len(data)
        return data

    def _skip_to(self, position: int) -> None:
        """Go to a place: only forward in a compressed archive. Raises BadData `truncated_archive`."""
        step = position - self._position
        if 0 <= step <= len(self._ahead):
            self._ahead = self._ahead[step:]
        elif self.is_compressed:
            while self._position < position:
                if not self._read(min(_CHUNK, position - self._position)):
                    raise _cut("ends within a member")
        elif self._num_bytes is not None and position > self._num_bytes:
            raise _cut("ends without an end mark")
        else:
            self._ahead = b""
            self._stream.seek(position)
        self._position = position


def _corrupt(message: str) -> BadData:
    return BadData("corrupt_record", f"damaged header: {message}")


def _cut(message: str) -> BadData:
    return BadData("truncated_archive", message)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _BLOCK) * _BLOCK


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _text(name: str) -> str:
    """A member's name as text. `../` and absolute names stay as they are: no name of a member is ever opened."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return urllib.parse.quote(name.encode("utf-8", "surrogateescape"), safe="/ ")
    return name


def _pax(data: bytes) -> dict[str, bytes]:
    """The records `LENGTH KEY=VALUE\\n` of a PAX header, up to the first that is none."""
    found: dict[str, bytes] = {}
    start = 0
    while (space := data.find(b" ", start, start + 10)) > start and data[start:space].isdigit():
        end = start + int(data[start:space])
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals or data[end - 1 : end] != b"\n":
            break
        found[key.decode("utf-8", "replace")] = value
        start = end
    return found


@contextlib.contextmanager
def open_archive(uri: str, files: Files) -> Iterator[Archive]:
    """A tar by its first bytes, whatever its name: plain, or compressed by gzip, bzip2, xz or zstd. Raises OSError, BadData."""
    with contextlib.ExitStack() as opened:
        stream: IO[bytes] = opened.enter_context(files.open(uri))
        start = stream.read(_BLOCK)
        stream.seek(0)
        # A plain tar may begin with the name `BZh.png`.
        magic = None if _is_header(start) else next((m for m in _MAGIC if start.startswith(m)), None)
        if magic is None:
            yield Archive(stream, files.state(uri).num_bytes)
            return
        inflated: Any
        if magic == _MAGIC[0]:
            inflated = opened.enter_context(gzip.GzipFile(fileobj=stream))
        elif magic == _MAGIC[1]:
            inflated = opened.enter_context(bz2.BZ2File(stream))
        elif magic == _MAGIC[2]:
            inflated = opened.enter_context(lzma.LZMAFile(stream))
        else:
            zstd = zstandard.ZstdDecompressor()
            reader = zstd.stream_reader(stream, read_across_frames=True, closefd=False)
            inflated = opened.enter_context(reader)
        yield Archive(inflated, None)
