import os
from pathlib import Path

import pytest

from images.fetch import Fetcher, Reach
from images.files import LocalFiles
from images.web import WebOptions
from shards.errors import BadData
from shards.ids import image_id_of
from shards.records import MediaRef


def fetcher(max_bytes: int = 100) -> Fetcher:
    return Fetcher(LocalFiles(), Reach(WebOptions(max_bytes=max_bytes)))


def code_of(path: Path, max_bytes: int = 100) -> str:
    with pytest.raises(BadData) as caught:
        fetcher(max_bytes).fetch(MediaRef(str(path), 0, -1))
    return caught.value.code


def test_whole_files_and_ranges(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    assert fetcher().fetch(MediaRef(str(path), 0, -1)) == b"0123456789"
    assert fetcher().fetch(MediaRef(str(path), 2, 3)) == b"234"


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
    assert fetcher().fetch_again(ref, image_id) == b"before"
    path.write_bytes(b"behind")
    for change in (lambda: None, path.unlink):
        change()
        with pytest.raises(BadData) as caught:
            fetcher().fetch_again(ref, image_id)
        assert caught.value.code == "source_changed"
