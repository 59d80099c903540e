"""How well scores rank the true copy of an image above all other pairs: ours beside what is commonly used.

python -m benchmarks.copies --queries 200

Each query's 14 changes are compared with every original; a pair is true if the original is the changed one. Micro-average
precision (AP) ranks the pairs of all changes together; R@P95 is the highest recall at a precision of .95 or more. What has
parameters, and the threshold whose cost in look-alikes is told, are fitted on other originals than those reported.
"""

import argparse
import io
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from imagededup.methods import PHash
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, precision_recall_curve

from beam_pipelines.planting import CHANGES, GEOMETRIC, flatten
from benchmarks.machine import describe
from benchmarks.originals import (
    DRAWINGS,
    FISH,
    FITTED,
    LOOK_ALIKES,
    PHOTOS,
    VEGETABLES,
    Facts,
    Pairs,
    changed,
    choose,
    compared,
    copies,
    facts_of,
    keep,
    look_alikes,
)
from embeddings.duplicates import DuplicateRule, Signatures, orientations

MOST_BITS = 24
"""More differing bits of 64 than this say no more against a pair: crops and turned images differ by as many as unlike ones."""


class Known(NamedTuple):
    """Of N images: our facts, imagededup's 64-bit hashes uint64 (N,), their k-means cluster (N,)."""

    facts: Facts
    imagededup: np.ndarray
    cluster: np.ndarray


class Signals(NamedTuple):
    """What scores are made of, each of M images beside each of N, (M, N)."""

    plain: Pairs
    either_way: Pairs  # as `plain`, but the hashes nearest of the eight ways to mirror and turn an image
    imagededup: np.ndarray
    one_cluster: np.ndarray


def signals(ours: Known, theirs: Known) -> Signals:
    mine, others = ours.facts.signatures, theirs.facts.signatures
    turned = zip(orientations(others.phashes), orientations(others.structures), strict=True)
    ways = [compared(mine, Signatures(others.vectors, *hashes)) for hashes in turned]
    return Signals(
        ways[0],
        Pairs(
            ways[0].cosine,
            np.min([way.bits for way in ways], axis=0),
            np.min([way.structure for way in ways], axis=0),
        ),
        np.bitwise_count(ours.imagededup[:, None] ^ theirs.imagededup).astype(int),
        ours.cluster[:, None] == theirs.cluster,
    )


def imagededup_hashes(images: list[bytes]) -> np.ndarray:
    hasher = PHash(verbose=False)
    arrays = (np.asarray(flatten(Image.open(io.BytesIO(data)))) for data in images)
    return np.array([int(hasher.encode_image(image_array=array), 16) for array in arrays], np.uint64)


class Corpus(NamedTuple):
    """Signals of a split: changed images beside originals by change, look-alikes beside each other by kind."""

    changes: dict[str, Signals]
    alike: dict[str, Signals]


def corpus(originals: list[bytes], queries: int, seed: int, photos: tuple[str, str]) -> Corpus:
    """The clusters are of all images of the split, as SemDeDup would see them: as many as the root of their number."""
    sets = {
        "": originals,
        **dict(changed(originals[:queries])),
        **dict(look_alikes(seed, LOOK_ALIKES, photos)),
    }
    facts = {name: facts_of(images) for name, images in sets.items()}
    vectors = np.concatenate([one.signatures.vectors for one in facts.values()]).astype(np.float32)
    clusters = KMeans(round(math.sqrt(len(vectors))), n_init=1, random_state=seed).fit_predict(vectors)
    ends = np.cumsum([len(images) for images in sets.values()])[:-1]
    known = {
        name: Known(facts[name], imagededup_hashes(images), labels)
        for (name, images), labels in zip(sets.items(), np.split(clusters, ends), strict=True)
    }
    return Corpus(
        {name: signals(known[name], known[""]) for name in CHANGES},
        {name: signals(one, one) for name, one in known.items() if name not in ("", *CHANGES)},
    )


def fitted(features: Callable[[Signals], list[np.ndarray]], pairs: Corpus) -> Callable[[Signals], np.ndarray]:
    """The log odds that a pair is true, a weighted sum of features."""

    def matrix(one: Signals) -> np.ndarray:
        return np.stack([column.ravel() for column in features(one)], axis=1)

    model = LogisticRegression(C=1e6, max_iter=1000).fit(
        np.concatenate([matrix(one) for one in pairs.changes.values()]),
        np.concatenate([truth(one).ravel() for one in pairs.changes.values()]),
    )
    weights = ", ".join(f"{weight:.2f}" for weight in model.coef_[0])
    print(f"- weights {weights}; intercept {model.intercept_[0]:.2f}")
    return lambda one: model.decision_function(matrix(one)).reshape(one.plain.cosine.shape)


