"""The records that flow between stages: one NamedTuple per stage, identity by content.

Ids are 32 raw bytes (`sha256`) in flight and lower-case hex in Parquet and JSON. Encoded image bytes are in none of them:
a record carries a `MediaRef`, and whoever needs the bytes reads them again and checks the hash.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Fate = Literal["kept", "duplicate", "filtered", "dead"]
Unit = Literal["image", "sample", "conversation"]
FATES: tuple[Fate, ...] = ("kept", "duplicate", "filtered", "dead")


class Origin(NamedTuple):
    """Where a source names an image or a sample. Tuple order is the order of preference between references.

    `priority` 0 is the first `--input`. `name` is relative to the source. `offset` tells apart what one name holds:
    the record number in a JSON file, 0 for a plain image file.
    """

    priority: int
    source: str
    name: str
    offset: int


class MediaRef(NamedTuple):
    """Where encoded bytes can be read: `length` bytes from `offset` of `uri`; length -1 is the whole file.

    `member` is empty, or `FORMAT:NAME` of what bytes cannot address: `COLUMN` or `COLUMN/INDEX` of the row numbered `offset` of a Parquet
    file, or the `offset`-th member of a compressed archive. Such bytes are expensive to reach one by one, so they are copied to the
    run's spool once, all of a file together.
    """

    uri: str
    offset: int
    length: int
    member: str = ""


class Geometry(NamedTuple):
    """How an image becomes a model's input of `size` x `size` pixels.

    `crop_mode` `center`: shorter side to `size / crop_pct`, then the central square. `squash`: both sides
    to that, then the same.
    """

    size: int
    crop_pct: float
    interpolation: str
    crop_mode: str


class SourceImage(NamedTuple):
    """One reference to an image, as a source names it. `sha256` is what the source says its bytes hash to, in hex; empty where it does not."""

    origin: Origin
    ref: MediaRef
    sha256: str = ""


class Turn(NamedTuple):
    """One turn of a conversation. `speaker` is `human`, `gpt` or `system`, as in LLaVA's `from`."""

    speaker: str
    value: str


class SourceSample(NamedTuple):
    """A sample as read: 0..n images in order and the conversation, unchanged.

    `language` is as the source names it; `weight` is how much the sample counts in a mixture, 1 where nothing is said; `extra_json`
    holds the other fields.
    """

    origin: Origin
    images: Sequence[SourceImage]
    conversation: Sequence[Turn]
    license: str
    language: str
    weight: float
    extra_json: str


class ImageFacts(NamedTuple):
    """What decoding says of an image, whatever the encoder.

    `width` and `height` in pixels after EXIF orientation; `pixel_hash` sha256 of size and decoded RGB pixels; `phash` the 64-bit
    perceptual hash (8 bytes); `structure` the 1,024-bit one (128 bytes), which tells copies from look-alikes. The last three are
    measures of the luma, as integers: see the properties in whose units they are spoken of.
    """

    width: int
    height: int
    num_bytes: int
    format: str
    pixel_hash: bytes
    phash: bytes
    structure: bytes
    entropy_milli: int
    sharpness_milli: int
    flat_ppm: int

    @property
    def side(self) -> int:
        """The shorter side, in pixels."""
        return min(self.width, self.height)

    @property
    def pixels(self) -> int:
        return self.width * self.height

    @property
    def aspect(self) -> float:
        """Longer side through shorter side, 1 and more."""
        return max(self.width, self.height) / self.side

    @property
    def entropy(self) -> float:
        """Shannon entropy of the histogram of 256 luma levels: 0 to 8 bits."""
        return self.entropy_milli / 1000

    @property
    def sharpness(self) -> float:
        """Variance of the 3 x 3 Laplacian of the luma, brought to a longer side of 256 to 511 pixels; 0 where a side has under 3."""
        return self.sharpness_milli / 1000

    @property
    def flat(self) -> float:
        """Largest share of the pixels whose luma lies within 16 neighbouring levels: 0 to 1."""
        return self.flat_ppm / 1_000_000


class EmbeddedImage(NamedTuple):
    """One reference, read, decoded and embedded.

    `embedding` is little-endian float16 (D,), centred and L2-normalised; `scores` little-endian float16 (C,), softmax over the
    encoder's classes in [0, 1], empty for an encoder without a classifier. `encoder` is the encoder's fingerprint, `numerics` what
    rounded its floats.
    """

    image_id: bytes
    source_image: SourceImage
    facts: ImageFacts
    embedding: bytes
    scores: bytes
    encoder: str
    numerics: str


