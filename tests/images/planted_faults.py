"""What a faulty decoder would do, in place of a faulty decoder: imported by the workers of the pools under test."""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np

from images.decode import Decoded, DecodeMode, Limits, decode
from shards.errors import BadData
from shards.records import Geometry, ImageFacts


def _loop() -> None:
    while True:
        pass


def _fill() -> None:
    # Touched, so that the memory is had and not only promised.
    np.ones(4 << 30, np.uint8)


def _raise_sys_exit() -> None:
    sys.exit(3)


FAULTS = {
    b"segfault": lambda: ctypes.string_at(0),
    b"abort": os.abort,
    b"loop": _loop,
    b"four gigabytes": _fill,
    b"sleep": lambda: time.sleep(1e6),
    b"exit": lambda: os._exit(3),
    b"sys.exit": _raise_sys_exit,
    b"sigkill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    b"recursion": lambda: FAULTS[b"recursion"](),
    b"value error": lambda: int("no number"),
    b"odd code": lambda: (_ for _ in ()).throw(BadData("made_up", "of no known code")),
    b"machine": lambda: Path("/no such file").read_bytes(),
}


def decode_or_fail(encoded: bytes, geometry: Geometry, limits: Limits, mode: DecodeMode = "exact") -> Decoded:
    """`decode`, unless the bytes are the name of a fault."""
    if fault := FAULTS.get(encoded):
        fault()
    return decode(encoded, geometry, limits, mode)


def echo(encoded: bytes) -> bytes:
    return encoded


def enlarged(encoded: bytes, num_bytes: int) -> bytes:
    return encoded * (num_bytes // max(1, len(encoded)))


def killed_once(encoded: bytes, note: str) -> bytes:
    """Killed from outside, the first time that it is tried."""
    if encoded == b"innocent" and not Path(note).exists():
        os.kill(os.getppid(), 0)
        os.mkfifo(note)  # a file would meet the cap on what is written
        os.kill(os.getpid(), signal.SIGKILL)
    return encoded


def corrupt_late(encoded: bytes) -> bytes:
    """An image that does damage which ends the process only at the next one, unless there is none."""
    if _DAMAGE:
        os.abort()
    if encoded == b"corrupts":
        _DAMAGE.append(encoded)
    return encoded


_DAMAGE: list[bytes] = []


def surroundings(encoded: bytes) -> bytes:
    """What a worker sees: environment, modules, open files, limits."""
    files = {}
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists them
            files[fd.name] = str(fd.readlink())
    seen = {
        "environment": Path("/proc/self/environ").read_text().split("\0"),
        "environ": dict(os.environ),
        "modules": sorted(sys.modules),
        "main": getattr(sys.modules["__main__"], "__file__", ""),
        "files": files,
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "memory": resource.getrlimit(resource.RLIMIT_AS),
        "pid": os.getpid(),
    }
    return json.dumps(seen).encode()


def bloat(encoded: bytes) -> ImageFacts:
    raise MemoryError("planted")
