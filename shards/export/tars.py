"""Tar files of samples: what belongs to a sample lies together under one key. The same bytes for the same samples."""

import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from shards.export.parts import numbered, runs, unnumbered

Member = tuple[str, bytes]
"""Name and content."""


_END = bytes(2 * tarfile.BLOCKSIZE)


def _framed(name: str, content: bytes) -> Iterator[bytes]:
    """Header, content, and zeros up to a whole block. TarInfo's defaults are no clock, no owner and mode 644."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    yield header.tobuf(tarfile.USTAR_FORMAT)
    yield content
    yield bytes(-len(content) % tarfile.BLOCKSIZE)


def write_tars(folder: Path, entries: Iterable[Sequence[Member]], max_bytes: int) -> list[str]:
    """Files `train-00000-of-0000N.tar` of at most `max_bytes`, each entry whole in one of them; their names."""

    def sized() -> Iterator[tuple[int, list[bytes]]]:
        for members in entries:
            framed = [part for name, content in members for part in _framed(name, content)]
            yield sum(map(len, framed)), framed

    paths = []
    for number, run in enumerate(runs(sized(), max_bytes - len(_END))):
        paths.append(unnumbered(folder, "train", number, "tar"))
        # Not by TarFile, which remembers every header until it is closed.
        with paths[-1].open("wb") as stream:
            for framed in run:
                stream.writelines(framed)
            stream.write(_END)
    return numbered(paths)
