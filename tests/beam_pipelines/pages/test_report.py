"""The page, on a small snapshot made with the shard writers."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beam_pipelines.codes import meaning_of
from beam_pipelines.explain import explain_text
from beam_pipelines.pages.conversations import MAX_MADE
from beam_pipelines.pages.gallery import MAX_GROUPS
from beam_pipelines.pages.report import write_report
from beam_pipelines.pages.thumbnails import Pictures, Thumbnail
from shards.errors import BadRequest, CorruptShard
from shards.ids import digest, image_id_of
from shards.records import Call, Provenance
from shards.snapshot import Funnel, open_snapshot
from tests.beam_pipelines.small_snapshot import EVIL, EVIL_NAME, image_row, sample_of
from tests.made_snapshots import commit_made


@pytest.fixture(scope="module")
def page(made) -> str:
    return Path(write_report(str(made.out))).read_text()


class Elements(HTMLParser):
    """Every element with its attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.text += " "

    def handle_data(self, data):
        self.text += data


def words_of(page: str) -> str:
    return " ".join(Elements(page).text.split())


def test_funnels_and_fates_are_on_the_page(page):
    words = words_of(page)
    assert "8 images in, 2 kept" in words
    assert "8 image references read kept 2 25.0% duplicate 4 50.0% filtered 0 0.0% dead 2 25.0%" in words
    assert "3 samples read kept 2 66.7% duplicate 0 0.0% filtered 0 0.0% dead 1 33.3%" in words
    assert "1 sample synthesised." in words
    for code in ("near_cosine", "near_phash", "same_bytes", "truncated", "file_missing", "image_truncated"):
        assert code in words and meaning_of(code) in words


