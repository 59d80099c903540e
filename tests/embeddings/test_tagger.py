import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.pixel_taggers import is_pixel_tagger, open_tagger
from embeddings.tagger import (
    FORMAT,
    LinearTagger,
    average_precision,
    evaluate,
    fit,
    tagger_bytes,
    tagger_from,
)
from shards.errors import BadRequest
from shards.records import Tag


def two_kinds(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors, and whether they point up and whether they point right."""
    vectors = np.random.default_rng(seed).normal(size=(count, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float16), np.stack([vectors[:, 0] > 0.1, vectors[:, 1] > 0.2], axis=1)


def test_what_can_be_told_is_learnt() -> None:
    vectors, labels = two_kinds(0, 600)
    tagger = fit(vectors, labels, ["up", "right"], "encoder", penalty=0.01)
    assert (
        fit(vectors, labels, ["up", "right"], "encoder", penalty=0.01).weights.tobytes()
        == tagger.weights.tobytes()
    )
    result = evaluate(tagger, *two_kinds(1, 300))
    assert result.num_images == 300 and result.mean_average_precision > 0.99 and result.micro_f1 > 0.95
    up, right = result.tags
    assert (up.name, right.name) == ("up", "right") and up.num_images > right.num_images > 30
    shuffled = evaluate(tagger, two_kinds(1, 300)[0], two_kinds(2, 300)[1])
    assert shuffled.mean_average_precision < 0.7
    assert tagger.tags(np.array([1, 0] + [0] * 6, np.float16))[0].score_milli > 900


def test_a_row_does_not_depend_on_the_others() -> None:
    vectors, labels = two_kinds(0, 50)
    tagger = fit(vectors, labels, ["up", "right"], "encoder")
    together = tagger.probabilities(vectors)
    alone = np.concatenate([tagger.probabilities(vector[None]) for vector in vectors])
    assert together.tobytes() == alone.tobytes()


def test_the_file_gives_the_tagger_back() -> None:
    vectors, labels = two_kinds(0, 50)
    tagger = fit(vectors, labels, ["up", "ünd, right"], "encoder")
    data = tagger_bytes(tagger, evaluate(tagger, vectors, labels))
    again = tagger_from(data, "t")
    assert again.names == tagger.names and again.encoder == "encoder"
    assert np.array_equal(again.weights, tagger.weights) and np.array_equal(again.bias, tagger.bias)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no tensors",
        safetensors.numpy.save({"weights": np.zeros((2, 3), np.float32)}),
        safetensors.numpy.save(
            {"weights": np.zeros((2, 3), np.float32), "bias": np.zeros(2, np.float32)},
            {"format": FORMAT, "names": '["one"]', "encoder": "e"},
        ),
    ],
)
def test_another_file_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest, match="--tagger t.safetensors"):
        tagger_from(data, "t.safetensors")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=20))
def test_average_precision_is_scikit_learns(drawn: list[tuple[int, bool]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores = np.array([score / 4 for score, _ in drawn])
    labels = np.array([label for _, label in drawn])
    if labels.any():
        assert average_precision(scores, labels) == pytest.approx(
            metrics.average_precision_score(labels, scores)
        )


def test_names_of_taggers() -> None:
    assert all(map(is_pixel_tagger, ("ocr", "safety", "my_models:ram")))
    assert not any(
        map(is_pixel_tagger, ("classes", "tagger.safetensors", "gs://b/t.safetensors", "C:/t.safetensors"))
    )
    for name in ("no_such_module_here:make", "json:no_such", "json:dumps_"):
        with pytest.raises(BadRequest, match=f"--tagger {name}"):
            open_tagger(name)
    with pytest.raises(BadRequest, match="fingerprint"):
        open_tagger("builtins:dict")


def test_a_head_is_a_record() -> None:
    tagger = LinearTagger(("a",), np.zeros((1, 2), np.float32), np.zeros(1, np.float32), "e")
    assert tagger.tags(np.zeros(2, np.float16)) == [Tag("a", 500)]
