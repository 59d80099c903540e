"""Notices: what a bucket tells a subscription about its objects, in the format of Cloud Storage's Pub/Sub notifications."""

import datetime
import json
from collections.abc import Mapping
from typing import NamedTuple

from shards.errors import BadData

NEW_OBJECT = "OBJECT_FINALIZE"


class Notice(NamedTuple):
    """An object that was written: its uri, and when, in milliseconds since 1970."""

    uri: str
    event_ms: int


def parse_notice(data: bytes, attributes: Mapping[str, str]) -> Notice | None:
    """The object that a message is about; None where it tells of something else than a new object.

    What the attributes leave out is looked for in the payload, the object's JSON. Raises BadData `bad_notice`.
    Source: https://cloud.google.com/storage/docs/pubsub-notifications.
    """
    told = dict(attributes)
    if told.get("eventType", NEW_OBJECT) != NEW_OBJECT:
        return None
    if not {"bucketId", "objectId", "eventTime"} <= told.keys():
        told = _told_in(data) | told
    bucket, name = told.get("bucketId", ""), told.get("objectId", "")
    if not bucket or not name:
        raise BadData("bad_notice", "names no object: bucketId or objectId is missing")
    return Notice(f"gs://{bucket}/{name}", _milliseconds(told.get("eventTime", "")))


def _told_in(data: bytes) -> dict[str, str]:
    try:
        body = json.loads(data)
        told = {
            "bucketId": body.get("bucket"),
            "objectId": body.get("name"),
            "eventTime": body.get("timeCreated"),
        }
    except (ValueError, AttributeError, RecursionError):
        raise BadData("bad_notice", "neither its attributes nor its payload name an object") from None
    return {name: value for name, value in told.items() if isinstance(value, str)}


def _milliseconds(text: str) -> int:
    try:
        when = datetime.datetime.fromisoformat(text)
        if when.tzinfo is None:
            raise ValueError("no time zone")
        return int(when.timestamp() * 1000)
    except (ValueError, OverflowError):
        raise BadData("bad_notice", f"eventTime is no time: {text[:40]!r}") from None
