"""Two devices are compared by what their vectors lead to: alike if these are, and what differs is named."""

import numpy as np
import pytest

from benchmarks.devices import differences, embedded, found, report
from embeddings.duplicates import DuplicateRule
from embeddings.encoder import EncoderSpec, load_encoder
from tests.embeddings.oracle import clustered


def test_a_device_beside_itself_differs_in_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    encoder = load_encoder(EncoderSpec(batch_size=8))
    prints = embedded(30, [encoder, encoder])
    results = [
        found(some, DuplicateRule(), device) for some, device in zip(prints, ("cpu", "cpu:0"), strict=True)
    ]
    assert differences(*results) == ([], []) and len(results[0].pairs) > 10
    assert len(set(results[0].keepers)) < len(prints[0])
    report(prints, results, ("cpu", "cpu:0"))
    assert "0 by one alone; 0 images with another keeper" in capsys.readouterr().out


def test_pairs_and_keepers_of_one_device_alone_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    ours, rule = clustered(1, 40), DuplicateRule("similar", cosine=0.9)
    before = found(ours, rule, "cpu")
    row = min(before.pairs)[0]
    turned = np.frombuffer(ours[row].embedding, "<f2") * np.float16(-1)
    theirs = [*ours[:row], ours[row]._replace(embedding=turned.tobytes()), *ours[row + 1 :]]
    results = [before, found(theirs, rule, "cpu")]
    apart = differences(*results)
    assert apart.pairs == sorted(pair for pair in before.pairs if row in pair) and apart.images
    report([ours, theirs], results, ("one", "other"))
    said = capsys.readouterr().out
    assert f"{len(apart.pairs)} by one alone; {len(apart.images)} images with another keeper" in said
    (first, second), score = apart.pairs[0], before.pairs[apart.pairs[0]]
    assert f"| {first}, {second} | {score:.6f} | {-score:.6f} | one |" in said
