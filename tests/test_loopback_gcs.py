"""What tests of commits rest on: the loopback answers as the service does, and the client does what we think it does."""

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from google.api_core.exceptions import (
    GoogleAPICallError,
    MethodNotImplemented,
    NotFound,
    PreconditionFailed,
    RequestRangeNotSatisfiable,
    ServiceUnavailable,
)
from google.cloud import storage
from google.cloud.storage.exceptions import InvalidResponse
from google.cloud.storage.retry import DEFAULT_RETRY

from tests.loopback_gcs import LoopbackGcs

MIB = 1 << 20
# Source: google/cloud/storage/blob.py, _MAX_MULTIPART_SIZE; what is larger goes up resumable.
MULTIPART_MAX_BYTES = 8 * MIB
SOON = DEFAULT_RETRY.with_delay(initial=0.01, maximum=0.02)


@pytest.fixture
def bucket(gcs: LoopbackGcs) -> Iterator[Any]:
    client = storage.Client.create_anonymous_client()
    yield client.bucket(gcs.bucket)
    client.close()


def writes_of(gcs: LoopbackGcs, name: str) -> list[tuple[str, int]]:
    """Method and status of the requests that wrote the object, in order."""
    wanted = f"{gcs.bucket}/{name}"
    return [
        (seen.method, seen.status) for seen in gcs.seen if seen.object_name == wanted and seen.method != "GET"
    ]


def test_of_twenty_writers_of_one_name_one_wins(gcs: LoopbackGcs, bucket: Any) -> None:
    def put(number: int, name: str) -> bool:
        try:
            bucket.blob(name).upload_from_string(b"%d" % number, if_generation_match=0)
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(20) as pool:
        for round_number in range(50):
            name = f"round-{round_number}"
            won = list(pool.map(put, range(20), [name] * 20))
            assert sum(won) == 1
            assert bucket.blob(name).download_as_bytes() == b"%d" % won.index(True)
    assert Counter(seen.status for seen in gcs.seen if seen.method == "POST") == {200: 50, 412: 950}


def test_compare_and_swap_loses_no_count(bucket: Any) -> None:
    bucket.blob("count").upload_from_string(b"0", if_generation_match=0)

    def add_five(_: int) -> None:
        done = 0
        while done < 5:
            blob = bucket.get_blob("count")
            generation = blob.generation
            try:
                after = int(blob.download_as_bytes()) + 1
                bucket.blob("count").upload_from_string(str(after), if_generation_match=generation)
                done += 1
            except (NotFound, PreconditionFailed):
                pass  # overwritten since: before the reading, or before the writing

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add_five, range(8)))
    assert bucket.blob("count").download_as_bytes() == b"40"


def test_the_generation_grows_with_each_overwrite_and_is_what_is_read(bucket: Any) -> None:
    generations = []
    for number in range(20):
        blob = bucket.blob("x")
        blob.upload_from_string(b"same bytes")
        generations.append(blob.generation)
        assert bucket.get_blob("x").generation == blob.generation, number
    assert generations == sorted(set(generations))
    stale = bucket.get_blob("x")
    bucket.blob("x").upload_from_string(b"other bytes")
    with pytest.raises(NotFound):
        stale.download_as_bytes()
    fresh = bucket.blob("x")
    assert fresh.download_as_bytes() == b"other bytes"
    assert fresh.generation > generations[-1]


@pytest.mark.parametrize("num_bytes", [0, 1, MULTIPART_MAX_BYTES, MULTIPART_MAX_BYTES + 1])
def test_conditions_hold_for_multipart_and_resumable_uploads(
    gcs: LoopbackGcs, bucket: Any, tmp_path: Path, num_bytes: int
) -> None:
    data = random.Random(7).randbytes(num_bytes)
    (tmp_path / "file").write_bytes(data)
    blob = bucket.blob("folder/é b?#%2F.bin")
    blob.upload_from_filename(tmp_path / "file", if_generation_match=0)
    resumable = num_bytes > MULTIPART_MAX_BYTES
    assert writes_of(gcs, blob.name) == [("POST", 200)] + [("PUT", 200)] * resumable
    found = bucket.get_blob(blob.name)
    assert (found.size, found.generation) == (num_bytes, blob.generation)
    assert found.download_as_bytes() == data
    assert bucket.blob(blob.name).download_as_bytes() == data
    for generation in (0, blob.generation - 1):
        with pytest.raises(PreconditionFailed) as refused:
            bucket.blob(blob.name).upload_from_filename(tmp_path / "file", if_generation_match=generation)
        assert "pre-conditions you specified did not hold" in str(refused.value)
    before = blob.generation
    blob.upload_from_filename(tmp_path / "file", if_generation_match=before)
    assert blob.generation > before


