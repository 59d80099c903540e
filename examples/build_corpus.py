"""Builds the corpus beside this script: about 240 small, free, captioned images.

    python examples/build_corpus.py

Sources: the Debian packages openclipart-png and openclipart-svg (fetched with apt-get, unpacked without
root) and the photographs that scikit-image ships in its wheel. Nothing is drawn at random: candidates are
walked in the order of sha256(path), so the same packages give the same files. The result is committed; this
script tells how it came to be.
"""

import argparse
import gzip
import hashlib
import html
import io
import itertools
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import imagehash
import numpy as np
import skimage
from PIL import Image

HERE = Path(__file__).parent
PACKAGES = ("openclipart-png", "openclipart-svg")
PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"
QUESTIONS = (
    "Describe this image.",
    "What does this picture show?",
    "Write a short caption for this image.",
    "What can you see here?",
    "Give a one-sentence description of the picture.",
    "What is depicted in this image?",
)
MIN_SIDE = 200
CLIP_ART_SIDE, PHOTO_SIDE = 320, 448
# Two images at most this far apart could pass for copies: 10 of 64 pHash bits, or 16 % of 1,024.
COPY_BITS_64, COPY_BITS_1024 = 10, int(0.16 * 1024)


class Photo(NamedTuple):
    file: str  # in scikit-image's data folder
    title: str
    author: str
    license: str
    keywords: tuple[str, ...]
    caption: str


CC0, PUBLIC = "CC0-1.0", "public domain"
# fmt: off
# Left out: coins and immunohistochemistry ('no known copyright restrictions' names no dedication), moon,
# page, colour wheel, logo and motorcycle (no licence stated), microaneurysms and text (under 200 pixels).
PHOTOS = (
    Photo("astronaut.png", "astronaut portrait", "NASA", PUBLIC, ("astronaut", "portrait", "space suit"),
          "A portrait of the astronaut Eileen Collins in an orange space suit, in front of a flag and a "
          "model of the space shuttle."),
    Photo("brick.png", "brick wall", "CC0Textures", CC0, ("brick", "wall", "texture"),
          "A grey close-up photo of a brick wall."),
    Photo("camera.png", "man with camera", "Lav Varshney", CC0, ("camera", "man", "tripod"),
          "A black and white photo of a man looking through a camera on a tripod, outdoors."),
    Photo("cell.png", "cell in saline", "Paul Mueller et al.", CC0, ("cell", "microscopy", "hologram"),
          "A microscope image of a single cell floating in saline."),
    Photo("chelsea.png", "tabby cat", "Stefan van der Walt", CC0, ("cat", "pet", "whiskers"),
          "A close-up photo of Chelsea, a tabby cat."),
    Photo("clock_motion.png", "blurred wall clock", "Stefan van der Walt", PUBLIC, ("clock", "motion blur"),
          "A wall clock, blurred because the camera moved sideways."),
    Photo("coffee.png", "cup of espresso", "Rachel Michetti", CC0, ("coffee", "espresso", "cup"),
          "A cup of espresso with a spoon on a saucer, on a wooden table."),
    Photo("grass.png", "grass", "linolafett", CC0, ("grass", "lawn", "texture"),
          "A grey photo of grass seen from above."),
    Photo("gravel.png", "gravel", "CC0Textures", CC0, ("gravel", "stones", "texture"),
          "A grey close-up photo of gravel."),
    Photo("horse.png", "horse silhouette", "Andreas Preuss", CC0, ("horse", "silhouette"),
          "The black silhouette of a horse."),
    Photo("hubble_deep_field.jpg", "hubble deep field", "NASA", PUBLIC, ("galaxies", "space", "telescope"),
          "The Hubble extreme deep field: hundreds of galaxies on a black sky."),
    Photo("retina.jpg", "human retina", "Mikael Haggstrom", CC0, ("retina", "eye", "medicine"),
          "A fundus photo of a human retina with its blood vessels."),
    Photo("rocket.jpg", "rocket launch", "SpaceX", PUBLIC, ("rocket", "launch", "spacecraft"),
          "A Falcon 9 rocket with the DSCOVR satellite on its launch pad at dusk."),
)
# fmt: on

# Authors whose titles are mostly not in English.
AUTHORS_SKIPPED = ("Rollandin", "Balin")

