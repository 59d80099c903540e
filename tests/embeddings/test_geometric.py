import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.buckets import Buckets
from embeddings.cell_plan import fit
from embeddings.cells import Cells
from embeddings.duplicates import NEVER, Group, Pairing, Prints, Thresholds, exact_scores, ids_of
from embeddings.geometric import Edge, Kept, losses, nearest, strongest
from tests.embeddings.oracle import clustered

SIMILAR = Thresholds(0.6, -1, 1024)


@pytest.mark.parametrize("num_cells", [1, 6])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_nearest_of_all_buckets_are_the_nearest(num_cells: int, parts: int) -> None:
    groups = [Group(SIMILAR), Group(NEVER), Group(SIMILAR._replace(cosine=0.8)), Group(SIMILAR, fixed=True)]
    pairing = Pairing(groups)
    columns = Prints.of(clustered(7, 240, groups))
    vectors = columns.signatures.vectors
    centroids = fit(vectors, num_cells) if num_cells > 1 else np.zeros((1, 1), np.float32)
    cells = Cells(centroids, np.full(num_cells, parts))
    found: dict[bytes, list[tuple[bytes, float]]] = {}
    for _, members in Buckets(cells, pairing).split(columns):
        some = nearest(members, pairing, 5)
        for ours, theirs, score in zip(some.ours, some.theirs, some.scores.tolist(), strict=True):
            found.setdefault(ours.tobytes(), []).append((theirs.tobytes(), score))
    num_found = 0
    for row, one in enumerate(columns.print_ids):
        others = np.arange(len(vectors))
        scores = exact_scores(vectors, np.full(len(vectors), row), others)
        limits = pairing.cosine[columns.groups[row], columns.groups]
        by_hand = sorted(
            (-float(scores[other]), columns.print_ids[other].tobytes())
            for other in others
            if other != row and scores[other] >= limits[other]
        )[:5]
        assert strongest(found.get(one.tobytes(), []), 5) == [other for _, other in by_hand]
        num_found += len(by_hand)
    assert num_found > 200


def test_a_lone_member_has_no_neighbour() -> None:
    pairing = Pairing([Group(SIMILAR)])
    ((_, members),) = Buckets(Cells(np.zeros((1, 1), np.float32), np.array([1])), pairing).split(
        Prints.of(clustered(7, 1, [Group(SIMILAR)]))
    )
    assert len(nearest(members, pairing, 5).ours) == 0
    assert len(ids_of(b"")) == 0


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_losses_are_those_of_the_walk(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 9))
    images = [
        Kept((0 if n < 2 else -1, -n % 3, 0), bytes([n]) * 32, n >= 2 and n % 5 == 2) for n in range(count)
    ]
    images = [one._replace(rank=(-1, 0, 0) if one.fixed else (0, *one.rank[1:])) for one in images]
    chosen = data.draw(st.sets(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1))))
    agreements = {(a, b): 800 + (7 * a + 11 * b) % 5 for a, b in chosen if a < b}
    agreements = {(a, b): v for (a, b), v in agreements.items() if not (images[a].fixed and images[b].fixed)}
    edges = [Edge(images[a], images[b], agreement) for (a, b), agreement in agreements.items()]
    lost = losses(data.draw(st.permutations(edges)))
    kept: list[Kept] = []
    by_hand = []
    for one in sorted(images):
        place = images.index(one)
        keepers = [
            (-agreements[pair], other)
            for other in kept
            if (pair := tuple(sorted((place, images.index(other))))) in agreements
        ]
        if keepers and not one.fixed:
            by_hand.append((one.image_id, min(keepers)[1], -min(keepers)[0]))
        else:
            kept.append(one)
    assert lost == by_hand
