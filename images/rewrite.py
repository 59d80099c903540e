"""Images as they are to be kept, where they are not kept as found: without metadata, or no larger than asked.

Metadata of JPEG, PNG and WebP are cut out of the file, and no pixel changes: EXIF, XMP, IPTC, comments, texts, times, and what follows the
first picture. Orientation stays, in an EXIF block that says nothing else, and so does the colour profile. Other formats, and what is larger
than asked, are encoded anew: JPEG, lossy WebP and AVIF as JPEG of quality 95 without chroma subsampling, the others as PNG; transparency is
laid on white as in decoding.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import ExifTags, Image

from images.decode import FORMATS, open_image
from shards.errors import BadData

_VERSION = "rewrite 1"


class Rewrite(NamedTuple):
    """How images are kept. `max_side` caps the longer side in pixels, 0 for no cap."""

    max_side: int = 0
    strip_metadata: bool = False

    @property
    def fingerprint(self) -> str:
        """What the bytes depend on besides the image and the libraries; empty where images are kept as found."""
        return f"{_VERSION} {self.max_side} {self.strip_metadata}" if any(self) else ""


def rewritten(encoded: bytes, rule: Rewrite, max_pixels: int) -> bytes:
    """The image as it is to be kept; itself where the rule asks for nothing that it is not. Raises BadData as `open_image` does."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            form, size = image.format, image.size
            lossy = form in ("JPEG", "MPO", "AVIF") or (form == "WEBP" and b"VP8 " in dict(_chunks(encoded)))
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            profile = image.info.get("icc_profile")
    # What is no image fails in the words of the decoder.
    except Exception:
        open_image(encoded, max_pixels)
        raise
    if not rule.max_side or max(size) <= rule.max_side:
        if not rule.strip_metadata:
            return encoded
        cut = _CUTTERS.get(str(form))
        if cut is not None:
            try:
                return cut(encoded, orientation if orientation in range(2, 9) else 1)
            except (struct.error, IndexError, ValueError) as error:
                raise BadData("decode_failed", f"{type(error).__name__}: {error}") from error
    upright, _ = open_image(encoded, max_pixels)
    if rule.max_side:
        upright.thumbnail((rule.max_side, rule.max_side), Image.Resampling.LANCZOS)
    upright.info = {}  # or a comment would be written again
    sink = io.BytesIO()
    if lossy:
        upright.save(sink, "JPEG", quality=95, subsampling=0, icc_profile=profile)
    else:
        upright.save(sink, "PNG", icc_profile=profile)
    return sink.getvalue()


def _exif_of(orientation: int) -> bytes:
    """A TIFF header with one entry."""
    return struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, ExifTags.Base.Orientation, 3, 1, orientation, 0, 0)


_KEPT_JPEG = {0xE0: b"JFIF\0", 0xE2: b"ICC_PROFILE\0", 0xEE: b"Adobe"}
"""Application segments that say how pixels are meant, by marker and beginning."""


def _segments(encoded: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, its bytes with all that belongs to it) from start to end of the first picture."""
    at = 2
    yield 0xD8, encoded[:2]
    while True:
        start = encoded.index(b"\xff", at)
        at = start + 1
        while encoded[at] == 0xFF:
            at += 1
        marker, at = encoded[at], at + 1
        if marker == 0xD9:
            yield marker, b"\xff\xd9"
            return
        if marker not in range(0xD0, 0xD9) and marker != 0x01:
            at += struct.unpack_from(">H", encoded, at)[0]
        if (
            marker == 0xDA
        ):  # entropy-coded data goes on to the next marker that is no restart and no stuffed byte
            while True:
                at = encoded.find(b"\xff", at)
                if at < 0 or at + 1 >= len(encoded):
                    yield marker, encoded[start:]  # cut short: the decoder says what that means
                    return
                if encoded[at + 1] != 0 and encoded[at + 1] not in range(0xD0, 0xD8):
                    break
                at += 2
        if at > len(encoded):
            raise ValueError("a segment beyond the end")
        yield marker, encoded[start:at]


def _cut_jpeg(encoded: bytes, orientation: int) -> bytes:
    kept = bytearray()
    for marker, segment in _segments(encoded):
        is_said = marker in range(0xE0, 0xF0) or marker == 0xFE
        if not is_said or segment[4:].startswith(_KEPT_JPEG.get(marker, b"\xff\xff")):
            kept += segment
        if marker == 0xD8 and orientation != 1:
            body = b"Exif\0\0" + _exif_of(orientation)
            kept += b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    return bytes(kept)


_CUT_PNG = frozenset([b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"tIME"])


def _cut_png(encoded: bytes, orientation: int) -> bytes:
    kept, at = bytearray(encoded[:8]), 8
    while at < len(encoded):
        (length,) = struct.unpack_from(">I", encoded, at)
        kind, end = encoded[at + 4 : at + 8], at + 12 + length
        if end > len(encoded):
            end = len(encoded)  # cut short: the decoder says what that means
        if kind not in _CUT_PNG:
            kept += encoded[at:end]
        if kind == b"IHDR" and orientation != 1:
            body = b"eXIf" + _exif_of(orientation)
            kept += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        if kind == b"IEND":
            break
        at = end
    return bytes(kept)


def _chunks(encoded: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, the whole chunk) of a WebP file."""
    at, end_of_file = 12, min(len(encoded), 8 + struct.unpack_from("<I", encoded, 4)[0])
    while at < end_of_file:
        kind, length = struct.unpack_from("<4sI", encoded, at)
        start, at = at, at + 8 + length + length % 2
        yield kind, encoded[start:at]


def _cut_webp(encoded: bytes, orientation: int) -> bytes:
    kept = bytearray()
    for kind, chunk in _chunks(encoded):
        if kind == b"VP8X":
            flags = chunk[8] & ~0x0C | (0x08 if orientation != 1 else 0)
            kept += chunk[:8] + bytes([flags]) + chunk[9:]
        elif kind not in (b"EXIF", b"XMP "):
            kept += chunk
    if orientation != 1:
        body = _exif_of(orientation)
        kept += struct.pack("<4sI", b"EXIF", len(body)) + body
    return struct.pack("<4sI4s", b"RIFF", len(kept) + 4, b"WEBP") + bytes(kept)


_CUTTERS = {"JPEG": _cut_jpeg, "MPO": _cut_jpeg, "PNG": _cut_png, "WEBP": _cut_webp}
