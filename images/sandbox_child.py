"""The other side of `images.sandbox`: a server process that forks workers, the workers, and the memory they share with the pool.

The server is a process of our own and not multiprocessing's `forkserver`: that one is shared with whoever else in the process uses
it, hands the whole environment on and imports the main module again in every child. This one starts with an allow-list of
environment variables, has the decoders imported, and stays single-threaded, so that forking a worker takes milliseconds.
"""

import contextlib
import ctypes
import fcntl
import functools
import gc
import io
import itertools
import json
import mmap
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards.errors import BadData
from shards.records import ImageFacts

_HEADER = struct.Struct("<iiqq")
"""The image in hand, how many are answered, bytes of the request, bytes by which the worker's memory has grown."""
_ANSWER = struct.Struct("<qq")
"""Bytes of an answer's description and of its data, before the two."""
_REQUEST_BYTES = 1 << 20
_KEPT_BYTES = 4 << 20
"""A slot that held more gives its pages back after each use."""

_PR_SET_PDEATHSIG = 1

NO_IMAGE = -1


class Answer(NamedTuple):
    """What a worker says of one image: a kind, what describes it (JSON), and its bytes."""

    kind: str
    fields: list[Any]
    data: bytes | memoryview = b""


class Slot:
    """Shared memory without a name for one batch on its way to a worker and its answers on their way back.

    Nobody can be left with it: it is gone with the last process that holds it. It is as large as any batch may need, and costs
    what has been written. The worker cannot shrink it under the pool's hands.
    """

    def __init__(self, fd: int, input_bytes: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, os.fstat(fd).st_size)
        self._view = memoryview(self._memory)
        self._answers_at = _HEADER.size + _REQUEST_BYTES + input_bytes
        self._end = self._answers_at

    @classmethod
    def create(cls, input_bytes: int, output_bytes: int) -> "Slot":
        fd = os.memfd_create("shardmill-decode", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, _HEADER.size + _REQUEST_BYTES + input_bytes + output_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return cls(fd, input_bytes)

    def close(self) -> None:
        self._view.release()
        self._memory.close()
        os.close(self.fd)

    # The pool's side.

    def write(self, work: bytes, images: Sequence[bytes]) -> None:
        """Put a batch in: the pickled work, and the encoded images."""
        request = pickle.dumps((work, [len(encoded) for encoded in images]))
        if len(request) > _REQUEST_BYTES:
            raise ValueError(f"arguments of {len(request)} bytes are no arguments")
        _HEADER.pack_into(self._view, 0, NO_IMAGE, 0, len(request), 0)
        at = _HEADER.size
        self._view[at : at + len(request)] = request
        at += _REQUEST_BYTES
        for encoded in images:
            self._view[at : at + len(encoded)] = encoded
            at += len(encoded)
        self._end = at

    def progress(self) -> tuple[int, int]:
        """The image in hand, -1 for none, and how many are answered."""
        hand, answered, *_ = _HEADER.unpack_from(self._view)
        return hand, answered

    @property
    def grown(self) -> int:
        """Bytes by which the worker's address space was larger after the batch than at its start."""
        return int(_HEADER.unpack_from(self._view)[3])

    def answers(self, count: int) -> list[Answer]:
        """The answers to `count` images, copied out. Raises ValueError for what no worker of ours would write."""
        if self.progress()[1] != count:
            raise ValueError("another number of answers than of images")
        found, at = [], self._answers_at
        for _ in range(count):
            described, length = _ANSWER.unpack(self._piece(at, _ANSWER.size))
            at += _ANSWER.size
            kind, fields = json.loads(bytes(self._piece(at, described)))
            at += described
            # A bytearray, so that arrays made of it can be written to.
            found.append(Answer(kind, fields, memoryview(bytearray(self._piece(at, length)))))
            at += length
        self._end = max(self._end, at)
        return found

    def _piece(self, at: int, length: int) -> memoryview:
        if length < 0 or at + length > len(self._view):
            raise ValueError("an answer outside of its slot")
        return self._view[at : at + length]

    def tidy(self) -> None:
        """Give back the pages of a large batch."""
        if self._end - self._answers_at > _KEPT_BYTES or self._used_input() > _KEPT_BYTES:
            first = -(-_HEADER.size // mmap.PAGESIZE) * mmap.PAGESIZE
            self._memory.madvise(mmap.MADV_REMOVE, first, len(self._view) - first)

    def _used_input(self) -> int:
        return min(self._end, self._answers_at) - _HEADER.size - _REQUEST_BYTES

    # The worker's side.

    def read(self) -> tuple[bytes, Iterator[bytes]]:
        """The pickled work and the encoded images, one after the other."""
        length = _HEADER.unpack_from(self._view)[2]
        work, lengths = pickle.loads(self._view[_HEADER.size : _HEADER.size + length])
        ends = itertools.accumulate(lengths, initial=_HEADER.size + _REQUEST_BYTES)
        return work, (bytes(self._view[at:end]) for at, end in itertools.pairwise(ends))

    def take(self, hand: int) -> None:
        """Say which image is in hand, before it is."""
        struct.pack_into("<i", self._view, 0, hand)

    def answer(self, number: int, at: int, answer: Answer) -> int:
        """Write one answer at an offset, where it fits; the offset of the next."""
        data: Any = answer.data
        described = json.dumps([answer.kind, answer.fields]).encode()
        start = self._answers_at + at
        needed = _ANSWER.size + len(described) + len(data)
        # Room is kept for saying so of every further image.
        if start + needed + (1 << 16) > len(self._view) and answer.kind != "no_room":
            return self.answer(number, at, Answer("no_room", [needed]))
        _ANSWER.pack_into(self._view, start, len(described), len(data))
        start += _ANSWER.size
        self._view[start : start + len(described)] = described
        start += len(described)
        self._view[start : start + len(data)] = data
        struct.pack_into("<ii", self._view, 0, NO_IMAGE, number + 1)
        return at + needed

    def tell_growth(self, num_bytes: int) -> None:
        struct.pack_into("<q", self._view, 16, num_bytes)


class Caps(NamedTuple):
    """What one worker may use: CPU seconds an image, bytes of address space above what it starts with."""

    seconds: float
    memory_bytes: int
    input_bytes: int


def serve(control_fd: int) -> None:
    """Fork a worker for every request, say how one ended; kill all that are left when the pool is gone."""
    from PIL import Image

    from images.decode import Limits, facts_of

    # Whatever is imported on first use is imported now, once for all workers.
    Image.init()
    sink = io.BytesIO()
    Image.linear_gradient("L").save(sink, "PNG")
    facts_of(sink.getvalue(), Limits())
    warnings.simplefilter("ignore")  # of doubtful metadata, on a stderr that nobody reads
    gc.freeze()
    workers: set[int] = set()
    with socket.socket(fileno=control_fd) as control:
        control.sendall(b"R")
        for message, fds in _requests(control):
            if message["ask"] == "fork":
                pid = os.fork()
                if not pid:
                    control.close()
                    _become_worker(fds, Caps(*message["caps"]))
                for fd in fds:
                    os.close(fd)
                workers.add(pid)
                control.sendall(struct.pack("<q", pid))
            else:
                workers.discard(message["pid"])
                control.sendall(struct.pack("<q", _end_of(message["pid"])))
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _requests(control: socket.socket) -> Iterator[tuple[dict[str, Any], list[int]]]:
    while True:
        try:
            message, fds, _, _ = socket.recv_fds(control, 4096, 8)
        except OSError:
            return
        if not message:
            return
        yield json.loads(message), fds


def _end_of(pid: int) -> int:
    """How a worker ended that has let go of its socket: as os.waitstatus_to_exitcode, negative for a signal."""
    deadline = time.monotonic() + 2
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.0005)


def _become_worker(fds: list[int], caps: Caps) -> None:
    code = 70
    try:
        _work(fds, caps)
        code = 0
    finally:
        os._exit(code)


def _work(fds: list[int], caps: Caps) -> None:
    """Answer batches until the pool lets go of the socket."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
    # Should the server be killed, nobody else would end a worker that hangs.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    bell = socket.socket(fileno=fds[0])
    slots = [Slot(fd, caps.input_bytes) for fd in fds[1:]]
    start = _address_space()
    for limit, value in (
        (resource.RLIMIT_AS, start + caps.memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        hard = resource.getrlimit(limit)[1]
        capped = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (capped, capped))
    bell.sendall(b"R")
    while rung := bell.recv(1):
        slot = slots[rung[0]]
        work, images = slot.read()
        at = 0
        for number, encoded in enumerate(images):
            slot.take(number)
            # Its signal ends the process: CPU time, which a busy machine does not shorten as it does the wall clock's.
            signal.setitimer(signal.ITIMER_PROF, caps.seconds)
            at = slot.answer(number, at, _answer(work, encoded))
            signal.setitimer(signal.ITIMER_PROF, 0)
        slot.tell_growth(_address_space() - start)
        bell.sendall(rung)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


@functools.lru_cache(maxsize=8)
def _loaded(work: bytes) -> Any:
    return pickle.loads(work)


def _answer(work: bytes, encoded: bytes) -> Answer:
    try:
        function, arguments = _loaded(work)
    # Whatever importing it raises, the pool is told and raises.
    except Exception:  # noqa: BLE001
        return Answer("broken", [traceback.format_exc()[-4000:]])
    try:
        return _described(function(encoded, *arguments))
    except BadData as error:
        return Answer("bad", [error.code, _plain(error)])
    except MemoryError as error:
        return Answer("memory", [_plain(error)])
    except ImportError:
        return Answer("broken", [traceback.format_exc()[-4000:]])
    # The sandbox's wall: whatever else untrusted bytes bring about is their fault, not the machine's.
    except Exception as error:  # noqa: BLE001
        if isinstance(error, OSError) and error.errno:
            return Answer("broken", [traceback.format_exc()[-4000:]])
        return Answer("bad", ["decode_failed", f"{type(error).__name__}: {_plain(error)}"])


def _plain(error: BaseException) -> str:
    return str(error)[:500].encode("utf-8", "replace").decode()


def _described(result: Any) -> Answer:
    from images.decode import Decoded

    if isinstance(result, Decoded):
        pixels = np.ascontiguousarray(result.pixels, np.uint8)
        return Answer("decoded", [_hexed(result.facts), list(pixels.shape)], pixels.data.cast("B"))
    if isinstance(result, ImageFacts):
        return Answer("facts", [_hexed(result)])
    if isinstance(result, bytes):
        return Answer("bytes", [], result)
    return Answer("broken", [f"a {type(result).__name__} cannot leave the sandbox"])


def _hexed(facts: Iterable[Any]) -> list[Any]:
    return [value.hex() if isinstance(value, bytes) else value for value in facts]


def boot(argv: Sequence[str] = sys.argv) -> None:
    """Entry of the server process: the control socket's number."""
    with contextlib.suppress(KeyboardInterrupt):
        serve(int(argv[1]))
