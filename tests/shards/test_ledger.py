import random
from pathlib import Path

import pytest

from shards import ledger as ledgers
from shards.errors import CorruptShard
from shards.ids import digest
from shards.ledger import (
    CallRow,
    CellsRow,
    ImageRow,
    Ledger,
    LedgerWriter,
    RefRow,
    SearchRow,
    read_segment,
    ref_key,
    smallest_per_key,
)
from shards.records import MediaRef
from shards.storage import LocalStorage


def ref_rows(count: int, image: bytes = b"i") -> list[RefRow]:
    return [RefRow(digest(n), image * 32, n) for n in range(count)]


def image_row(n: int, numerics: str, embedding: bytes = b"\1\2") -> ImageRow:
    return ImageRow(
        digest(n),
        numerics,
        "",
        "",
        0,
        9,
        4,
        5,
        "PNG",
        b"p" * 32,
        b"h" * 8,
        b"s" * 128,
        1,
        2,
        3,
        embedding,
        b"",
    )


ROWS = {
    RefRow: ref_rows(7),
    ImageRow: [image_row(n, "cpu") for n in range(7)],
    CellsRow: [CellsRow(digest(n), n, 1, bytes([n]), b"") for n in range(7)],
    SearchRow: [SearchRow(digest(n), -n, bytes([n]), b"") for n in range(7)],
    CallRow: [CallRow(digest(n), digest(-n), f"é{n}", n, 1) for n in range(7)],
}


@pytest.mark.parametrize("kind", ROWS)
def test_every_kind_is_appended_read_and_looked_up(tmp_path: Path, kind: type) -> None:
    ledger = Ledger(LocalStorage(str(tmp_path)), kind)
    assert ledger.segments() == [] and ledger.lookup([digest(1)]) == {}
    writer = ledger.writer("token")
    for row in ROWS[kind]:
        writer.append(row)
    assert ledger.segments() == []
    writer.flush()
    writer.flush()
    assert len(ledger.segments()) == 1
    assert sorted(ledger.rows()) == sorted(ROWS[kind])
    assert ledger.lookup([digest(3), digest(99)]) == {digest(3): ROWS[kind][3]}
    assert ledger.lookup([]) == {}


def test_a_writer_flushes_by_rows_and_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(LocalStorage(str(tmp_path)), RefRow)
    monkeypatch.setattr(ledgers, "FLUSH_ROWS", 10)
    writer = LedgerWriter(ledger, "token")
    for row in ref_rows(25):
        writer.append(row)
    assert len(list(ledger.rows())) == 20
    monkeypatch.setattr(ledgers, "FLUSH_S", 0.0)
    writer.append(RefRow(digest("late"), b"", 0))
    assert len(list(ledger.rows())) == 26


def test_the_smallest_row_of_a_key_stands_whatever_the_order(tmp_path: Path) -> None:
    ledger = Ledger(LocalStorage(str(tmp_path)), RefRow)
    key = digest("one")
    rows = [RefRow(key, bytes([n]) * 32, n) for n in (3, 1, 2)]
    for row in rows:
        ledger.put([row], "t")
    assert ledger.lookup([key]) == smallest_per_key(reversed(rows)) == {key: rows[1]}
    void = RefRow(key, b"", 0)
    ledger.put([void], "t")
    assert ledger.lookup([key]) == {key: void}


def test_the_same_rows_are_one_segment_in_any_order(tmp_path: Path) -> None:
    ledger = Ledger(LocalStorage(str(tmp_path)), RefRow)
    rows = ref_rows(50)
    first = ledger.put(rows, "t")
    random.Random(0).shuffle(rows)
    assert ledger.put(rows + rows, "u") == first and len(ledger.segments()) == 1


def test_lookup_finds_all_and_only_what_is_asked_in_many_segments(tmp_path: Path) -> None:
    ledger = Ledger(LocalStorage(str(tmp_path)), RefRow)
    rows = ref_rows(5_000)
    for start in range(7):
        ledger.put(rows[start::7], "t")
    asked = [row.key for row in random.Random(1).sample(rows, 700)]
    strangers = [digest(f"stranger {n}") for n in range(700)]
    found = ledger.lookup([*strangers, *asked])
    assert set(found) == set(asked) and all(rows[row.num_bytes] == row for row in found.values())
    # A key that shares its first half with a stored one.
    assert ledger.lookup([rows[0].key[:8] + bytes(24)]) == {}


def test_compaction_keeps_every_fact_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "COMPACT_ROWS", 40)
    ledger = Ledger(LocalStorage(str(tmp_path)), ImageRow)
    rows = [image_row(n, numerics) for n in range(50) for numerics in ("cpu", "gpu")]
    for start in range(6):
        ledger.put(rows[start::5], "t")  # one of them twice
    ledger.put([image_row(0, "cpu", b"\0\0")], "t")
    before = ledger.lookup([row.key for row in rows])
    assert ledger.compact("t") == 7
    assert len(ledger.segments()) == 3
    assert sorted(ledger.rows()) == sorted([image_row(0, "cpu", b"\0\0"), *rows[1:]])
    assert ledger.lookup([row.key for row in rows]) == before
    assert ledger.compact("t") == 0 and len(ledger.segments()) == 3


def test_a_damaged_segment_is_named_and_may_be_deleted(tmp_path: Path) -> None:
    ledger = Ledger(LocalStorage(str(tmp_path)), RefRow)
    path = tmp_path / ledger.put(ref_rows(100), "t")
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptShard, match=f"{path.name}.*delete it: a ledger is a memo"):
        list(ledger.rows())
    path.unlink()
    assert list(ledger.rows()) == []


def test_a_segment_that_was_merged_away_meanwhile_is_no_rows(tmp_path: Path) -> None:
    ledger = Ledger(LocalStorage(str(tmp_path)), RefRow)
    for row in ref_rows(3):
        ledger.put([row], "t")
    seen = ledger.segments()
    ledger.compact("t")
    assert [list(read_segment(LocalStorage(s.root), s.path, RefRow)) for s in seen] == [[], [], []]


def test_a_reference_has_another_key_once_its_file_changed() -> None:
    ref = MediaRef("/a.jpg", 0, -1)
    keys = {ref_key(ref, "1"), ref_key(ref, "2"), ref_key(ref._replace(offset=1), "1")}
    assert len(keys) == 3