# At the start of a word in path, title, description or keywords they leave an image out: weapons, politics,
# religion, alcohol and the like, nudity, portraits of named people, trademarks.
STOPPED = """
weapon gun pistol rifle sword knife knives dagger katana ninja nunchak bomb grenade missile militar soldier
army war_ ammo skull bone death dead_ kill gallows blood scalpel axe_ target shoot biohazard nuclear
radioact flag politic government president capitol soviet commun nazi swastik sunwheel anarch peace campaign
national map_ maps_ religi christ jesus cross_ crucif bibl church god_ goddess angel pray kanji yang israel
easter eris discord illuminat pentag tomb saint devil halloween zodiac cannabis smok cigar beer wine alcohol
martini cocktail champagne casino gambl cork sexy nude naked babe_ erotic pregnan bikini breast tattoo tatoo
tux linux gnome kde_ debian gentoo inkscape openoffice openclipart emule cisco alcatel nikon sony gameboy
nintendo atari xbox pacman packman tetris pong_ rubik toyota shelby skoda sprint imac mac_ microsoft windows
coke_ vgcats hitchhiker disney pokemon beckham einstein coltrane king leisler spaghetti velocette
grandstream orleans test_ untitled template unknown webicon theme
"""
# Whole words of other languages; the titles and descriptions are kept in English.
FOREIGN = "di del della il la le les con el un una um uma des du und der das mit en et au een"
STOP_WORDS = re.compile(
    rf"(?<![a-z])(?:{'|'.join(STOPPED.split())}|(?:{'|'.join(FOREIGN.split())})_)".replace("_", r"(?![a-z])")
)

# What a person picked on a contact sheet of the 583 that pass the rules, by the title in kebab case; left
# out were mirrored pairs, pictures hard to read, portraits, and titles that say too little. These are
# described by their title...
PICKED = """
acorn alarm-clock alien baseball bear bee bicycle big-house bison blue-folder blue-vacuum-cleaner
bouquet-of-flowers bowl-of-steaming-soup box burger butterfly camcorder capacitors cardboard-box
cartoon-squirrel certificate chemistry-flask cherry clipboard closed-book closed-box construction-hammer
crazy-cookie croissant daisy desk-lamp drill echidna elephant-symbol emperor-penguin eye factory
fall-coloured-tree fern flower flowers folder-icon fondue globe golf-symbols grain-elevator green-arrow
groom handshake hot-dog icicles iris-and-pupil ironing-board ladybug landscape-near-the-river large-braces
maracas milk-carton modern-clock mushroom old-car old-hanging-sign onion open-book orange paint-brush
paint-roller paint-roller-border pan piano piano-keys pink-cake pointing-hand red-flower red-telephone reed
resistors saxophone school-hallway server simple-calculator simple-crown-with-one-riser simple-teddy-bear
sledge slouch-hat small-house smiley snowman spyglass stack-of-books strawberry telephone-receiver telescope
television tiger trawler truck unit-blocks water-tower watermelon wedding-couple wild-summer-shorts
winter-hat wooden-barrel wrench
"""

