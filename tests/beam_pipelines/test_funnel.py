"""The lines after a run."""

from beam_pipelines.funnel import fate_rows, funnel_text
from shards.records import FATES
from shards.snapshot import open_snapshot


def test_the_lines_after_a_run(made):
    lines = funnel_text(open_snapshot(str(made.out)).manifest).splitlines()
    assert lines[0].split() == ["input", *FATES]
    assert lines[1].split() == ["images", "8", "2", "4", "0", "2"]
    assert lines[2].split() == ["samples", "3", "2", "0", "0", "1"]
    assert len({len(line) for line in lines[:3]}) == 1, "columns align"
    assert lines[3:9] == [
        "images not kept:",
        "  near_cosine   2",
        "  near_phash    1",
        "  same_bytes    1",
        "  file_missing  1",
        "  truncated     1",
    ]
    assert lines[9:] == ["samples not kept: image_truncated 1", "synthesised: 1 sample"]


def test_few_codes_stand_in_one_line_and_columns_are_as_wide_as_their_numbers(made):
    manifest = open_snapshot(str(made.out)).manifest
    few = {"image/filtered/settle/no_sample": 12_000, "image/dead/decode/truncated": 3}
    funnels = {**manifest.funnels, "image": manifest.funnels["image"]._replace(input=1_234_567)}
    assert funnel_text(manifest._replace(codes=few, funnels=funnels, synthesised=0)).splitlines() == [
        "             input  kept  duplicate  filtered  dead",
        "images   1,234,567     2          4         0     2",
        "samples          3     2          0         0     1",
        "images not kept: no_sample 12,000, truncated 3",
        "synthesised: none",
    ]


def test_no_line_is_wider_than_a_terminal(made):
    codes = {f"sample/dead/resolve/image_too_many_pixels_{n}": 1_000_000_000 for n in range(3)}
    text = funnel_text(open_snapshot(str(made.out)).manifest._replace(codes=codes))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\n  image_too_many_pixels_0  1,000,000,000\n" in text


def test_fates_come_by_unit_and_fate_the_most_frequent_first(made):
    rows = fate_rows(open_snapshot(str(made.out)).manifest)
    assert [(row.unit, row.fate, row.code) for row in rows][:3] == [
        ("image", "kept", "kept"),
        ("image", "duplicate", "near_cosine"),
        ("image", "duplicate", "near_phash"),
    ]
    assert [row.items for row in rows][:2] == [2, 2] and rows[-1].unit == "sample"
