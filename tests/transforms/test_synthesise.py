"""Calls through the ledger: asked once, kept for good, the same samples whoever asked and however often it failed."""

import gc
import io
import pickle
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from PIL import Image

from images.decode import DECODER
from images.fetch import Reach
from images.web import WebOptions
from shards.ids import image_id_of, sample_id_of
from shards.ledger import CallRow, Ledger, call_key
from shards.records import (
    FROM_SOURCE,
    DeadLetter,
    Decision,
    MediaRef,
    Origin,
    PlannedImage,
    PlannedType,
    Sample,
    SourceImage,
    Tag,
    TaggedImage,
    Turn,
)
from shards.snapshot import Destination
from shards.storage import storage_of
from synthesis.backend import Ask, Reply, VlmFailure
from synthesis.calls import KnownCalls, Revision
from synthesis.client import ChatClient
from synthesis.generate import Method
from synthesis.prompts import load_prompts
from tests.loopback_gcs import LoopbackGcs
from tests.proof.counts import some
from tests.scripted_vlm import ScriptedServer, scripted_server
from transforms.calls import Backend, callers
from transforms.judge import JudgeExisting
from transforms.synthesise import Synthesise

TYPES = (
    "Coarse Perception/Image Scene/Identify indoor scene",
    "Fine-grained Perception/Attribute Recognition/Recognize colors of objects",
)
IMAGES = 10
METHOD = Method(load_prompts())
REACH = Reach(WebOptions(max_bytes=1 << 20), decoders=1)
MODES = {
    "in memory": ["--runner=FnApiRunner"],
    "over gRPC": ["--runner=FnApiRunner", "--direct_running_mode=multi_threading", "--direct_num_workers=2"],
    "processes": ["--runner=FnApiRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2"],
    "bundles": ["--runner=BundleBasedDirectRunner"],
}


class Found(NamedTuple):
    """What a pipeline gave."""

    samples: list[Sample]
    decisions: list[Decision]
    dead: list[DeadLetter]
    questions: Counter[str]


@pytest.fixture(autouse=True)
def leftovers() -> Iterator[None]:
    """Beam tears nothing down where an error ends a run; in the job the launcher lets go of connections, here nobody does."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> list[PlannedImage]:
    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for number in range(IMAGES):
        sink = io.BytesIO()
        noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(noise).resize((80, 60)).save(sink, "JPEG")
        path = folder / f"{number:02}.jpg"
        path.write_bytes(sink.getvalue())
        source = SourceImage(Origin(0, "s", path.name, 0), MediaRef(str(path), 0, len(sink.getvalue())))
        types = [PlannedType(name, ["noise"], 900) for name in TYPES]
        made.append(PlannedImage(image_id_of(sink.getvalue()), source, [Tag("noise", 900)], "", types))
    return sorted(made)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as scripted:
        yield scripted


def gone(planned: Sequence[PlannedImage]) -> list[PlannedImage]:
    """The same images, whose files are not there any more."""
    source = SourceImage(Origin(0, "s", "gone", 0), MediaRef("/nowhere", 0, 1))
    return [one._replace(source_image=source._replace(origin=one.source_image.origin)) for one in planned]


def no_sleep(_: float) -> None:
    time.sleep(0.001)


def backend_of(
    url: str, out: str, concurrency: int = 4, reuse_from: Sequence[str] = (), **how: Any
) -> Backend:
    client = ChatClient(url, how.pop("model", "scripted-vlm"), max_attempts=2, sleep=no_sleep)
    segments = [s for folder in (out, *reuse_from) for s in Ledger(storage_of(folder), CallRow).segments()]
    given = {"max_pixels": 4000, "reach": REACH, "revision": "", **how}
    return Backend(
        client, to=Destination(out, uuid.uuid4().hex), known=segments, concurrency=concurrency, **given
    )


def keep(element: Any, folder: str) -> None:
    (Path(folder) / uuid.uuid4().hex).write_bytes(pickle.dumps(element))


def collected(outputs: Sequence[Any], folder: Path, run: beam.Pipeline) -> Found:
    names = ("samples", "decisions", "dead", "questions")
    for name, elements in zip(names, outputs, strict=False):
        (folder / name).mkdir(parents=True)
        _ = elements | f"Keep{name}" >> beam.Map(keep, str(folder / name))
    run.run().wait_until_finish()
    kept = [[pickle.loads(f.read_bytes()) for f in (folder / name).glob("*")] for name in names]
    return Found(sorted(kept[0]), sorted(kept[1], key=str), sorted(kept[2]), Counter(kept[3]))


def synthesised(
    planned: Sequence[PlannedImage],
    backend: Backend,
    folder: Path,
    method: Method = METHOD,
    mode: str = "in memory",
) -> Found:
    run = beam.Pipeline(options=PipelineOptions(MODES[mode]))
    made = (
        run
        | beam.Create(planned).with_output_types(PlannedImage)
        | "Synthesise" >> Synthesise(backend, method)
    )
    return collected(made, folder / uuid.uuid4().hex, run)


@pytest.fixture(scope="module")
def calm(planned: list[PlannedImage], tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What comes of the images where nothing fails."""
    folder = tmp_path_factory.mktemp("calm")
    with scripted_server() as scripted:
        return synthesised(planned, backend_of(scripted.url, str(folder / "out")), folder)


