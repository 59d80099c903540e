"""Parquet: rows with pictures in them as `datasets` writes them, with urls, or with names of files; conversations, captions, the rest.

Pictures are left where they are while rows are read: of their columns only names and the lengths of lists. `copy_rows` reads the bytes.
"""

import base64
import contextlib
import io
import itertools
import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from images.files import Files
from images.sources.records import CONVERSATION_FIELDS, IMAGE_FIELDS, named_image, sample_of
from images.sources.source import Source, Unreadable
from shards.errors import BadData
from shards.records import MediaRef, Origin, SourceImage, SourceSample

BYTES_COLUMNS = ("jpg", "jpeg", "png", "webp", "img", "picture", "bytes", "content", "image_bytes")
NAME_COLUMNS = (
    *("url", "image_url", "URL", "img_url", "urls", "image_urls"),
    *("file_name", "images_file_names", "image_path", "image_file", "path"),
)
CAPTION_COLUMNS = ("caption", "text", "TEXT")
"""Columns that are taken for pictures, urls or names, and captions, best first, where `columns` names none. Pictures, urls and names may
also lie in `image` or `images`."""
_BATCH_BYTES = 16 * 2**20
_BATCH_ROWS = 4096
_BUFFER_BYTES = 2**20
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError, IndexError)
"""What pyarrow raises for damaged bytes; OSError with errno is the file system's."""


class _Pictures(NamedTuple):
    """Where a file has its images. `form`: `struct` (`bytes`, `path`), `binary`, or `text` (urls and names).

    `listed` where a cell is a list of them. `bytes_leaf` and `path_leaf` are columns of the file in Parquet's sense, empty where there
    is none.
    """

    column: str
    form: str
    listed: bool
    bytes_leaf: str
    path_leaf: str


class _Plan(NamedTuple):
    """What to read of a file: `source` with its columns named, and the leaves besides the pictures'."""

    source: Source
    pictures: _Pictures | None
    leaves: Sequence[str]


def _form_of(dtype: pa.DataType) -> tuple[str, bool]:
    """(form of the pictures that a column may hold, empty for none; whether it holds lists of them)."""
    t = pa.types
    if isinstance(dtype, pa.ExtensionType):
        dtype = dtype.storage_type
    if t.is_list(dtype) or t.is_large_list(dtype) or t.is_fixed_size_list(dtype):
        form, nested = _form_of(dtype.value_type)
        return ("" if nested else form), True
    if t.is_dictionary(dtype):
        dtype = dtype.value_type
    if t.is_string(dtype) or t.is_large_string(dtype) or t.is_string_view(dtype):
        return "text", False
    if _is_binary(dtype):
        return "binary", False
    held = (
        t.is_struct(dtype) and dtype.get_field_index("bytes") >= 0 and _is_binary(dtype.field("bytes").type)
    )
    return ("struct" if held else ""), False


def _is_binary(dtype: pa.DataType) -> bool:
    t = pa.types
    return bool(
        t.is_binary(dtype)
        or t.is_large_binary(dtype)
        or t.is_binary_view(dtype)
        or t.is_fixed_size_binary(dtype)
    )


def _leaves(file: pq.ParquetFile, column: str = "") -> list[str]:
    """Paths of all leaf columns, or of those of one column."""
    paths = [file.schema.column(index).path for index in range(len(file.schema))]
    return [path for path in paths if not column or path == column or path.startswith(f"{column}.")]


def _pictures_of(file: pq.ParquetFile, named: str) -> _Pictures | None:
    """The column of pictures: the one named, or the likeliest. Raises BadData `bad_schema`."""
    forms = {field.name: _form_of(field.type) for field in file.schema_arrow}
    guesses = [
        *(name for name in IMAGE_FIELDS if forms.get(name, ("", False))[0]),
        *(name for name in BYTES_COLUMNS if forms.get(name, ("", False))[0] in ("struct", "binary")),
        *(name for name in NAME_COLUMNS if forms.get(name, ("", False))[0] == "text"),
    ]
    if not named and guesses[:2] == list(IMAGE_FIELDS):
        raise BadData("bad_schema", "both `image` and `images`; say which by the source's columns")
    if named and not forms[named][0]:
        raise BadData("bad_schema", f"column {named!r} holds neither pictures nor names of such")
    column = named or next(iter(guesses), "")
    if not column:
        return None
    form, listed = forms[column]
    last = {path.rsplit(".", 1)[-1]: path for path in _leaves(file, column)}
    bytes_leaf = {"struct": last.get("bytes", ""), "binary": next(iter(last.values())), "text": ""}[form]
    return _Pictures(column, form, listed, bytes_leaf, last.get("path", "") if form == "struct" else "")