def test_the_page_is_inert(page):
    found = Elements(page)
    allowed = {"html", "head", "meta", "title", "style", "body", "header", "main", "footer", "nav", "section"}
    allowed |= {"div", "span", "b", "i", "p", "a", "h1", "h2", "h3", "dl", "dt", "dd", "code", "pre", "img"}
    allowed |= {"table", "tr", "th", "td", "figure", "figcaption", "details", "summary"}
    assert {tag for tag, _ in found.elements} <= allowed
    for tag, attributes in found.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        assert (attributes.get("href") or "#").startswith("#")
        if tag == "i":
            assert re.fullmatch(r"width:[0-9.]+%", attributes["style"] or "")
    policy = [a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_untrusted_text_is_shown_and_does_nothing(page):
    assert "<script" not in page and '<img src="http' not in page and "\x1b" not in page
    words = words_of(page)
    assert f"A cat. {EVIL}" in words, "a caption"
    assert EVIL_NAME in words, "a file name"
    assert f"cut off {EVIL}" in words, "a message"
    assert f"Ask. {EVIL}" in words, "a prompt"
    assert '<img src="http://evil.example/x.png" onerror=alert(1)> {{7*7}} \\x1b[31mred' in words, "an answer"
    assert "49" not in re.findall(r"gpt(\S+)", words)


def test_duplicates_stand_beside_their_keeper(page):
    words = words_of(page)
    assert "3 of 3 near duplicates" in words and "Besides, 1 reference to the bytes of another one." in words
    assert "differ in at most 12 % of their bits" in words
    near = words.index("copies/near.jpg cosine 0.973 ≥ 0.85 near_cosine, verified")
    changed = words.index("copies/changed.jpg cosine 0.860 ≥ 0.85")
    gone = words.index("copies/gone.jpg pHash 3 of 64 bits ≤ 8 near_phash, verified")
    assert words.index("3 near duplicates, 1 of the same bytes") < near < changed < gone


def test_a_loser_that_is_gone_or_changed_has_a_reason_instead_of_a_picture(page):
    words = words_of(page)
    assert "no picture: source_changed: cannot be read again: no such file copies/gone.jpg" in words
    assert (
        "no picture: source_changed: holds other bytes than when it was first read copies/changed.jpg"
        in words
    )
    # The keeper, the loser that is still there, and the images of two conversations.
    assert page.count("<img ") == 4


def test_thumbnails_are_small_jpegs_of_our_own(made):
    thumbnail = Pictures(open_snapshot(str(made.out)), []).stored(made.kept_id.hex())
    kind, _, body = thumbnail.data_uri.partition(",")
    encoded = base64.b64decode(body)
    with Image.open(io.BytesIO(encoded)) as image:
        assert (kind, image.format, image.size) == ("data:image/jpeg;base64", "JPEG", (160, 96))
    assert image_id_of(encoded) != made.kept_id and len(encoded) < 15_000


def test_conversations_name_their_generator_model_and_prompt(page):
    words = words_of(page)
    assert "2 samples as read, 1 sample written by a model that saw tags and caption, not the image." in words
    assert "synthesised, text-only perception/scene by tiny-model captions.jsonl, record 0" in words
    assert "question/v1@aaaaaaaaaaaa" in words
    assert "A synthesised cat." in words and "captions.jsonl, record 1" in words
    assert "tiger & cat 2" in words and "tabby 2" in words, "tags are counted over samples as read"


def test_the_same_snapshot_gives_the_same_page(made, page, tmp_path):
    again = write_report(f"{made.out}@{open_snapshot(str(made.out)).id[:8]}", str(tmp_path / "again.html"))
    assert again == str(tmp_path / "again.html") and Path(again).read_text() == page


def test_without_metrics_the_page_says_what_is_missing(made, tmp_path):
    shutil.copytree(made.out, tmp_path / "out")
    (tmp_path / "out/metrics.json").write_text('{"snapshot_id": "another"}')
    words = words_of(Path(write_report(str(tmp_path / "out"))).read_text())
    assert "metrics.json belongs to another snapshot" in words
    assert words.count("no picture: not at hand: metrics.json does not say where its source lies") == 3
    assert "No message was kept." in words


def test_an_empty_snapshot_says_so_in_words(tmp_path):
    zero = Funnel(0, 0, 0, 0, 0)
    funnels = {"image": zero, "sample": zero}
    commit_made(tmp_path / "out", funnels=funnels, options={})
    words = words_of(Path(write_report(str(tmp_path / "out"))).read_text())
    for said in (
        "None were read.",
        "No near duplicates were found.",
        "No sample carries a tag.",
        "Nothing failed.",
    ):
        assert said in words
    with pytest.raises(BadRequest, match="no image or sample of that name"):
        explain_text(open_snapshot(str(tmp_path / "out")), "cat.jpg")


def test_the_page_stays_bounded(tmp_path, monkeypatch):
    """2,000 groups, long answers, and pictures that compress worst: choices are bounded, and spread by hash."""
    out = tmp_path / "out"
    ids = [digest(["keeper", n]) for n in range(2_000)]
    rows = [
        image_row(
            "duplicate", "near_cosine", b"", f"{n}.jpg", 0.9, 0.85, ids[n // 10], "deduplicate", digest(n)
        )
        for n in range(20_000)
    ]
    rows += [image_row("kept", "kept", b"", f"keeper{n}.jpg", id=keeper) for n, keeper in enumerate(ids)]
    long = [Call("q/v1@a", "p" * 20_000, "<" * 20_000)] * 9
    provenance = Provenance("vlm", "m", (), long)
    samples = [sample_of(ids[n % 50], f"{n} " + "w" * 5_000, n, provenance) for n in range(100)]
    funnels = {"image": Funnel(22_000, 2_000, 20_000, 0, 0), "sample": Funnel(0, 0, 0, 0, 0)}
    codes = {"image/duplicate/deduplicate/near_cosine": 20_000, "image/kept/settle/kept": 2_000}
    commit_made(
        out, samples=samples, decisions=rows, funnels=funnels, codes=codes, synthesised=100, options={}
    )
    (out / "metrics.json").write_text(
        json.dumps(
            {
                "snapshot_id": open_snapshot(str(out)).id,
                "sources": [
                    {"name": "photos", "path": "/", "format": "files", "folder": "/", "image_root": ""}
                ],
            }
        )
    )
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 160, 3), np.uint8)).save(
        sink, "JPEG", quality=80
    )
    thumbnail = Thumbnail(f"data:image/jpeg;base64,{base64.b64encode(sink.getvalue()).decode()}", "")
    monkeypatch.setattr(Pictures, "stored", lambda *_: thumbnail)
    monkeypatch.setattr(Pictures, "read_again", lambda *_: thumbnail)
    page = Path(write_report(str(out))).read_text()
    assert page.count("<img ") == 40 * 6 + 24 and 4_000_000 < len(page) < 10_000_000
    words = words_of(page)
    assert "200 of 20,000 near duplicates" in words
    shown = [int(n) for n in re.findall(r"keeper(\d+)\.jpg kept 10 near duplicates", words)]
    assert len(shown) == MAX_GROUPS and max(shown) > 1_500
    assert words.count("synthesised, vlm") == 2 * MAX_MADE
    assert "and 17,000 characters more" in words and "and 5 more calls" in words


@pytest.mark.parametrize(
    ("output", "message"), [("none/here.html", "there is no folder"), (".", "is a folder; name a file")]
)
def test_an_output_that_cannot_be_written_is_a_bad_request(made, tmp_path, output, message):
    with pytest.raises(BadRequest, match=message):
        write_report(str(made.out), str(tmp_path / output))


def test_a_lost_table_is_named(made, tmp_path):
    shutil.copytree(made.out, tmp_path / "out")
    next((tmp_path / "out").glob("samples/*.parquet")).unlink()
    with pytest.raises(CorruptShard, match="samples-00000.*shardmill verify"):
        write_report(str(tmp_path / "out"))
