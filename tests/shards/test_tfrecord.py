import io
from bisect import bisect_right

import pytest
from apache_beam.io.tfrecordio import _TFRecordUtil
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import CorruptShard
from shards.tfrecord import frame, read_records, unframe


def framed(records: list[bytes]) -> bytes:
    return b"".join(frame(data)[0] + data + frame(data)[1] for data in records)


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_bytes_are_those_of_beams_writer(records: list[bytes]) -> None:
    sink = io.BytesIO()
    for data in records:
        _TFRecordUtil.write_record(sink, data)
    assert framed(records) == sink.getvalue()


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_round_trip(records: list[bytes]) -> None:
    assert list(read_records(io.BytesIO(framed(records)), "x")) == records


RECORDS = [b"first", b"", b"third record"]
GOOD = framed(RECORDS)
EDGES = [len(framed(RECORDS[:count])) for count in range(len(RECORDS) + 1)]


def read_until_corrupt(data: bytes) -> tuple[list[bytes], CorruptShard | None]:
    """The records that come before the first that is found corrupt, and how that one is named."""
    read = []
    try:
        for record in read_records(io.BytesIO(data), "pack"):
            read.append(record)
    except CorruptShard as error:
        return read, error
    return read, None


def test_a_byte_that_changed_to_any_other_is_found_in_its_record() -> None:
    for position in range(len(GOOD)):
        number = bisect_right(EDGES, position) - 1
        for change in range(1, 256):
            bad = bytearray(GOOD)
            bad[position] ^= change
            read, error = read_until_corrupt(bytes(bad))
            assert error is not None, (position, change)
            assert (error.path, error.record) == ("pack", number), (position, change)
            assert read == RECORDS[:number]


def test_a_cut_is_found_in_its_record_but_at_a_records_edge() -> None:
    for cut in range(len(GOOD)):
        number = bisect_right(EDGES, cut) - 1
        read, error = read_until_corrupt(GOOD[:cut])
        assert read == RECORDS[:number]
        if cut in EDGES:
            # Fewer records, each whole: what tells is the size and the sha256 in the manifest.
            assert error is None
        else:
            assert error is not None, cut
            assert (error.path, error.record) == ("pack", number), cut


def test_unframe_names_file_and_record() -> None:
    header, footer = frame(b"data")
    with pytest.raises(CorruptShard, match=r"pack, record 7: data checksum differs"):
        unframe(header + b"dbta" + footer, "pack", 7)