# ...and these by a phrase that mends the title's spelling, order or language.
MENDED = """
african-drum: an African drum; an-apple: an apple with a leaf;
arctic-greyling-jumping: a jumping Arctic grayling; arrow-next: an arrow that points right;
aussie-hat: an Aussie hat; ayres-rock-australia: Ayers Rock in Australia;
b-w-tiger: a tiger in black and white; backpacker-heavy-load: a backpacker with a heavy load;
baseball-cap: a baseball cap in black and white; black-and-white-pawns: a black and a white pawn;
blue-cut-gemstone-saphire: a blue cut sapphire; blue-stamper: a blue stapler; bofish: a round pink fish;
books-aj: two books; bus: a bus seen from the side and from the front;
busy-mom-with-child-and-pets: a busy mom with child and pets; button-blue: a round blue button;
bypasspruner: bypass pruners; calebasse: a calabash bowl;
capsized-sailing-illustration: a capsized sailing boat;
carnegie-library-building: a Carnegie library building; celtic-harp-simple: a simple Celtic harp;
celtic-solomons-knot: a Celtic Solomon's knot; cfbulb-brightlit: a brightly lit compact fluorescent bulb;
chateau: a small castle; color-tiger: a tiger in colour; colori: coloured pencils;
computer-aj: a desktop computer with monitor and keyboard; copyright: the copyright symbol;
crazy-monkey: a crazy monkey; dancer-sketch: a dancer, a sketch; disability-sign: a disability sign;
dog-on-leash: a dog on a leash; earth-globe: a simple globe centered on North America;
eiffel-tower: the Eiffel Tower; engrenagem: gears; envelop: an envelope; etiquette-laptop: a laptop;
etiquette-printer: a printer; fall-coloured-leaf: fall coloured leaves; fire: a fire;
firestation: a fire station; flourish-two-horizontal: a horizontal flourish;
full-bloom: a rose in full bloom; full-moon: a full moon; heart-arrow: a heart with an arrow;
heart-ballons: heart-shaped balloons; heart-cluster: a cluster of hearts; heart-tiles: tiles with hearts;
hedge-shear: hedge shears; hotel-icon-in-room-phone: a hotel icon for a phone in the room;
hotel-icon-laundromat: a hotel icon for a laundromat;
hotel-icon-pets-welcome: a hotel icon that says pets are welcome;
hotel-icon-rail-transport: a hotel icon for rail transport;
inservice-presentation: a woman giving a presentation; jibe-diagram-sailing: the jibe, a sailing diagram;
joystick-black-red: a black and red joystick; juice-glass: a glass of juice; jupiter: the planet Jupiter;
knot-illustration-bowline: the bowline knot, step by step;
knot-illustration-square: the square knot, step by step;
labrador-retriever-black: a black Labrador retriever; lcd-monitor: an LCD monitor;
left-bottom-corner-tribal: a tribal ornament for the lower left corner; left-foot-print: a left footprint;
left-hand-print: a left handprint; lightbulb-lit: a lit light bulb;
lighthouse: a lighthouse with red and white stripes; magnifing-glass: a magnifying glass;
magnolia-white: a white magnolia; mars: the planet Mars; monetary-euro-symbol: the euro symbol;
moon: the moon with craters; mouse: a computer mouse; my-house: a small house with a red roof;
no-entrance-sign: a no-entrance sign; northern-hemisphere-globe: a globe of the northern hemisphere;
note-with-paperclip: a note with a paper clip; note-with-pin: a note with a pin;
paint-roller-wall: a paint roller on a wall; paperback-book-black: a black paperback book;
paperbag: a paper bag; parking: a parking sign; pda: a PDA with a stylus;
phone-handset-gray: a grey phone handset; piramide: a pyramid in layers; pizza-slice: a slice of pizza;
plane-silhouet: the silhouette of a plane; police-man: a policeman; pudim: a pudding;
quay-sign: a quay warning sign; raccoon-opening-box: a raccoon opening a box;
rainbow-of-light-emitting-diodes: a rainbow of light-emitting diodes;
reminder-hand: a finger with a ribbon as a reminder; rubber-duck-open-bill: a rubber duck with an open bill;
running-free-sailing: a boat running free before the wind; sakura: a cherry blossom;
saturn: the planet Saturn; scrub-brush: a wooden scrub brush; shamrock-symbol: a shamrock;
simple-evergreen-with-highlights: a simple evergreen with highlights;
slate-apple: a school slate and an apple; soup: a pot of soup; star-double: a double star;
stara-ksiega-old-book: an old book; stop-sign-angled: an angled stop sign; stylized-cd: a stylized CD;
stylized-teddy-bear-with-heart: a stylized teddy bear with a heart; the-electronic-mail: electronic mail;
thongs: a pair of flip-flops; traffic-light: a traffic light with all lights on;
tree-branches-and-roots: a tree with branches and roots; tree-whit-fruits: a tree with fruit;
trip-to-the-beach: a trip to the beach; turkey-on-platter: a turkey on a platter;
two-sailboats-in-sunset: two sailboats in the sunset; usb-memory-stick: a USB memory stick;
vavuum-cleaner-upright: an upright vacuum cleaner; violin: violins; warning: a roadworks warning sign;
water-balloon-throw: a water balloon thrown at a man; wooden-mallot: a wooden mallet;
wreath-of-evergreen-with-red-berries: an evergreen wreath with red berries;
yet-another-chess-game: a chess board with all pieces
"""
PHRASES: dict[str, str] = dict.fromkeys(PICKED.split(), "")
PHRASES.update(
    (stem, phrase) for stem, phrase in (pair.split(": ") for pair in " ".join(MENDED.split()).split("; "))
)