class Verdict(NamedTuple):
    """What near-duplicate detection says of an image: kept (`keeper_id` is its own id) or a duplicate of a kept one.

    `code` is the signal that proposed the pair: `near_cosine` (`score` and `threshold` are cosine similarities), `near_phash`
    (differing bits of 64), or `near_geometric` (share of blocks that agree). `structure_distance` counts differing bits of 1,024,
    0 where none were compared.
    """

    image_id: bytes
    keeper_id: bytes
    code: str
    score: float
    threshold: float
    structure_distance: int
    same_pixels: bool


class Tag(NamedTuple):
    """A tag and its score in thousandths: integers, so that sums do not depend on their order."""

    name: str
    score_milli: int


class TaggedImage(NamedTuple):
    """An image with its encoded size and its tags, best first."""

    image_id: bytes
    source_image: SourceImage
    num_bytes: int
    tags: Sequence[Tag]


class ImageFate(NamedTuple):
    """What became of one reference, as samples need to know it.

    `keeper_id` is the image that stands for it: its own for a kept one, empty for a dead or filtered one. `code` says why it is not kept.
    """

    fate: str
    code: str
    image_id: bytes
    keeper_id: bytes
    same_pixels: bool
    tags: Sequence[Tag]


class NamedImage(NamedTuple):
    """A kept image that at least one surviving sample names, with the caption one of them gives it, if any."""

    image_id: bytes
    source_image: SourceImage
    num_bytes: int
    tags: Sequence[Tag]
    caption: str


class PlannedType(NamedTuple):
    """An instruction type chosen for an image, the names of the tags that argue for it, best first, and the sum of their scores."""

    instruction_type: str
    argued_by: Sequence[str]
    score_milli: int


class PlannedImage(NamedTuple):
    """A kept image and the instruction types chosen for it, best first; at least one."""

    image_id: bytes
    source_image: SourceImage
    tags: Sequence[Tag]
    caption: str
    types: Sequence[PlannedType]


class Call(NamedTuple):
    """One call to a VLM: which prompt (`name/version@sha256`), the rendered text, and the raw answer."""

    prompt_id: str
    prompt: str
    answer: str


class Question(NamedTuple):
    """What became of one question that was planned for an image.

    `argued_by` are the tags that argued for `instruction_type`; `code` is `kept`, or why the question was dropped. `form` is that of
    the answer that was used, `score` what a judge gave it, 1 to 10: of a dropped question the best, 0 where nobody judged. `suspect`
    says why the model may have obeyed text in its input, empty where nothing hints at it.
    """

    instruction_type: str
    argued_by: Sequence[str]
    code: str
    form: str = ""
    score: int = 0
    suspect: str = ""


class Provenance(NamedTuple):
    """How a sample came to be. `generator`: `source` (as read), `vlm` (saw the image), `text-only` (saw tags and caption).

    `questions` are all that were planned, in order: each kept one is a turn and its answer. `calls` are those that led to what was kept.
    """

    generator: str
    model: str
    questions: Sequence[Question]
    calls: Sequence[Call]


FROM_SOURCE = Provenance("source", "", (), ())


class Sample(NamedTuple):
    """A training sample: images in order and a conversation. `from_ids` are the ids of the source samples it stands for."""

    sample_id: bytes
    image_ids: Sequence[bytes]
    conversation: Sequence[Turn]
    tags: Sequence[Tag]
    origin: Origin
    from_ids: Sequence[bytes]
    license: str
    language: str
    weight: float
    extra_json: str
    provenance: Provenance


class Decision(NamedTuple):
    """The fate of one input reference (`unit` image), one input sample or one planned conversation, and why. Exactly one row each.

    A conversation is planned for a kept image, so its row names the image; the sample that a kept one became is `other_id`.
    `id` is empty where the content was never read. `score`, `threshold` and `other_id` say what decided, where something did.
    """

    unit: str
    fate: str
    id: bytes
    stage: str
    code: str
    source: str
    name: str
    offset: int
    score: float | None = None
    threshold: float | None = None
    other_id: bytes = b""


class DeadLetter(NamedTuple):
    """Something that failed, where and why.

    `message`, `attempts` (how often it was tried in this run; 0 where the ledger knew, or nobody might be asked) and `uri` (where the
    bytes were to be had) depend on the weather and the machine: they go to metrics and the log, never into a snapshot.
    """

    id: bytes
    stage: str
    code: str
    source: str
    name: str
    offset: int
    message: str
    attempts: int = 1
    uri: str = ""


class ShardFile(NamedTuple):
    """A file of a snapshot: path relative to the output folder, sha256 in hex, sizes in bytes and records."""

    kind: str
    path: str
    sha256: str
    num_bytes: int
    num_records: int
