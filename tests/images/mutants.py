"""Small valid images, damaged: each mutant is a function of its number."""

import random
import struct
import zlib
from collections.abc import Callable

from tests.images.hostile import honest

_EXTREMES = (0, 1, 2, 7, 0x7F, 0x80, 0xFE, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 2**31 - 1, 2**31, 2**32 - 1)


def _flip(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _replace(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] = chance.choice((0, 255, 127, 128, chance.randrange(256)))


def _header(data: bytearray, chance: random.Random) -> None:
    """Nearer to the beginning than `_replace`, where formats keep sizes, depths and offsets."""
    for _ in range(chance.randint(1, 3)):
        data[min(int(chance.expovariate(1 / 24)), len(data) - 1)] = chance.randrange(256)


def _number(data: bytearray, chance: random.Random) -> None:
    """A length, count or offset of two or four bytes becomes an extreme one."""
    layout = chance.choice(("<I", ">I", "<H", ">H"))
    width = struct.calcsize(layout)
    value = chance.choice(_EXTREMES) & (256**width - 1)
    if len(data) > width:
        struct.pack_into(layout, data, chance.randrange(len(data) - width), value)


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[max(1, chance.randrange(len(data))) :]


def _remove(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    del data[at : at + chance.randint(1, 32)]
    data += b"\0" * (not data)


def _repeat(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    piece = data[at : at + chance.randint(1, 64)]
    data[at:at] = piece * chance.choice((1, 2, 50))


def _splice(data: bytearray, chance: random.Random) -> None:
    """A piece of another image, over this one's or between."""
    other = chance.choice(_BASES)
    start = chance.randrange(len(other))
    piece = other[start : start + chance.randint(1, 200)]
    at = chance.randrange(len(data))
    data[at : at + chance.choice((0, len(piece)))] = piece


_CHANGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip,
    _replace,
    _header,
    _header,
    _number,
    _number,
    _cut,
    _remove,
    _repeat,
    _splice,
)


def _sums_mended(png: bytes) -> bytes:
    """The PNG with every chunk's checksum made right, so that what is in the chunks is read."""
    mended, at = bytearray(png), 8
    while at + 12 <= len(mended):
        (length,) = struct.unpack_from(">I", mended, at)
        end = at + 8 + length
        if end + 4 > len(mended):
            break
        struct.pack_into(">I", mended, end, zlib.crc32(mended[at + 4 : end]))
        at = end + 4
    return bytes(mended)


_BASES = tuple(honest().values())


def mutant(number: int) -> bytes:
    """The mutant of that number, the same on every machine that encodes the honest images alike."""
    chance = random.Random(number)
    data = bytearray(_BASES[number % len(_BASES)])
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        chance.choice(_CHANGES)(data, chance)
    if data.startswith(b"\x89PNG") and chance.random() < 0.7:
        return _sums_mended(bytes(data))
    return bytes(data)