def _plan(source: Source, file: pq.ParquetFile) -> _Plan:
    """Raises BadData `bad_schema` for a file whose rows cannot be samples, with the columns that it has."""
    names = file.schema_arrow.names
    columns = ", ".join(names) or "none"
    if len(set(names)) < len(names):
        raise BadData("bad_schema", f"two columns of one name; columns: {columns}")
    for role, name in source.columns.items():
        if name not in names:
            raise BadData("bad_schema", f"no column {name!r} for {role}; columns: {columns}")
    pictures = _pictures_of(file, source.columns.get("image", ""))
    if not pictures and not {source.columns.get("conversation"), *CONVERSATION_FIELDS} & set(names):
        raise BadData("bad_schema", f"no column of images, urls or conversations; columns: {columns}")
    caption = next((name for name in CAPTION_COLUMNS if name in names), "caption")
    left_out = {leaf for name in IMAGE_FIELDS if name in names for leaf in _leaves(file, name)}
    if pictures:
        left_out.update(_leaves(file, pictures.column))
    return _Plan(
        source._replace(columns={"caption": caption, **source.columns}),
        pictures,
        [leaf for leaf in _leaves(file) if leaf not in left_out],
    )


def _open(stream: BinaryIO) -> pq.ParquetFile:
    """Raises BadData `bad_parquet`; OSError where the file system does."""
    try:
        # Without pre_buffer and with a buffer, pages are read one by one, not a column of a row group at once.
        file = pq.ParquetFile(
            stream, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
        )
        _ = file.schema_arrow, _leaves(file)
        return file
    except _DAMAGE as error:
        if _is_of_the_system(error):
            raise
        raise BadData("bad_parquet", _reason(error)) from error


def _is_of_the_system(error: Exception) -> bool:
    """Whether the file system failed, not the bytes, for which pyarrow raises OSError too."""
    return isinstance(error, OSError) and error.errno is not None


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _group_error(error: Exception) -> BadData:
    if _is_of_the_system(error):
        return BadData("unreadable", _reason(error))
    return BadData("bad_row_group", _reason(error))


class _Untouched(Exception):
    """The bytes behind a footer were asked for."""


class _Unread(io.RawIOBase):
    """A file of which nothing can be read."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes, self._at = num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._num_bytes}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        raise _Untouched


def _check_footer(file: pq.ParquetFile, group: int, num_bytes: int) -> None:
    """Raises OSError where the footer describes the columns of a row group wrongly.

    Asked for such a description, pyarrow 25 ends the process. On the way to the pages it looks at all of them, and raises.
    """
    unread = pq.ParquetFile(
        _Unread(num_bytes), metadata=file.metadata, pre_buffer=False, buffer_size=_BUFFER_BYTES
    )
    with contextlib.suppress(_Untouched, StopIteration):
        next(unread.iter_batches(1, row_groups=[group], use_threads=False))


def _batches(file: pq.ParquetFile, group: int, leaves: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some leaves of a row group in batches of about `_BATCH_BYTES`."""
    meta = file.metadata.row_group(group)
    chunks = [meta.column(index) for index in range(meta.num_columns)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in set(leaves))
    rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * meta.num_rows // max(size, 1)))
    return iter(file.iter_batches(rows, row_groups=[group], columns=list(leaves), use_threads=False))


