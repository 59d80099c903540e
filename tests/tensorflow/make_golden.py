"""Write golden.json: bytes as TensorFlow writes them, which the tests that run without it hold our writer to.

Run as `make golden-tf` where the cases change, and read what changed.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

GOLDEN = Path(__file__).parent / "golden.json"

Values = Sequence[bytes] | Sequence[str] | Sequence[int] | Sequence[float]

EXAMPLES: list[dict[str, Values]] = [
    {},
    {"c": [0.5], "a": [1, 300], "b": ["x"]},
    {"none": []},
    {"bytes": [b"", b"\x00\xff\n\r", bytes(range(256))], "text": ["é", "日本語", "👩‍🚀", ""]},
    {"int": [0, 1, -1, 127, 128, 2**31, -(2**31), 2**63 - 1, -(2**63)]},
    {
        "float": [
            0.0,
            -0.0,
            1.5,
            -1e-45,
            3.4028234663852886e38,
            float("inf"),
            float("-inf"),
            float("nan"),
            0.1,
        ]
    },
    # How keys are sorted: by their bytes, beyond ASCII and beyond the first plane, where one begins another.
    {key: [1] for key in ("z", "é", "￮", "𝄞", "Z", "a", "aa", "ab", "", "a/b", "a\x00")},
    {
        "sample_id": ["00" * 32],
        "image/encoded": [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"],
        "image/id": ["11" * 32, "22" * 32],
        "conversations": ['[{"from": "human", "value": "<image>\\né?"}]'],
        "tags/name": [],
        "tags/score_milli": [],
        "source": ["s"],
        "license": ["CC0-1.0"],
        "generator": ["source"],
    },
]
RECORDS: list[list[bytes]] = [[], [b""], [b"first", b"", bytes(range(256)), b"x" * 300]]


def example(features: Mapping[str, Values]) -> Any:
    """The tf.train.Example of these features; where a list is empty, its kind is left open."""
    made = tf.train.Example()
    for name, values in features.items():
        feature = made.features.feature[name]
        if not values:
            continue
        if isinstance(values[0], int):
            feature.int64_list.value.extend(values)
        elif isinstance(values[0], float):
            feature.float_list.value.extend(values)
        else:
            encoded = [value.encode() if isinstance(value, str) else value for value in values]
            feature.bytes_list.value.extend(encoded)
    return made


def tfrecord(records: Sequence[bytes]) -> bytes:
    """The file that TensorFlow writes of these records."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.tfrecord"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in records:
                writer.write(record)
        return path.read_bytes()


def described(values: Values) -> list[Any]:
    """Values as JSON holds them: bytes as {"hex": ...}, floats as {"float": text}, since JSON has no infinity."""
    forms = {bytes: lambda value: {"hex": value.hex()}, float: lambda value: {"float": repr(value)}}
    return [forms.get(type(value), lambda value: value)(value) for value in values]


def main() -> None:
    golden = {
        "tensorflow": tf.__version__,
        "examples": [
            {
                "features": {name: described(values) for name, values in features.items()},
                "hex": example(features).SerializeToString(deterministic=True).hex(),
            }
            for features in EXAMPLES
        ],
        "tfrecords": [
            {"records": [record.hex() for record in records], "hex": tfrecord(records).hex()}
            for records in RECORDS
        ],
    }
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
