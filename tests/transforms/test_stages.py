"""Each stage's plain functions, one small pipeline a stage, and that every PTransform can be pickled."""

import io
import pickle
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.util import assert_that, equal_to
from PIL import Image

from embeddings.contamination import BenchmarkCounts, ContaminationRule
from embeddings.duplicates import DuplicateRule, Group
from embeddings.encoder import EncoderSpec, load_encoder
from images.fetch import Reach
from images.files import LocalFiles
from images.sources import read_samples
from images.sources.source import Source
from images.web import WebOptions
from shards import records
from shards.errors import BadData, CorruptShard, RunFailed
from shards.ids import image_id_of, sample_id_of
from shards.ledger import Segment
from shards.packs import num_shards_for
from shards.records import (
    EmbeddedImage,
    ImageFacts,
    ImageFate,
    MediaRef,
    NamedImage,
    Origin,
    Provenance,
    Sample,
    ShardFile,
    SourceImage,
    SourceSample,
    Tag,
    Turn,
)
from shards.snapshot import Destination, StoredPack, snapshot_id_of
from synthesis.client import ChatClient
from synthesis.generate import Method
from synthesis.planner import LookupPlanner
from synthesis.prompts import load_prompts
from transforms.calls import Backend
from transforms.commit import Commit, RunFacts, build_manifest
from transforms.decontaminate import Decontaminate
from transforms.deduplicate import CollapseSameBytes, FindNearDuplicates, choose_reference
from transforms.embed import DistinctReferences, EmbedImages, Reading
from transforms.filter import FilterImages, FilterRule
from transforms.judge import JudgeExisting
from transforms.limit import LimitErrors
from transforms.plan import PlanInstructions
from transforms.read import ReadSamples, sampling_key
from transforms.recall import Memory, RecallImages, RecallReferences
from transforms.resolve import (
    JudgeImages,
    NameImages,
    ResolveSamples,
    caption_of,
    collapse,
    resolve_sample,
)
from transforms.route import Search
from transforms.settle import SettleImages, SettleSamples
from transforms.spool import SpoolImages
from transforms.stored import KeepPacks, ReadStored
from transforms.synthesise import Synthesise
from transforms.tag import TagImages, TagRule, best_tags, class_tags
from transforms.write import (
    CountRowShards,
    CountShards,
    WriteMedia,
    WriteRows,
    pack_images,
)