def _picture_leaves(file: pq.ParquetFile, group: int, pictures: _Pictures) -> list[str]:
    """What must be read of the pictures to tell where there are some: their bytes only where nothing else says so."""
    if pictures.form == "text":
        return _leaves(file, pictures.column)
    told = [leaf for leaf in (pictures.path_leaf,) if leaf]
    if (told or not pictures.listed) and _are_all_there(file, group, pictures):
        return told
    return [*told, pictures.bytes_leaf]


def _are_all_there(file: pq.ParquetFile, group: int, pictures: _Pictures) -> bool:
    """Whether statistics say that every picture of a row group has bytes: all but what `path` shows to be no picture."""
    meta = file.metadata.row_group(group)
    chunks = {chunk.path_in_schema: chunk for chunk in map(meta.column, range(meta.num_columns))}
    leaf = pictures.bytes_leaf
    declared = next(c for c in map(file.schema.column, range(len(file.schema))) if c.path == leaf)
    if leaf not in chunks or chunks[leaf].physical_type != declared.physical_type:
        raise OSError(
            "the footer gives a column another type"
        )  # asked for statistics, pyarrow would end the process
    statistics = chunks[leaf].statistics
    if statistics is None or not statistics.has_null_count:
        return False
    nulls = statistics.null_count
    if nulls and pictures.path_leaf:  # no list, an empty list and no struct count as null too
        for batch in _batches(file, group, [pictures.path_leaf]):
            column = batch.column(0)
            if pictures.listed:
                nulls -= sum(not length for length in pc.list_value_length(column).to_pylist())
                column = column.flatten()
            nulls -= column.null_count
    return bool(nulls == 0)


_Cell = tuple[bool, str | None]
"""Of one picture: whether its bytes are in the file, and its name."""


def _cells(array: pa.Array, pictures: _Pictures) -> list[list[_Cell]]:
    """For every row its pictures in order. Bytes that were not read are there. A cell without a picture is no picture; in a list it is one."""
    if pictures.listed:
        elements = iter(_elements(array.flatten(), pictures))
        lengths = pc.list_value_length(array).to_pylist()
        return [[next(elements) for _ in range(length or 0)] for length in lengths]
    return [[cell] if cell[0] or cell[1] else [] for cell in _elements(array, pictures)]


def _elements(array: pa.Array, pictures: _Pictures) -> list[_Cell]:
    if pictures.form == "text":
        return [(False, name) for name in array.to_pylist()]
    here = array.is_valid()
    if pictures.form == "binary":
        return [(valid, None) for valid in here.to_pylist()]
    fields = {array.type.field(index).name for index in range(array.type.num_fields)}
    full = pc.and_(here, array.field("bytes").is_valid()) if "bytes" in fields else here
    # A child knows nothing of what its parent lacks.
    paths = pc.if_else(here, array.field("path"), None) if "path" in fields else pa.nulls(len(array))
    return list(zip(full.to_pylist(), paths.to_pylist(), strict=True))


def _images(plan: _Plan, uri: str, row: Origin, cells: Sequence[_Cell]) -> list[SourceImage]:
    """The images of one row. Raises BadData `bad_record`."""
    images = []
    for place, (is_there, path) in enumerate(cells):
        assert plan.pictures is not None
        if path and not is_there:
            images.append(named_image(plan.source, path))
            continue
        if plan.pictures.form == "text":
            raise BadData("bad_record", f"image {place} without a name")
        member = f"{plan.pictures.column}/{place}" if plan.pictures.listed else plan.pictures.column
        origin = row._replace(name=f"{row.name}/{member}")
        images.append(SourceImage(origin, MediaRef(uri, row.offset, -1, member)))
    return images


def _spelled(dtype: pa.DataType) -> pa.DataType:
    """The type as which JSON takes what pyarrow makes of its values: points in time as text, in UTC where they have a zone."""
    t = pa.types
    if (
        t.is_timestamp(dtype)
        or t.is_date(dtype)
        or t.is_time(dtype)
        or t.is_decimal(dtype)
        or t.is_duration(dtype)
    ):
        return pa.string()
    if t.is_dictionary(dtype):
        return _spelled(dtype.value_type)
    if t.is_float16(dtype):
        return pa.float32()
    if t.is_list(dtype) or t.is_large_list(dtype):
        return pa.list_(_spelled(dtype.value_type))
    if t.is_struct(dtype):
        return pa.struct([field.with_type(_spelled(field.type)) for field in dtype.fields])
    return dtype


