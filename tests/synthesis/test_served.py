"""Servers that a process starts for itself: the real llama.cpp behind its command, and commands that fail."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.errors import BadRequest, RunFailed
from synthesis import served
from synthesis.backend import Ask
from synthesis.client import ChatClient
from synthesis.local_server import MODEL_NAME, find_weights
from synthesis.served import ServedModel, check_lives, end_servers, serve

try:
    find_weights()
except BadRequest as missing:
    pytest.skip(str(missing), allow_module_level=True)

SMOLLM2 = f"{sys.executable} -m synthesis.local_server --stay --port {{port}}"
ROOT = str(Path(served.__file__).parents[1])


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    end_servers()


def group_of(words: str) -> list[int]:
    """Living processes whose command holds these words."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if words.encode() in (folder / "cmdline").read_bytes().replace(b"\0", b" "):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def gone_within(words: str, seconds: float = 15) -> bool:
    over = time.monotonic() + seconds
    while group_of(words) and time.monotonic() < over:
        time.sleep(0.05)
    return not group_of(words)


def test_a_served_model_travels_as_its_command_and_answers_where_it_is_asked() -> None:
    backend = ServedModel(SMOLLM2, ChatClient((), MODEL_NAME, max_attempts=1))
    there: ServedModel = pickle.loads(pickle.dumps(backend)).open()
    assert there == backend and there.model == MODEL_NAME
    try:
        assert there.chat(Ask("Say hello.", max_tokens=8)).text
        url = serve(SMOLLM2)
        assert url == serve(SMOLLM2), "one server a process"
        there.close()
        assert there.chat(Ask("Say hello.", max_tokens=8)).text, (
            "closed backends open again, at the same server"
        )
        with pytest.raises(RunFailed, match=f"serves {MODEL_NAME}, not --vlm-model another"):
            ServedModel(SMOLLM2, ChatClient((), "another")).chat(Ask("Why?"))
        for pid in group_of(
            f"{sys.executable} -m synthesis.local_server --stay --port {url.split(':')[2][:-3]}"
        ):
            if os.getpgid(pid) == pid != served._RUNNING[SMOLLM2].process.pid:  # the server, not its guardian
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(RunFailed, match="ended with code"):
            for _ in range(100):  # its guardian sees it within a moment
                check_lives(SMOLLM2)
                time.sleep(0.1)
        with pytest.raises(RunFailed, match="ended with code"):
            there.chat(Ask("Why?"))
    finally:
        there.close()


def test_it_ends_with_the_process_that_started_it_however_that_ends() -> None:
    words = "import time; time.sleep(999.25)"
    code = (
        "from synthesis import served; import time\n"
        f"served._Running([{sys.executable!r}, '-c', {words!r}]); print('up', flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
        over = time.monotonic() + 10
        while len(group_of(words)) < 3 and time.monotonic() < over:  # parent, guardian, server
            time.sleep(0.05)
        parent.send_signal(signal.SIGKILL)
    assert gone_within(words)


def test_it_has_the_environment_of_who_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of another installation must not find our modules before its own."""
    monkeypatch.setenv("PYTHONPATH", "/its/own")
    tell = (
        "import os, sys; print(os.environ['PYTHONPATH'], [path for path in sys.path if path == sys.argv[1]])"
    )
    with pytest.raises(RunFailed, match=r"ended with code 0: /its/own \[\]"):
        serve(f'{sys.executable} -P -c "{tell}" {ROOT} {{port}}')


def test_a_guardian_that_is_killed_takes_its_server_along() -> None:
    words = "import time; time.sleep(997.25)"
    running = served._Running([sys.executable, "-c", words])
    over = time.monotonic() + 10
    while len(group_of(words)) < 2 and time.monotonic() < over:
        time.sleep(0.05)
    running.process.kill()
    assert gone_within(words)
    running.end()


def test_of_two_processes_neither_gets_the_port_of_the_other() -> None:
    first, lock = served._free_port()
    second, other = served._free_port()
    lock.close()
    again, third = served._free_port()
    other.close()
    third.close()
    assert first == again != second


def test_what_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    python = sys.executable
    with pytest.raises(BadRequest, match="where the port goes, as in `vllm serve MODEL --port {port}`"):
        serve("vllm serve a-model")
    with pytest.raises(BadRequest, match="there is no program nowhere-to-be-found here"):
        serve("nowhere-to-be-found --port {port}")
    with pytest.raises(BadRequest, match="No closing quotation"):
        serve("a 'b --port {port}")
    with pytest.raises(RunFailed, match=r"ended with code 3: no such model"):
        serve(f"{python} -c \"print('no such model'); raise SystemExit(3)\" {{port}}")
    monkeypatch.setattr(served, "START_S", 0.2)
    with pytest.raises(RunFailed, match="did not list its models within"):
        serve(f'{python} -c "import time; time.sleep(998.25)" {{port}}')
    assert gone_within("time.sleep(998.25)")
