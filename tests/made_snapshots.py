"""Small snapshots made with the project's own writers, without a pipeline."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shards.ids import image_id_of, sample_id_of
from shards.packs import PackWriter
from shards.records import FROM_SOURCE, DeadLetter, Decision, Origin, Sample, ShardFile, Turn
from shards.snapshot import KINDS, Destination, Funnel, Manifest, commit
from shards.tables import (
    dead_table,
    decisions_table,
    tombstones_table,
    write_samples,
    write_table,
)

NO_FUNNELS = {"image": Funnel(0, 0, 0, 0, 0), "sample": Funnel(0, 0, 0, 0, 0)}


def a_sample(
    image_ids: Sequence[bytes], turns: Sequence[tuple[str, str]], name: str = "made", **fields: Any
) -> Sample:
    """A sample as a source would give it."""
    conversation = [Turn(*turn) for turn in turns]
    sample_id = sample_id_of(image_ids, conversation)
    made = Sample(
        sample_id,
        list(image_ids),
        conversation,
        [],
        Origin(0, "made", name, 0),
        [sample_id],
        "CC0-1.0",
        "",
        1.0,
        "{}",
        FROM_SOURCE._replace(questions=[], calls=[]),
    )
    return made._replace(**fields)


def write_pack(to: Destination, images: Iterable[bytes], shard: int = 0) -> tuple[ShardFile, ShardFile]:
    """One media pack of encoded images."""
    with PackWriter(to.storage, to.token, "media", "media", shard) as writer:
        for image_id, encoded in sorted({image_id_of(encoded): encoded for encoded in images}.items()):
            writer.write(image_id, encoded)
        return writer.publish()


def commit_made(
    out: Path | str,
    images: Iterable[bytes] = (),
    samples: Sequence[Sample] = (),
    decisions: Sequence[Decision] = (),
    dead: Sequence[DeadLetter] = (),
    tombstones: Sequence[bytes] = (),
    token: str = "token",
    base: str = "",
    shards: int = 1,
    **fields: Any,
) -> Manifest:
    """Write and commit a snapshot: images in one pack, samples dealt over `shards` shards. `fields` of the manifest win."""
    to = Destination(str(out), token)
    images = list(images)
    kinds: dict[str, list[ShardFile]] = {kind: [] for kind in KINDS}

    def add(files: Iterable[ShardFile]) -> None:
        for file in files:
            kinds[file.kind].append(file)

    if images:
        add(write_pack(to, images))
    for shard in range(shards if samples else 0):
        add(write_samples(to.storage, to.token, sorted(samples)[shard::shards], shard))
    for kind, table, rows in (
        ("decisions", decisions_table, decisions),
        ("dead", dead_table, dead),
        ("tombstones", tombstones_table, tombstones),
    ):
        if rows:
            add([write_table(to.storage, to.token, table(rows), kind, f"{to.staging}/{kind}", 0)])
    live = sorted({image_id_of(encoded) for encoded in images} - set(tombstones))
    manifest = Manifest(
        snapshot_id="",
        parent="",
        base="",
        **kinds,
        live_images=len(live),
        live_images_sha256=hashlib.sha256(b"".join(live)).hexdigest(),
        options={"max_shard_size": 1_000_000},
        funnels=NO_FUNNELS,
        codes={},
        synthesised=0,
        versions={},
    )
    return commit(to, base, manifest._replace(**fields))
