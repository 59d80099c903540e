import io

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


def test_every_flipped_byte_is_found() -> None:
    good = framed([b"first", b"", b"third record"])
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 0x41
        with pytest.raises(CorruptShard):
            list(read_records(io.BytesIO(bytes(bad)), "x"))


def test_every_cut_but_at_a_records_edge_is_found() -> None:
    records = [b"first", b"", b"third record"]
    good = framed(records)
    edges = {len(framed(records[:count])) for count in range(len(records) + 1)}
    for cut in range(len(good)):
        if cut not in edges:
            with pytest.raises(CorruptShard, match="record"):
                list(read_records(io.BytesIO(good[:cut]), "x"))


def test_unframe_names_file_and_record() -> None:
    header, footer = frame(b"data")
    with pytest.raises(CorruptShard, match=r"pack, record 7: data checksum differs"):
        unframe(header + b"dbta" + footer, "pack", 7)
