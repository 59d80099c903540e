"""Messages of a bucket: what names a new object, what is about something else, what makes no sense."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from images.notices import Notice, parse_notice
from shards.errors import BadData

ATTRIBUTES = {
    "notificationConfig": "projects/_/buckets/photos/notificationConfigs/3",
    "eventType": "OBJECT_FINALIZE",
    "payloadFormat": "JSON_API_V1",
    "bucketId": "photos",
    "objectId": "2026/a b.jpg",
    "objectGeneration": "1790000000000001",
    "eventTime": "2026-11-23T12:00:00.250000Z",
}
EVENT_MS = 1795435200250


def test_a_new_object() -> None:
    assert parse_notice(b"", ATTRIBUTES) == Notice("gs://photos/2026/a b.jpg", EVENT_MS)


@pytest.mark.parametrize("kind", ["OBJECT_DELETE", "OBJECT_ARCHIVE", "OBJECT_METADATA_UPDATE"])
def test_what_is_about_no_new_object(kind: str) -> None:
    assert parse_notice(b"", {**ATTRIBUTES, "eventType": kind}) is None


def test_the_payload_says_what_the_attributes_leave_out() -> None:
    payload = {"bucket": "photos", "name": "x.png", "timeCreated": "2026-11-23T12:00:00.25+00:00"}
    assert parse_notice(json.dumps(payload).encode(), {}) == Notice("gs://photos/x.png", EVENT_MS)
    told = {"bucketId": "other", "objectId": "y.png"}
    assert parse_notice(json.dumps(payload).encode(), told) == Notice("gs://other/y.png", EVENT_MS)


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (b"", {"objectId": ""}),
        (b"", {"bucketId": ""}),
        (b"", {"eventTime": "yesterday"}),
        (b"", {"eventTime": "2026-11-23T12:00:00"}),
        (b"\xff", {"eventTime": None}),
        (b"[1]", {"eventTime": None}),
        (b"[" * 100_000, {"eventTime": None}),
        (b'{"bucket": 3, "name": {}}', {"bucketId": None, "objectId": None}),
    ],
)
def test_what_makes_no_sense(data: bytes, changes: dict[str, str | None]) -> None:
    told = {name: value for name, value in {**ATTRIBUTES, **changes}.items() if value is not None}
    with pytest.raises(BadData) as refused:
        parse_notice(data, told)
    assert refused.value.code == "bad_notice"


@given(st.binary(), st.dictionaries(st.sampled_from(sorted(ATTRIBUTES)), st.text()))
def test_any_message_is_an_object_or_nothing_or_bad(data: bytes, attributes: dict[str, str]) -> None:
    try:
        notice = parse_notice(data, attributes)
    except BadData as error:
        assert error.code == "bad_notice"
    else:
        assert notice is None or notice.uri.startswith("gs://")
