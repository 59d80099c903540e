"""A Flink cluster on loopback: JobManager, TaskManagers, Beam's job server and a pool of SDK workers, each a process of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

REPOSITORY = Path(__file__).parents[2]
HOST = "127.0.0.1"
_OPENED = [
    f"--add-opens=java.base/{package}=ALL-UNNAMED"
    for package in (
        "java.lang",
        "java.lang.invoke",
        "java.net",
        "java.nio",
        "java.text",
        "java.time",
        "java.util",
        "java.util.concurrent",
        "java.util.concurrent.atomic",
        "java.util.concurrent.locks",
        "sun.net.util",
    )
]
"""What Flink's own start scripts open to it on Java 17: Kryo and the serializers reach into the JDK."""

CONFIGURATION: dict[str, str | int] = {
    "jobmanager.rpc.address": HOST,
    "jobmanager.bind-host": HOST,
    "taskmanager.host": HOST,
    "taskmanager.bind-host": HOST,
    "rest.address": HOST,
    "rest.bind-address": HOST,
    "taskmanager.numberOfTaskSlots": 1,
    "taskmanager.cpu.cores": 1,
    # The start scripts work these out from one size; who starts the JVM itself states them.
    "taskmanager.memory.framework.heap.size": "128m",
    "taskmanager.memory.framework.off-heap.size": "128m",
    "taskmanager.memory.task.heap.size": "384m",
    "taskmanager.memory.task.off-heap.size": "64m",
    "taskmanager.memory.network.min": "256m",
    "taskmanager.memory.network.max": "256m",
    # Beam's classes are the cluster's own: SDK workers outlive a stage only where Beam is not loaded anew with each job.
    "classloader.resolve-order": "parent-first",
    # A graph of many exchanges: each takes its least number of buffers, 512 of 32 KB unless told otherwise.
    "taskmanager.memory.segment-size": "8kb",
    "taskmanager.network.sort-shuffle.min-buffers": 32,
    "taskmanager.memory.managed.size": "256m",
    "taskmanager.memory.jvm-metaspace.size": "256m",
    "taskmanager.memory.jvm-overhead.min": "64m",
    "taskmanager.memory.jvm-overhead.max": "64m",
    # Who does not answer on a busy machine is not lost yet; a process that is gone is noticed by its closed port, within seconds.
    "heartbeat.interval": 1000,
    "heartbeat.timeout": 30000,
    "restart-strategy.type": "fixed-delay",
    # Without a spare slot each attempt fails at once, until the next TaskManager is there.
    "restart-strategy.fixed-delay.attempts": 60,
    "restart-strategy.fixed-delay.delay": "2 s",
    "execution.checkpointing.interval": "2 s",
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


class FlinkCluster:
    """Processes, logs and configuration live under `folder`. Two TaskManagers of one slot each, unless told otherwise.

    `jars` holds those of `flink.pom.xml`.
    """

    def __init__(self, jars: Path, folder: Path, task_managers: int = 2) -> None:
        self._jars, self._folder = jars, folder
        self._rest, self._job, self._pool = free_port(), free_port(), free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._wanted = task_managers

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        settings = CONFIGURATION | {
            "rest.port": self._rest,
            "jobmanager.rpc.port": free_port(),
            "io.tmp.dirs": str(self._folder / "tmp"),
            "state.checkpoints.dir": (self._folder / "checkpoints").as_uri(),
        }
        (self._folder / "flink-conf.yaml").write_text(
            "".join(f"{name}: {value}\n" for name, value in settings.items())
        )
        try:
            self._java("jobmanager", "256m", _SESSION, "--configDir", str(self._folder))
            self._start_worker_pool()
            for _ in range(self._wanted):
                self.start_task_manager()
            self._wait("the cluster", lambda: len(self.task_managers()) == self._wanted)
            ports = ["--job-port", str(self._job), "--artifact-port", "0", "--expansion-port", "0"]
            artifacts = ["--artifacts-dir", str(self._folder / "artifacts")]
            master = ["--job-host", HOST, "--flink-master", f"{HOST}:{self._rest}"]
            configured = ["--flink-conf-dir", str(self._folder)]
            self._java("job-server", "384m", _JOB_SERVER, *ports, *artifacts, *master, *configured)
            self._wait("the job server", lambda: _listens(self._job) and _listens(self._pool))
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def beam_args(self) -> list[str]:
        """What names this cluster to a Beam pipeline."""
        return [
            "--runner=FlinkRunner",
            f"--job_endpoint={HOST}:{self._job}",
            f"--flink_master={HOST}:{self._rest}",
            "--environment_type=EXTERNAL",
            f"--environment_config={HOST}:{self._pool}",
            "--parallelism=2",
        ]

    def rest(self, path: str) -> Any:
        """The answer of Flink's REST API, for example to `/jobs/overview`."""
        with urllib.request.urlopen(f"http://{HOST}:{self._rest}{path}", timeout=10) as answer:
            return json.load(answer)

    def task_managers(self) -> list[str]:
        """Ids of those that the JobManager knows and has heard of lately."""
        return [one["id"] for one in self.rest("/taskmanagers")["taskmanagers"]]

    def start_task_manager(self) -> None:
        name = f"taskmanager{sum(name.startswith('taskmanager') for name in self._processes) + 1}"
        # Two of them on one address are told apart by name.
        named = ["-D", f"taskmanager.resource-id={name}"]
        self._java(name, "512m", _TASK_MANAGER, "--configDir", str(self._folder), *named)

    def replace_task_manager(self) -> None:
        """Kill the TaskManager that has run longest with SIGKILL, so that nothing is said to anybody, and start another."""
        alive = [name for name in self._processes if name.startswith("taskmanager") and self._runs(name)]
        self._processes[alive[0]].kill()
        self._processes[alive[0]].wait()
        self.start_task_manager()

    def states(self) -> list[str]:
        """Of all jobs, the last one first."""
        return [job["state"] for job in self._jobs()]

    def restarts(self) -> int:
        """How many tasks of the last job were started again."""
        last = self._jobs()[0]["jid"]
        tasks = [
            task
            for vertex in self.rest(f"/jobs/{last}")["vertices"]
            for task in self.rest(f"/jobs/{last}/vertices/{vertex['id']}")["subtasks"]
        ]
        return sum(task["attempt"] for task in tasks)

    def _jobs(self) -> list[dict[str, Any]]:
        return sorted(self.rest("/jobs/overview")["jobs"], key=lambda job: -job["start-time"])

    def _runs(self, name: str) -> bool:
        return self._processes[name].poll() is None

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def _java(self, name: str, heap: str, main: str, *arguments: str) -> None:
        classes = os.pathsep.join(sorted(map(str, self._jars.glob("*.jar"))))
        memory = [f"-Xmx{heap}", "-Xms64m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        self._start(name, ["java", *memory, *_OPENED, "-cp", classes, main, *arguments])

    def _start_worker_pool(self) -> None:
        """The pool starts the bare word `python`: that is to be this one."""
        module = "apache_beam.runners.worker.worker_pool_main"
        self._start("worker-pool", [sys.executable, "-m", module, f"--service_port={self._pool}"])

    def _start(self, name: str, command: Sequence[str]) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def _wait(self, what: str, ready: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError, OSError):
                if ready():
                    return
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended with {process.returncode}:\n{self.log(name)[-2000:]}")
            time.sleep(0.2)
        raise TimeoutError(f"{what} did not start in {seconds:.0f} s; logs in {self._folder}")

    def _stop(self) -> None:
        """Each is the head of a session of its own, with the workers that it started."""
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


_SESSION = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
_TASK_MANAGER = "org.apache.flink.runtime.taskexecutor.TaskManagerRunner"
_JOB_SERVER = "org.apache.beam.runners.flink.FlinkJobServerDriver"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
