import os
from pathlib import Path

import pytest

from images.fetch import fetch, fetch_again
from shards.errors import BadData
from shards.ids import image_id_of
from shards.records import MediaRef


def code_of(path: Path, max_bytes: int = 100) -> str:
    with pytest.raises(BadData) as caught:
        fetch(MediaRef(str(path), 0, -1), max_bytes)
    return caught.value.code


def test_whole_files_and_ranges(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    assert fetch(MediaRef(str(path), 0, -1), 100) == b"0123456789"
    assert fetch(MediaRef(str(path), 2, 3), 100) == b"234"


def test_codes(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "large").write_bytes(b"x" * 101)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    codes = {
        name: code_of(tmp_path / name) for name in ("empty", "large", "dangling", "loop", "pipe", "none")
    }
    assert codes == {
        "empty": "empty_file",
        "large": "too_many_bytes",
        "dangling": "file_missing",
        "loop": "unreadable",
        "pipe": "not_a_file",
        "none": "file_missing",
    }
    assert code_of(tmp_path) == "not_a_file"


def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"before")
    ref, image_id = MediaRef(str(path), 0, 6), image_id_of(b"before")
    assert fetch_again(ref, image_id, 100) == b"before"
    path.write_bytes(b"behind")
    for change in (lambda: None, path.unlink):
        change()
        with pytest.raises(BadData) as caught:
            fetch_again(ref, image_id, 100)
        assert caught.value.code == "source_changed"