def truth(one: Signals) -> np.ndarray:
    return np.eye(*one.plain.cosine.shape, dtype=bool)


def recall_at_precision(true: np.ndarray, scores: np.ndarray, least: float = 0.95) -> tuple[float, float]:
    """The highest recall at that precision or more, and the threshold that gives it."""
    precision, recall, thresholds = precision_recall_curve(true, scores)
    best = int(np.argmax(precision >= least))  # recall falls with the threshold
    return float(recall[best]), float(thresholds[best]) if best < len(thresholds) else math.inf


def together(by_change: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([values.ravel() for values in by_change.values()])


def removed(duplicate: dict[str, np.ndarray]) -> str:
    count = sum(len(pairs) - keep(pairs) for pairs in duplicate.values())
    total = sum(map(len, duplicate.values()))
    return f"{count} of {total}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=200, help="originals that are changed")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rule = DuplicateRule()
    print(describe("torch", "timm", "imagehash", "imagededup", "scikit-learn", "numpy"))
    pictures = choose(arguments.seed, PHOTOS, DRAWINGS)
    others = corpus(pictures[:FITTED], min(arguments.queries, 100), arguments.seed + 1, VEGETABLES)
    reported = corpus(pictures[FITTED:], arguments.queries, arguments.seed, FISH)
    both = fitted(lambda one: [one.plain.cosine, np.minimum(one.plain.bits, MOST_BITS)], others)
    turned = fitted(lambda one: [one.plain.cosine, np.minimum(one.either_way.bits, MOST_BITS)], others)
    ways: dict[str, Callable[[Signals], np.ndarray]] = {
        "imagededup's PHash": lambda one: -one.imagededup,
        "pHash alone": lambda one: -one.plain.bits,
        "embedding alone": lambda one: one.plain.cosine,
        "embedding within k-means clusters": lambda one: np.where(one.one_cluster, one.plain.cosine, -2),
        "both": both,
        "both, verified copies first": lambda one: both(one) + 1000 * copies(one.plain, rule),
        "both, hashes turned and mirrored": turned,
    }
    true = {name: truth(one) for name, one in reported.changes.items()}
    others_true = together({name: truth(one) for name, one in others.changes.items()})
    print(
        f"\n{len(next(iter(true.values()))[0])} originals, {arguments.queries} of them changed, {together(true).sum()} true pairs of {together(true).size}.\n"
    )
    print("| score | AP | R@P95 | at a threshold from others: recall | precision | look-alikes removed |")
    print("|---|---|---|---|---|---|")
    lines = {}
    for name, way in ways.items():
        _, threshold = recall_at_precision(
            others_true, together({change: way(one) for change, one in others.changes.items()})
        )
        scores = {change: way(one) for change, one in reported.changes.items()}
        recall, _ = recall_at_precision(together(true), together(scores))
        hits = together(scores) >= threshold
        right = (hits & together(true)).sum()
        print(
            f"| {name} | {average_precision_score(together(true), together(scores)):.3f} | {recall:.3f} "
            f"| {right / together(true).sum():.3f} | {right / hits.sum():.3f} "
            f"| {removed({kind: way(one) >= threshold for kind, one in reported.alike.items()})} |"
        )
        lines[name] = [
            f"{average_precision_score(true[change].ravel(), scores[change].ravel()):.2f}, "
            f"{(scores[change] >= threshold)[true[change]].mean():.2f}"
            for change in CHANGES
        ]
    for name, seen in (("the default rule", "plain"), ("the same, hashes turned and mirrored", "either_way")):
        found = {change: copies(getattr(one, seen), rule) for change, one in reported.changes.items()}
        hits = together(found)
        right = (hits & together(true)).sum()
        wrongly = removed({kind: copies(getattr(one, seen), rule) for kind, one in reported.alike.items()})
        print(f"| {name} | | | {right / together(true).sum():.3f} | {right / hits.sum():.3f} | {wrongly} |")
        lines[name] = [f"{found[change][true[change]].mean():.2f}" for change in CHANGES]
    print(f"\n| AP, recall at that threshold | {' | '.join(lines)} |\n|---{'|---' * len(lines)}|")
    for row, change in enumerate(CHANGES):
        mark = " (geometric)" if change in GEOMETRIC else ""
        print(f"| {change}{mark} | {' | '.join(column[row] for column in lines.values())} |")


if __name__ == "__main__":
    main()
