"""The report, `explain` and the lines after a run, on a small snapshot made with the shard writers."""

import ast
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

from beam_pipelines import report
from beam_pipelines.codes import CODES, FATE_MEANINGS, decided_text, meaning_of, verified_text
from beam_pipelines.report import explain_text, funnel_text, visible, write_report
from shards.errors import BadRequest, CorruptShard
from shards.ids import digest, image_id_of, sample_id_of
from shards.media import MediaWriter
from shards.records import (
    FATES,
    FROM_SOURCE,
    Call,
    DeadLetter,
    Decision,
    Origin,
    Provenance,
    Sample,
    Tag,
    Turn,
)
from shards.snapshot import Destination, Funnel, Manifest, commit, open_snapshot
from shards.tables import dead_table, decisions_table, samples_table, write_table

ROOT = Path(__file__).resolve().parents[2]
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
    return Sample(sample_id, [image_id], turns, tags, origin, from_ids, "", "{}", provenance)


class Made:
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
        made = Provenance("text-only", "tiny-model", "perception/scene", ("fox",), calls)
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
        to = Destination(str(self.out), "token")
        media = []
        with MediaWriter(self.out, 0, to.staging) as writer:
            for encoded in sorted((self.kept, self.evil), key=image_id_of):
                writer.write(image_id_of(encoded), encoded)
            media = list(writer.publish())
        rows = self.decisions()
        letters = [
            DeadLetter(image_id_of(b"x"), "decode", "truncated", "photos", "broken.jpg", 0, ""),
            DeadLetter(self.evil_id, "synthesise", "vlm_bad_question", "photos", EVIL_NAME, 0, ""),
        ]
        codes: dict[str, int] = {}
        for row in rows:
            key = f"{row.unit}/{row.fate}/{row.stage}/{row.code}"
            codes[key] = codes.get(key, 0) + 1
        samples = sorted(self.samples)
        staged = (("decisions", decisions_table(rows)), ("dead", dead_table(letters)))
        files = {k: write_table(t, k, to.staging, k, 0, to.staging) for k, t in staged}
        manifest = Manifest(
            snapshot_id="",
            parent="",
            samples=[write_table(samples_table(samples), "samples", self.out, "samples", 0, to.staging)],
            decisions=[files["decisions"]],
            dead=[files["dead"]],
            media=media[:1],
            media_index=media[1:],
            live_images=2,
            live_images_sha256="0" * 64,
            tombstones=[],
            options={"dedup_mode": "copies", "structure": 0.12, "limit": None, "max_image_bytes": 1 << 26},
            funnels={"image": Funnel(8, 2, 4, 0, 2), "sample": Funnel(3, 2, 0, 0, 1)},
            codes=codes,
            synthesised=1,
            versions={"shardmill": "0.1.0", "encoders": ["abc"]},
        )
        placed = commit(to, "", manifest)
        metrics = {
            "snapshot_id": placed.snapshot_id,
            "sources": [
                {
                    "name": "photos",
                    "path": str(self.source),
                    "format": "files",
                    "root": str(self.source),
                    "priority": 0,
                }
            ],
            "failures": {
                "decode/truncated": [{"source": "photos", "name": EVIL_NAME, "message": f"cut off {EVIL}"}]
            },
        }
        (self.out / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return Made(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(made) -> str:
    return write_report(str(made.out)).read_text()


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


def test_control_and_direction_marks_are_spelt_out():
    assert visible("a\x1b[2Jb\u202ec\x00\n\td") == "a\\x1b[2Jb\\u202ec\\x00\n\td"
    assert visible("x" * 50, 10) == "x" * 10 + " ... and 40 characters more"


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
    thumbnail = report.Pictures(open_snapshot(str(made.out)), {}).stored(made.kept_id.hex())
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
    assert again == tmp_path / "again.html" and again.read_text() == page


def test_without_metrics_the_page_says_what_is_missing(made, tmp_path):
    shutil.copytree(made.out, tmp_path / "out")
    (tmp_path / "out/metrics.json").write_text('{"snapshot_id": "another"}')
    words = words_of(write_report(str(tmp_path / "out")).read_text())
    assert "metrics.json belongs to another snapshot" in words
    assert words.count("no picture: metrics.json does not say where this source lies") == 3
    assert "No message was kept." in words


def test_an_empty_snapshot_says_so_in_words(tmp_path):
    zero = Funnel(0, 0, 0, 0, 0)
    funnels = {"image": zero, "sample": zero}
    empty = Manifest("", "", [], [], [], [], [], 0, "0" * 64, [], {}, funnels, {}, 0, {})
    (tmp_path / "out").mkdir()
    commit(Destination(str(tmp_path / "out"), "token"), "", empty)
    words = words_of(write_report(str(tmp_path / "out")).read_text())
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
    to = Destination(str(out), "token")
    ids = [digest(["keeper", n]) for n in range(2_000)]
    rows = [
        image_row(
            "duplicate", "near_cosine", b"", f"{n}.jpg", 0.9, 0.85, ids[n // 10], "deduplicate", digest(n)
        )
        for n in range(20_000)
    ]
    rows += [image_row("kept", "kept", b"", f"keeper{n}.jpg", id=keeper) for n, keeper in enumerate(ids)]
    long = [Call("q/v1@a", "p" * 20_000, "<" * 20_000)] * 9
    provenance = Provenance("vlm", "m", "t", (), long)
    samples = [sample_of(ids[n % 50], f"{n} " + "w" * 5_000, n, provenance) for n in range(100)]
    staged = write_table(decisions_table(rows), "decisions", to.staging, "decisions", 0, to.staging)
    funnels = {"image": Funnel(22_000, 2_000, 20_000, 0, 0), "sample": Funnel(0, 0, 0, 0, 0)}
    codes = {"image/duplicate/deduplicate/near_cosine": 20_000, "image/kept/settle/kept": 2_000}
    shard = write_table(samples_table(samples), "samples", out, "samples", 0, to.staging)
    manifest = Manifest("", "", [shard], [staged], [], [], [], 0, "0", [], {}, funnels, codes, 100, {})
    commit(to, "", manifest)
    (out / "metrics.json").write_text(
        json.dumps(
            {
                "snapshot_id": open_snapshot(str(out)).id,
                "sources": [{"name": "photos", "path": "/", "format": "files", "root": "/"}],
            }
        )
    )
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 160, 3), np.uint8)).save(sink, "PNG")
    thumbnail = report.Pictures._thumbnail
    monkeypatch.setattr(report.Pictures, "_thumbnail", lambda self, _: thumbnail(self, sink.getvalue))
    page = write_report(str(out)).read_text()
    assert page.count("<img ") == 40 * 6 + 24 and 4_000_000 < len(page) < 10_000_000
    words = words_of(page)
    assert "200 of 20,000 near duplicates" in words
    shown = [int(n) for n in re.findall(r"keeper(\d+)\.jpg kept 10 near duplicates", words)]
    assert len(shown) == report.MAX_GROUPS and max(shown) > 1_500
    assert words.count("synthesised, vlm") == 2 * report.MAX_MADE
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