def _in_utc(dtype: pa.DataType) -> pa.DataType:
    """The type with all zones UTC: the same points in time, and no data base of zones is needed to write them."""
    t = pa.types
    if t.is_timestamp(dtype) and dtype.tz is not None:
        return pa.timestamp(dtype.unit, "UTC")
    if t.is_list(dtype) or t.is_large_list(dtype):
        return pa.list_(_in_utc(dtype.value_type))
    if t.is_struct(dtype):
        return pa.struct([field.with_type(_in_utc(field.type)) for field in dtype.fields])
    return dtype


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value if value is None or isinstance(value, str | int) else str(value)


def _values(array: pa.Array) -> list[Any]:
    """A column's values as JSON has them."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    for wanted in (_in_utc, _spelled):
        if (dtype := wanted(array.type)) != array.type:
            array = array.cast(dtype)
    values: list[Any] = array.to_pylist()
    is_plain = pa.types.is_string(array.type) or pa.types.is_integer(array.type)
    return values if is_plain else [_jsonable(value) for value in values]


def _records(batch: pa.RecordBatch) -> list[dict[str, Any] | BadData]:
    """The rows of a batch, or why one cannot be told."""
    try:
        columns = [_values(column) for column in batch.columns]
    except (ValueError, pa.ArrowException) as error:  # text that is no UTF-8, mostly: which row?
        if batch.num_rows == 1:
            return [BadData("bad_record", str(error))]
        return [record for row in range(batch.num_rows) for record in _records(batch.slice(row, 1))]
    return [dict(zip(batch.schema.names, row, strict=True)) for row in _rows(columns, batch.num_rows)]


def _rows(columns: Sequence[Sequence[Any]], num_rows: int) -> Iterable[tuple[Any, ...]]:
    return zip(*columns, strict=True) if columns else itertools.repeat((), num_rows)


def _read_batch(
    plan: _Plan, batch: pa.RecordBatch, uri: str, first: Origin
) -> Iterator[SourceSample | Unreadable]:
    """The samples of a batch whose first row lies at `first`."""
    pictures = plan.pictures
    cells: list[list[_Cell]] = [[] if pictures is None else [(True, None)]] * batch.num_rows
    if pictures is not None and pictures.column in batch.schema.names:
        cells = _cells(batch.column(pictures.column), pictures)
        batch = batch.drop_columns([pictures.column])
    for number, record in enumerate(_records(batch)):
        row = first._replace(offset=first.offset + number)
        try:
            if isinstance(record, BadData):
                raise record
            images = _images(plan, uri, row, cells[number])
            yield sample_of(plan.source, row, record, lambda _, images=images: images)  # type: ignore[misc]
        except BadData as error:
            yield Unreadable(row, error)


def read(source: Source, uri: str, origin: Origin, files: Files) -> Iterator[SourceSample | Unreadable]:
    """The samples of one file; origins count its rows. In memory: some MiB of rows without pictures.

    Where a row group's statistics leave open which of its pictures are there, their bytes are read to see. Codes: `bad_parquet` and
    `bad_schema` for a file, `bad_row_group` for what is left of a row group, `bad_record` for a row.
    """
    with files.open(uri) as stream:
        try:
            file = _open(stream)
            plan = _plan(source, file)
        except BadData as error:
            yield Unreadable(origin, error)
            return
        first, num_bytes = 0, stream.seek(0, io.SEEK_END)
        for group in range(file.num_row_groups):
            row = origin._replace(offset=first)
            first += file.metadata.row_group(group).num_rows
            try:
                _check_footer(file, group, num_bytes)
                leaves = [*plan.leaves]
                if plan.pictures is not None:
                    leaves += _picture_leaves(file, group, plan.pictures)
                for batch in _batches(file, group, leaves):
                    yield from _read_batch(plan, batch, uri, row)
                    row = row._replace(offset=row.offset + batch.num_rows)
            except _DAMAGE as error:
                yield Unreadable(row, _group_error(error))


def copy_members(
    uri: str, wanted: Collection[MediaRef], files: Files, max_bytes: int
) -> Iterator[tuple[MediaRef, bytes | BadData]]:
    """What references to pictures in rows of one file lead to, by column and row. Codes as `copy_rows`, and `too_many_bytes`."""
    refs = {(ref.offset, ref.member): ref for ref in wanted}
    for row, member, got in copy_rows(uri, refs, files):
        if isinstance(got, bytes) and len(got) > max_bytes:
            got = BadData("too_many_bytes", f"{len(got)} bytes, the limit is {max_bytes}")
        yield refs[row, member], got or BadData("empty_file", "zero bytes")


def copy_rows(
    uri: str, wanted: Iterable[tuple[int, str]], files: Files
) -> Iterator[tuple[int, str, bytes | BadData]]:
    """(row, member, bytes) of the pictures at these rows and members of `MediaRef`s, by column and row.

    Every row group with a wanted row is read once, of it the pictures alone, in memory a page and some 16 MiB at a time. BadData
    instead of bytes: `no_image` for a cell without, `bad_row_group` and `bad_parquet` for what cannot be read, `source_changed` where
    there is no such row or column, `file_missing`, `not_a_file`, `unreadable`.
    """
    ordered = sorted((member, row) for row, member in set(wanted))
    with contextlib.ExitStack() as stack:
        try:
            files.state(uri)
            stream = stack.enter_context(files.open(uri))
            num_bytes = stream.seek(0, io.SEEK_END)
            file = _open(stream)
        except (BadData, OSError) as error:
            bad = error if isinstance(error, BadData) else BadData("unreadable", _reason(error))
            yield from ((row, member, bad) for member, row in ordered)
            return
        names = set(file.schema_arrow.names)
        by_column: dict[str, list[tuple[int, int, str]]] = {}
        for member, row in ordered:
            column, _, place = (member, "", "0") if member in names else member.rpartition("/")
            by_column.setdefault(column, []).append((row, int(place) if place.isdecimal() else -1, member))
        for column, cells in by_column.items():
            yield from _copy_column(file, num_bytes, column, sorted(cells))


def _copy_column(
    file: pq.ParquetFile, num_bytes: int, column: str, wanted: Sequence[tuple[int, int, str]]
) -> Iterator[tuple[int, str, bytes | BadData]]:
    """(row, member, bytes) of one column for ascending (row, place in its list, member)."""
    field = file.schema_arrow.field(column) if column in file.schema_arrow.names else None
    pictures = _pictures_of(file, column) if field is not None and _form_of(field.type)[0] else None
    waiting = deque(wanted)
    first = 0
    for group in range(file.num_row_groups if pictures is not None else 0):
        assert pictures is not None
        start, first = first, first + file.metadata.row_group(group).num_rows
        if not waiting or waiting[0][0] >= first:
            continue
        try:
            _check_footer(file, group, num_bytes)
            for batch in _batches(file, group, [pictures.bytes_leaf]):
                while waiting and waiting[0][0] < start + batch.num_rows:
                    row, place, member = waiting.popleft()
                    yield row, member, _picture(batch.column(0)[row - start], pictures, place)
                start += batch.num_rows
                if not waiting or waiting[0][0] >= first:
                    break
        except _DAMAGE as error:
            bad = _group_error(error)
            while waiting and waiting[0][0] < first:
                row, _, member = waiting.popleft()
                yield row, member, bad
    yield from (
        (row, member, BadData("source_changed", "no such row or column")) for row, _, member in waiting
    )


def _picture(cell: pa.Scalar, pictures: _Pictures, place: int) -> bytes | BadData:
    if pictures.listed and cell.is_valid:
        cell = cell.values[place] if 0 <= place < len(cell.values) else pa.scalar(None)
    value = cell.as_py()
    if isinstance(value, dict):
        value = value["bytes"]
    return value if value is not None else BadData("no_image", "the row holds no bytes there")
