"""Our writers against bytes that TensorFlow wrote; `make test-tf` compares with TensorFlow itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from shards.example_proto import Example, example_bytes
from shards.tfrecord import frame

GOLDEN = json.loads((Path(__file__).parent.parent / "tensorflow" / "golden.json").read_text())


def value_of(described: Any) -> Any:
    if not isinstance(described, dict):
        return described
    return bytes.fromhex(described["hex"]) if "hex" in described else float(described["float"])


@pytest.mark.parametrize(
    "case", GOLDEN["examples"], ids=lambda case: "-".join(case["features"])[:40] or "empty"
)
def test_example_bytes_are_those_of_tensorflow(case: dict[str, Any]) -> None:
    features = {name: [value_of(value) for value in values] for name, values in case["features"].items()}
    theirs = bytes.fromhex(case["hex"])
    assert example_bytes(features) == theirs
    assert example_bytes(dict(reversed(features.items()))) == theirs
    assert Example.FromString(theirs).SerializeToString(deterministic=True) == theirs


@pytest.mark.parametrize("case", GOLDEN["tfrecords"], ids=lambda case: str(len(case["records"])))
def test_framed_records_are_those_of_tensorflow(case: dict[str, Any]) -> None:
    records = [bytes.fromhex(record) for record in case["records"]]
    assert b"".join(frame(data)[0] + data + frame(data)[1] for data in records).hex() == case["hex"]
