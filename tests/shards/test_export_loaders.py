"""Exports are read by the libraries that users load them with, by the very lines that the exports give. Nothing asks the network."""

import gc
import glob
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[variable] = "1"

from shards.export import Exported, export_snapshot  # noqa: E402
from tests.shards.exported import ALL, Made, pasted, picture, pixels_sha256, sample, snapshot_of, turns  # noqa: E402

# What the readers do among themselves: files that webdataset and datasets leave to the collector, old names in rdflib, pandas and TRL.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.reset_index"),
]
Loaded = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made") / "out")


@pytest.fixture(scope="module")
def exports(
    made: Made, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Path, Exported]]]:
    root = tmp_path_factory.mktemp("it's exports")  # a path that a careless line would not survive
    yield {name: (root / name, export_snapshot(made.snapshot, name, root / name)) for name in ALL}
    gc.collect()  # files left open are warned of here, not in another module's tests


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()


def by_id(rows: Any, key: Callable[[Any], str] = lambda row: row["id"]) -> Loaded:
    return {key(row): row for row in rows}


def conversation_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["from"], turn["value"]) for turn in row["conversations"]]


def test_datasets_reads_hf(made: Made, exports: dict[str, tuple[Path, Exported]]) -> None:
    loaded = by_id(pasted(exports["hf"][1]))
    assert len(loaded) == 9
    for s in made.samples:
        row = loaded[s.sample_id.hex()]
        assert [pixels_sha256(image) for image in row["images"]] == made.pixels(row["id"])
        assert conversation_of(row) == [tuple(turn) for turn in s.conversation]
        assert (row["license"], row["tags"]) == (s.license, ["fox", "hen"])


def test_datasets_reads_one_image_a_sample_as_a_column_of_images(tmp_path: Path) -> None:
    pictures = [picture(value) for value in range(3)]
    snapshot = snapshot_of(tmp_path / "out", [sample([p], []) for p in pictures], pictures)
    data = pasted(export_snapshot(snapshot, "hf", tmp_path / "hf"))
    assert sorted(pixels_sha256(image) for image in data["image"]) == sorted(map(pixels_sha256, pictures))


@pytest.mark.parametrize("name", ["hf", "webdataset", "messages"])
def test_a_new_export_of_the_same_name_is_not_taken_for_the_old_one(name: str, tmp_path: Path) -> None:
    """`datasets` finds what it cached by the folder's last name and the card's front matter."""
    import datasets

    shown = []
    for place, text in enumerate(("old", "new")):
        snapshot = snapshot_of(
            tmp_path / f"out{place}", [sample([picture(1)], turns("<image>?", text))], [picture(1)]
        )
        folder = tmp_path / str(place) / "export"
        export_snapshot(snapshot, name, folder)
        (row,) = datasets.load_dataset(str(folder), split="train")
        shown.append(row["json"] if name == "webdataset" else row)
    assert shown[0]["id"] != shown[1]["id"]


def test_datasets_reads_webdataset(made: Made, exports: dict[str, tuple[Path, Exported]]) -> None:
    """By the card, which names every picture's place: samples of one, three and no pictures in one table."""
    import datasets

    data = datasets.load_dataset(str(exports["webdataset"][0]), split="train")
    loaded = by_id(data, lambda row: row["json"]["id"])
    assert len(loaded) == 9
    for s in made.samples:
        row = loaded[s.sample_id.hex()]
        found = {n: v for n, v in row.items() if v is not None and n != "json" and not n.startswith("__")}
        assert [pixels_sha256(found[name]) for name in sorted(found)] == made.pixels(row["json"]["id"])
        assert conversation_of(row["json"]) == [tuple(turn) for turn in s.conversation]
        assert row["json"]["license"] == s.license


@pytest.mark.parametrize("name", ["webdataset", "infinity-mm"])
def test_webdataset_reads_tars(name: str, made: Made, exports: dict[str, tuple[Path, Exported]]) -> None:
    loaded = by_id(pasted(exports[name][1]), lambda row: row["__key__"])
    assert len(loaded) == 9
    for s in made.samples:
        row = loaded[s.sample_id.hex()]
        found = {n: v for n, v in row.items() if n != "json" and not n.startswith("__")}
        assert [pixels_sha256(found[n]) for n in sorted(found)] == made.pixels(row["__key__"])
        assert conversation_of(row["json"]) == [tuple(turn) for turn in s.conversation]


def test_json_reads_llava(made: Made, exports: dict[str, tuple[Path, Exported]]) -> None:
    assert len(pasted(exports["llava"][1])) == 9  # the rest is in the round trip


def test_datasets_reads_messages_in_parts(made: Made, exports: dict[str, tuple[Path, Exported]]) -> None:
    loaded = by_id(pasted(exports["messages"][1]))
    assert len(loaded) == 6
    for s in made.samples:
        if (row := loaded.get(s.sample_id.hex())) is not None:
            assert [pixels_sha256(image) for image in row["images"]] == made.pixels(row["id"])
            parts = [part for message in row["messages"] for part in message["content"]]
            assert sum(part["type"] == "image" for part in parts) == len(row["images"])
            assert "<image>" not in "".join(part["text"] or "" for part in parts)
            assert row["license"] == s.license