@pytest.fixture
def explained(made):
    return lambda what: explain_text(open_snapshot(str(made.out)), what).splitlines()


def test_explain_a_kept_image(made, explained):
    kept, again, named, synthesised = explained("cat.jpg")
    id12 = made.kept_id.hex()[:12]
    assert kept.startswith(
        f"image again/cat.jpg (source photos, id {id12}): duplicate of cat.jpg (id {id12}), same_bytes."
    )
    assert again == f"image cat.jpg (source photos, id {id12}): kept."
    samples = {named, synthesised}
    made_id = made.synthesised.sample_id.hex()[:12]
    assert (
        f"image {id12} has synthesised sample {made_id}: perception/scene, written by tiny-model without seeing it "
        "(text-only)." in samples
    )
    source_id = made.samples[0].sample_id.hex()[:12]
    assert f"image {id12} is named by sample {source_id} (captions.jsonl, record 0)." in samples
    assert set(explained(made.kept_id.hex().upper()[:10])) == {kept, again, named, synthesised}
    assert explained(made_id[:6]) == [line for line in (named, synthesised) if made_id in line]


def test_explain_duplicates(made, explained):
    keeper = f"cat.jpg (id {made.kept_id.hex()[:12]})"
    checked = "verified: the 1,024-bit perceptual hashes differ in at most 12 % of their bits."
    (near,) = explained("near.jpg")
    assert near.endswith(f"duplicate of {keeper}, cosine 0.973 ≥ 0.85, {checked}")
    (gone,) = explained("copies/gone.jpg")
    assert gone.endswith(f"duplicate of {keeper}, pHash 3 of 64 bits ≤ 8, {checked}")


def test_explain_what_is_dead(explained):
    (broken,) = explained("broken.jpg")
    assert broken.endswith(f"dead at stage decode, truncated. {CODES['truncated']}")
    assert explained("lost.jpg") == [
        f"image lost.jpg (source photos, never read): dead at stage decode, file_missing. {CODES['file_missing']}"
    ]
    sample = explained(digest(2).hex()[:8])
    assert sample[0].startswith("sample captions.jsonl, record 2 (source photos")
    assert "dead at stage resolve, image_truncated. One of its images is dead." in sample[0]


def test_explain_a_failed_call(made, explained):
    assert explained(made.evil_id.hex()[:6])[-1] == (
        f"synthesis for image {made.evil_id.hex()[:12]} failed (vlm_bad_question): "
        "what the model wrote is not one question of its own words."
    )


def test_explain_what_is_not_there(explained):
    with pytest.raises(BadRequest, match=r"brokn\.jpg: no image or sample .* did you mean broken\.jpg\?$"):
        explained("brokn.jpg")
    with pytest.raises(BadRequest, match=r"an id needs at least 6 hex digits$"):
        explained("ab12")
    with pytest.raises(BadRequest) as error:
        explained("\x1b[2J")
    assert "\x1b" not in str(error.value)