class Item(NamedTuple):
    """One image that may enter the corpus, with what its source says about it."""

    source: Path  # PNG or JPEG in the package
    key: str  # path inside the package: the seed of every choice about this image
    category: str
    title: str
    caption: str
    keywords: tuple[str, ...]
    author: str
    license: str
    origin: str


class Chosen(NamedTuple):
    item: Item
    name: str  # file name in examples/images
    data: bytes


def seeded(*parts: str) -> int:
    """A number in [0, 2**64) that depends on nothing but the words given."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")


def fetch_packages(work: Path) -> Path:
    """Downloads and unpacks the Debian packages; returns the folder with png/ and svg/."""
    root = work / "root"
    for package in PACKAGES:
        if (root / "usr/share/doc" / package).exists():
            continue
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], cwd=work, check=True)
        (deb,) = work.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(deb), str(root)], check=True)
    return root / "usr/share/openclipart"


def metadata(svg: Path) -> dict[str, Any]:
    """Dublin Core fields of one SVG: title, description, author, license, keywords ('' or () where missing).

    Raises: ElementTree.ParseError where the file is no XML.
    """
    raw = svg.read_bytes()
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8", "replace")
    block = re.search(r"<(?:\w+:)?RDF\b.*?</(?:\w+:)?RDF>", text, re.DOTALL)
    if not block:
        return {}
    # Prefixes are often declared outside the block, on the root element: without them the block parses alone.
    bare = re.sub(r"<(/?)\w+:", r"<\1", re.sub(r'\s(?:xmlns(?::\w+)?="[^"]*")', "", block.group(0)))
    bare = re.sub(r"\s\w+:(\w+)=", r" \1=", bare)
    work = ElementTree.fromstring(bare).find("Work")
    if work is None:
        return {}

    def words(path: str) -> str:
        found = work.find(path)
        text = "" if found is None else "".join(found.itertext())
        return re.sub(r"\s+", " ", html.unescape(text)).strip()  # many files escape twice

    license_node = work.find("license")
    return {
        "title": words("title"),
        "description": words("description"),
        "author": words("creator/Agent/title"),
        "license": license_node.get("resource", "") if license_node is not None else "",
        "keywords": tuple((li.text or "").strip().lower() for li in work.iter("li")),
    }


def clean_title(title: str) -> str:
    """A title as a phrase: 'Sandwich_One_bw' -> 'sandwich one', 'Grapes 02' -> 'grapes'; '' if all goes."""
    title = re.sub(r"\.svg$|\(?\bb and w\)?|[_ ]bw$", "", title, flags=re.IGNORECASE)
    title = re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", title)
    title = re.sub(r"[\s#-]*\b(?:v|version)?\.?\s*\d+$|(?<=[a-z])\d+$", "", title, flags=re.IGNORECASE)
    title = re.sub(r"\(([^)]*)\)$", r", \1", re.sub(r"\s+", " ", title).strip(" .,-!:"))
    return title.replace(" ,", ",").lower()


def kebab(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def with_article(title: str) -> str:
    """'water skier' -> 'a water skier'; a plural stays as it is."""
    head = re.split(r",| (?:with|of|in|on|for|and)\b", title)[0].split()[-1]
    if head.endswith("s") and not head.endswith(("ss", "us", "is")):
        return title
    return f"{'an' if title[0] in 'aeiou' else 'a'} {title}"


# Descriptions of the file, its making or its terms rather than of the picture.
NOT_PROSE = re.compile(
    r"http|www|@|hash\(|svg|inkscape|sodipodi|clip|creat|convert|trac|image|vector|\bI\b|released|draw|\bmy\b"
    r"|collection|derivative|logo|print|useful|enjoy|[<>{}\[\]=!;]|:\)",
    re.IGNORECASE,
)


def clean_description(description: str, title: str) -> str:
    """The description as one sentence where it is short prose and says more than the title; else ''."""
    if not 12 <= len(description) <= 120 or not description.isascii() or NOT_PROSE.search(description):
        return ""
    stems = {word[:5] for word in re.findall(r"[a-z]+", title.lower())}
    if len([w for w in re.findall(r"[a-z]{4,}", description.lower()) if w[:5] not in stems]) < 2:
        return ""
    return description[0].upper() + description[1:].rstrip(" .") + "."


def clip_art(root: Path) -> Iterator[Item]:
    """Every openclipart image with a PNG, a public-domain tag, an English title of its own and a keyword.

    Titles used more than three times name a series ('Lemon SVG theme'), not a picture.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for svg in sorted((root / "svg").rglob("*.svg*")):
        key = svg.relative_to(root / "svg").with_suffix("").as_posix()
        if not svg.is_symlink() and (root / "png" / f"{key}.png").is_file():
            try:
                found.append((key, metadata(svg)))
            except ElementTree.ParseError:
                continue
    uses = Counter(fields.get("title", "").lower() for _, fields in found)
    for key, fields in found:
        keywords = tuple(
            dict.fromkeys(k for k in fields.get("keywords", ()) if k and k not in ("hash", "unsorted"))
        )
        title = clean_title(fields.get("title", ""))
        if fields.get("license") != PUBLIC_DOMAIN or not keywords or uses[fields["title"].lower()] > 3:
            continue
        if len(title) < 3 or not title.isascii() or (stem := kebab(title)) not in PHRASES:
            continue
        text = " ".join((key, title, fields["description"], *keywords)).lower()
        if any(author in fields["author"] for author in AUTHORS_SKIPPED) or STOP_WORDS.search(text):
            continue
        # A mended phrase says what the description would add.
        described = "" if PHRASES[stem] else clean_description(fields["description"], title)
        caption = f"A clip-art drawing of {PHRASES[stem] or with_article(title)}."
        caption = f"{caption} {described}".strip()
        yield Item(
            source=root / "png" / f"{key}.png",
            key=key,
            category=key.split("/")[0],
            title=title,
            caption=caption,
            keywords=keywords,
            author=fields["author"],
            license="public domain",
            origin="openclipart",
        )