def test_every_planned_conversation_has_a_fate(calm: Found, planned: list[PlannedImage]) -> None:
    assert len(calm.samples) + len(calm.decisions) == IMAGES and not calm.dead
    assert (
        calm.questions.total()
        == IMAGES * len(TYPES)
        == sum(len(planned_one.types) for planned_one in planned)
    )
    codes = Counter(key.split()[1] for key in calm.questions.elements())
    assert codes.keys() == {"kept", "low_judge", "not_relevant"}
    assert codes["kept"] == sum(len(sample.conversation) // 2 for sample in calm.samples)
    assert {len(sample.conversation) for sample in calm.samples} == {2, 4}
    for sample in calm.samples:
        assert sample.language == "en" and sample.sample_id == sample_id_of(
            sample.image_ids, sample.conversation
        )
        assert len(sample.provenance.questions) == len(TYPES)
    for row in calm.decisions:
        assert (row.unit, row.fate) == ("conversation", "filtered")
        assert (row.score, row.threshold) == ((3, 8) if row.code == "low_judge" else (None, None))


def test_a_rerun_makes_no_call_and_reads_no_image(planned, calm, server, tmp_path) -> None:
    out = str(tmp_path / "out")
    assert synthesised(planned[:5], backend_of(server.url, out), tmp_path).samples
    first = server.total
    assert synthesised(planned, backend_of(server.url, out), tmp_path) == calm
    assert max(server.calls.values()) == 1 and server.total > first
    before = server.total
    again = synthesised(gone(planned), backend_of(server.url, out), tmp_path)
    assert (again, server.total) == (calm, before)
    other = str(tmp_path / "other")
    assert synthesised(gone(planned), backend_of(server.url, other, reuse_from=[out]), tmp_path) == calm
    assert server.total == before and not Ledger(storage_of(other), CallRow).segments()


def keys_of(out: str) -> set[bytes]:
    return {row.key for row in Ledger(storage_of(out), CallRow).rows()}


def test_what_changes_the_answer_changes_every_key(planned, server, tmp_path) -> None:
    out, few = str(tmp_path / "out"), planned[:3]
    synthesised(few, backend_of(server.url, out), tmp_path)
    prompts = {
        **METHOD.prompts,
        "question": METHOD.prompts["question"]._replace(body=METHOD.prompts["question"].body + "!"),
    }
    known = server.total
    for how, method in (
        ({"max_pixels": 3000}, METHOD),
        ({"model": "another"}, METHOD),
        ({"revision": "r2"}, METHOD),
    ):
        other = str(tmp_path / str(how))
        synthesised(few, backend_of(server.url, other, **how), tmp_path, method)
        assert keys_of(other) and keys_of(other).isdisjoint(keys_of(out)), how
    before = server.total
    synthesised(few, backend_of(server.url, out), tmp_path, METHOD._replace(prompts=prompts))
    assert server.total - before == len(few) * len(TYPES)  # the scripted model asks the same all the same
    before = server.total
    synthesised(few, backend_of(server.url, out), tmp_path, METHOD._replace(judge_min=5, relevance=False))
    assert server.total - before < known  # only of what had been dropped before


def test_failures_cost_their_images_alone_and_a_calm_rerun_completes_them(planned, calm, tmp_path) -> None:
    out = str(tmp_path / "out")
    with scripted_server(faulty=0.3) as hostile:
        met = synthesised(planned, backend_of(hostile.url, out), tmp_path)
    assert met.dead and len(met.samples) + len(met.decisions) == IMAGES
    assert len([row for row in met.decisions if row.fate == "dead"]) == len(met.dead)
    assert {letter.code for letter in met.dead} <= {
        "vlm_server_error",
        "vlm_refused",
        "vlm_bad_response",
        "vlm_empty",
        "vlm_rate_limited",
    }
    assert (
        set(met.samples) <= set(calm.samples)
        if met.samples and isinstance(met.samples[0].tags, tuple)
        else True
    )
    assert {sample.sample_id for sample in met.samples} <= {sample.sample_id for sample in calm.samples}
    with scripted_server() as server:
        assert synthesised(planned, backend_of(server.url, out), tmp_path) == calm
        assert max(server.calls.values()) == 1


@pytest.mark.proof
@pytest.mark.parametrize("mode", some(["over gRPC", "bundles", "processes"], 2, seed=1))
def test_every_running_mode_gives_the_same(planned, calm, server, tmp_path, mode) -> None:
    assert synthesised(planned, backend_of(server.url, str(tmp_path / "out")), tmp_path, mode=mode) == calm
    assert max(server.calls.values()) == 1


def test_a_ledger_in_a_bucket(planned, calm, server, gcs: LoopbackGcs, tmp_path) -> None:
    out = f"gs://{gcs.bucket}/out"
    assert synthesised(planned, backend_of(server.url, out), tmp_path) == calm
    before = server.total
    assert synthesised(gone(planned), backend_of(server.url, out), tmp_path) == calm
    assert server.total == before


def test_what_breaks_a_run_costs_no_answer_that_came(planned, server, tmp_path, monkeypatch) -> None:
    out, chat, lock = str(tmp_path / "out"), ChatClient.chat, threading.Lock()
    made = []

    def breaks(self: ChatClient, ask: Ask, affinity: bytes = b"") -> Reply:
        with lock:
            made.append(1)
            if len(made) == 30:
                raise MemoryError("the machine is broken")
        return chat(self, ask, affinity)

    monkeypatch.setattr(ChatClient, "chat", breaks)
    with pytest.raises(Exception, match="the machine is broken"):
        synthesised(planned, backend_of(server.url, out), tmp_path)
    answered = server.total
    assert len(list(Ledger(storage_of(out), CallRow).rows())) == answered >= 29


def test_threads_are_kept_busy_from_the_first_image_to_the_last(planned, tmp_path) -> None:
    """Also while other images come: none waits for the slowest of its batch."""
    with scripted_server(delay_s=0.02) as server:
        synthesised(planned, backend_of(server.url, str(tmp_path / "out"), concurrency=3), tmp_path)
        assert server.most_busy == callers(3) == 4


class Model:
    """Answers everything with its name."""

    model = "m"

    def __init__(self, said: str) -> None:
        self.said, self.asked = said, 0

    def chat(self, ask: Ask, affinity: bytes = b"") -> Reply:
        self.asked += 1
        if ask.prompt == "fail":
            raise VlmFailure("vlm_timeout", "late")
        if ask.prompt == "too much":
            raise VlmFailure("vlm_over_budget", "no money is left")
        return Reply(self.said, 7, 2)

    def close(self) -> None: ...


def test_known_calls() -> None:
    noted: list[CallRow] = []
    model, whose = Model("b"), Revision("m", "")
    ask = Ask("what?")
    calls = KnownCalls(b"i" * 32, whose, [], model, noted.append)
    assert calls.chat(ask) == calls.chat(ask) == Reply("b", 7, 2) and (calls.asked, calls.known) == (1, 1)
    with pytest.raises(VlmFailure):
        calls.chat(Ask("fail"))
    with pytest.raises(VlmFailure):
        calls.chat(Ask("too much"))
    assert calls.asked == 2, "what the budget held back was no call"
    schema = '{"additionalProperties":false,"properties":{"x":{"type":"integer"}},"required":["x"],"type":"object"}'
    with pytest.raises(VlmFailure, match="JSON"):
        calls.chat(Ask("json", schema=schema))
    assert [row.answer for row in noted] == ["b"]  # no failure, and nothing that is not what was asked for
    key = call_key(b"i" * 32, "m", ask.told(), "")
    assert noted[0].key == key
    smaller = CallRow(key, b"i" * 32, "a", 0, 0)
    for rows in ([*noted, smaller], [smaller, *noted]):
        assert KnownCalls(b"i" * 32, whose, rows).chat(ask).text == "a"
    with pytest.raises(VlmFailure) as caught:
        KnownCalls(b"j" * 32, whose, []).chat(ask)
    assert caught.value.code == "vlm_unanswered"


class _Overtaken:
    """While this run asks for a question, another one puts a smaller one into the ledger."""

    def __init__(self, client: ChatClient, to: Destination) -> None:
        self._client, self._to, self.model = client, to, client.model

    def chat(self, ask: Ask, affinity: bytes = b"") -> Reply:
        if ask.prompt.startswith("You write"):
            key = call_key(affinity, self.model, ask.told(), "")
            row = CallRow(key, affinity, "A smaller question, is it not?", 0, 0)
            Ledger(self._to.storage, CallRow).put([row], self._to.token)
        return self._client.chat(ask, affinity)

    def close(self) -> None:
        self._client.close()


def test_an_answer_that_another_run_overtook_is_a_failure_that_a_rerun_heals(
    planned, server, tmp_path
) -> None:
    """Of two answers to one call the smaller one counts, and nobody has gone on from there yet."""
    out, one = str(tmp_path / "out"), planned[:1]
    backend = backend_of(server.url, out)
    found = synthesised(one, backend._replace(client=_Overtaken(backend.client, backend.to)), tmp_path)
    assert [letter.code for letter in found.dead] == ["vlm_unanswered"]
    again = synthesised(one, backend_of(server.url, out), tmp_path)
    assert not again.dead and len(again.samples) + len(again.decisions) == 1


def sample(planned: PlannedImage, answer: str, number: int) -> Sample:
    turns = [Turn("human", "<image>\nWhat is it?"), Turn("gpt", answer)] if answer else []
    ids = [planned.image_id]
    origin = Origin(0, "s", "all.json", number)
    return Sample(sample_id_of(ids, turns), ids, turns, [], origin, [], "", "", 1.0, "{}", FROM_SOURCE)


def test_collected_conversations_are_judged_once(planned, server, tmp_path) -> None:
    out = str(tmp_path / "out")
    samples = [
        sample(one, "It is a picture of noise, as far as one can see." * (n > 3), n)
        for n, one in enumerate(planned)
    ]
    kept = [TaggedImage(one.image_id, one.source_image, 1, one.tags) for one in planned]

    def judged(kept: Sequence[TaggedImage]) -> Found:
        run = beam.Pipeline(options=PipelineOptions(MODES["in memory"]))
        inputs = {
            "samples": run | "S" >> beam.Create(samples).with_output_types(Sample),
            "kept": run | "K" >> beam.Create(kept).with_output_types(TaggedImage),
        }
        outcome = inputs | JudgeExisting(backend_of(server.url, out), METHOD)
        return collected(outcome, tmp_path / uuid.uuid4().hex, run)

    found = judged(kept)
    assert len(found.samples) + len(found.decisions) == IMAGES and not found.dead
    assert server.total == IMAGES - 4  # those without a conversation pass unasked
    assert found.decisions and {(row.unit, row.fate, row.code, row.score) for row in found.decisions} == {
        ("sample", "filtered", "low_judge", 3.0)
    }
    before = server.total
    nowhere = [one._replace(source_image=gone(planned)[0].source_image) for one in kept]
    assert judged(nowhere) == found and server.total == before


def test_a_recipe_names_all_that_makes_the_bytes(planned) -> None:
    from transforms.pictures import picture_of, picture_recipe

    image = planned[0]
    seen = picture_of(image.image_id, image.source_image, 4000, None, None)  # type: ignore[arg-type]
    assert seen.recipe == picture_recipe(image.image_id, 4000)
    assert DECODER in seen.recipe and "4000" in seen.recipe and image.image_id.hex() in seen.recipe