def test_the_lines_after_a_run(made):
    lines = funnel_text(open_snapshot(str(made.out)).manifest).splitlines()
    assert lines[0].split() == ["input", *FATES]
    assert lines[1].split() == ["images", "8", "2", "4", "0", "2"]
    assert lines[2].split() == ["samples", "3", "2", "0", "0", "1"]
    assert len({len(line) for line in lines[:3]}) == 1, "columns align"
    assert (
        lines[3] == "images not kept: near_cosine 2, near_phash 1, same_bytes 1, file_missing 1, truncated 1"
    )
    assert lines[4:] == ["samples not kept: image_truncated 1", "synthesised: 1 sample"]


def test_comparisons_in_words():
    assert decided_text("near_phash", 4.0, 8.0) == "pHash 4 of 64 bits ≤ 8"
    assert decided_text("same_bytes", None, None) == ""
    assert verified_text({"dedup_mode": "similar"}).startswith("not verified")
    assert verified_text({"dedup_mode": "exact"}) == "mode exact: only equal bytes count"
    assert tuple(FATE_MEANINGS) == FATES


# Which argument holds the code, by the name of what is called.
CODE_ARGUMENT = {
    "BadData": 0,
    "VlmFailure": 0,
    "decision": 4,
    "dead_letter": 2,
    "died": 3,
    "Verdict": 2,
    "Decision": 4,
    "DeadLetter": 2,
}
STAGES = ("images", "embeddings", "synthesis", "transforms", "shards", "beam_pipelines")


def _values(
    node: ast.expr, assigned: dict[str, list[ast.expr]], seen: frozenset[str] = frozenset()
) -> set[str]:
    """String literals that an expression may be. Of an f-string, its literal start and a star."""
    match node:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.IfExp(body=body, orelse=orelse):
            return _values(body, assigned, seen) | _values(orelse, assigned, seen)
        case ast.Name(id=name) if name not in seen:
            return {v for e in assigned.get(name, []) for v in _values(e, assigned, seen | {name})}
        case ast.JoinedStr(values=[ast.Constant(value=str(start)), *_]):
            return {start + "*"}
    return set()


def _unpacked(target: ast.expr, value: ast.expr):
    """(name, expression) pairs of an assignment, through tuples and conditional tuples."""
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.IfExp):
        yield from _unpacked(target, value.body)
        yield from _unpacked(target, value.orelse)
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for inner, part in zip(target.elts, value.elts, strict=True):
            yield from _unpacked(inner, part)


def codes_in(source: str) -> set[str]:
    """Every code that a module's calls are given as a literal, directly or through a variable."""
    tree = ast.parse(source)
    assigned: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for name, value in _unpacked(node.targets[0], node.value):
                assigned.setdefault(name, []).append(value)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CODE_ARGUMENT:
            position = CODE_ARGUMENT[node.func.id]
            given = node.args[position : position + 1] + [k.value for k in node.keywords if k.arg == "code"]
            for argument in given:
                found |= _values(argument, assigned)
    return found


def test_codes_are_found_where_they_hide():
    assert codes_in("raise BadData('a', '')") == {"a"}
    assert codes_in("code = 'a' if x else 'b'\nraise BadData(code, '')") == {"a", "b"}
    assert codes_in("f, c = ('x', 'a') if x else ('y', 'b')\ndecision(1, f, 2, 3, c, 4)") == {"a", "b"}
    assert codes_in("died(1, 2, 3, f'image_{code}')") == {"image_*"}


def test_every_code_that_is_raised_has_a_meaning_and_no_other():
    raised: set[str] = set()
    for folder in STAGES:
        for path in (ROOT / folder).rglob("*.py"):
            raised |= codes_in(path.read_text())
    families = {code for code in raised if code.endswith("*")}
    plain = raised - families
    assert {
        "truncated",
        "decode_failed",
        "near_phash",
        "same_bytes",
        "no_sample",
        "vlm_timeout",
        "kept",
    } <= plain
    assert plain <= set(CODES), f"without a meaning in codes.py: {sorted(plain - set(CODES))}"
    assert families == {"image_*"}
    unknown = {code for code in CODES if code not in plain and not code.startswith("image_")}
    assert not unknown, f"in codes.py and never raised: {sorted(unknown)}"
    for code in codes_in((ROOT / "images/decode.py").read_text()) | codes_in(
        (ROOT / "images/fetch.py").read_text()
    ):
        assert f"image_{code}" in CODES


def test_every_meaning_is_one_or_two_plain_sentences():
    for meaning in [*CODES.values(), *FATE_MEANINGS.values()]:
        assert meaning[0].isupper() and meaning.endswith(".") and "\n" not in meaning
    assert meaning_of("of_the_future").endswith("no description of this code.")