def test_of_two_resumable_uploads_the_second_to_complete_loses(bucket: Any) -> None:
    first = bucket.blob("x").open("wb", if_generation_match=0, chunk_size=256 << 10)
    second = bucket.blob("x").open("wb", if_generation_match=0, chunk_size=256 << 10)
    for writer, byte in ((first, b"1"), (second, b"2")):
        writer.write(byte * (300 << 10))
    second.close()
    # A writer does not translate what it is answered, as an upload does.
    with pytest.raises(InvalidResponse) as refused:
        first.close()
    assert refused.value.response.status_code == 412
    assert bucket.blob("x").download_as_bytes() == b"2" * (300 << 10)


def test_a_media_upload_is_checked_too(gcs: LoopbackGcs, bucket: Any) -> None:
    path = f"{gcs.url}/upload/storage/v1/b/{gcs.bucket}/o?uploadType=media&name=x&ifGenerationMatch=0"
    http = bucket.client._http
    assert http.post(path, data=b"first").status_code == 200
    refused = http.post(path, data=b"second")
    assert refused.status_code == 412
    assert refused.json()["error"]["errors"][0]["reason"] == "conditionNotMet"
    assert bucket.blob("x").download_as_bytes() == b"first"


def test_delete_and_copy_under_conditions(bucket: Any) -> None:
    blob = bucket.blob("a/x")
    blob.upload_from_string(b"x")
    with pytest.raises(PreconditionFailed):
        bucket.delete_blob("a/x", if_generation_match=blob.generation + 1)
    assert bucket.copy_blob(blob, bucket, "b/x", if_generation_match=0).generation > blob.generation
    with pytest.raises(PreconditionFailed):
        bucket.copy_blob(blob, bucket, "b/x", if_generation_match=0)
    with pytest.raises(PreconditionFailed):
        bucket.copy_blob(blob, bucket, "c/x", if_source_generation_match=blob.generation + 1)
    with pytest.raises(PreconditionFailed):
        bucket.blob("b/x").rewrite(blob, if_generation_match=0)
    bucket.blob("c/x").rewrite(blob, if_generation_match=0)
    assert bucket.blob("c/x").download_as_bytes() == b"x"
    bucket.delete_blob("a/x", if_generation_match=blob.generation)
    with pytest.raises(NotFound):
        bucket.delete_blob("a/x")
    assert [found.name for found in bucket.list_blobs()] == ["b/x", "c/x"]


def test_listing_by_prefix_and_delimiter(bucket: Any) -> None:
    for name in ("b/2", "a/1", "b/c/3", "b-/4", "b"):
        bucket.blob(name).upload_from_string(name)
    assert [blob.name for blob in bucket.list_blobs(prefix="b/")] == ["b/2", "b/c/3"]
    top = bucket.list_blobs(delimiter="/")
    assert [blob.name for blob in top] == ["b"]
    assert top.prefixes == {"a/", "b/", "b-/"}


def test_ranges(gcs: LoopbackGcs, bucket: Any) -> None:
    data = random.Random(7).randbytes(1000)
    bucket.blob("x").upload_from_string(data)
    blob = bucket.blob("x")
    assert blob.download_as_bytes(start=10, end=19) == data[10:20]
    assert blob.download_as_bytes(start=990) == data[990:]
    assert blob.download_as_bytes(start=990, end=5000) == data[990:]
    assert blob.download_as_bytes(start=-7) == data[-7:]
    with pytest.raises(RequestRangeNotSatisfiable):
        blob.download_as_bytes(start=1000)
    with bucket.blob("x").open("rb", chunk_size=64) as stream:
        stream.seek(500)
        assert stream.read(100) == data[500:600]


def test_what_is_not_checked_is_refused(bucket: Any) -> None:
    blob = bucket.blob("x")
    blob.upload_from_string(b"x")
    with pytest.raises(MethodNotImplemented):
        blob.delete(if_metageneration_match=1)
    with pytest.raises(MethodNotImplemented):
        list(bucket.list_blobs(start_offset="x"))
    with pytest.raises(GoogleAPICallError), bucket.client.batch():
        bucket.delete_blob("x", if_generation_match=1)
    with bucket.client.batch():
        bucket.delete_blob("x")
    assert not bucket.blob("x").exists()