def png(colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", size, colour).save(sink, "PNG")
    return sink.getvalue()


REACH = Reach(WebOptions(max_bytes=1000))


def source_image(name: str, priority: int = 0, uri: str = "", length: int = -1) -> SourceImage:
    return SourceImage(Origin(priority, f"s{priority}", name, 0), MediaRef(uri or name, 0, length))


def sample_of(names: list[str], turns: list[Turn] | None = None, number: int = 0) -> SourceSample:
    return SourceSample(
        Origin(0, "s0", "file", number), [source_image(n) for n in names], turns or [], "", "", 1.0, "{}"
    )


def fate(name: str, **changes: Any) -> ImageFate:
    image_id = image_id_of(name.encode())
    return ImageFate("kept", "kept", image_id, image_id, False, [])._replace(**changes)


# Read.


def test_a_larger_limit_contains_a_smaller_one(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.png").touch()
    source = Source(0, "in", str(tmp_path), "files", str(tmp_path))
    ranked = sorted(read_samples(source, LocalFiles()), key=lambda s: sampling_key(5, s.origin))
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        read = pipeline | beam.Create([source]) | ReadSamples(limit=7, seed=5)
        assert_that(
            read.main | beam.Map(lambda s: s.origin.name), equal_to([s.origin.name for s in ranked[:7]])
        )


# Embed.


def test_references_become_embedded_images_or_dead_letters(tmp_path: Path) -> None:
    good = {f"{n}.png": png((n * 20, 10, 200)) for n in range(11)}
    for name, data in {**good, "bad.png": b"nonsense", "empty.png": b""}.items():
        (tmp_path / name).write_bytes(data)
    names = [*good, *list(good)[:4], "bad.png", "empty.png", "missing.png"]
    images = [source_image(name, uri=str(tmp_path / name)) for name in names]
    encoder = load_encoder(EncoderSpec(batch_size=8))
    expected = sorted((name, image_id_of(data), len(data)) for name, data in good.items())

    fingerprint = encoder.fingerprint
    to = Destination(str(tmp_path / "out"), "token")

    def facts(image: EmbeddedImage) -> tuple[str, bytes, int]:
        assert len(image.embedding) == 2 * 1280 and len(image.scores) == 2000
        assert image.encoder == fingerprint
        assert image.source_image.ref.length == -1, "a reference stays what its source says"
        return image.source_image.origin.name, image.image_id, image.facts.num_bytes

    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        embedded = (
            pipeline
            | beam.Create(images)
            | DistinctReferences()
            | EmbedImages(EncoderSpec(batch_size=8), fingerprint, Reading(REACH, encoder.geometry, 16), to)
        )
        assert_that(embedded.main | beam.Map(facts), equal_to(expected), "main")
        codes = [("bad.png", "unknown_format"), ("empty.png", "empty_file"), ("missing.png", "file_missing")]
        assert_that(embedded.dead | "d" >> beam.Map(lambda d: (d.name, d.code)), equal_to(codes), "dead")
        fates = [(*pair, "image", "dead") for pair in codes]
        rows = embedded.decisions | "r" >> beam.Map(lambda d: (d.name, d.code, d.unit, d.fate))
        assert_that(rows, equal_to(fates), "fates")


# Deduplicate.


def embedded(name: str, content: str, priority: int = 0, vector: int = 0, width: int = 8) -> EmbeddedImage:
    axis = np.zeros(4, "<f2")
    axis[vector] = 1
    facts = ImageFacts(
        width,
        8,
        9,
        "PNG",
        content.encode(),
        (vector * 0xFFFF).to_bytes(8, "little"),
        bytes(128),
        7000,
        900_000,
        1000,
    )
    return EmbeddedImage(
        image_id_of(content.encode()), source_image(name, priority), facts, axis.tobytes(), b"", "e", "n"
    )


def test_one_reference_stands_for_equal_bytes() -> None:
    references = [embedded("b", "x", 1), embedded("z", "x", 0), embedded("c", "x", 0)]
    first, others = choose_reference(references)
    assert first.source_image.origin.name == "c"
    assert [origin.name for origin in others] == ["z", "b"]
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        images, decisions = pipeline | beam.Create([*references, embedded("o", "y")]) | CollapseSameBytes()
        assert_that(images | beam.Map(lambda i: i.source_image.origin.name), equal_to(["c", "o"]), "images")
        rows = decisions | "rows" >> beam.Map(lambda d: (d.name, d.fate, d.code, d.other_id))
        same = image_id_of(b"x")
        expected = [(name, "duplicate", "same_bytes", same) for name in ("z", "b")]
        assert_that(rows, equal_to(expected), "decisions")


def test_near_duplicates_meet_in_a_pipeline(tmp_path: Path) -> None:
    images = [embedded("a", "a", width=9), embedded("b", "b"), embedded("c", "c", vector=1)]
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        given = {"images": pipeline | beam.Create(images), "fixed": pipeline | "none" >> beam.Create([])}
        verdicts, _ = given | FindNearDuplicates(
            Search([Group(DuplicateRule().thresholds)], Destination(str(tmp_path), "t"))
        )
        a, c = image_id_of(b"a"), image_id_of(b"c")
        pairs = verdicts | beam.Map(lambda v: (v.image_id, v.keeper_id))
        assert_that(pairs, equal_to([(a, a), (image_id_of(b"b"), a), (c, c)]))


# Tag.


def test_tags_are_the_best_classes() -> None:
    scores = np.array([0.3, 0.05, 0.3, 0.2, 0.1], "<f2").tobytes()
    names = ["pear", "low", "apple", "crane", "crane"]
    found = class_tags(scores, names, 0.09)
    assert best_tags(found, 0.09, 9) == [Tag("apple", 300), Tag("pear", 300), Tag("crane", 200)]
    assert best_tags(found, 0.09, 1) == [Tag("apple", 300)]
    assert best_tags(class_tags(b"", [], 0.1), 0.1, 5) == []


# Resolve.


def test_samples_live_and_die_with_their_images() -> None:
    turns = [Turn("human", "q"), Turn("gpt", "a")]
    sample = sample_of(["a", "b"], turns)
    a, b = image_id_of(b"a"), image_id_of(b"b")
    kept = resolve_sample(
        sample, [fate("a", tags=[Tag("t", 5)]), fate("b", tags=[Tag("t", 9)])], "merge", "drop"
    )
    assert (kept.sample_id, list(kept.image_ids)) == (sample_id_of([a, b], turns), [a, b])
    assert kept.tags == [Tag("t", 9)]

    dead = fate("b", fate="dead", code="truncated", keeper_id=b"")
    row = resolve_sample(sample, [fate("a"), dead], "merge", "drop")
    assert (row.unit, row.fate, row.code, row.id) == ("sample", "dead", "image_truncated", kept.sample_id)
    unread = resolve_sample(sample, [fate("a"), dead._replace(image_id=b"")], "merge", "drop")
    assert unread.id == b""
    with pytest.raises(RunFailed, match="truncated"):
        resolve_sample(sample, [fate("a"), dead], "merge", "fail")

    filtered = fate("b", fate="filtered", code="blurred", keeper_id=b"")
    for rule in ("drop", "fail"):
        row = resolve_sample(sample, [fate("a"), filtered], "merge", rule)
        assert (row.fate, row.code, row.id, row.other_id) == ("filtered", "image_blurred", kept.sample_id, b)
    both = resolve_sample(sample, [filtered, dead], "merge", "drop")
    assert both.code == "image_truncated", "a failure is said before a choice"

    lost = fate("b", fate="duplicate", keeper_id=a)
    for rule, same_pixels in (("merge", False), ("drop", True)):
        row = resolve_sample(sample, [fate("a"), lost._replace(same_pixels=same_pixels)], rule, "drop")
        assert (row.fate, row.code, row.other_id) == ("duplicate", "image_duplicate", a)
    merged = resolve_sample(sample, [fate("a"), lost._replace(same_pixels=True)], "merge", "drop")
    assert list(merged.image_ids) == [a, a]
    assert list(merged.from_ids) == [kept.sample_id]
    assert merged.sample_id != kept.sample_id


def test_keepers_take_the_places_of_their_duplicates() -> None:
    fates = {
        "a": fate("a"),
        "b": fate("b"),
        **{
            f"lost {name}": fate(
                f"lost {name}", fate="duplicate", keeper_id=image_id_of(name.encode()), same_pixels=True
            )
            for name in "ab"
        },
    }
    for names in (
        ["lost a", "b"],
        ["b", "lost a"],
        ["lost b", "a", "lost a"],
        ["a", "lost b", "b", "lost b"],
    ):
        merged = resolve_sample(sample_of(names), [fates[name] for name in names], "merge", "drop")
        assert list(merged.image_ids) == [image_id_of(name[-1:].encode()) for name in names]


def test_equal_samples_collapse_to_the_first_by_origin() -> None:
    one, two, three = (
        resolve_sample(sample_of(["a"], number=n), [fate("a")], "merge", "drop")._replace(
            from_ids=[bytes([9 - n])]
        )
        for n in range(3)
    )
    one, three = one._replace(license="CC0-1.0"), three._replace(license="all rights reserved")
    (kept,), rows = collapse([three, one, two])
    assert kept.license == "CC0-1.0; all rights reserved"
    assert kept.origin.offset == 0
    assert kept.from_ids == [b"\x07", b"\x08", b"\x09"]
    assert [(r.offset, r.code, r.other_id) for r in rows] == [
        (n, "same_sample", kept.sample_id) for n in (1, 2)
    ]


def asking(question: str, number: int, names: list[str], moved_from: str = "", answer: str = "yes") -> Sample:
    """A resolved sample; of `moved_from`'s images, if given, each became the keeper of its place."""
    turns = [Turn("human", question), Turn("gpt", answer)]
    fates = [
        fate(name, fate="duplicate", image_id=image_id_of(old.encode()), same_pixels=True)
        if old != name
        else fate(name)
        for name, old in zip(names, moved_from or names, strict=True)
    ]
    sample = resolve_sample(sample_of(list(moved_from or names), turns, number), fates, "merge", "drop")
    assert isinstance(sample, Sample)
    return sample._replace(license=f"license {number}")


def collapsed(samples: list[Sample]) -> tuple[dict[int, list[bytes]], list[tuple[int, str, bytes]]]:
    """What stands: its number and from_ids; what does not: number, code, the id it gave way to. The same in any order."""
    found = []
    for number in range(3):
        standing, rows = collapse(samples[number:] + samples[:number])
        assert sorted([s.origin.offset for s in standing] + [r.offset for r in rows]) == sorted(
            sample.origin.offset for sample in samples
        ), "each has one fate"
        by_offset = {sample.origin.offset: sample for sample in samples}
        assert all(row.id == by_offset[row.offset].from_ids[0] and row.fate == "duplicate" for row in rows)
        found.append(
            (
                {sample.origin.offset: list(sample.from_ids) for sample in standing},
                sorted((row.offset, row.code, row.other_id) for row in rows),
            )
        )
    assert found[0] == found[1] == found[2]
    return found[0]


def test_a_moved_sample_gives_way_to_one_that_asks_the_same() -> None:
    own = asking("What is in the image?", 5, ["a"])
    moved = [
        asking("<image>\nwhat's in the image", 1, ["a"], "b", "no"),
        asking("Where is it?", 2, ["a"], "b"),
        asking("where is it", 3, ["a"], "c", "there"),
        asking("Who is it?", 4, ["a"], "b"),
    ]
    standing, rows = collapsed([own, *moved])
    assert rows == [(1, "near_question", own.sample_id), (3, "near_question", moved[1].sample_id)]
    assert standing == {
        5: sorted(own.from_ids + moved[0].from_ids),
        2: sorted(moved[1].from_ids + moved[2].from_ids),
        4: moved[3].from_ids,
    }
    (kept,), _ = collapse([own, moved[0]])
    assert (kept.conversation, kept.license) == (own.conversation, "license 1; license 5")


def test_samples_that_were_not_moved_never_give_way_to_a_question() -> None:
    own = [
        asking("What is it?", 2, ["a"]),
        asking("what's it", 3, ["a"]),
        asking("What is it?", 4, ["a"], answer="no"),
    ]
    standing, rows = collapsed([*own, asking("WHAT IS IT", 1, ["a"], "b")])
    assert sorted(standing) == [2, 3, 4] and rows == [(1, "near_question", own[0].sample_id)]
    # The same sample of the keeper and of its duplicate is the keeper's own.
    both = [
        asking("What is it", 0, ["a"], "b"),
        asking("What is it", 1, ["a"]),
        asking("What is it?", 2, ["a"]),
    ]
    standing, rows = collapsed(both)
    assert sorted(standing) == [0, 2] and rows == [(1, "same_sample", both[0].sample_id)]


def test_what_equals_a_sample_that_gives_way_gives_way_to_the_same() -> None:
    own = asking("What is it?", 9, ["a"])
    moved = [asking("what is it", number, ["a"], old) for number, old in ((1, "b"), (2, "c"))]
    standing, rows = collapsed([own, *moved])
    assert rows == [(number, "near_question", own.sample_id) for number in (1, 2)]
    assert standing == {9: sorted({*own.from_ids, *moved[0].from_ids, *moved[1].from_ids})}


def test_what_asks_nothing_or_is_about_nothing_gives_way_to_no_question() -> None:
    captions = [asking("<image>", number, ["a"], "b", f"caption {number}") for number in (1, 2)]
    assert collapsed([asking("<image>", 0, ["a"]), *captions])[1] == []
    texts = [
        sample._replace(image_ids=[]) for sample in (asking("q", 1, ["a"], "b"), asking("Q?", 2, ["a"], "b"))
    ]
    assert collapsed(texts)[1] == []


@pytest.mark.parametrize("on_duplicate", ["merge", "drop"])
def test_questions_meet_in_a_pipeline_where_samples_move(on_duplicate: str) -> None:
    from transforms.resolve import _place_of

    def talk(question: str) -> list[Turn]:
        return [Turn("human", question), Turn("gpt", "a cat")]

    asked = [
        (["a", "c"], "What is it?"),
        (["a", "c"], "what's it"),  # the user's own, of these very images
        (["b", "c"], "<image> what is it"),
        (["c", "b"], "what is it"),  # in another order the images are others
        (["b", "c"], "How old is it?"),
        ([], "What is it?"),
        ([], "what is it"),
    ]
    samples = [sample_of(names, talk(question), number) for number, (names, question) in enumerate(asked)]
    a = image_id_of(b"a")
    fates = {
        "a": fate("a"),
        "b": fate("b", fate="duplicate", code="near_phash", keeper_id=a, same_pixels=True),
        "c": fate("c"),
    }
    keyed = [(_place_of(source_image(name).origin), one) for name, one in fates.items()]
    standing_id = sample_id_of([a, image_id_of(b"c")], talk("What is it?"))
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        resolved, rows = {
            "samples": pipeline | "s" >> beam.Create(samples),
            "fates": pipeline | "f" >> beam.Create(keyed),
        } | ResolveSamples(on_duplicate)
        expected = {
            "merge": ([0, 1, 3, 4, 5, 6], [(2, "near_question", standing_id)]),
            "drop": ([0, 1, 5, 6], [(n, "image_duplicate", a) for n in (2, 3, 4)]),
        }[on_duplicate]
        assert_that(resolved | beam.Map(lambda s: s.origin.offset), equal_to(expected[0]), "samples")
        told = rows | "c" >> beam.Map(lambda d: (d.offset, d.code, d.other_id))
        assert_that(told, equal_to(expected[1]), "rows")


def test_resolving_in_a_pipeline_with_text_only_and_repeated_images() -> None:
    from transforms.resolve import _place_of

    samples = [
        sample_of(["a", "b", "a"], [Turn("human", "x")], 0),
        sample_of([], [Turn("human", "text")], 1),
        sample_of(["dead"], [], 2),
    ]
    fates = {
        "a": fate("a"),
        "b": fate("b"),
        "dead": fate("dead", fate="dead", code="empty_file", keeper_id=b""),
    }
    keyed = [(_place_of(source_image(name).origin), one) for name, one in fates.items()]
    a, b = image_id_of(b"a"), image_id_of(b"b")
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        resolved, rows = {
            "samples": pipeline | "s" >> beam.Create(samples),
            "fates": pipeline | "f" >> beam.Create(keyed),
        } | ResolveSamples()
        assert_that(resolved | beam.Map(lambda s: list(s.image_ids)), equal_to([[a, b, a], []]), "samples")
        assert_that(
            rows | "c" >> beam.Map(lambda d: (d.offset, d.code)), equal_to([(2, "image_empty_file")]), "rows"
        )


def test_caption_is_the_first_answer_about_an_only_image() -> None:
    turns = [Turn("human", "q"), Turn("gpt", "one"), Turn("gpt", "two")]
    one, two = (
        resolve_sample(sample_of(n, turns), [fate(x) for x in n], "merge", "drop")
        for n in (["a"], ["a", "b"])
    )
    assert caption_of(one) == "one"
    assert caption_of(two) == ""


# Write and settle.


def test_number_of_shards() -> None:
    assert [num_shards_for(n, 100) for n in (0, 1, 100, 101, 200, 201, 400, 401)] == [1, 1, 1, 2, 2, 4, 4, 8]


@pytest.mark.parametrize(
    ("image_bytes", "words", "shards"),
    [([], [], 1), ([70, 70, 70, 70], ["a"], 4), ([70], ["a" * 150] * 3, 8), ([], ["a" * 150] * 3, 8)],
)
def test_samples_lie_in_as_many_shards_as_images_or_texts_need(
    image_bytes: list[int], words: list[str], shards: int
) -> None:
    images = [
        NamedImage(bytes([number]) * 32, source_image("x"), size, [], "")
        for number, size in enumerate(image_bytes)
    ]
    samples = [resolve_sample(sample_of([], [Turn("gpt", word)]), [], "drop", "drop") for word in words]
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        inputs = {
            "images": pipeline | "Images" >> beam.Create(images),
            "samples": pipeline | "Samples" >> beam.Create(samples),
        }
        assert_that(inputs | CountRowShards(100), equal_to([shards]))


def named(folder: Path, data: bytes, name: str) -> NamedImage:
    (folder / name).write_bytes(data)
    return NamedImage(image_id_of(data), source_image(name, uri=str(folder / name)), len(data), [], "")


def test_packs_are_bounded_and_changed_sources_are_void(tmp_path: Path) -> None:
    images = [named(tmp_path, bytes([n]) * 100, str(n)) for n in range(10)]
    (tmp_path / "3").write_bytes(b"changed")
    (tmp_path / "7").unlink()
    to = Destination(str(tmp_path / "out"), "token")
    results = list(pack_images(0, images[::-1], to, REACH, 250))
    assert sorted(r.name for r in results if not hasattr(r, "kind")) == ["3", "7"]
    packs = [r for r in results if getattr(r, "kind", "") == "media"]
    assert sum(p.num_records for p in packs) == 8
    assert all(p.num_bytes <= 250 + 2 * 16 for p in packs) and len(packs) >= 4
    assert results == list(pack_images(0, images, to, REACH, 250))


def test_samples_of_void_images_die() -> None:
    good, gone = (
        resolve_sample(sample_of([n], number=i), [fate(n)], "merge", "drop") for i, n in enumerate("ab")
    )
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        void = pipeline | "v" >> beam.Create([image_id_of(b"b")])
        settled = {"samples": pipeline | beam.Create([good, gone]), "void": void} | SettleSamples()
        assert_that(settled.main | beam.Map(lambda s: s.sample_id), equal_to([good.sample_id]), "main")
        fates = settled.decisions | "f" >> beam.Map(lambda d: (d.offset, d.fate, d.code))
        assert_that(fates, equal_to([(0, "kept", "kept"), (1, "dead", "image_source_changed")]), "fates")


def test_a_written_conversation_has_its_row_by_its_image() -> None:
    good, gone = (
        resolve_sample(sample_of([n], number=i), [fate(n)], "merge", "drop")._replace(
            provenance=Provenance("vlm", "m", [], [])
        )
        for i, n in enumerate("ab")
    )
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        void = pipeline | "v" >> beam.Create([image_id_of(b"b")])
        settled = {"samples": pipeline | beam.Create([good, gone]), "void": void} | SettleSamples()
        rows = settled.decisions | "f" >> beam.Map(lambda d: (d.unit, d.fate, d.code, d.id, d.other_id))
        one, other = image_id_of(b"a"), image_id_of(b"b")
        kept = ("conversation", "kept", "kept", one, good.sample_id)
        assert_that(
            rows, equal_to([kept, ("conversation", "dead", "image_source_changed", other, other)]), "rows"
        )
        dead = settled.dead | "d" >> beam.Map(lambda letter: letter.code)
        assert_that(dead, equal_to(["image_source_changed"]), "dead")


def test_a_snapshot_is_another_one_where_other_images_were_protected() -> None:
    def snapshot_id(*benchmarks: BenchmarkCounts) -> str:
        manifest = build_manifest([], {}, {"image": 0, "sample": 0}, [], 0, [], {"seed": 0}, benchmarks)
        assert set(manifest.decontaminated) == {one.benchmark for one in benchmarks}
        return snapshot_id_of(manifest)

    mmmu, docvqa = BenchmarkCounts("mmmu", 5, "a" * 64, 0, 0), BenchmarkCounts("docvqa", 5, "b" * 64, 0, 0)
    sets = [(), (mmmu,), (docvqa,), (mmmu, docvqa), (mmmu._replace(ids_sha256="c" * 64),)]
    assert len({snapshot_id(*benchmarks) for benchmarks in sets}) == len(sets)
    assert snapshot_id(mmmu, docvqa) == snapshot_id(docvqa, mmmu)


def test_transforms_survive_pickling() -> None:
    geometry = load_encoder(EncoderSpec(batch_size=8)).geometry
    to = Destination("out", "token")
    memory = Memory([], [Segment("out", "s")], "d", "e", "n", True)
    pack = StoredPack(ShardFile("media", "p", "", 1, 1), ShardFile("media_index", "p.index", "", 1, 1))
    backend = Backend(ChatClient("http://127.0.0.1:9", "m"), 1000, REACH, 2, to)
    method = Method(load_prompts())
    for transform in (
        ReadSamples(5, 1),
        DistinctReferences(),
        RecallReferences(memory, REACH),
        SpoolImages(to, REACH),
        RecallImages(memory, REACH, to),
        LimitErrors({"any": 0.5}),
        EmbedImages(EncoderSpec(), "e", Reading(REACH, geometry, 8), to),
        ReadStored("out", [pack]),
        KeepPacks([pack]),
        FilterImages(FilterRule(min_side=9, expressions=("side > 3",))),
        Decontaminate(["mmmu"], ContaminationRule(verified_only=True)),
        CollapseSameBytes(),
        FindNearDuplicates(Search([Group(DuplicateRule().thresholds)], to)),
        TagImages(TagRule(("a",), 0.1, 5)),
        JudgeImages(),
        ResolveSamples(),
        NameImages(),
        CountShards(100),
        CountRowShards(100),
        WriteMedia(to, REACH, 100),
        WriteRows("dead", to),
        SettleSamples(),
        SettleImages(),
        Commit(to, RunFacts("", {}, {})),
        Synthesise(backend, method),
        JudgeExisting(backend, method),
    ):
        again = pickle.loads(pickle.dumps(transform))
        assert type(again) is type(transform) and again.__dict__ == transform.__dict__
    planner = pickle.loads(pickle.dumps(PlanInstructions(LookupPlanner()))).planner
    assert planner.plan(b"i", [Tag("espresso", 900)]) == LookupPlanner().plan(b"i", [Tag("espresso", 900)])


def test_errors_survive_pickling() -> None:
    for error in (BadData("code", "message", b"id"), CorruptShard("path", "what", 3), RunFailed("why")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error) and again.__dict__ == error.__dict__


def test_every_record_of_the_contract_has_a_deterministic_coder() -> None:
    nested = {"Origin", "MediaRef", "Turn", "ImageFacts", "Tag", "Call", "Question", "Provenance", "Geometry"}
    flowing = {
        record
        for name, record in vars(records).items()
        if isinstance(record, type)
        and issubclass(record, tuple)
        and hasattr(record, "_fields")
        and name not in nested
    }
    assert len(flowing) >= 12
    for record in flowing:
        coder = beam.coders.registry.get_coder(record)
        assert isinstance(coder, beam.coders.RowCoder), record
        # Rows of decisions are never keys; their optional floats have no deterministic coder.
        assert coder.is_deterministic() or record is records.Decision, record
