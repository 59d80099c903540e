import hashlib

from hypothesis import given
from hypothesis import strategies as st

from shards.ids import canonical_json, image_id_of, sample_id_of, shard_of
from shards.records import Turn


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": [1, "é"], "a": None}) == '{"a":null,"b":[1,"é"]}'.encode()


def test_sample_id_is_the_documented_hash() -> None:
    image_id = image_id_of(b"bytes")
    text = f'{{"conversation":[{{"from":"human","value":"é"}}],"images":["{image_id.hex()}"]}}'
    assert sample_id_of([image_id], [Turn("human", "é")]) == hashlib.sha256(text.encode()).digest()


def test_sample_id_depends_on_order_and_text() -> None:
    a, b = image_id_of(b"a"), image_id_of(b"b")
    turns = [Turn("human", "x")]
    ids = {
        sample_id_of([a, b], turns),
        sample_id_of([b, a], turns),
        sample_id_of([a], turns),
        sample_id_of([], []),
    }
    assert len(ids) == 4


@given(st.binary(min_size=32, max_size=32), st.integers(0, 6))
def test_doubling_the_shards_splits_each_in_two(image_id: bytes, bits: int) -> None:
    shard = shard_of(image_id, 1 << bits)
    assert 0 <= shard < 1 << bits
    assert shard_of(image_id, 1 << bits + 1) // 2 == shard
