"""The page cache of single files: drop it, and see whether it is gone. Linux; needs no rights beyond reading the files."""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)


def drop(folder: Path) -> None:
    """Write back the files below `folder` and drop their pages. Raises RuntimeError where more than 1 % stays: somebody has them mapped."""
    files = files_below(folder)
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    share = resident_share(files)
    if share > 0.01:
        raise RuntimeError(f"{folder}: {share:.0%} of the pages are still cached")


def resident_share(paths: Iterable[Path]) -> float:
    """The share of the files' pages that is in memory, by mincore, in [0, 1]."""
    resident = pages = 0
    for path in paths:
        size = path.stat().st_size
        if size == 0:
            continue
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), size, mmap.MAP_PRIVATE) as mapped:
            count = -(-size // mmap.PAGESIZE)
            flags = (ctypes.c_ubyte * count)()
            start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            if _LIBC.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), flags):
                raise OSError(ctypes.get_errno(), "mincore")
            resident += sum(flag & 1 for flag in flags)
            pages += count
    return resident / max(pages, 1)


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
