"""Real pictures, their changes and drawn documents, embedded by the real encoder: the search keeps and names what the double loop does."""

import numpy as np
import pytest

from benchmarks.devices import embedded
from embeddings.buckets import find_near_duplicates
from embeddings.cell_plan import directions_of, fit_cells
from embeddings.duplicates import DuplicateRule, Group, Pairing, Print, Prints
from embeddings.encoder import EncoderSpec, load_encoder
from tests.proof.counts import count

pytestmark = pytest.mark.proof

IMAGES = count(4000, 210)
"""Fifteen of each example, which are 3,630; then documents."""


@pytest.fixture(scope="module")
def prints() -> list[Print]:
    (made,) = embedded(IMAGES, [load_encoder(EncoderSpec(batch_size=8))])
    assert len(made) > 0.95 * IMAGES, "hardly any change leaves the bytes as they are"
    return made


def double_loop(prints: list[Print], rule: DuplicateRule) -> dict[bytes, bytes]:
    """image_id -> keeper_id. Down the order each image is compared with those kept before it, all at once."""
    ordered = sorted(prints, key=lambda one: (one.rank, one.image_id))
    vectors = np.stack([np.frombuffer(one.embedding, "<f2").astype(np.float64) for one in ordered])
    hashes, structures = (
        np.stack([np.frombuffer(getattr(one, name), "<u8") for one in ordered])
        for name in ("phash", "structure")
    )
    thresholds = rule.thresholds
    kept: list[int] = []
    keepers = {}
    for row, one in enumerate(ordered):
        scores = vectors[kept] @ vectors[row]
        bits, distances = (
            np.bitwise_count(columns[kept] ^ columns[row]).sum(axis=1) for columns in (hashes, structures)
        )
        duplicate = (scores >= thresholds.cosine) | (bits <= thresholds.phash_bits)
        duplicate &= distances <= thresholds.structure_bits
        if duplicate.any():
            best = int(np.where(duplicate, scores, -np.inf).argmax())
            keepers[one.image_id] = ordered[kept[best]].image_id
        else:
            kept.append(row)
            keepers[one.image_id] = one.image_id
    return keepers


@pytest.mark.parametrize(
    "rule", [DuplicateRule(), DuplicateRule(cosine=0.9, phash_bits=0), DuplicateRule("similar", cosine=0.85)]
)
def test_the_search_in_cells_is_the_double_loop(prints: list[Print], rule: DuplicateRule) -> None:
    expected = double_loop(prints, rule)
    num_kept = sum(image_id == keeper for image_id, keeper in expected.items())
    assert IMAGES / 60 < num_kept < 0.8 * IMAGES
    vectors = Prints.of(prints).signatures.vectors
    rng = np.random.default_rng(0)
    for num_cells, basis in ((5, None), (IMAGES // 12, directions_of(vectors))):
        cells = fit_cells(vectors, num_cells, basis)._replace(parts=rng.integers(1, 4, num_cells))
        shuffled = [prints[place] for place in rng.permutation(len(prints))]
        searched = find_near_duplicates(shuffled, Pairing([Group(rule.thresholds)]), cells)
        assert {verdict.image_id: verdict.keeper_id for verdict in searched.verdicts} == expected
        assert all(
            (verdict.code == "kept") == (verdict.keeper_id == verdict.image_id)
            for verdict in searched.verdicts
        )
