"""The streaming job on one core: notices a second, how long an image takes from its notice to the snapshot, and what is remembered.

python -m benchmarks.stream [--notices 2000] [--window 5] [--embedder real|stub]
python -m benchmarks.stream --embedder stub --rate 5 --notices 600 --window 5 --horizon 30

Notices come over a loopback Pub/Sub and name objects of a loopback Cloud Storage, both in a process of their own. `stub` embeds by a
random projection of 8 x 8 pixels: what is left is Beam, fetching, decoding, comparing, packing and committing. With a `--horizon` it prints
how many bytes of state there were, keys and all, when each window had been committed.
"""

import argparse
import datetime
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.machine import describe
from shards.snapshot import open_by_id, read_current
from shards.storage import storage_of

_SPAWN = multiprocessing.get_context("spawn")
_IMAGES = Path(__file__).parent.parent / "examples" / "images"


def _serve(pipe: Connection) -> None:
    from tests.loopback_gcs import LoopbackGcs
    from tests.loopback_pubsub import LoopbackPubsub

    with LoopbackGcs() as gcs:
        pubsub = LoopbackPubsub()
        pubsub.start()
        gcs.new_bucket()
        pipe.send((gcs.url, gcs.bucket, pubsub.host))
        while (asked := pipe.recv()) is not None:
            for name, when in asked:
                pubsub.publish(
                    {
                        "eventType": "OBJECT_FINALIZE",
                        "bucketId": gcs.bucket,
                        "objectId": name,
                        "eventTime": datetime.datetime.fromtimestamp(when, datetime.UTC).isoformat(),
                    }
                )
            pipe.send(True)
        pubsub.stop()