def test_datasets_reads_messages_as_json_lines(
    made: Made, exports: dict[str, tuple[Path, Exported]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ms-swift does it: paths relative to the folder that training runs in."""
    import datasets

    folder = exports["messages"][0]
    data = datasets.load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    monkeypatch.chdir(folder)
    for row in data:
        assert [pixels_sha256(Path(name).read_bytes()) for name in row["images"]] == made.pixels(row["id"])
        assert {message["role"] for message in row["messages"]} == {"user", "assistant"}


def _processor() -> Any:
    """A LLaVA processor with a tokenizer of words made here: TRL and transformers do the rest as with any model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}{% if part['type'] == 'image' %}<image> "
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    size = {"height": 28, "width": 28}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template=template,
    )


def test_trl_collates_messages(made: Made, exports: dict[str, tuple[Path, Exported]]) -> None:
    """TRL's own collator turns rows into a batch: one picture and 4 image tokens (28 / 14 squared) for every image."""
    pytest.importorskip("trl")
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    processor = _processor()
    rows = list(pasted(exports["messages"][1]))
    batch = DataCollatorForVisionLanguageModeling(processor)([dict(row) for row in rows])
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    for row, ids in zip(rows, batch["input_ids"], strict=True):
        assert (ids == image_token).sum() == 4 * len(row["images"])
    assert len(batch["pixel_values"]) == sum(len(row["images"]) for row in rows) == 8
    assert sum(not row["images"] for row in rows) == 1


def test_datasets_reads_messages_of_many_rows(tmp_path: Path) -> None:
    """More than one row group, text-only ones first: types come from the schema, not from the first rows."""
    pictures = [picture(value) for value in range(3)]
    many = [sample([], turns(f"q{i}", "a")) for i in range(1_500)]
    many += [sample([p], turns("<image>?", "a")) for p in pictures]
    data = pasted(export_snapshot(snapshot_of(tmp_path / "out", many, pictures), "messages", tmp_path / "m"))
    assert data.num_rows == 1_503
    assert sum(len(row) for row in data["images"]) == 3


@pytest.mark.parametrize("name", ALL)
def test_mlcroissant_validates(
    name: str, exports: dict[str, tuple[Path, Exported]], caplog: pytest.LogCaptureFixture
) -> None:
    import mlcroissant

    with caplog.at_level(logging.WARNING):
        dataset = mlcroissant.Dataset(jsonld=str(exports[name][0] / "croissant.json"))
    issues = dataset.metadata.ctx.issues
    assert not issues.errors
    # The one that stays: nothing here knows a date.
    assert all("datePublished" in warning for warning in issues.warnings)
    assert "context" not in caplog.text
    described = {file.content_url for file in dataset.metadata.file_objects}
    there = {p.name for p in exports[name][0].iterdir() if p.is_file()} - {"README.md", "croissant.json"}
    assert described == there
    for record_set in dataset.metadata.record_sets:
        records = list(dataset.records(record_set.id))
        assert len(records) == exports[name][1].num_records
        assert all(record["samples/tags"] == [b"fox", b"hen"] for record in records)
    assert bool(dataset.metadata.record_sets) == (name in ("hf", "messages"))


@pytest.mark.parametrize("name", ALL)
def test_the_hub_reads_the_card(name: str, exports: dict[str, tuple[Path, Exported]]) -> None:
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(exports[name][0] / "README.md")
    assert card.data.license == "other" and card.data.size_categories == ["n<1K"]
    for config in card.data.to_dict().get("configs", ()):
        for pattern in config["data_files"][0]["path"]:
            assert glob.glob(str(exports[name][0] / pattern))
    text = card.content
    for needed in (
        "Of 9 images read, 8 were kept",
        "Of 5 samples read, 4 were kept; 1 were duplicates",
        "`made`",
        "- `CC0-1.0`: 3 samples",
        "not stated",
        "```python\nimport ",
        "- `mine | 'x'`: 1 sample",
    ):
        assert needed in text
    assert json.loads((exports[name][0] / "croissant.json").read_text())["version"][6:] in text


@pytest.mark.parametrize(
    ("licenses", "identifier"),
    [
        ([], "unknown"),
        ([""], "unknown"),
        (["CC0-1.0"], "cc0-1.0"),
        (["CC0-1.0", ""], "other"),
        (["mine"], "other"),
    ],
)
def test_the_license_of_a_card(licenses: list[str], identifier: str, tmp_path: Path) -> None:
    from huggingface_hub import DatasetCard

    samples = [sample([], turns(f"{i}?", "a"), stated) for i, stated in enumerate(licenses)]
    export_snapshot(snapshot_of(tmp_path / "out", samples, []), "llava", tmp_path / "llava")
    assert DatasetCard.load(tmp_path / "llava" / "README.md").data.license == identifier
