"""Pictures as files: their extension by their own bytes, and a folder that holds each once."""

from collections.abc import Sequence
from pathlib import Path

_PREFIXES = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"II+\0": "tiff",
    b"MM\0+": "tiff",
}


def extension_of(encoded: bytes) -> str:
    """`jpg`, `png`, `webp`, `gif`, `bmp`, `tiff`, `avif` or `ppm`, by the first bytes, whatever the source called it; else `bin`.

    Without Pillow, whose parser would meet untrusted bytes for the sake of a name.
    """
    for prefix, extension in _PREFIXES.items():
        if encoded.startswith(prefix):
            return extension
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        return "webp"
    if encoded[4:8] == b"ftyp":
        return "avif"
    if encoded[:1] == b"P" and encoded[1:2] in (b"1", b"2", b"3", b"4", b"5", b"6", b"f", b"y"):
        return "ppm"
    return "bin"


def member_names(key: str, pictures: Sequence[bytes]) -> list[str]:
    """Names in a tar: `KEY.jpg` for a single picture, `KEY.0.jpg`, `KEY.1.png`, ... for several."""
    if len(pictures) == 1:
        return [f"{key}.{extension_of(pictures[0])}"]
    return [f"{key}.{place}.{extension_of(encoded)}" for place, encoded in enumerate(pictures)]


def write_picture(folder: Path, image_id: bytes, encoded: bytes) -> str:
    """Write `images/ID.EXT` below a folder unless it is there; its path relative to the folder."""
    name = f"images/{image_id.hex()}.{extension_of(encoded)}"
    path = folder / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded)
    return name
