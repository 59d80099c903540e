from beam_pipelines.wording import one_line, plural, sample_title, visible


def test_control_and_direction_marks_are_spelt_out():
    assert visible("a\x1b[2Jb\u202ec\x00\n\td") == "a\\x1b[2Jb\\u202ec\\x00\n\td"
    assert visible("x" * 50, 10) == "x" * 10 + " ... and 40 characters more"
    assert one_line("a\n\tb\x00") == "a\\n\\tb\\x00" and len(one_line("x" * 900)) < 300


def test_counts_and_places_in_words():
    assert [plural(n, "sample") for n in (0, 1, 2_000)] == ["0 samples", "1 sample", "2,000 samples"]
    assert sample_title({"name": "a/x.jsonl", "offset": 7}) == "a/x.jsonl, record 7"
    assert sample_title({"name": "cat.jpg", "offset": 0}) == "cat.jpg"
