"""Files in buckets, against the same files on this machine."""

import gc as garbage
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from images.fetch import Fetcher, Reach
from images.files import LocalFiles, State, join_uri
from images.sources import expanded, files_of, read_samples
from images.sources.source import Source, Unreadable
from images.web import WebOptions
from shards.errors import BadData
from shards.ids import image_id_of
from shards.records import MediaRef
from shards.storage import storage_of
from tests.beam_pipelines.requests import sources_of
from tests.loopback_gcs import LoopbackGcs
from tests.loopback_s3 import LoopbackS3
from transforms import filesystems, objects
from transforms.filesystems import AllFiles, would_list

NAMES = [
    "a.jpg",
    "b.png",
    "d/c.jpg",
    "d/e/f.jpg",
    "d/.hidden.jpg",
    ".h/i.jpg",
    "d2/[x]?.jpg",
    "s-01.tar",
    "s-02.tar",
    "e.jpg",
]
DATA = {name: name.encode() * 10 for name in NAMES} | {"e.jpg": b""}


@pytest.fixture(params=["gs", "s3", "local"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder of `DATA`."""
    if request.param == "gs":
        folder = f"gs://{request.getfixturevalue('gcs').bucket}/in"
        for name, data in DATA.items():
            storage_of(folder).write(name, data)
    elif request.param == "s3":
        s3 = request.getfixturevalue("s3")
        folder = f"s3://{s3.bucket}/in"
        for name, data in DATA.items():
            s3.put(f"in/{name}", data)
    else:
        folder = str(tmp_path)
        for name, data in DATA.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
    yield folder


def fetcher(max_bytes: int = 1 << 20) -> Fetcher:
    return Fetcher(AllFiles(), Reach(WebOptions(max_bytes=max_bytes)))


def code_of(uri: str, max_bytes: int = 1 << 20, offset: int = 0, length: int = -1) -> str:
    with pytest.raises(BadData) as caught:
        fetcher(max_bytes).fetch(MediaRef(uri, offset, length))
    return caught.value.code


PATTERNS = {
    "*.jpg": ["a.jpg", "e.jpg"],
    "**/*.jpg": ["a.jpg", "d/c.jpg", "d/e/f.jpg", "d2/[x]?.jpg", "e.jpg"],
    "d/**": ["d/c.jpg", "d/e/f.jpg"],
    "*/c.jpg": ["d/c.jpg"],
    "d*/[[]x]*": ["d2/[x]?.jpg"],
    ".h/*": [".h/i.jpg"],
    "d/.*": ["d/.hidden.jpg"],
    "s-{00..02}.tar": ["s-01.tar", "s-02.tar"],
    "{a,b}.*": ["a.jpg", "b.png"],
    "nothing*": [],
}


def test_patterns_match_as_glob_does(root: str) -> None:
    for pattern, expected in PATTERNS.items():
        found = AllFiles().find(expanded(f"{root}/{pattern}"))
        assert found == [f"{root}/{name}" for name in expected], pattern


def test_folders_and_files(root: str) -> None:
    files = AllFiles()
    walked = [found.uri.removeprefix(f"{root}/") for found in files.walk(root)]
    assert walked == sorted(name for name in NAMES if "/." not in f"/{name}")
    assert files.is_folder(root) and files.is_folder(f"{root}/d") and not files.is_folder(f"{root}/a.jpg")
    assert files.state(f"{root}/a.jpg").num_bytes == 50
    with files.open(f"{root}/a.jpg") as stream:
        assert stream.seek(-5, io.SEEK_END) == 45 and stream.read() == b"a.jpg"
        stream.seek(3)
        assert stream.read(4) == b"pga." and stream.tell() == 7
    with pytest.raises(FileNotFoundError):
        files.open(f"{root}/none")


def test_codes_of_fetching(root: str) -> None:
    assert fetcher().fetch(MediaRef(f"{root}/a.jpg", 0, -1)) == DATA["a.jpg"]
    assert fetcher().fetch(MediaRef(f"{root}/a.jpg", 5, 5)) == b"a.jpg"
    assert fetcher(50).fetch(MediaRef(f"{root}/a.jpg", 0, -1)) == DATA["a.jpg"]
    assert code_of(f"{root}/none") == "file_missing"
    assert code_of(f"{root}/e.jpg") == "empty_file"
    assert code_of(f"{root}/a.jpg", offset=50, length=3) == "empty_file"
    assert code_of(f"{root}/a.jpg", 49) == "too_many_bytes" == code_of(f"{root}/a.jpg", 5, 0, 6)


def test_large_images_take_more_requests(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for first_bytes in (49, 50, 51):
        monkeypatch.setattr(filesystems, "_FIRST_BYTES", first_bytes)
        assert fetcher().fetch(MediaRef(f"{root}/a.jpg", 0, -1)) == DATA["a.jpg"]
        assert fetcher().fetch(MediaRef(f"{root}/a.jpg", 10, -1)) == DATA["a.jpg"][10:]


def test_an_unknown_scheme_is_a_dead_letter() -> None:
    assert code_of("ftp://host/a.jpg") == "unreadable"


def test_an_object_takes_one_request_and_knows_its_etag(gcs: LoopbackGcs, s3: LoopbackS3) -> None:
    storage_of(f"gs://{gcs.bucket}").write("a", b"before")
    s3.put("a", b"before")
    for uri, seen in ((f"gs://{gcs.bucket}/a", gcs.seen), (f"s3://{s3.bucket}/a", s3.seen)):
        ref = MediaRef(uri, 0, -1)
        fetcher().etag(ref)
        seen.clear()
        fetched = fetcher().fetch_known(ref)
        assert len(seen) == 1 and fetched.encoded == b"before" and fetched.etag == fetcher().etag(ref) != ""
    storage_of(f"gs://{gcs.bucket}").write("a", b"behind")
    s3.put("a", b"behind")
    assert fetcher().etag(MediaRef(f"gs://{gcs.bucket}/a", 0, -1)) != fetched.etag
    assert fetcher().etag(ref) != fetched.etag


def test_members_of_a_tar_take_one_request_each_and_headers_few(gcs: LoopbackGcs) -> None:
    packed = io.BytesIO()
    images = [bytes([n]) * 50_000 for n in range(40)]
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for n, image in enumerate(images):
            member = tarfile.TarInfo(f"{n:03}.jpg")
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
    uri = f"gs://{gcs.bucket}/t.tar"
    storage_of(f"gs://{gcs.bucket}").write("t.tar", packed.getvalue())
    gcs.seen.clear()
    source = Source(0, "in", uri, "webdataset", f"gs://{gcs.bucket}")
    refs = [image.ref for sample in read_samples(source, AllFiles()) for image in sample.images]  # type: ignore[union-attr]
    assert len(refs) == 40 and len(gcs.seen) <= 6
    gcs.seen.clear()
    fetched = list(fetcher().fetch_ahead(refs))
    assert [one.encoded for one in fetched if not isinstance(one, BadData)] == images
    assert len(gcs.seen) == 40
    gcs.seen.clear()
    assert len(set(fetcher().etags(refs))) == 1 and len(gcs.seen) == 1


# The client drops the answer that it tries again without reading it: its connection closes when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_fetching_ahead_keeps_order_and_what_fails_costs_itself(gcs: LoopbackGcs) -> None:
    storage = storage_of(f"gs://{gcs.bucket}")
    data = [b"%d" % n for n in range(30)]
    for n, one in enumerate(data):
        storage.write(f"{n}", one)
    gcs.fail_next("GET", "/o/7?", 403)
    gcs.fail_next("GET", "/o/8?", 503)  # which the client tries again
    uris = [f"gs://{gcs.bucket}/{n}" for n in range(31)]
    got = list(fetcher().fetch_ahead([MediaRef(uri, 0, -1) for uri in uris]))
    codes = {n: one.code for n, one in enumerate(got) if isinstance(one, BadData)}
    assert codes == {7: "unreadable", 30: "file_missing"}
    assert [one.encoded for one in got if not isinstance(one, BadData)] == [*data[:7], *data[8:]]
    again = fetcher().fetch_all_again([(MediaRef(uri, 0, -1), image_id_of(b"7")) for uri in uris[6:9]])
    assert [one if isinstance(one, bytes) else one.code for one in again] == [
        "source_changed",
        b"7",
        "source_changed",
    ]
    garbage.collect()


def test_what_is_written_meanwhile_is_never_half_of_each(
    gcs: LoopbackGcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, uri = storage_of(f"gs://{gcs.bucket}"), f"gs://{gcs.bucket}/a"
    storage.write("a", b"before" * 100)
    monkeypatch.setattr(filesystems, "_FIRST_BYTES", 10)
    state = objects._Gcs.state

    def state_then_written(self: objects._Gcs, uri: str) -> State:
        found = state(self, uri)
        storage.write("a", b"behind" * 100)
        return found

    monkeypatch.setattr(objects._Gcs, "state", state_then_written)
    assert code_of(uri) == "unreadable"
    with AllFiles().open(uri) as stream, pytest.raises(OSError, match="changed while it was read"):
        stream.read()


def test_a_source_that_breaks_off_is_unreadable(gcs: LoopbackGcs) -> None:
    storage_of(f"gs://{gcs.bucket}").write("in/a.jpg", b"x")
    source = Source(0, "in", f"gs://{gcs.bucket}/in", "files", f"gs://{gcs.bucket}/in")
    gcs.fail_next("GET", "prefix=in/", 403)
    (item,) = read_samples(source, AllFiles())
    assert isinstance(item, Unreadable) and item.error.code == "unreadable"


def test_local_files_still_know_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x")
    states = iter([State(1, "one"), State(1, "two"), State(1, "two"), State(1, "two")])
    monkeypatch.setattr(LocalFiles, "state", lambda self, uri: next(states))
    assert [LocalFiles().read(str(path), 0, -1, 9).etag for _ in range(2)] == ["", "two"]


def test_an_image_root_at_a_url_makes_urls(tmp_path: Path) -> None:
    assert join_uri("https://host/p/", "a/b #1%.jpg") == "https://host/p/a/b%20%231%25.jpg"
    assert join_uri("gs://b/p/", "a/b #1%.jpg") == "gs://b/p/a/b #1%.jpg"
    (tmp_path / "x.json").write_text('[{"image": "a b.jpg"}, {"image": "https://other/c.jpg"}]')
    (source,) = sources_of([str(tmp_path / "x.json")], "https://host/p")
    uris = [image.ref.uri for sample in read_samples(source, AllFiles()) for image in sample.images]  # type: ignore[union-attr]
    assert uris == ["https://host/p/a%20b.jpg", "https://other/c.jpg"]


@pytest.mark.parametrize("asked", ["", "/", "/d", "/*.jpg", "/{a,d/c}.jpg", "/**/*.jpg", "/d/.h*", "/a.jpg"])
def test_a_notice_counts_of_what_a_listing_would_hold(gcs: LoopbackGcs, asked: str) -> None:
    folder = f"gs://{gcs.bucket}/in"
    names = [*DATA, "notes.txt", "made.json", "d/README.md"]
    for name in names:
        storage_of(folder).write(name, b"x")
    (source,) = sources_of([f"{folder}{asked}"])
    assert source.format == "files"
    listed = set(files_of(source, AllFiles()))
    assert listed and {uri for name in names if would_list(source, uri := f"{folder}/{name}")} == listed
    assert not would_list(source, f"gs://{gcs.bucket}/instead/a.jpg")
