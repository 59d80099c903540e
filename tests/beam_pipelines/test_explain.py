"""`explain` on a small snapshot."""

import pytest

from beam_pipelines.codes import CODES
from beam_pipelines.explain import explain_text
from shards.errors import BadRequest
from shards.ids import digest, image_id_of
from shards.records import Decision
from shards.snapshot import open_snapshot
from tests.beam_pipelines.small_snapshot import SmallSnapshot, image_row


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
    near, unknown = explained("near.jpg")
    assert near.endswith(f"duplicate of {keeper}, cosine 0.973 ≥ 0.85, {checked}")
    assert unknown == (
        f"not recorded: which samples of the input named copies/near.jpg. If the pixels are equal they name {keeper} now."
    )
    gone, _ = explained("copies/gone.jpg")
    assert gone.endswith(f"duplicate of {keeper}, pHash 3 of 64 bits ≤ 8, {checked}")


def test_explain_what_is_dead(explained):
    broken, unknown = explained("broken.jpg")
    assert broken.endswith(f"dead at stage decode, truncated. {CODES['truncated']}")
    assert unknown == (
        "not recorded: which samples of the input named broken.jpg. "
        "A sample that is not kept does not list its images; search the input for the name."
    )
    assert explained("lost.jpg")[:1] == [
        f"image lost.jpg (source photos, never read): dead at stage decode, file_missing. {CODES['file_missing']}"
    ]
    sample = explained(digest(2).hex()[:8])
    assert sample[0].startswith("sample captions.jsonl, record 2 (source photos")
    assert "dead at stage resolve, image_truncated. One of its images is dead." in sample[0]


def test_explain_a_failed_call(made, explained):
    assert explained(made.evil_id.hex()[:6])[-1] == (
        f"synthesis for image {made.evil_id.hex()[:12]} failed (vlm_bad_question): "
        "what the model wrote is not one question of its own words."
        " Tried 2 times, file:///photos/evil.jpg: no question"
    )


def test_explain_what_is_not_there(explained):
    with pytest.raises(BadRequest, match=r"brokn\.jpg: no image or sample .* did you mean broken\.jpg\?$"):
        explained("brokn.jpg")
    with pytest.raises(BadRequest, match=r"an id needs at least 6 hex digits$"):
        explained("ab12")
    with pytest.raises(BadRequest) as error:
        explained("\x1b[2J")
    assert "\x1b" not in str(error.value)


class Named(SmallSnapshot):
    """The same, with samples around the images: records of a JSON file that are not kept, and a file that is its own sample."""

    def decisions(self) -> list[Decision]:
        def fallen(n, fate, code, name="captions.jsonl", other=b""):
            return Decision(
                "sample", fate, digest(["s", n]), "resolve", code, "photos", name, n, None, None, other
            )

        near, gone, _ = self.losers.items()
        return [
            *super().decisions(),
            image_row("duplicate", "same_bytes", gone[1], "again/gone.jpg", other=image_id_of(gone[1])),
            image_row("dead", "source_changed", b"void", "void.jpg"),
            *(fallen(n, "duplicate", "image_duplicate", other=self.kept_id) for n in (4, 5)),
            fallen(6, "duplicate", "same_sample", other=self.samples[0].sample_id),
            fallen(7, "dead", "image_source_changed", other=image_id_of(b"void")),
            fallen(8, "duplicate", "near_question", other=self.samples[0].sample_id),
            fallen(0, "duplicate", "image_duplicate", near[0], self.kept_id),
        ]


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    made = Named(tmp_path_factory.mktemp("named"))
    return lambda what: explain_text(open_snapshot(str(made.out)), what).splitlines()


def test_a_sample_that_says_the_same_is_found_by_the_image(named):
    lines = named("cat.jpg")
    (same,) = [line for line in lines if line.startswith("sample captions.jsonl, record 6 ")]
    assert "duplicate of captions.jsonl, record 0 (id " in same and "same_sample" in same
    (asked,) = [line for line in lines if line.startswith("sample captions.jsonl, record 8 ")]
    assert "duplicate of captions.jsonl, record 0 (id " in asked and "near_question" in asked
    assert not [line for line in lines if "record 4" in line or "record 5" in line], (
        "those named another image"
    )


def test_samples_that_may_have_named_a_near_duplicate_are_candidates(named):
    assert named("copies/gone.jpg")[-1].endswith(
        "now; else they are among those that fell to it: captions.jsonl, record 4, captions.jsonl, record 5."
    )


def test_a_sample_that_fell_with_its_image_as_it_was_written_is_found(named):
    image, sample, _ = named("void.jpg")
    assert "dead at stage settle, source_changed" in image
    assert sample.startswith("sample captions.jsonl, record 7 ") and "image_source_changed" in sample


def test_a_reference_to_the_bytes_of_a_near_duplicate_leads_to_its_keeper(named):
    lines = named("again/gone.jpg")
    assert any(
        line.startswith("image copies/gone.jpg") and "duplicate of cat.jpg (id " in line for line in lines
    )


def test_an_image_file_is_its_own_sample_also_by_id(named):
    by_name = named("copies/near.jpg")
    assert by_name[1].startswith("sample copies/near.jpg (source photos, id ")
    assert "duplicate because of cat.jpg (id " in by_name[1] and "image_duplicate. One of" in by_name[1]
    assert len(by_name) == 2, "nothing is unknown"
    assert named(by_name[0].split("id ")[1][:12]) == by_name
