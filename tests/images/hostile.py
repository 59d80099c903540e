"""Images made to harm whoever decodes them, and small honest ones of every format to make them of."""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

_RNG = np.random.default_rng(7)
NOISE = _RNG.integers(0, 256, (12, 16, 3), np.uint8)
RGB = Image.fromarray(NOISE)
GREY = RGB.convert("L")
RGBA = Image.fromarray(np.dstack([NOISE, NOISE[..., 0]]), "RGBA")
FRAMES = [Image.fromarray(np.roll(NOISE, by, 0)) for by in range(1, 4)]


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def honest() -> dict[str, bytes]:
    """Valid images of 16 x 12 pixels: every format, and the forms of each that are decoded by other code."""
    sixteen = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)
    floats = Image.fromarray(NOISE[..., 0].astype(np.float32))
    animation = {"save_all": True, "append_images": FRAMES, "duration": 40}
    return {
        "jpeg": saved(RGB, "JPEG", quality=90),
        "jpeg progressive": saved(RGB, "JPEG", progressive=True),
        "jpeg grey": saved(GREY, "JPEG"),
        "jpeg cmyk": saved(RGB.convert("CMYK"), "JPEG"),
        "jpeg turned": saved(RGB, "JPEG", exif=_turned(6)),
        "jpeg restarts": saved(RGB, "JPEG", restart_marker_blocks=1),
        "mpo": saved(RGB, "MPO", save_all=True, append_images=FRAMES[:1]),
        "png": saved(RGB, "PNG"),
        "png grey": saved(GREY, "PNG"),
        "png 1 bit": saved(GREY.convert("1"), "PNG"),
        "png 16 bits": saved(sixteen, "PNG"),
        "png alpha": saved(RGBA, "PNG"),
        "png palette": saved(RGB.quantize(16), "PNG", transparency=3),
        "png animated": saved(RGB, "PNG", **animation),
        "png interlaced": interlaced_png(NOISE),
        "png turned": saved(RGB, "PNG", exif=_turned(5)),
        "webp lossy": saved(RGB, "WEBP"),
        "webp lossless": saved(RGB, "WEBP", lossless=True),
        "webp alpha": saved(RGBA, "WEBP"),
        "webp animated": saved(RGB, "WEBP", **animation),
        "gif": saved(RGB, "GIF"),
        "gif animated": saved(RGB, "GIF", transparency=1, **animation),
        "bmp": saved(RGB, "BMP"),
        "bmp palette": saved(RGB.quantize(16), "BMP"),
        "bmp run length": run_length_bmp(),
        "tiff": saved(RGB, "TIFF"),
        "tiff lzw": saved(RGB, "TIFF", compression="tiff_lzw"),
        "tiff deflate": saved(RGBA, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": saved(RGB, "TIFF", compression="jpeg"),
        "tiff fax": saved(GREY.convert("1"), "TIFF", compression="group4"),
        "tiff packbits": saved(RGB.quantize(16), "TIFF", compression="packbits"),
        "tiff float": saved(floats, "TIFF"),
        "tiff 16 bits": saved(sixteen, "TIFF", compression="tiff_lzw"),
        "tiff cmyk": saved(RGB.convert("CMYK"), "TIFF"),
        "tiff big": saved(RGB, "TIFF", big_tiff=True),
        "tiff turned": saved(RGB, "TIFF", exif=_turned(8)),
        "avif": saved(RGB, "AVIF", speed=10),
        "avif alpha": saved(RGBA, "AVIF", speed=10, subsampling="4:4:4"),
        "avif animated": saved(RGB, "AVIF", speed=10, **animation),
        "ppm": saved(RGB, "PPM"),
        "pgm": saved(GREY, "PPM"),
        "pgm 16 bits": saved(sixteen, "PPM"),
        "pbm": saved(GREY.convert("1"), "PPM"),
        "pfm": saved(floats, "PPM"),
        "ppm plain": b"P3 4 3 255\n" + b" ".join(b"%d" % value for value in NOISE[:3, :4].flat),
        "ppm levels": b"P6 16 12 99\n" + (NOISE // 3).tobytes(),
    }


# PNG by hand.


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(header: bytes, *chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(chunks) + png_chunk(b"IEND", b"")


def png_header(width: int, height: int, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    return struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)


def interlaced_png(pixels: np.ndarray) -> bytes:
    """Adam7; `pixels` uint8 (H, W, 3)."""
    passes = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]
    rows = b"".join(
        b"\0" + row.tobytes()
        for top, left, down, across in passes
        if (part := pixels[top::down, left::across]).size
        for row in part
    )
    height, width, _ = pixels.shape
    return png_of(png_header(width, height, interlace=1), png_chunk(b"IDAT", zlib.compress(rows)))


def with_chunk(kind: bytes, data: bytes, times: int = 1) -> bytes:
    """The honest PNG with chunks put before its pixels."""
    png = saved(RGB, "PNG")
    at = png.index(b"IDAT") - 4
    return png[:at] + png_chunk(kind, data) * times + png[at:]


def run_length_bmp() -> bytes:
    palette = bytes(value for level in range(256) for value in (level, 255 - level, level // 2, 0))
    rows = b"".join(b"".join(bytes([4, 40 * x + y]) for x in range(4)) + b"\0\0" for y in range(12)) + b"\0\1"
    offset = 14 + 40 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, 16, 12, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(rows), 0, 0, offset) + info + palette + rows


# TIFF by hand.

_SHORT, _LONG, _SIXTEEN = 3, 4, 16


def tiff(tags: dict[int, tuple[int, int, int]], tail: bytes = b"", next_ifd: int = 0) -> bytes:
    """A little-endian TIFF of one directory; a tag is (type, count, value or offset)."""
    entries = b"".join(struct.pack("<HHII", tag, *value) for tag, value in sorted(tags.items()))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + struct.pack("<I", next_ifd) + tail


def tiff_tags(**changes: tuple[int, int, int] | None) -> dict[int, tuple[int, int, int]]:
    """Those of a grey 16 x 12 image whose one strip begins at byte 200, with changes by number (`t256`)."""
    tags = {
        256: (_LONG, 1, 16),
        257: (_LONG, 1, 12),
        258: (_SHORT, 1, 8),
        259: (_SHORT, 1, 1),
        262: (_SHORT, 1, 1),
        273: (_LONG, 1, 200),
        277: (_SHORT, 1, 1),
        278: (_LONG, 1, 12),
        279: (_LONG, 1, 192),
    }
    for name, value in changes.items():
        if value is None:
            del tags[int(name[1:])]
        else:
            tags[int(name[1:])] = value
    return tags


# The hostile set.


def _bombs() -> Iterator[tuple[str, bytes]]:
    """More pixels than any limit, declared in few bytes."""
    yield "png", png_of(png_header(60_000, 60_000), png_chunk(b"IDAT", zlib.compress(bytes(10_000))))
    yield "png largest", png_of(png_header(2**31 - 1, 2**31 - 1), png_chunk(b"IDAT", b""))
    jpeg = saved(RGB, "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    yield "jpeg", jpeg[: frame + 5] + b"\xff\xff\xff\xff" + jpeg[frame + 9 :]
    gif = saved(RGB, "GIF")
    yield "gif screen", gif[:6] + b"\xff\xff\xff\xff" + gif[10:]
    at = first_frame(gif)
    yield "gif frame", gif[: at + 5] + b"\xff\xff\xff\xff" + gif[at + 9 :]
    bmp = saved(RGB, "BMP")
    yield "bmp", bmp[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + bmp[26:]
    yield "bmp run length", run_length_bmp()[:18] + struct.pack("<ii", 90_000, 90_000) + run_length_bmp()[26:]
    yield "tiff", tiff(tiff_tags(t256=(_LONG, 1, 2**31 - 1), t257=(_LONG, 1, 2**31 - 1)), bytes(400))
    yield (
        "tiff lzw",
        tiff(tiff_tags(t256=(_LONG, 1, 10**5), t257=(_LONG, 1, 10**5), t259=(_SHORT, 1, 5)), bytes(99)),
    )
    extended = saved(RGBA, "WEBP")
    canvas = extended.index(b"VP8X") + 12
    yield "webp canvas", extended[:canvas] + b"\xff\xff\0\xff\xfe\0" + extended[canvas + 6 :]
    lossless = saved(RGB, "WEBP", lossless=True)
    at = lossless.index(b"VP8L") + 9
    (bits,) = struct.unpack_from("<I", lossless, at)
    yield "webp lossless", lossless[:at] + struct.pack("<I", bits | 0x0FFFFFFF) + lossless[at + 4 :]
    lossy = saved(RGB, "WEBP")
    at = lossy.index(b"\x9d\x01\x2a") + 3
    yield "webp lossy", lossy[:at] + b"\xff\x3f\xff\x3f" + lossy[at + 4 :]
    avif = saved(RGB, "AVIF", speed=10)
    at = avif.index(b"ispe") + 8
    yield "avif", avif[:at] + struct.pack(">II", 16_384, 16_384) + avif[at + 8 :]
    yield "ppm", b"P6 99999 99999 255\n" + bytes(1000)
    yield "pbm plain", b"P1 999999 999999\n" + b"1 " * 1000


def _metadata() -> Iterator[tuple[str, bytes]]:
    """Around honest pixels, or what looks like them."""
    text = zlib.compress(bytes(100 << 20), 1)
    yield "png text of 100 MB", with_chunk(b"zTXt", b"Comment\0\0" + text)
    yield "png international text of 100 MB", with_chunk(b"iTXt", b"Comment\0\x01\0\0\0" + text)
    yield "png profile of 100 MB", with_chunk(b"iCCP", b"icc\0\0" + text)
    yield "png a thousand texts", with_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20)), 1000)
    yield "png text uncompressed", with_chunk(b"tEXt", b"k\0" + bytes(2 << 20), 3)
    yield "png two billion frames", with_chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
    png = saved(RGB, "PNG")
    at = png.index(b"IDAT") - 4
    yield "png chunk of 2 GB", png[:at] + struct.pack(">I", 2**31 - 1) + b"tEXtk\0" + png[at:]
    yield "png no pixels", png_of(png_header(16, 12))
    yield "png pixels to spare", png_of(png_header(4, 4), png_chunk(b"IDAT", zlib.compress(bytes(8 << 20))))
    yield "png bad exif", saved(RGB, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff nonsense")
    yield (
        "png hex exif",
        with_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 9\nxyz")),
    )

    profile = b"".join(
        b"\xff\xe2" + struct.pack(">H", 65_535) + b"ICC_PROFILE\0" + bytes([number, 255]) + bytes(65_519)
        for number in range(1, 256)
    )
    jpeg = saved(RGB, "JPEG")
    yield "jpeg profile of 16 MB", jpeg[:2] + profile + jpeg[2:]
    for orientation in (0, 9, 65_535):
        yield f"jpeg orientation {orientation}", saved(RGB, "JPEG", exif=_turned(orientation))
    yield "jpeg deep exif", jpeg_with_exif(nested_directories(2000))
    yield "jpeg exif in a ring", jpeg_with_exif(ring_of_directories())
    yield "jpeg exif of 65535 tags", jpeg_with_exif(b"II*\0\x08\0\0\0\xff\xff" + bytes(range(256)) * 200)
    yield (
        "jpeg exif tag of 4 GB",
        jpeg_with_exif(
            b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, _SHORT, 2**31, 20) + bytes(40)
        ),
    )
    yield (
        "jpeg malformed mpo",
        saved(RGB, "MPO", save_all=True, append_images=FRAMES).replace(
            b"\x01\xb0\x04\0\x01\0\0\0", b"\x01\xb0\x04\0\xff\xff\xff\x7f"
        ),
    )
    yield "jpeg junk between markers", jpeg[:20] + bytes(1 << 20) + jpeg[20:]

    yield "gif of ten thousand frames", gif_of_frames(10_000)
    gif = saved(RGB, "GIF")
    at = first_frame(gif)
    comment = b"!\xfe" + (b"\xff" + b"c" * 255) * 20_000 + b"\0"
    yield "gif comment of 5 MB", gif[:at] + comment + gif[at:]
    yield "gif no end", gif[:at] + b"!\xfe" + b"\xff" + b"c" * 99
    yield "ppm comment of 1 MB", b"P6 #" + b"c" * (1 << 20) + b"\n4 4 255\n" + bytes(48)
    yield "ppm endless comment", b"P6 #" + b"c" * 10_000
    yield "ppm long number", b"P6 " + b"9" * 10_000 + b" 1 255\n"
    yield "ppm negative", b"P6 -4 -4 255\n" + bytes(48)
    yield "pfm scale", b"Pf 4 4 1e999\n" + bytes(64)


def _directories() -> Iterator[tuple[str, bytes]]:
    """TIFF tags that say absurd things."""
    changes: dict[str, dict[str, tuple[int, int, int] | None]] = {
        "width 0": {"t256": (_LONG, 1, 0)},
        "no width": {"t256": None},
        "width of 4 billion values": {"t256": (_LONG, 2**32 - 1, 8)},
        "samples 65535": {"t277": (_SHORT, 1, 65_535)},
        "bits 64": {"t258": (_SHORT, 1, 64)},
        "bits 0": {"t258": (_SHORT, 1, 0)},
        "strip beyond the end": {"t273": (_LONG, 1, 2**32 - 16)},
        "strips of 4 billion": {"t273": (_LONG, 2**32 - 1, 8)},
        "rows per strip 0": {"t278": (_LONG, 1, 0)},
        "compression unknown": {"t259": (_SHORT, 1, 12_345)},
        "old jpeg": {"t259": (_SHORT, 1, 6)},
        "lzw of zeros": {"t259": (_SHORT, 1, 5)},
        "fax of zeros": {"t259": (_SHORT, 1, 4), "t258": (_SHORT, 1, 1)},
        "strip of 4 GB": {"t259": (_SHORT, 1, 8), "t279": (_LONG, 1, 2**32 - 1)},
        "rows of 4 GB": {"t259": (_SHORT, 1, 5), "t278": (_LONG, 1, 2**32 - 1)},
        "profile of 4 GB": {"t34675": (7, 2**32 - 1, 8)},
        "description of 2 GB": {"t270": (2, 2**31, 8)},
        "huge tiles": {
            "t273": None, "t278": None, "t279": None, "t259": (_SHORT, 1, 5),
            "t322": (_LONG, 1, 2**31 - 16), "t323": (_LONG, 1, 2**31 - 16),
            "t324": (_LONG, 1, 200), "t325": (_LONG, 1, 192),
        },
        "tiles of 2 GB": {
            "t273": None, "t278": None, "t279": None, "t259": (_SHORT, 1, 5),
            "t322": (_LONG, 1, 46_336), "t323": (_LONG, 1, 46_336),
            "t324": (_LONG, 1, 200), "t325": (_LONG, 1, 192),
        },
    }  # fmt: skip
    for name, change in changes.items():
        yield name, tiff(tiff_tags(**change), bytes(400))
    yield "in a ring", tiff(tiff_tags(), bytes(400), next_ifd=8)
    yield "next beyond the end", tiff(tiff_tags(), bytes(400), next_ifd=2**32 - 2)
    yield "of nothing", b"II*\0\x08\0\0\0\0\0\0\0\0\0"
    yield "65535 tags", b"II*\0\x08\0\0\0\xff\xff" + bytes(range(256)) * 3072
    yield "big, of 2^63 tags", b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0" + b"\xff" * 7 + b"\x7f" + bytes(200)
    many = b"".join(struct.pack("<I", 200) for _ in range(50_000))
    yield "50000 strips over one another", tiff(tiff_tags(t273=(_LONG, 50_000, 400)), bytes(400 - 122) + many)


def _lengths() -> Iterator[tuple[str, bytes]]:
    """Strips of one row or column, as long as a format allows, and images of nearly nothing."""
    for width, height in ((65_535, 1), (1, 65_535), (1, 1)):
        strip = Image.new("RGB", (width, height), (9, 99, 199))
        for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM"):
            if kind != "JPEG" or max(width, height) < 65_501:
                yield f"{kind} {width} x {height}", saved(strip, kind)
    for width, height in ((16_383, 1), (1, 16_383)):
        yield f"WEBP {width} x {height}", saved(Image.new("RGB", (width, height)), "WEBP")
    yield "AVIF 1 x 20000", saved(Image.new("RGB", (1, 20_000)), "AVIF", speed=10)
    yield (
        "png of 16 million pixels in 2 KB",
        png_of(
            png_header(4_000, 4_000, depth=1, colour=0), png_chunk(b"IDAT", zlib.compress(bytes(501 * 4_000)))
        ),
    )


def _others() -> Iterator[tuple[str, bytes]]:
    """No image, several things at once, or formats that are not read."""
    jpeg, png, gif = (saved(RGB, kind) for kind in ("JPEG", "PNG", "GIF"))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("a.txt", "hidden")
    yield "nothing", b""
    for number in (1, 2, 3, 7, 15, 16, 30, 4096, 1 << 20):
        yield f"{number} zeros", bytes(number)
        yield f"{number} times 255", b"\xff" * number
    yield "jpeg and zip", jpeg + archive.getvalue()
    yield "gif and script", gif.replace(b"GIF89a", b"GIF89a", 1) + b"/*<script>alert(1)</script>*/"
    yield "png and jpeg", png + jpeg
    yield "jpeg and png", jpeg + png
    yield "png in a jpeg comment", jpeg[:2] + b"\xff\xfe" + struct.pack(">H", len(png) + 2) + png + jpeg[2:]
    yield "pdf and jpeg", b"%PDF-1.7\n" + jpeg
    yield "html", b"<!doctype html><img src=x onerror=alert(1)>"
    yield "svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    yield "postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file"
    yield "icon", saved(RGB, "ICO", sizes=[(16, 12)])
    yield "targa", saved(RGB, "TGA")
    yield "jpeg 2000", saved(RGB, "JPEG2000")
    yield "heic brand", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    yield "avif brand alone", b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(100)
    for name, magic in {
        "jpeg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n", "gif": b"GIF89a", "bmp": b"BM", "tiff": b"II*\0",
        "webp": b"RIFF\xff\xff\xff\xffWEBPVP8 ", "webp extended": b"RIFF\xff\xff\xff\xffWEBPVP8X", "pnm": b"P6\n",
    }.items():  # fmt: skip
        yield f"{name} and noise", magic + _RNG.integers(0, 256, 2000, np.uint8).tobytes()
        yield f"{name} and zeros", magic + bytes(2000)


def scan_bomb(side: int, scans: int) -> bytes:
    """A small progressive JPEG that sends one scan over and over: every repetition walks all its blocks again."""
    jpeg = saved(Image.new("RGB", (side, side), (90, 120, 30)), "JPEG", progressive=True)
    starts = [at for at in range(len(jpeg) - 1) if jpeg[at : at + 2] == b"\xff\xda"]
    last = jpeg[starts[-1] : jpeg.rindex(b"\xff\xd9")]
    return jpeg[: starts[-1]] + last * scans + b"\xff\xd9"


def jpeg_with_exif(exif: bytes) -> bytes:
    jpeg = saved(RGB, "JPEG")
    data = b"Exif\0\0" + exif[:65_000]
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data + jpeg[2:]


def nested_directories(depth: int) -> bytes:
    """EXIF whose directory points to one that points to one, and so on, the orientation in the first."""
    parts, at = [], 8
    for level in range(depth):
        entries = [(0x0112, _SHORT, 1, 3)] if level == 0 else []
        at += 2 + 12 * (len(entries) + 1) + 4
        entries.append((0x8769, _LONG, 1, at))
        parts.append(
            struct.pack("<H", len(entries))
            + b"".join(struct.pack("<HHII", *one) for one in entries)
            + bytes(4)
        )
    return b"II*\0\x08\0\0\0" + b"".join(parts)


def ring_of_directories() -> bytes:
    tags = (0x8769, 0x8825, 0x014A, 0xA005)
    entries = b"".join(struct.pack("<HHII", tag, _LONG, 1, 8) for tag in sorted(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 8)


def first_frame(gif: bytes) -> int:
    """Where the palette for all frames ends."""
    return 13 + (3 << ((gif[10] & 7) + 1))


def gif_of_frames(count: int) -> bytes:
    gif = saved(RGB, "GIF")
    frame = gif[first_frame(gif) : -1]
    return gif[:-1] + frame * (count - 1) + b";"


def truncations(encoded: bytes) -> Iterator[bytes]:
    """Cut at every sixteenth, the whole included."""
    for part in range(17):
        yield encoded[: len(encoded) * part // 16]


def hostile() -> dict[str, bytes]:
    """Every hostile image under a name that says what it is; `bomb ...` are refused for their pixels."""
    families = {
        "bomb": _bombs(), "metadata": _metadata(), "tiff": _directories(), "length": _lengths(), "other": _others(),
    }  # fmt: skip
    found = {f"{family} {name}": encoded for family, pairs in families.items() for name, encoded in pairs}
    for name, encoded in honest().items():
        for part, cut in enumerate(truncations(encoded)):
            found[f"cut {name} {part}/16"] = cut
    return found
