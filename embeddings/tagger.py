"""A linear head that turns stored embeddings into tags: fitted on labelled images, one independent yes or no a tag.

A file of safetensors holds the weights, the tags' names, the fingerprint of the encoder whose vectors it reads, and how well it did on
images it was not fitted on. Applying it needs no image and no GPU.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch

from shards.errors import BadRequest
from shards.ids import canonical_json
from shards.records import Tag

FORMAT = "shardmill tagger 1"
_STEPS = 200
Labels = npt.NDArray[np.bool_]


class LinearTagger(NamedTuple):
    """`names` of C tags, `weights` float32 (C, D), `bias` float32 (C,), for vectors of the encoder with this fingerprint."""

    names: tuple[str, ...]
    weights: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    encoder: str

    def probabilities(self, vectors: npt.NDArray[np.float16]) -> npt.NDArray[np.float64]:
        """float16 (N, D) -> float64 (N, C) in [0, 1]. A row does not depend on the others."""
        weights = self.weights.astype(np.float64)
        logits = np.stack([weights @ vector for vector in vectors.astype(np.float64)]) + self.bias
        return np.asarray(1 / (1 + np.exp(-logits)))

    def tags(self, vector: npt.NDArray[np.float16]) -> list[Tag]:
        """All tags of one vector float16 (D,), in the order of `names`."""
        scores = self.probabilities(vector[None])[0]
        return [
            Tag(name, round(score * 1000)) for name, score in zip(self.names, scores.tolist(), strict=True)
        ]


class TagMeasure(NamedTuple):
    """How a tag was told on held-out images: how many bear it, average precision, and F1 at a probability of one half."""

    name: str
    num_images: int
    average_precision: float
    f1: float


class Evaluation(NamedTuple):
    """Means over the tags that any of `num_images` held-out images bears, and `micro_f1` over all decisions."""

    num_images: int
    mean_average_precision: float
    macro_f1: float
    micro_f1: float
    tags: Sequence[TagMeasure]


def fit(
    vectors: npt.NDArray[np.float16], labels: Labels, names: Sequence[str], encoder: str, penalty: float = 1.0
) -> LinearTagger:
    """Logistic regression of each tag: float16 (N, D) and bool (N, C). `penalty` weighs half the squared weights against the N losses."""
    inputs = torch.from_numpy(vectors.astype(np.float64))
    wanted = torch.from_numpy(labels.astype(np.float64))
    weights = torch.zeros((labels.shape[1], vectors.shape[1]), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(labels.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weights, bias], max_iter=_STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        found = torch.nn.functional.binary_cross_entropy_with_logits(
            inputs @ weights.T + bias, wanted, reduction="sum"
        )
        total = found + penalty / 2 * weights.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    fitted, offsets = (tensor.detach().numpy().astype(np.float32) for tensor in (weights, bias))
    return LinearTagger(tuple(names), fitted, offsets, encoder)


def average_precision(scores: npt.NDArray[np.float64], labels: Labels) -> float:
    """Mean of the precision at each step of recall, ties at once, as scikit-learn has it: float64 (N,) and bool (N,), one True at least."""
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(labels[order])
    last_of_equals = np.append(ranked[1:] != ranked[:-1], True)
    hits, places = hits[last_of_equals], np.flatnonzero(last_of_equals) + 1
    return float((np.diff(hits, prepend=0) * hits / places).sum() / labels.sum())


def _f1(said: Labels, true: Labels) -> float:
    both = int((said & true).sum())
    return 2 * both / max(1, int(said.sum()) + int(true.sum()))


def evaluate(tagger: LinearTagger, vectors: npt.NDArray[np.float16], labels: Labels) -> Evaluation:
    """On images that it was not fitted on: float16 (N, D) and bool (N, C)."""
    probabilities = tagger.probabilities(vectors) if len(vectors) else np.empty(labels.shape)
    said = probabilities >= 0.5
    measures = [
        TagMeasure(
            name,
            int(labels[:, column].sum()),
            average_precision(probabilities[:, column], labels[:, column]),
            _f1(said[:, column], labels[:, column]),
        )
        for column, name in enumerate(tagger.names)
        if labels[:, column].any()
    ]
    count = max(1, len(measures))
    return Evaluation(
        len(vectors),
        sum(measure.average_precision for measure in measures) / count,
        sum(measure.f1 for measure in measures) / count,
        _f1(said, labels),
        measures,
    )


def tagger_bytes(tagger: LinearTagger, evaluation: Evaluation) -> bytes:
    """The file: equal taggers give equal bytes."""
    told: dict[str, Any] = {
        **evaluation._asdict(),
        "tags": [measure._asdict() for measure in evaluation.tags],
    }
    metadata = {
        "format": FORMAT,
        "encoder": tagger.encoder,
        "names": canonical_json(list(tagger.names)).decode(),
        "evaluation": canonical_json(told).decode(),
    }
    return safetensors.numpy.save({"weights": tagger.weights, "bias": tagger.bias}, metadata)


def tagger_from(data: bytes, path: str) -> LinearTagger:
    """Of a file's bytes. Raises BadRequest where they are no tagger."""
    try:
        tensors = safetensors.numpy.load(data)
        size = int.from_bytes(data[:8], "little")
        metadata: Mapping[str, str] = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        names = json.loads(metadata["names"])
        tagger = LinearTagger(tuple(names), tensors["weights"], tensors["bias"], metadata["encoder"])
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise BadRequest(f"--tagger {path}: no tagger that `shardmill fit-tagger` wrote ({error})") from error
    if metadata.get("format") != FORMAT or tagger.weights.shape[0] != len(names) != tagger.bias.shape[0]:
        raise BadRequest(f"--tagger {path}: of another format than '{FORMAT}'")
    return tagger
