"""A small snapshot made with the shard writers: every fate, an evil name, evil text, a synthesised sample."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from shards.ids import digest, image_id_of, sample_id_of
from shards.records import (
    FROM_SOURCE,
    Call,
    DeadLetter,
    Decision,
    Origin,
    Provenance,
    Question,
    Sample,
    Tag,
    Turn,
)
from shards.snapshot import Funnel
from tests.made_snapshots import commit_made

EVIL = "<script>alert(1)</script>"
EVIL_NAME = f"a/{EVIL.replace('/', '')}.jpg"
RAW = 'Sure! <img src="http://evil.example/x.png" onerror=alert(1)> {{7*7}} \x1b[31mred'


def jpeg(seed: int, size: tuple[int, int] = (200, 120)) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size)
    sink = io.BytesIO()
    image.save(sink, "JPEG")
    return sink.getvalue()


def image_row(fate, code, encoded, name, score=None, threshold=None, other=b"", stage="settle", id=None):
    item_id = image_id_of(encoded) if id is None else id
    return Decision("image", fate, item_id, stage, code, "photos", name, 0, score, threshold, other)


def conversation(text: str) -> list[Turn]:
    return [Turn("human", "<image>\nWhat is it?"), Turn("gpt", text)]


def sample_of(image_id: bytes, text: str, offset: int, provenance: Provenance = FROM_SOURCE) -> Sample:
    turns = conversation(text)
    origin = Origin(0, "photos", "captions.jsonl", offset)
    sample_id = sample_id_of([image_id], turns)
    tags = [Tag("tabby", 700), Tag("tiger & cat", 200)]
    from_ids = [sample_id] if provenance is FROM_SOURCE else []
    return Sample(sample_id, [image_id], turns, tags, origin, from_ids, "", "", 1.0, "{}", provenance)


class SmallSnapshot:
    """A committed snapshot of: a kept and an evilly named kept image, four duplicates, two dead, one synthesised sample."""

    def __init__(self, folder: Path) -> None:
        self.source, self.out = folder / "photos", folder / "out"
        self.kept, self.evil = jpeg(1), jpeg(2)
        self.losers = {
            f"copies/{name}.jpg": jpeg(seed) for seed, name in ((3, "near"), (4, "gone"), (5, "changed"))
        }
        for name, encoded in {"cat.jpg": self.kept, EVIL_NAME: self.evil, **self.losers}.items():
            path = self.source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded)
        (self.source / "copies/gone.jpg").unlink()
        (self.source / "copies/changed.jpg").write_bytes(jpeg(99))
        self.kept_id, self.evil_id = image_id_of(self.kept), image_id_of(self.evil)
        calls = [Call(f"question/v1@{'a' * 64}", f"Ask. {EVIL}", RAW), Call("answer/v1@b", "Tell.", "A cat.")]
        made = Provenance("text-only", "tiny-model", [Question("perception/scene", ("fox",), "kept")], calls)
        self.samples = [
            sample_of(self.kept_id, f"A cat. {EVIL}", 0),
            sample_of(self.evil_id, "{{7*7}}", 1),
            sample_of(self.kept_id, "A synthesised cat.", 0, made),
        ]
        self.synthesised = self.samples[2]
        self._commit()

    def decisions(self) -> list[Decision]:
        near, gone, changed = self.losers.items()
        to = self.kept_id
        images = [
            image_row("kept", "kept", self.kept, "cat.jpg"),
            image_row("kept", "kept", self.evil, EVIL_NAME),
            image_row("duplicate", "near_cosine", near[1], near[0], 0.9731, 0.85, to, "deduplicate"),
            image_row("duplicate", "near_phash", gone[1], gone[0], 3.0, 8.0, to, "deduplicate"),
            image_row("duplicate", "near_cosine", changed[1], changed[0], 0.86, 0.85, to, "deduplicate"),
            image_row("duplicate", "same_bytes", self.kept, "again/cat.jpg", other=to, stage="deduplicate"),
            image_row("dead", "truncated", b"x", "broken.jpg", stage="decode"),
            image_row("dead", "file_missing", b"", "lost.jpg", stage="decode", id=b""),
        ]
        samples = [
            Decision("sample", "kept", s.sample_id, "settle", "kept", *s.origin[1:]) for s in self.samples[:2]
        ]
        dead = Decision(
            "sample", "dead", digest(2), "resolve", "image_truncated", "photos", "captions.jsonl", 2
        )
        return [*images, *samples, dead]

    def _commit(self) -> None:
        rows = self.decisions()
        letters = [
            DeadLetter(image_id_of(b"x"), "decode", "truncated", "photos", "broken.jpg", 0, ""),
            DeadLetter(self.evil_id, "synthesise", "vlm_bad_question", "photos", EVIL_NAME, 0, ""),
        ]
        codes: dict[str, int] = {}
        for row in rows:
            key = f"{row.unit}/{row.fate}/{row.stage}/{row.code}"
            codes[key] = codes.get(key, 0) + 1
        placed = commit_made(
            self.out,
            (self.kept, self.evil),
            self.samples,
            rows,
            letters,
            options={"dedup_mode": "copies", "structure": 0.12, "limit": None, "max_image_bytes": 1 << 26},
            funnels={"image": Funnel(8, 2, 4, 0, 2), "sample": Funnel(3, 2, 0, 0, 1)},
            codes=codes,
            synthesised=1,
            versions={"shardmill": "0.1.0", "encoders": ["abc"]},
        )
        metrics = {
            "snapshot_id": placed.snapshot_id,
            "sources": [
                {
                    "name": "photos",
                    "path": str(self.source),
                    "format": "files",
                    "folder": str(self.source),
                    "image_root": "",
                    "priority": 0,
                }
            ],
            "failures": {
                "decode/truncated": [{"source": "photos", "name": EVIL_NAME, "message": f"cut off {EVIL}"}],
                "synthesise/vlm_bad_question": [
                    {
                        "source": "photos",
                        "name": EVIL_NAME,
                        "offset": 0,
                        "message": "no question",
                        "attempts": 2,
                        "uri": "file:///photos/evil.jpg",
                    }
                ],
            },
        }
        (self.out / "metrics.json").write_text(json.dumps(metrics))