def test_where_the_emulator_falls_over_its_traceback_is_the_answer(gcs: LoopbackGcs, bucket: Any) -> None:
    path = f"{gcs.url}/upload/storage/v1/b/{gcs.bucket}/o?uploadType=media&name=x"
    answer = bucket.client._http.post(path, data=b"")
    assert answer.status_code == 501
    assert "TypeError" in answer.json()["error"]["message"]


@pytest.mark.parametrize("status", [503, None])
def test_an_upload_that_failed_before_it_was_applied_is_sent_again(
    gcs: LoopbackGcs, bucket: Any, status: int | None
) -> None:
    gcs.fail_next("POST", "name-of-it", status, times=2)
    bucket.blob("name-of-it").upload_from_string(b"x", if_generation_match=0, retry=SOON)
    assert writes_of(gcs, "name-of-it") == [("POST", status or 0)] * 2 + [("POST", 200)]
    gcs.fail_next("POST", "other", 503)
    with pytest.raises(ServiceUnavailable):
        bucket.blob("other").upload_from_string(b"x", if_generation_match=0, retry=None)
    assert not bucket.blob("other").exists()


@pytest.mark.parametrize("status", [503, None])
def test_the_client_sends_an_applied_upload_again_and_hears_412(
    gcs: LoopbackGcs, bucket: Any, status: int | None
) -> None:
    # Its own write stands in its way: whoever commits so has to look at what is there before believing that another won.
    gcs.fail_next("POST", f"{gcs.bucket}/x", status, applied=True)
    with pytest.raises(PreconditionFailed):
        bucket.blob("x").upload_from_string(b"mine", if_generation_match=0, retry=SOON)
    assert writes_of(gcs, "x") == [("POST", status or 0), ("POST", 412)]
    assert bucket.blob("x").download_as_bytes() == b"mine"


def test_without_retry_an_applied_upload_is_an_error_of_the_connection(gcs: LoopbackGcs, bucket: Any) -> None:
    gcs.fail_next("POST", f"{gcs.bucket}/x", None, applied=True)
    with pytest.raises(requests.exceptions.ConnectionError):
        bucket.blob("x").upload_from_string(b"mine", if_generation_match=0, retry=None)
    assert bucket.blob("x").download_as_bytes() == b"mine"


@pytest.mark.parametrize("status", [503, None])
def test_a_resumable_upload_knows_its_own_write(gcs: LoopbackGcs, bucket: Any, status: int | None) -> None:
    gcs.fail_next("PUT", f"{gcs.bucket}/x", status, applied=True)
    data = b"x" * (MULTIPART_MAX_BYTES + 1)
    blob = bucket.blob("x")
    blob.upload_from_string(data, if_generation_match=0, retry=SOON)
    assert writes_of(gcs, "x") == [("POST", 200), ("PUT", status or 0), ("PUT", 200)]
    assert bucket.get_blob("x").generation == blob.generation


def test_an_applied_delete_is_tried_again_and_not_found(gcs: LoopbackGcs, bucket: Any) -> None:
    bucket.blob("x").upload_from_string(b"x")
    gcs.fail_next("DELETE", "/o/x", None, applied=True)
    with pytest.raises(NotFound):
        bucket.blob("x").delete(retry=SOON)


def test_faults_that_did_not_happen_are_told(gcs: LoopbackGcs, bucket: Any) -> None:
    gcs.fail_next("GET", "nowhere")
    bucket.blob("x").upload_from_string(b"x")
    assert gcs.faults_left() == ["GET nowhere"]


def test_a_subprocess_needs_the_environment_alone(gcs: LoopbackGcs, bucket: Any) -> None:
    script = (
        "import sys; from google.cloud import storage; client = storage.Client();"
        "client.bucket(sys.argv[1]).blob('x').upload_from_string(b'from there', if_generation_match=0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, gcs.bucket], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert bucket.blob("x").download_as_bytes() == b"from there"


def test_the_environment_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://before")
    with LoopbackGcs() as gcs, gcs.in_environment():
        assert os.environ["STORAGE_EMULATOR_HOST"] == gcs.url
    assert os.environ["STORAGE_EMULATOR_HOST"] == "http://before"