def photos() -> Iterator[Item]:
    """The photographs in scikit-image's wheel whose docstrings state CC0 or public domain."""
    folder = Path(skimage.__file__).parent / "data"
    for photo in PHOTOS:
        yield Item(
            source=folder / photo.file,
            key=f"scikit-image/{photo.file}",
            category="photos",
            title=photo.title,
            caption=photo.caption,
            keywords=photo.keywords,
            author=photo.author,
            license=photo.license,
            origin="scikit-image",
        )


def on_white(image: Image.Image) -> Image.Image:
    """RGB, transparent pixels shown as white."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def load(item: Item) -> Image.Image | None:
    """The picture at its final size, RGB or RGBA; None where it is too small, long, large or nearly blank."""
    side = PHOTO_SIDE if item.origin == "scikit-image" else CLIP_ART_SIDE
    with Image.open(item.source) as image:
        if min(image.size) < MIN_SIDE or max(image.size) > 2 * min(image.size) or max(image.size) > 6000:
            return None
        picture = image.convert("RGBA" if image.mode in ("RGBA", "LA", "P") else "RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    flat = np.asarray(on_white(picture).convert("L"))  # uint8 (H, W)
    commonest = np.bincount(flat.ravel() >> 3, minlength=32).max() / flat.size
    if item.origin == "openclipart" and (flat.std() < 28 or commonest > 0.9):
        return None
    transparent = picture.mode == "RGBA" and np.asarray(picture)[..., 3].min() < 250
    # Half of the transparent pictures keep their alpha, so that the corpus holds both kinds.
    return picture if transparent and seeded("alpha", item.key) % 2 else on_white(picture)


def encode(picture: Image.Image, photo: bool) -> tuple[bytes, str]:
    """A small faithful encoding and its extension: palette PNG above 38 dB, else JPEG 88 (PNG with alpha)."""

    def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, optimize=True, **options)
        return buffer.getvalue()

    reference = np.asarray(on_white(picture), np.float32)
    for colours in () if photo else (32, 64, 128, 256):
        method = Image.Quantize.FASTOCTREE if picture.mode == "RGBA" else Image.Quantize.MEDIANCUT
        palette = picture.quantize(colours, method=method, dither=Image.Dither.NONE)
        error = float(np.mean((np.asarray(on_white(palette), np.float32) - reference) ** 2))
        if error < 255**2 / 10**3.8:
            return saved(palette, "PNG"), "png"
    if picture.mode == "RGBA":
        return saved(picture, "PNG"), "png"
    return saved(picture, "JPEG", quality=88), "jpg"


class Screen:
    """Remembers the hashes of accepted images and refuses whatever could pass for a copy of one."""

    def __init__(self) -> None:
        self.hashes: list[tuple[imagehash.ImageHash, imagehash.ImageHash]] = []

    def admits(self, data: bytes) -> bool:
        flat = on_white(Image.open(io.BytesIO(data)))
        short, long = imagehash.phash(flat), imagehash.phash(flat, hash_size=32)
        if any(short - s <= COPY_BITS_64 or long - h <= COPY_BITS_1024 for s, h in self.hashes):
            return False
        self.hashes.append((short, long))
        return True


def in_turns(items: Iterable[Item]) -> Iterator[Item]:
    """One of each category, then the next of each, so that small categories are not drowned by the large."""
    rooms: dict[str, list[Item]] = {}
    for item in sorted(items, key=lambda item: seeded("order", item.key)):
        rooms.setdefault(item.category, []).append(item)
    for row in itertools.zip_longest(*(rooms[category] for category in sorted(rooms))):
        yield from (item for item in row if item is not None)


def choose(root: Path) -> list[Chosen]:
    """Walks photographs, then clip art in turns; whatever looks like an image already chosen stays out."""
    screen = Screen()
    chosen: dict[str, Chosen] = {}
    for item in itertools.chain(photos(), in_turns(clip_art(root))):
        stem = kebab(item.title)
        if stem in chosen or (picture := load(item)) is None:
            continue
        data, extension = encode(picture, photo=item.origin == "scikit-image")
        if screen.admits(data):
            chosen[stem] = Chosen(item, f"{stem}.{extension}", data)
    return sorted(chosen.values(), key=lambda c: c.name)


def caption_line(chosen: Chosen) -> str:
    """One line of captions.jsonl, in LLaVA's form."""
    item = chosen.item
    question = QUESTIONS[seeded("question", item.key) % len(QUESTIONS)]
    record = {
        "id": chosen.name.rsplit(".", 1)[0],
        "image": chosen.name,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": item.caption},
        ],
        "keywords": list(item.keywords),
        "license": item.license,
        "origin": item.origin,
    }
    return json.dumps(record, ensure_ascii=False)


