"""`shardmill fit-tagger`: from images that bear labels to a tagger for images that bear none. Reads facts, no image."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from beam_pipelines.facts import image_rows
from beam_pipelines.wording import plural
from embeddings.tagger import Evaluation, LinearTagger, TagMeasure, evaluate, fit
from shards.errors import BadRequest
from shards.snapshot import Snapshot
from synthesis.questions import words_of

FOLDERS, CAPTIONS = "folders", "captions"
LEAST_IMAGES = 10
_SHOWN = 12


class Fitted(NamedTuple):
    """A tagger, how it did on `evaluation.num_images` images held out of `num_images`, and how many labels were too rare."""

    tagger: LinearTagger
    evaluation: Evaluation
    num_images: int
    num_rare: int


def read_vocabulary(path: str) -> dict[tuple[str, ...], str]:
    """Words -> tag. A line is a tag, and after commas other words for it. Raises BadRequest."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"--vocabulary {path}: cannot be read ({error})") from error
    known: dict[tuple[str, ...], str] = {}
    for number, line in enumerate(lines, 1):
        names = [name.strip() for name in line.split(",")]
        for name in filter(None, names):
            words = words_of(name)
            if known.setdefault(words, names[0]) != names[0]:
                raise BadRequest(f"--vocabulary {path}: line {number}: '{name}' is '{known[words]}' already")
    if not known:
        raise BadRequest(f"--vocabulary {path}: holds no tag; one a line, other words for it after commas")
    return known


def tags_in(text: str, vocabulary: Mapping[tuple[str, ...], str]) -> set[str]:
    """The tags whose words stand in a text, in order and beside one another."""
    words, longest = words_of(text), max(map(len, vocabulary))
    spans = (words[at : at + size] for at in range(len(words)) for size in range(1, longest + 1))
    return {vocabulary[span] for span in spans if span in vocabulary}


def labels_of(snapshot: Snapshot, by: str, vocabulary: str = "") -> dict[bytes, set[str]]:
    """image_id -> labels, of the kept images that have any. `by` is `folders`, `captions`, or a field of the samples. Raises BadRequest."""
    if (by == CAPTIONS) != bool(vocabulary):
        raise BadRequest("--vocabulary: goes with --labels captions, which needs it: one tag a line")
    labels: dict[bytes, set[str]] = {}
    pairs = _folder_labels(snapshot) if by == FOLDERS else _sample_labels(snapshot, by, vocabulary)
    for image_id, found in pairs:
        labels.setdefault(image_id, set()).update(found)
    return {image_id: found for image_id, found in labels.items() if found}


def _folder_labels(snapshot: Snapshot) -> Iterator[tuple[bytes, set[str]]]:
    for table in snapshot.batches("decisions", ("unit", "fate", "stage", "id", "name")):
        kept = pc.and_(pc.equal(table["unit"], "image"), pc.equal(table["stage"], "settle"))
        table = table.filter(kept)
        for image_id, name in zip(table["id"].to_pylist(), table["name"].to_pylist(), strict=True):
            yield bytes.fromhex(image_id), {PurePosixPath(name).parent.name} - {""}


def _sample_labels(snapshot: Snapshot, by: str, vocabulary: str) -> Iterator[tuple[bytes, set[str]]]:
    known = read_vocabulary(vocabulary) if vocabulary else {}
    for sample in snapshot.samples():
        if len(sample.image_ids) != 1:
            continue
        if known:
            said = " \n".join(turn.value for turn in sample.conversation if turn.speaker == "gpt")
            yield sample.image_ids[0], tags_in(said, known)
        else:
            found = json.loads(sample.extra_json).get(by, [])
            yield sample.image_ids[0], set(_strings(found))


def _strings(found: object) -> Iterable[str]:
    if isinstance(found, str):
        return [found]
    return [tag for tag in found if isinstance(tag, str)] if isinstance(found, list) else []


def fit_tagger(
    snapshot: Snapshot,
    labels: Mapping[bytes, set[str]],
    least_images: int = LEAST_IMAGES,
    held_out: float = 0.2,
    penalty: float = 1.0,
) -> Fitted:
    """Fit on the kept images that bear labels; which are held out, their ids tell. Raises BadRequest where there is too little to learn."""
    counts = Counter(label for found in labels.values() for label in found)
    names = sorted(name for name, count in counts.items() if count >= least_images)
    if len(names) < 1 or len(labels) < 2 * least_images:
        most = ", ".join(f"{name} ({count})" for name, count in counts.most_common(3)) or "none"
        raise BadRequest(
            f"fit-tagger: {plural(len(labels), 'image')} with labels, and no tag on {least_images} of them or more (the most: {most});"
            " --labels folders takes the name of an image's folder, --labels captions the words of a --vocabulary, --labels FIELD a field"
            " of the samples; --least-images lowers the number"
        )
    encoders = sorted({text.partition(" ")[0] for text in snapshot.manifest.versions.get("encoders", ())})
    if len(encoders) != 1:
        raise BadRequest(f"snapshot {snapshot.id[:12]}: embedded by {len(encoders)} encoders; one is needed")
    ordered = sorted(labels)
    rows = image_rows(snapshot, ordered)
    vectors = np.stack([np.frombuffer(rows[image_id].embedding, "<f2") for image_id in ordered])
    wanted = np.array([[name in labels[image_id] for name in names] for image_id in ordered])
    away = np.array([int.from_bytes(image_id[:4], "big") < held_out * 2**32 for image_id in ordered])
    tagger = fit(vectors[~away], wanted[~away], names, encoders[0], penalty)
    evaluation = evaluate(tagger, vectors[away], wanted[away])
    return Fitted(tagger, evaluation, len(ordered), len(counts) - len(names))


def fitted_text(fitted: Fitted) -> str:
    """How well it did, and on which tags best and worst."""
    of = fitted.evaluation
    ranked = sorted(of.tags, key=lambda measure: (-measure.average_precision, measure.name))
    rare = f"; {plural(fitted.num_rare, 'label')} on too few images left out" if fitted.num_rare else ""
    lines = [
        f"{plural(len(fitted.tagger.names), 'tag')} fitted on {fitted.num_images - of.num_images} images{rare}",
        f"on {of.num_images} held out: mAP {of.mean_average_precision:.3f}, macro F1 {of.macro_f1:.3f}, micro F1 {of.micro_f1:.3f}",
    ]
    if len(ranked) <= 2 * _SHOWN:
        return "\n".join([*lines, *map(_measure_line, ranked)])
    best, worst = map(_measure_line, ranked[:_SHOWN]), map(_measure_line, ranked[-_SHOWN:])
    return "\n".join([*lines, *best, "...", *worst])


def _measure_line(measure: TagMeasure) -> str:
    return f"  {measure.name}: AP {measure.average_precision:.3f}, F1 {measure.f1:.3f}, {plural(measure.num_images, 'image')}"


def write_tagger(path: Path, data: bytes) -> None:
    """Raises BadRequest where that cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise BadRequest(f"--output {path}: cannot be written ({error.strerror})") from error
