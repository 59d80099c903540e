"""`tf.train.Example` as a protobuf message, described here so that TensorFlow is not needed.

Source of the schema: tensorflow/core/example/{example,feature}.proto. Written with deterministic serialisation, as by TensorFlow
in Python: map entries by the bytes of their keys, a key that begins another after it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field

Value = bytes | str | int | float


def _example_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="shardmill/example.proto", package="shardmill", syntax="proto3"
    )

    def message(name: str, *fields: tuple[str, int, int, int, str]) -> descriptor_pb2.DescriptorProto:
        descriptor = file.message_type.add(name=name)
        for field_name, number, label, kind, type_name in fields:
            descriptor.field.add(
                name=field_name, number=number, label=label, type=kind, type_name=type_name or None
            )
        return descriptor

    one, many = Field.LABEL_OPTIONAL, Field.LABEL_REPEATED
    message("BytesList", ("value", 1, many, Field.TYPE_BYTES, ""))
    message("FloatList", ("value", 1, many, Field.TYPE_FLOAT, ""))
    message("Int64List", ("value", 1, many, Field.TYPE_INT64, ""))
    feature = message(
        "Feature",
        ("bytes_list", 1, one, Field.TYPE_MESSAGE, ".shardmill.BytesList"),
        ("float_list", 2, one, Field.TYPE_MESSAGE, ".shardmill.FloatList"),
        ("int64_list", 3, one, Field.TYPE_MESSAGE, ".shardmill.Int64List"),
    )
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = message(
        "Features", ("feature", 1, many, Field.TYPE_MESSAGE, ".shardmill.Features.FeatureEntry")
    )
    entry = features.nested_type.add(name="FeatureEntry")
    entry.field.add(name="key", number=1, label=one, type=Field.TYPE_STRING)
    entry.field.add(
        name="value", number=2, label=one, type=Field.TYPE_MESSAGE, type_name=".shardmill.Feature"
    )
    entry.options.map_entry = True
    message("Example", ("features", 1, one, Field.TYPE_MESSAGE, ".shardmill.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("shardmill.Example"))


Example = _example_class()


def example_bytes(features: Mapping[str, Sequence[Value]]) -> bytes:
    """A serialised Example: bytes and str become bytes_list, int int64_list, float float_list.

    An empty list leaves its kind open: TensorFlow reads that as an empty list of any kind, and refuses an empty bytes_list where
    numbers are expected.
    """
    example = Example()
    for name, values in features.items():
        feature = example.features.feature[name]
        if not values:
            continue
        if isinstance(values[0], int):
            feature.int64_list.value.extend(values)
        elif isinstance(values[0], float):
            feature.float_list.value.extend(values)
        else:
            encoded = [value.encode() if isinstance(value, str) else value for value in values]
            feature.bytes_list.value.extend(encoded)
    return bytes(example.SerializeToString(deterministic=True))


def example_features(data: bytes) -> dict[str, list[bytes] | list[int] | list[float]]:
    """The features of a serialised Example. Raises google.protobuf.message.DecodeError."""
    example = Example.FromString(data)
    found: dict[str, list[bytes] | list[int] | list[float]] = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        found[name] = list(getattr(feature, kind).value) if kind else []
    return found


def bytes_places(data: bytes) -> dict[str, list[tuple[int, int]]]:
    """(offset, length) of each value of each bytes feature within a serialised Example, of the last entry where a name comes twice.

    For messages as writers write them; one that spreads a feature over several messages is not followed. Raises IndexError or
    ValueError where the bytes are no Example.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for features in _fields(data, 0, len(data), 1):
        for entry in _fields(data, *features, 1):
            name = next((data[start:end] for start, end in _fields(data, *entry, 1)), b"").decode()
            values = []
            for feature in _fields(data, *entry, 2):
                for bytes_list in _fields(data, *feature, 1):
                    values += [(start, end - start) for start, end in _fields(data, *bytes_list, 1)]
            found[name] = values
    return found


def _fields(data: bytes, start: int, end: int, number: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each length-delimited field `number` of the message at data[start:end]. Encoding: protobuf.dev, `Encoding`."""
    while start < end:
        tag, start = _varint(data, start)
        wire_type = tag & 7
        if wire_type == 2:
            length, start = _varint(data, start)
            if tag >> 3 == number:
                yield start, start + length
            start += length
        elif wire_type == 0:
            _, start = _varint(data, start)
        elif wire_type in (1, 5):
            start += 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type}")


def _varint(data: bytes, start: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[start]
        value |= (byte & 127) << shift
        start, shift = start + 1, shift + 7
        if byte < 128:
            return value, start