def credits_page(chosen: list[Chosen]) -> str:
    """CREDITS.md: one table row for each image."""

    def author(name: str) -> str:
        name = re.sub(r"[|<>]", " ", re.sub(r" *[<(]?[^ ]+@[^ ]+", "", name)).strip()  # no mail addresses
        return "unknown" if name in ("", "author") else name

    rows = [
        f"| {c.name} | {c.item.origin}: `{c.item.key.removeprefix('scikit-image/')}` "
        f"| {author(c.item.author)} | {c.item.license} |"
        for c in chosen
    ]
    text = (
        "Images with the origin openclipart come from the Debian packages openclipart-png and\n"
        "openclipart-svg (Open Clip Art Library, release 0.18) and are tagged public domain in their\n"
        "SVG metadata. Those with the origin scikit-image come from its wheel; the docstrings of\n"
        "`skimage.data` state their licences. All were scaled down and encoded anew by\n"
        "`build_corpus.py`."
    )
    return "\n".join(
        ["# Credits", "", text, "", "| image | origin | author | licence |", "|---|---|---|---|", *rows, ""]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Build the example corpus from Debian packages and scikit-image."
    )
    parser.add_argument(
        "--work", type=Path, default=HERE / ".build", help="folder for packages (not committed)"
    )
    parser.add_argument("--output", type=Path, default=HERE, help="gets images/, captions.jsonl, CREDITS.md")
    args = parser.parse_args()
    # One openclipart PNG declares 623 million pixels; load() looks at sizes before it decodes.
    Image.MAX_IMAGE_PIXELS = None
    chosen = choose(fetch_packages(args.work))
    images = args.output / "images"
    images.mkdir(parents=True, exist_ok=True)
    for old in images.iterdir():
        old.unlink()
    for c in chosen:
        (images / c.name).write_bytes(c.data)
    lines = "".join(caption_line(c) + "\n" for c in chosen)
    (args.output / "captions.jsonl").write_text(lines, encoding="utf-8")
    (args.output / "CREDITS.md").write_text(credits_page(chosen), encoding="utf-8")
    print(f"{len(chosen)} images, {sum(len(c.data) for c in chosen):,} bytes")


if __name__ == "__main__":
    main()
