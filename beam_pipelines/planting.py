"""Plants ground truth beside real images: changed copies, look-alike documents and broken files.

No set of near-duplicates with known answers is shipped anywhere, so the demo, the tests and the benchmarks
make one. Everything is a function of the images and a seed: every random choice comes from
sha256(seed, label), so that adding a template or an original leaves the others byte for byte as they were.
"""

import functools
import hashlib
import io
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK, SOFT, RULE = "#1f2328", "#57606a", "#c4cbd3"


class Planted(NamedTuple):
    """One planted file and the answer that a pipeline should find."""

    name: str  # path relative to the folder, with forward slashes
    kind: str  # 'change', 'lookalike' or 'broken'
    what: str  # the change, the template or the fault
    original: str  # file name of the original; '' where there is none


def rng_for(seed: int, label: str) -> np.random.Generator:
    """The generator of one choice; labels are independent of each other."""
    digest = hashlib.sha256(f"{seed}/{label}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


# Changes of one image.


def flatten(image: Image.Image) -> Image.Image:
    """A decoded RGB copy; transparent pixels become white, as on a page."""
    if not image.has_transparency_data:
        return image.copy() if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # Level 3 took a quarter less time than the default level, for an eighth more bytes (45 look-alikes).
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def extension(data: bytes) -> str:
    """'png' or 'jpg', from the first bytes of an encoded image."""
    return "png" if data.startswith(b"\x89PNG") else "jpg"


def half(image: Image.Image) -> bytes:
    size = (max(1, image.width // 2), max(1, image.height // 2))
    return jpeg(image.resize(size, Image.Resampling.LANCZOS))


def crop(image: Image.Image, share: float) -> bytes:
    """The middle of the image; `share` is kept of each side, in (0, 1]."""
    width, height = max(1, round(image.width * share)), max(1, round(image.height * share))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return png(image.crop((left, top, left + width, top + height)))


def rotate10(image: Image.Image) -> bytes:
    return jpeg(image.rotate(10, Image.Resampling.BICUBIC, expand=True, fillcolor="white"))


def colour(image: Image.Image) -> bytes:
    """Stronger and warmer colours; the gains move grey pixels too, which saturation alone leaves alone."""
    gains = np.array([1.0, 0.92, 0.75], np.float32)
    pixels = np.asarray(ImageEnhance.Color(image).enhance(1.6), np.float32) * gains
    return jpeg(Image.fromarray(pixels.astype(np.uint8)))


def text(image: Image.Image) -> bytes:
    """An outlined line of text across the lower third, as memes and stock previews have it."""
    result = image.copy()
    size = max(8, min(image.height // 10, image.width // 10))
    at = (image.width // 2, image.height * 3 // 4)
    draw = ImageDraw.Draw(result)
    draw.text(
        at, "SAMPLE PREVIEW", "white", font(size), "mm", stroke_width=max(1, size // 10), stroke_fill=INK
    )
    return jpeg(result)


def pad(image: Image.Image) -> bytes:
    """A dark frame of 15 % of the longer side on every edge."""
    return png(ImageOps.expand(image, border=max(1, round(max(image.size) * 0.15)), fill="#202020"))


# Each takes an RGB image and gives an encoded file.
CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg30": lambda image: jpeg(image, 30),
    "jpeg10": lambda image: jpeg(image, 10),
    "half": half,
    "crop80": lambda image: crop(image, 0.8),
    "crop50": lambda image: crop(image, 0.5),
    "flip": lambda image: png(ImageOps.mirror(image)),
    "rotate10": rotate10,
    "rotate90": lambda image: png(image.transpose(Image.Transpose.ROTATE_90)),
    "brighter": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(1.2)),
    "colour": colour,
    "grey": lambda image: jpeg(image.convert("L")),
    "blur": lambda image: jpeg(image.filter(ImageFilter.GaussianBlur(2))),
    "text": text,
    "pad": pad,
}
# Changes that move pixels: hashes of the whole frame cannot follow them, alignment can.
GEOMETRIC = frozenset({"crop80", "crop50", "flip", "rotate10", "rotate90", "pad"})


# Documents of one template.


def _words(listed: str) -> tuple[str, ...]:
    return tuple(listed.split())


NOUNS = _words("""
account agreement archive article balance basis bridge budget campus canal capacity category census
channel charter circuit climate coast column committee compass concept condition contract council courier
craft current deposit desert detail device district drainage economy engine estate evidence exchange
factory feature festival filter forecast forest formula fraction garden gateway glacier grain habitat
harbour harvest history horizon household index industry insight interval inventory island journal
junction kitchen ladder laboratory language lecture library machine margin market material measure memory
meteor method migration mineral model module mountain museum network notebook observer orchard orbit
outcome packet parcel pattern pension period pigment planet platform policy portion practice premium
process product project province quarter railway record region report reserve resource response river
routine sample schedule sector series service shelter signal source statement station statute storage
stream supply surface survey symbol system terminal theory timber traffic transfer turbine valley variety
vessel village volume warehouse weather workshop
""")
VERBS = _words("""
absorbs affects alters arranges assigns balances borders carries combines compares connects covers crosses
defines delays describes enters exceeds explains extends follows guides holds improves includes joins
limits marks measures meets modifies monitors moves needs offers orders outlasts precedes presents
produces protects reaches receives reduces reflects removes repeats replaces requires resembles restores
returns reveals separates serves shapes shares shows spans stores supports tests traces transforms uses
widens
""")
LINKS = _words("""
because although while unless until since before after where whenever and but so yet
""")
GOODS = _words("""
paper envelopes folders binders staplers markers pencils notebooks labels toner cartridges cables adapters
keyboards monitors headsets chairs desks lamps shelves cabinets whiteboards erasers scissors tape glue
stamps calendars planners batteries chargers routers switches speakers webcams projectors screens mounts
trays baskets gloves towels soap filters kettles mugs plates bottles boxes crates pallets straps hinges
brackets screws bolts washers valves hoses pumps sensors gauges
""")
QUALITIES = _words("""
standard heavy-duty recycled compact wireless ergonomic adjustable magnetic transparent matte glossy
folding portable industrial premium economy double-sided waterproof insulated stainless anodised
""")
CITIES = _words("""
Ashford Brookfield Calder Dunmore Eastbourne Fairhaven Glenwood Harrow Inverness Jarrow Kendal Ludlow
Milford Norwick Oakham Penrith Queensbury Redhill Selby Thornton Upton Ventnor Whitby Yarrow
""")
NAMES = _words("""
Adler Barros Castillo Dubois Eriksen Fontaine Grant Haddad Ito Jansen Kowalski Lindqvist Moreau Novak
Okafor Petrov Quinn Rossi Santos Tanaka Ueda Varga Weber Xu Yilmaz Zimmermann
""")
MONTHS = _words("""
January February March April May June July August September October November December
""")
TRADES = _words("""
Trading Logistics Foods Printing Textiles Studios Engineering Pharmacy Bakery Motors Clinic
""")
PALETTE = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")


@functools.cache
def font(size: int) -> Font:
    return ImageFont.load_default(size)


def pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def date(rng: np.random.Generator) -> str:
    return f"{rng.integers(1, 29)} {pick(rng, MONTHS)} {rng.integers(2015, 2026)}"


def address(rng: np.random.Generator) -> list[str]:
    """Four or five lines: firm, person, street, city, sometimes a department."""
    lines = [
        f"{pick(rng, NAMES)} {pick(rng, TRADES)} Ltd",
        f"Attn. {pick(rng, NAMES)}",
        f"{rng.integers(1, 400)} {pick(rng, NOUNS).title()} {pick(rng, ('Street', 'Road', 'Lane'))}",
        f"{pick(rng, CITIES)} {rng.integers(10000, 99999)}",
    ]
    if rng.random() < 0.5:
        lines.insert(1, f"Department of {pick(rng, NOUNS).title()}")
    return lines


def sentence(rng: np.random.Generator) -> str:
    def clause() -> str:
        start = f"the {pick(rng, NOUNS)} {pick(rng, VERBS)} {pick(rng, ('the', 'each'))} {pick(rng, NOUNS)}"
        place = f" {pick(rng, ('near', 'under', 'beyond', 'of'))} the {pick(rng, NOUNS)}"
        return start + (place if rng.random() < 0.6 else "")

    words = clause() if rng.random() < 0.5 else f"{clause()} {pick(rng, LINKS)} {clause()}"
    return words[0].upper() + words[1:] + "."


def wrapped(words: str, width: int, face: Font) -> Iterator[str]:
    """Lines of at most `width` pixels."""
    line = ""
    for word in words.split():
        longer = f"{line} {word}".strip()
        if line and face.getlength(longer) > width:
            yield line
            line = word
        else:
            line = longer
    yield line


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    words: str,
    size: int,
    fill: str = INK,
    anchor: str = "la",
) -> None:
    draw.text(at, words, fill=fill, font=font(size), anchor=anchor)


def invoice(index: int, seed: int = 0) -> Image.Image:
    """An invoice of one company, 800 x 1000 RGB: same letterhead, another customer, other items and sums."""
    rng = rng_for(seed, f"invoice/{index}")
    sheet = Image.new("RGB", (800, 1000), "white")
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((0, 0, 800, 14), fill="#1d4e89")
    draw.ellipse((50, 40, 100, 90), fill="#1d4e89")
    write(draw, (75, 65), "H", 30, "white", "mm")
    write(draw, (115, 44), "Halden Office Supply", 24)
    write(draw, (115, 74), "48 Wharf Street, Milford 20417", 13, SOFT)
    write(draw, (750, 42), "INVOICE", 34, "#1d4e89", "ra")
    facts = (
        ("Number", f"{rng.integers(2015, 2026)}-{rng.integers(10000, 99999)}"),
        ("Date", date(rng)),
        ("Due", date(rng)),
        ("Order", f"{pick(rng, CITIES)[:3].upper()}{rng.integers(1000, 9999)}"),
    )
    for row, (label, value) in enumerate(facts):
        write(draw, (560, 92 + 20 * row), label, 13, SOFT)
        write(draw, (750, 92 + 20 * row), value, 13, INK, "ra")
    for left, title in ((50, "BILL TO"), (300, "SHIP TO")):
        write(draw, (left, 135), title, 12, SOFT)
        for row, line in enumerate(address(rng)):
            write(draw, (left, 155 + 21 * row), line, 16)
    bottom = invoice_items(draw, rng)
    notes = " ".join(sentence(rng) for _ in range(int(rng.integers(1, 7))))
    write(draw, (50, bottom + 30), "Notes", 13, SOFT)
    for row, line in enumerate(wrapped(notes, 420, font(15))):
        if bottom + 70 + 20 * row < 950:
            write(draw, (50, bottom + 50 + 20 * row), line, 15)
    draw.line((50, 955, 750, 955), fill=RULE)
    write(draw, (400, 972), "Halden Office Supply - VAT 204 178 334 - payable within 30 days", 12, SOFT, "ma")
    return sheet


def invoice_items(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> int:
    """The table of 5 to 9 items and its totals; returns the y below the table, in pixels."""
    draw.rectangle((50, 280, 750, 308), fill="#e8eef5")
    heads = ((60, "Item", "lm"), (530, "Qty", "rm"), (635, "Price", "rm"), (740, "Amount", "rm"))
    for left, title, anchor in heads:
        write(draw, (left, 294), title, 14, INK, anchor)
    total, y = 0, 308
    for _ in range(int(rng.integers(5, 10))):
        write(draw, (60, y + 18), f"{pick(rng, QUALITIES).capitalize()} {pick(rng, GOODS)}", 18, INK, "lm")
        quantity, cents = int(rng.integers(1, 240)), int(rng.integers(45, 48000))
        sums = (f"{quantity}", f"{cents / 100:,.2f}", f"{quantity * cents / 100:,.2f}")
        for (left, _, anchor), value in zip(heads[1:], sums, strict=True):
            write(draw, (left, y + 18), value, 17, INK, anchor)
        height = 36
        for _ in range(int(rng.integers(0, 3)) if y < 600 else 0):  # room for nine items above the footer
            detail = f"{pick(rng, NOUNS)} {pick(rng, NOUNS)}, {pick(rng, NOUNS)} {rng.integers(100, 99999)}"
            write(draw, (60, y + height + 5), detail, 15, SOFT, "lm")
            height += 22
        draw.line((50, y + height, 750, y + height), fill=RULE)
        total, y = total + quantity * cents, y + height
    rate = int(rng.choice([0, 5, 7, 10, 20]))
    tax = total * rate // 100
    for row, (label, due) in enumerate(
        (("Subtotal", total), (f"VAT {rate} %", tax), ("Total due", total + tax))
    ):
        write(draw, (540, y + 24 + 28 * row), label, 16, SOFT, "lm")
        write(draw, (740, y + 24 + 28 * row), f"{due / 100:,.2f}", 19 if row == 2 else 17, INK, "rm")
    return y


def page(index: int, seed: int = 0) -> Image.Image:
    """A page of a report, 800 x 1000 grey: headings and paragraphs of other words, of other lengths."""
    rng = rng_for(seed, f"page/{index}")
    sheet = Image.new("L", (800, 1000), "white")
    draw = ImageDraw.Draw(sheet)
    write(draw, (80, 40), "Annual report", 13, SOFT)
    write(draw, (720, 40), f"{rng.integers(3, 400)}", 13, SOFT, "ra")
    draw.line((80, 62, 720, 62), fill=RULE)
    y = 90
    while y < 860:
        chapter = (
            f"{rng.integers(1, 12)}.{rng.integers(1, 9)}  The {pick(rng, NOUNS)} and the {pick(rng, NOUNS)}"
        )
        write(draw, (80, y), chapter, 24)
        y += 44
        for _ in range(int(rng.integers(1, 4))):
            words = " ".join(sentence(rng) for _ in range(int(rng.integers(2, 9))))
            for line in wrapped(words, 640, font(17)):
                if y > 920:
                    break
                write(draw, (80, y), line, 17)
                y += 25
            y += 14
        y += int(rng.integers(6, 40))
    return sheet


def chart(index: int, seed: int = 0) -> Image.Image:
    """A bar or line chart, 640 x 480 RGB: one style, other series, labels and title."""
    rng = rng_for(seed, f"chart/{index}")
    canvas = Image.new("RGB", (640, 480), "white")
    draw = ImageDraw.Draw(canvas)
    left, top, right, bottom = 70, 70, 610, 400
    write(draw, (left, 18), f"{pick(rng, NOUNS).title()} by {pick(rng, NOUNS)}, {pick(rng, CITIES)}", 20)
    write(draw, (left, 44), f"{pick(rng, NOUNS)} in thousands, {rng.integers(1990, 2025)}", 13, SOFT)
    points, series = int(rng.integers(4, 10)), int(rng.integers(1, 4))
    bars = bool(rng.random() < 0.5)
    # A walk, so that lines look like measurements; float64 (series, points), in [0.05, 1].
    values = rng.random((series, 1)) + np.cumsum(rng.normal(0, 0.35, (series, points)), axis=1)
    values = 0.05 + 0.95 * (values - values.min()) / np.ptp(values)
    highest = int(rng.choice([5, 10, 20, 40, 60, 80, 100, 250, 400, 500, 1000]))
    for step in range(6):
        y = bottom - (bottom - top) * step // 5
        draw.line((left, y, right, y), fill=RULE if step else INK)
        write(draw, (left - 8, y), f"{highest * step / 5:g}", 12, SOFT, "rm")
    colours = [PALETTE[int(c)] for c in rng.permutation(len(PALETTE))[:series]]
    slot = (right - left) / points
    for point in range(points):
        write(draw, (left + slot * (point + 0.5), bottom + 8), pick(rng, NOUNS)[:7], 12, SOFT, "ma")
    for s, fill in enumerate(colours):
        heights: list[float] = (bottom - (bottom - top) * values[s]).tolist()
        if bars:
            wide = slot * 0.8 / series
            for point, high in enumerate(heights):
                x = left + slot * (point + 0.1) + wide * s
                draw.rectangle((x, high, x + wide - 2, bottom - 1), fill=fill)
        else:
            dots = [(left + slot * (point + 0.5), high) for point, high in enumerate(heights)]
            draw.line(dots, fill=fill, width=4, joint="curve")
            for x, high in dots:
                draw.ellipse((x - 5, high - 5, x + 5, high + 5), fill=fill)
        draw.rectangle((left + 180 * s, 440, left + 180 * s + 12, 452), fill=fill)
        write(draw, (left + 180 * s + 20, 446), f"{pick(rng, NOUNS)} {pick(rng, NOUNS)}", 13, INK, "lm")
    return canvas


def screen(index: int, seed: int = 0) -> Image.Image:
    """A window of one application, 800 x 600 RGB: same bars and buttons, another list, selection and figures."""
    rng = rng_for(seed, f"screen/{index}")
    window = Image.new("RGB", (800, 600), "#f6f8fa")
    draw = ImageDraw.Draw(window)
    draw.rectangle((0, 0, 800, 44), fill="#24292f")
    write(draw, (20, 22), "Halden Stock", 18, "white", "lm")
    draw.rounded_rectangle((480, 10, 780, 34), 6, fill="#57606a")
    write(draw, (492, 22), f"{pick(rng, QUALITIES)} {pick(rng, GOODS)}", 13, "white", "lm")
    draw.rectangle((0, 44, 170, 600), fill="#eaeef2")
    chosen = int(rng.integers(7))
    views = ("Overview", "Orders", "Deliveries", "Customers", "Suppliers", "Reports", "Settings")
    for row, view in enumerate(views):
        if row == chosen:
            draw.rectangle((0, 60 + 36 * row, 170, 94 + 36 * row), fill="#0969da")
        write(draw, (20, 77 + 36 * row), view, 15, "white" if row == chosen else INK, "lm")
    write(draw, (190, 64), f"{views[chosen]}: {pick(rng, CITIES)}", 22)
    for column in range(3):
        left = 190 + 200 * column
        draw.rounded_rectangle((left, 104, left + 184, 170), 8, fill="white", outline=RULE)
        write(draw, (left + 12, 112), f"{pick(rng, NOUNS).title()} {pick(rng, NOUNS)}", 12, SOFT)
        write(draw, (left + 12, 132), f"{rng.integers(1, 99999):,}", 26)
    rows = int(rng.integers(3, 12))
    draw.rectangle((190, 186, 774, 212 + 30 * rows), fill="white", outline=RULE)
    for left, title in ((200, "Customer"), (380, "Item"), (600, "State"), (700, "Sum")):
        write(draw, (left, 199), title, 12, SOFT, "lm")
    for row in range(rows):
        y = 227 + 30 * row
        if rng.random() < 0.2:
            draw.rectangle((191, y - 15, 773, y + 14), fill="#ddf4ff")
        draw.line((190, y - 15, 774, y - 15), fill=RULE)
        write(draw, (200, y), f"{pick(rng, NAMES)} {pick(rng, TRADES)}", 14, INK, "lm")
        write(draw, (380, y), f"{pick(rng, QUALITIES)} {pick(rng, GOODS)}"[:26], 14, INK, "lm")
        state = int(rng.integers(3))
        draw.rounded_rectangle((600, y - 10, 672, y + 10), 9, fill=("#2da44e", "#bf8700", "#cf222e")[state])
        write(draw, (636, y), ("shipped", "waiting", "held")[state], 12, "white", "mm")
        write(draw, (765, y), f"{rng.integers(100, 999999) / 100:,.2f}", 14, INK, "rm")
    draw.rounded_rectangle((670, 560, 774, 588), 6, fill="#2da44e")
    write(draw, (722, 574), "New order", 14, "white", "mm")
    return window


# (index, seed) -> image. Two of one template share what a designer made and nothing that a customer reads.
LOOKALIKES: dict[str, Callable[[int, int], Image.Image]] = {
    "invoice": invoice,
    "page": page,
    "chart": chart,
    "screen": screen,
}


# Broken files.


def truncated_jpeg() -> bytes:
    """The first 60 % of a photograph-sized JPEG: the header is whole, the scan is not."""
    data = jpeg(chart(0))
    return data[: len(data) * 6 // 10]


def chunk(kind: bytes, data: bytes) -> bytes:
    """One PNG chunk: length, kind, data, CRC."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def corrupt_png() -> bytes:
    """A PNG whose compressed pixels are overwritten in the middle: CRC and zlib stream are both wrong."""
    data = bytearray(png(chart(1)))
    start = data.index(b"IDAT") + 4
    middle = start + (len(data) - start) // 2
    data[middle : middle + 64] = b"\xff" * 64
    return bytes(data)


def bomb_png() -> bytes:
    """A valid 1-bit PNG of 50,000 x 50,000 black pixels: 2.5 billion pixels in about 300 KB.

    One compressed band of 500 rows, repeated: 313 MB of pixel data are neither held nor compressed. After a
    full flush a deflate stream refers to nothing before it, so that a band may follow itself.
    """
    side, rows = 50_000, 500
    row = 1 + side // 8  # bytes: filter type, then the pixels
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    band = packer.compress(bytes(row * rows)) + packer.flush(zlib.Z_FULL_FLUSH)
    adler32 = (side * row % 65521) << 16 | 1  # of that many zero bytes
    pixels = b"\x78\xda" + band * (side // rows) + b"\x03\x00" + struct.pack(">I", adler32)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


ERROR_PAGE = b"""<!DOCTYPE html>
<html><head><title>404 Not Found</title></head>
<body><h1>Not Found</h1><p>The requested image was not found on this server.</p></body></html>
"""

# File name -> its bytes; the stem is the fault, the extension is what the file claims to be.
BROKEN: dict[str, Callable[[], bytes]] = {
    "truncated.jpg": truncated_jpeg,
    "empty.jpg": lambda: b"",
    "text.jpg": lambda: b"This is a note that somebody saved under the wrong name.\n" * 20,
    "corrupt.png": corrupt_png,
    "bomb.png": bomb_png,
    "html.png": lambda: ERROR_PAGE,
}


# Planting.


def choose_originals(images: Sequence[Path], seed: int, count: int) -> list[Path]:
    """The `count` images with the smallest sha256(seed, file name), in that order.

    Raises: ValueError where two of them would give planted files of one name.
    """
    ranked = sorted(images, key=lambda path: hashlib.sha256(f"{seed}/{path.name}".encode()).digest())[:count]
    stems = [path.stem for path in ranked]
    if len(set(stems)) < len(stems):
        raise ValueError(f"originals need different stems, got {sorted(stems)}")
    return ranked


def plant(
    images: Sequence[Path], folder: Path, seed: int, originals: int = 20, lookalikes: int = 20
) -> list[Planted]:
    """Writes changes/, lookalikes/ and broken/ under `folder`; returns what was planted, sorted by name.

    `originals` images get each of the 14 changes; each of the four templates gives `lookalikes` documents.
    The same images and seed give the same bytes.
    """
    planted: list[Planted] = []

    def put(name: str, data: bytes, kind: str, what: str, original: str = "") -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        planted.append(Planted(name, kind, what, original))

    for path in choose_originals(images, seed, originals):
        with Image.open(path) as opened:
            image = flatten(ImageOps.exif_transpose(opened))
            for change, apply in CHANGES.items():
                data = apply(image)
                put(f"changes/{path.stem}-{change}.{extension(data)}", data, "change", change, path.name)
    for template, draw in LOOKALIKES.items():
        for index in range(lookalikes):
            data = png(draw(index, seed))
            put(f"lookalikes/{template}-{index:03}.{extension(data)}", data, "lookalike", template)
    for name, make in BROKEN.items():
        put(f"broken/{name}", make(), "broken", Path(name).stem)
    return sorted(planted)
