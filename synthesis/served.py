"""A server of one's own: started by its command on a free port of this machine, gone with the process that started it.

Between the two stands a process of ours, `main`: a parent that is killed can end nobody, and servers start processes of their own.
"""

import atexit
import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Self

from shards.errors import BadRequest, RunFailed
from synthesis.backend import Ask, Reply, VlmFailure
from synthesis.client import ChatClient
from synthesis.local_server import end_with_parent
from synthesis.server import Server

START_S = 1800.0
"""Until a server answers: it may have to fetch its weights first."""
END_S = 10.0
"""Between asking a server to end and ending it."""
PORT = "{port}"
_PORTS = range(20_000, 32_000)
# The server has the environment of who started it, without a path to our modules.
_GUARD = "import sys; sys.path.insert(0, sys.argv[1]); from synthesis.served import main; sys.exit(main(sys.argv[2:]))"
_LOOK_S = 0.5
_LAST_LINES = 20


class _Running:
    """A server, and the last lines that it wrote."""

    def __init__(self, words: list[str]) -> None:
        port, self._lock = _free_port()
        self.url = f"http://127.0.0.1:{port}/v1"
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        root = str(Path(__file__).resolve().parents[1])
        self.process = subprocess.Popen(
            [sys.executable, "-c", _GUARD, root, str(os.getpid())]
            + [word.replace(PORT, str(port)) for word in words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the run, which ends its server when it is done with it
        )
        assert self.process.stdout is not None
        # A pipe that nobody drains stops the server; a file would grow with every call.
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            self._lines.append(line.decode(errors="replace").rstrip())

    def last_words(self) -> str:
        """What it wrote last, once it has ended."""
        self._reader.join(END_S)
        return "\n".join(self._lines) or "it wrote nothing"

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()
        self._reader.join(END_S)
        if not self._reader.is_alive():  # else somebody who left the server's group still holds the pipe
            assert self.process.stdout is not None
            self.process.stdout.close()
        self._lock.close()


def _free_port() -> tuple[int, IO[str]]:
    """A port that nobody listens on, and a lock on it: a server listens minutes after it started, and others look for ports meanwhile.

    It is none of those that the system gives to whoever asks for any.
    """
    for step in range(len(_PORTS)):
        port = _PORTS[(os.getpid() + step) % len(_PORTS)]
        try:
            lock = (Path(tempfile.gettempdir()) / f"shardmill-port-{port}").open("w")
        except OSError:  # somebody else's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as free:
                free.bind(("127.0.0.1", port))
        except OSError:
            lock.close()
            continue
        return port, lock
    raise RunFailed(f"no port of {_PORTS} is free for a server")


_STARTING = threading.Lock()
_RUNNING: dict[str, _Running] = {}


def serve(command: str) -> str:
    """The base url of the server that `command` starts, which this process starts once; `{port}` in it is the port to listen on.

    Raises BadRequest for what is no such command, RunFailed where it ends, or does not list its models in time.
    """
    words = check_command(command)
    if shutil.which(words[0]) is None:
        raise BadRequest(f"--vlm-serve {command}: there is no program {words[0]} here")
    with _STARTING:
        running = _RUNNING.get(command)
        if running is None:
            if not _RUNNING:
                atexit.register(end_servers)
            running = _RUNNING[command] = _Running(words)
            try:
                _wait(running, command)
            except BaseException:
                _RUNNING.pop(command).end()
                raise
        return running.url


def end_servers() -> None:
    """End all that this process has started."""
    with _STARTING:
        while _RUNNING:
            _RUNNING.popitem()[1].end()


def check_command(command: str) -> list[str]:
    """The words of a command. Raises BadRequest."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise BadRequest(f"--vlm-serve {command}: {error}") from error
    if not any(PORT in word for word in words):
        raise BadRequest(
            f"--vlm-serve {command}: does not say where the port goes, as in `vllm serve MODEL --port {PORT}`"
        )
    return words


def _wait(running: _Running, command: str) -> None:
    with contextlib.closing(Server(running.url)) as server:
        over = time.monotonic() + START_S
        while time.monotonic() < over:
            check_lives(command)
            try:
                server.models(_LOOK_S)
            except VlmFailure as failure:
                if failure.status in (401, 403):  # it answers, and wants its key
                    return
                time.sleep(_LOOK_S)
            else:
                check_lives(command)  # or somebody else answered
                return
    raise RunFailed(f"--vlm-serve {command}: did not list its models within {START_S:.0f} s")


def check_lives(command: str) -> None:
    """Raises RunFailed, with what it wrote last, where the server of a command has ended."""
    running = _RUNNING.get(command)
    if running is not None and running.process.poll() is not None:
        raise RunFailed(
            f"--vlm-serve {command}: ended with code {running.process.returncode}: {running.last_words()}"
        )


@dataclass
class ServedModel:
    """A backend whose server every process that asks starts for itself: it travels as the command, and starts at the first call.

    `client` has no urls, and names the model that the server must serve.
    """

    command: str
    client: ChatClient
    _asking: ChatClient | None = field(default=None, init=False, repr=False, compare=False)
    _opening: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, object]:
        return {"command": self.command, "client": self.client}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _asking=None, _opening=threading.Lock())

    @property
    def model(self) -> str:
        return self.client.model

    def chat(self, ask: Ask, affinity: bytes = b"") -> Reply:
        """As ChatClient's. Raises RunFailed where the server does not start, has ended, or serves another model."""
        try:
            return self._opened().chat(ask, affinity)
        except VlmFailure:
            check_lives(self.command)
            raise

    def _opened(self) -> ChatClient:
        with self._opening:
            if self._asking is None:
                url = serve(self.command)
                with contextlib.closing(Server(url, self.client.api_key_env)) as server:
                    served = server.models(self.client.timeout_s)
                if self.model not in served:
                    raise RunFailed(
                        f"--vlm-serve {self.command}: serves {', '.join(served) or 'nothing'}, not --vlm-model {self.model}"
                    )
                self._asking = replace(self.client, base_urls=[url]).open()
            return self._asking

    def open(self) -> Self:
        """Nothing: the first call starts the server."""
        return self

    def close(self) -> None:
        """Drop the connections. The server stays for whoever else asks in this process."""
        with self._opening:
            asking, self._asking = self._asking, None
        if asking is not None:
            asking.close()

    def end(self) -> None:
        """As `close`."""
        self.close()


def main(argv: list[str]) -> int:
    """Run a command until it ends, the process `argv[0]` is gone, or SIGTERM comes; then end whatever it started."""
    parent, stop = int(argv[0]), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    child = subprocess.Popen(argv[1:], start_new_session=True, preexec_fn=end_with_parent)
    while child.poll() is None and os.getppid() == parent and not stop.is_set():
        time.sleep(_LOOK_S / 5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    over = time.monotonic() + END_S
    while _lives(child) and time.monotonic() < over:
        time.sleep(_LOOK_S / 5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def _lives(child: subprocess.Popen[bytes]) -> bool:
    """Whether any process of its group does."""
    child.poll()
    try:
        os.killpg(child.pid, 0)
    except ProcessLookupError:
        return False
    return True
