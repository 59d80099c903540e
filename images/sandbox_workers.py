"""The pool's view of `images.sandbox_child`: the server process, one worker, what it answers and how it died."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, get_type_hints

import numpy as np

from images.decode import REFUSALS, Decoded
from images.sandbox_child import NO_IMAGE, Answer, Caps, Slot
from shards.errors import BadData, SandboxBroken
from shards.records import ImageFacts

CODES = (*REFUSALS, "too_many_bytes", "decoder_crashed", "decoder_timeout", "decoder_memory")
"""Every code that comes out of a pool."""
MAY_PASS = frozenset({"decoder_timeout", "decoder_memory"})
"""Those that depend on the caps and the machine, not on the image alone."""

_WALL_PER_SECOND = 10
"""Wall seconds without any progress, for each CPU second allowed, after which a worker is taken to sleep for ever."""

_START_SECONDS = 120
_ENVIRONMENT = ("LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PATH", "TZ")
"""What a worker sees of the environment; no credentials are among them."""
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from images.sandbox_child import boot; boot()"
)


Result = Decoded | ImageFacts | bytes | BadData


class Shortage(NamedTuple):
    """Memory, or room for the result, was too small."""

    of: str
    message: str

    def verdict(self) -> BadData:
        if self.of == "no_room":
            raise SandboxBroken(f"a result of {self.message} bytes is larger than its slot")
        return BadData("decoder_memory", f"needs more memory than it may have: {self.message}")


def _result_of(answer: Answer) -> Result | Shortage:
    """What an answer says. Raises ValueError for what no worker of ours would say, SandboxBroken where it is a complaint."""
    kind, fields, data = answer
    if kind == "decoded":
        facts, shape = fields
        return Decoded(_facts_of(facts), np.frombuffer(data, np.uint8).reshape(shape))
    if kind == "facts":
        return _facts_of(fields[0])
    if kind == "bytes":
        return bytes(data)
    if kind == "bad":
        code, message = map(str, fields)
        if code not in CODES:
            raise ValueError(f"the code {code!r}")
        return BadData(code, message)
    if kind in ("memory", "no_room"):
        return Shortage(kind, str(fields[0]))
    if kind == "broken":
        raise SandboxBroken(f"a decoding worker complains: {fields[0]}")
    raise ValueError(f"an answer of kind {kind!r}")


def _facts_of(fields: list[Any]) -> ImageFacts:
    kinds = get_type_hints(ImageFacts).values()
    return ImageFacts._make(
        bytes.fromhex(field) if kind is bytes else kind(field)
        for kind, field in zip(kinds, fields, strict=True)
    )


class Died(Exception):
    """A worker is gone. `hand` is the image it was at, -1 for none; `begun` whether it was at any; `exit_code` negative for a signal."""

    def __init__(self, exit_code: int, progress: tuple[int, int], why: str = "") -> None:
        super().__init__(exit_code)
        self.exit_code, self.why = exit_code, why
        self.hand, answered = progress
        self.begun = bool(why) or self.hand != NO_IMAGE or answered > 0

    @property
    def by_strangers(self) -> bool:
        """Whether somebody else's SIGKILL ended it, most often the kernel's for want of memory: it may have been meant for any process."""
        return self.exit_code == -signal.SIGKILL and not self.why

    def verdict(self, caps: Caps) -> BadData:
        if self.why == "slept":
            seconds = caps.seconds * _WALL_PER_SECOND
            return BadData("decoder_timeout", f"no progress in {seconds:g} seconds by the clock")
        if self.why:
            return BadData("decoder_crashed", self.why)
        if self.exit_code == -signal.SIGPROF:
            return BadData("decoder_timeout", f"took more than {caps.seconds:g} seconds of CPU time")
        if self.exit_code < 0:
            with contextlib.suppress(ValueError):
                return BadData("decoder_crashed", f"died of {signal.Signals(-self.exit_code).name}")
        return BadData("decoder_crashed", f"ended with exit code {self.exit_code}")


class Server:
    """The process that forks workers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair()
        self._control = ours
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        paths = json.dumps([str(Path(entry).absolute()) for entry in sys.path])
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | _ONE_THREAD
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-c", _BOOT, str(theirs.fileno()), paths],
                    env=environment,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._errors,
                    cwd="/",
                    start_new_session=True,  # Ctrl-C is the pool's affair
                )
        except OSError as error:
            ours.close()
            self._errors.close()
            raise SandboxBroken(f"the decoding server cannot be started: {error}") from error
        try:
            ours.settimeout(_START_SECONDS)
            if ours.recv(1) != b"R":
                raise SandboxBroken(f"the decoding server did not start: {self._last_words()}")
        except (OSError, SandboxBroken) as error:
            self.close()
            if isinstance(error, SandboxBroken):
                raise
            raise SandboxBroken(f"the decoding server did not start: {error}") from error

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"

    def _ask(self, message: dict[str, Any], fds: list[int]) -> int:
        with self._lock:
            try:
                socket.send_fds(self._control, [json.dumps(message).encode()], fds)
                reply = self._control.recv(8, socket.MSG_WAITALL)
            except OSError as error:
                raise SandboxBroken(f"the decoding server is gone: {error}") from error
        if len(reply) != 8:
            raise SandboxBroken("the decoding server is gone")
        return int(struct.unpack("<q", reply)[0])

    def fork(self, fds: list[int], caps: Caps) -> int:
        """The pid of a new worker."""
        return self._ask({"ask": "fork", "caps": caps}, fds)

    def end_of(self, pid: int) -> int:
        """Waits for a worker whose end is near; its exit code, negative for a signal."""
        return self._ask({"ask": "end", "pid": pid}, [])

    def close(self) -> None:
        """Ends the server, which kills its workers."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._process.wait()
        self._control.close()
        self._errors.close()


class Worker:
    """One worker process, seen from the thread that attends to it."""

    def __init__(self, server: Server, slots: list[Slot], caps: Caps) -> None:
        self._server, self._slots, self._caps = server, slots, caps
        self._bell, theirs = socket.socketpair()
        self.fresh = True
        with theirs:
            self.pid = server.fork([theirs.fileno(), *(slot.fd for slot in slots)], caps)
        self._bell.settimeout(_START_SECONDS)
        try:
            started = self._bell.recv(1) == b"R"
        except OSError:
            started = False
        if not started:
            died = Died(self.end(), (NO_IMAGE, 0))
            raise SandboxBroken(f"a decoding worker does not start: {died.verdict(caps)}")

    def give(self, number: int, work: bytes, images: Sequence[bytes]) -> None:
        """Hand over a batch in the slot of that number."""
        self._slots[number].write(work, images)
        with contextlib.suppress(OSError):  # its death shows when it is waited for
            self._bell.sendall(bytes([number]))

    def wait(self, number: int, count: int) -> "list[Result | Shortage]":
        """What became of the images of the batch in a slot. Raises Died, SandboxBroken."""
        slot = self._slots[number]
        seen = slot.progress()
        self._bell.settimeout(self._caps.seconds * _WALL_PER_SECOND)
        while True:
            try:
                rung = self._bell.recv(1)
                break
            except TimeoutError:
                if seen == slot.progress():
                    raise self._death(seen, "slept") from None
                seen = slot.progress()
            except OSError:
                rung = b""
                break
        if not rung:
            raise self._death(slot.progress())
        self.fresh = False
        try:
            if rung[0] != number:
                raise ValueError("another batch")
            results = [_result_of(answer) for answer in slot.answers(count)]
        except SandboxBroken:
            raise
        # A wall as well: what a worker says may be what the image made of it.
        except Exception as error:
            raise self._death((NO_IMAGE, 0), "its worker's answer made no sense") from error
        slot.tidy()
        return results

    def is_bloated(self, number: int) -> bool:
        """Whether a fresh worker would have notably more room than this one: C decoders leak."""
        return self._slots[number].grown > self._caps.memory_bytes // 4

    def _death(self, progress: tuple[int, int], why: str = "") -> Died:
        if why:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        return Died(self.end(), progress, why)

    def end(self) -> int:
        """Let go of it; its exit code."""
        self._bell.close()
        return self._server.end_of(self.pid)

    def let_go(self) -> None:
        """Where the server is about to end it."""
        self._bell.close()