def _stub(encoder: Any) -> Any:
    """The encoder without its network: float32 (B, D) rows of norm 1 from 8 x 8 blocks of the pixels."""
    dimension, classes = (part.shape[1] for part in encoder.encode(np.zeros((1, *_SHAPE(encoder)), np.uint8)))
    projection = np.random.default_rng(0).normal(size=(192, dimension)).astype("f4")

    class Stub(type(encoder)):  # type: ignore[misc]
        def encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            side = pixels.shape[1] // 8 * 8
            blocks = pixels[:, :side, :side].reshape(len(pixels), 8, side // 8, 8, side // 8, 3)
            small = blocks.mean(axis=(2, 4)).reshape(len(pixels), -1).astype("f4") - 128
            vectors = small @ projection
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-6
            return vectors, np.zeros((len(pixels), classes), "f4")

    encoder.__class__ = Stub
    return encoder


def _SHAPE(encoder: Any) -> tuple[int, int, int]:
    return encoder.geometry.size, encoder.geometry.size, 3


def _follow(out: Path, committed: dict[str, float], stop: threading.Event) -> None:
    """When each image was first seen in a committed snapshot."""
    storage, last = storage_of(str(out)), ""
    while not stop.wait(0.05):
        current = read_current(storage).snapshot
        if current == last:
            continue
        now = time.time()
        for manifest in open_by_id(storage, current).manifests:
            for file in manifest.decisions:
                if file.path not in committed:
                    import pyarrow.parquet as pq

                    table = pq.read_table(out / file.path, columns=["unit", "name"]).to_pylist()
                    committed[file.path] = now
                    committed.update(
                        {
                            row["name"]: now
                            for row in table
                            if row["unit"] == "image" and row["name"] not in committed
                        }
                    )
        last = current


_KEPT = {
    "seen": "flags",
    "waiting": "waiting for a window's end",
    "remembered": "arrivals in cells",
    "decided": "decided images",
}


def _print_state(windows: list[tuple[int, Counter[str]]]) -> None:
    """Bytes of each state when each window had been committed, as a table."""
    print("\n| s | images of the horizon | " + " | ".join(_KEPT.values()) + " | in all |")
    print("| -- " * (len(_KEPT) + 3) + "|")
    for end_ms, kept in windows:
        told = [(end_ms - windows[0][0]) // 1000, kept["decided"] // 40, *(kept[name] for name in _KEPT)]
        print("".join(f"| {number:,} " for number in (*told, kept.total())) + "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notices", type=int, default=2000)
    parser.add_argument("--window", type=int, default=5)
    parser.add_argument("--lateness", type=int, default=2)
    parser.add_argument("--rate", type=float, default=0.0, help="notices a second; 0: all at once")
    parser.add_argument("--embedder", choices=["real", "stub"], default="real")
    parser.add_argument("--horizon", type=int, default=0, help="seconds; 0: the job's default, and no table")
    given = parser.parse_args()
    os.sched_setaffinity(0, {0})
    ours, theirs = _SPAWN.Pipe()
    server = _SPAWN.Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    os.sched_setaffinity(server.pid, {1 % os.cpu_count()})
    url, bucket, host = ours.recv()
    os.environ |= {"STORAGE_EMULATOR_HOST": url, "PUBSUB_EMULATOR_HOST": host}

    from apache_beam.internal.gcp import auth

    auth._Credentials._credentials_init = True
    from beam_pipelines import stream_images
    from beam_pipelines.options import StreamOptions, parse_as
    from embeddings.encoder import load_encoder
    from tests.streams import StateOfWindows

    storage, images = storage_of(f"gs://{bucket}"), sorted(_IMAGES.iterdir())
    names = []
    for number in range(given.notices):
        path = images[number % len(images)]
        names.append(f"photos/{number}{path.suffix}")
        storage.write(names[-1], path.read_bytes() + number.to_bytes(4, "little"))

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        out = Path(folder) / "out"
        flags = {
            "input": [f"photos=gs://{bucket}/photos"],
            "output": str(out),
            "subscription": "projects/test-project/subscriptions/objects",
            "window": str(given.window),
            "lateness": str(given.lateness),
            **({"horizon": str(given.horizon)} if given.horizon else {}),
        }
        options = parse_as(StreamOptions, flags)
        prepared, streaming = stream_images.prepare_stream(options, [])
        if given.embedder == "stub":
            _stub(load_encoder(prepared.job.encoder))
        state = StateOfWindows(patch) if given.horizon else None
        committed: dict[str, float] = {}
        stop, done = threading.Event(), threading.Event()
        threads = [
            threading.Thread(target=stream_images._listen, args=(options, prepared, streaming, stop)),
            threading.Thread(target=_follow, args=(out, committed, done)),
        ]
        for thread in threads:
            thread.start()
        published = {}
        began, cpu = time.time(), resource.getrusage(resource.RUSAGE_SELF)
        at_once = max(1, round(given.rate / 10)) if given.rate else len(names)
        for start in range(0, len(names), at_once):
            now = time.time()
            some = [(name, now) for name in names[start : start + at_once]]
            ours.send(some)
            ours.recv()
            published |= {name.removeprefix("photos/"): when for name, when in some}
            if given.rate:
                time.sleep(max(0.0, began + (start + at_once) / given.rate - time.time()))
        while sum(name in committed for name in published) < len(published):
            time.sleep(0.1)
        took = max(committed[name] for name in published) - began
        after = resource.getrusage(resource.RUSAGE_SELF)
        stop.set()
        done.set()
        for thread in threads:
            thread.join()
        ours.send(None)
        latencies = np.array([committed[name] - when for name, when in published.items()])
        p50, p99 = np.quantile(latencies, [0.5, 0.99])
        used = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
        rate = "all at once" if not given.rate else f"{given.rate:g} a second"
        print(describe("apache-beam", "torch", "pyarrow"))
        print(
            f"{len(names)} notices, {rate}, windows of {given.window} s closing {given.lateness} s late, embedder {given.embedder}:"
        )
        print(
            f"{len(names) / took:.1f} notices/s, {1000 * used / len(names):.1f} ms CPU each (one core, decoders apart), latency p50 {p50:.1f} s, p99 {p99:.1f} s"
        )
        if state is not None:
            _print_state(state.windows)


if __name__ == "__main__":
    main()
