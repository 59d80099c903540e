"""Worker processes of this machine: each has its share of cores and a GPU of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from beam_pipelines.launch import beam_options, cores_each, is_local, processes
from beam_pipelines.worker import claim, command, gpus
from shards.errors import BadRequest


def test_every_process_gets_another_gpu_and_what_is_given_back_is_taken_again(tmp_path: Path) -> None:
    claims = [claim(["0", "1"], tmp_path) for _ in range(5)]
    assert [name for name, _ in claims] == ["0", "1", "0", "1", "0"]
    claims[1][1].close()
    name, held = claim(["0", "1"], tmp_path)
    assert name == "1"
    for lock in (held, *(lock for _, lock in claims)):
        lock.close()


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    code = "import pathlib, sys, time; from beam_pipelines.worker import claim; a = claim(['0'], pathlib.Path(sys.argv[1]))"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{code}; print(a[0], flush=True); time.sleep(60)", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "0\n"
    name, lock = claim(["0", "7"], tmp_path)
    assert name == "7"
    lock.close()
    child.kill()
    child.wait()
    child.stdout.close()
    name, lock = claim(["0", "7"], tmp_path)
    assert name == "0"
    lock.close()


def test_gpus_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5f,")
    assert gpus() == ["3", "GPU-5f"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus() == []
    assert command(2, one_gpu=True).endswith("--threads 2 --one-gpu")


def test_workers_share_the_cores_of_this_machine() -> None:
    cores = len(os.sched_getaffinity(0))
    assert cores_each(beam_options([], 1)) == cores
    several = beam_options([], 2 * cores)
    assert (processes(several), cores_each(several)) == (2 * cores, 1)
    assert processes(beam_options(["--direct_running_mode=multi_processing", "--runner=FnApiRunner"], 1)) == 1
    assert cores_each(beam_options(["--runner=DataflowRunner"], 4)) == 0


def test_a_job_is_local_where_its_workers_are() -> None:
    assert is_local(beam_options(["--runner=PrismRunner"], 1))
    assert not is_local(beam_options(["--runner=PrismRunner", "--environment_type=DOCKER"], 1))
    assert is_local(beam_options(["--runner=FlinkRunner", "--environment_type=LOOPBACK"], 1))
    assert not is_local(beam_options(["--runner=FlinkRunner", "--environment_type=EXTERNAL"], 1))


def test_flink_gets_what_its_job_server_needs_unless_it_is_said() -> None:
    options = beam_options(["--runner=FlinkRunner", "--checkpointing_interval=2000"], 1)
    given = options.get_all_options(retain_unknown_options=True)
    assert given["experiments"] == ["pre_optimize=all"]
    assert given["environment_cache_millis"] == "3600000"
    assert given["finish_bundle_before_checkpointing"]
    said = beam_options(
        ["--runner", "FlinkRunner", "--experiments=pre_optimize=none", "--environment_cache_millis=0"], 1
    ).get_all_options()
    assert (said["experiments"], said["environment_cache_millis"]) == (["pre_optimize=none"], "0")
    with pytest.raises(BadRequest, match="--checkpointing_intervall: not an option of Beam"):
        beam_options(["--runner=FlinkRunner", "--checkpointing_intervall"], 1)
    with pytest.raises(BadRequest, match="--checkpointing_interval"):
        beam_options(["--checkpointing_interval=2000"], 1)
