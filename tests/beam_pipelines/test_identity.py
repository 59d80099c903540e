"""Stable identity: names, coders and states of every step of a job, beside golden files.

A streaming job that is updated hands its state on to the step of the same name, in the old step's coders.
"""

import difflib
import functools
import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import apache_beam as beam
import numpy as np
import pytest
from apache_beam import coders
from apache_beam.internal import pickler
from apache_beam.portability.api import beam_runner_api_pb2 as protos
from apache_beam.portability.api import schema_pb2
from apache_beam.transforms.userstate import BagStateSpec, CombiningValueStateSpec, ReadModifyWriteStateSpec

from beam_pipelines import stream_images
from beam_pipelines.curate_images import build
from beam_pipelines.options import StreamOptions, parse_as, parse_options
from beam_pipelines.prepare import Job, prepare
from embeddings.encoder import Encoder
from images.sources.source import Source
from shards.records import Tag
from synthesis.local_model import LocalSpec
from tests.conftest import REPOSITORY
from tests.scripted_vlm import scripted_server
from transforms.against import KeptPack
from transforms.losses import LossSource
from transforms.tag import DropRule

GOLDEN = Path(__file__).parent / "golden"
EXPLANATION = """{count} lines of {path} do not hold any more:

{difference}

What that does to a running job that is updated (`shardmill submit ... update: true`):
  - a step that went or has another name: the update is refused, or its state and what is in flight before it is lost, unless
    `transform_name_mapping: {{OLD: NEW}}` in the `dataflow:` block says what it is called now;
  - another coder: the update is refused: what is in flight cannot be read. Drain the job, and start a new one;
  - another state: as another coder, for that step;
  - another record in a state: what is held cannot be read, unless its last field is new and has a default;
  - a new step: nothing.
Batch jobs are never updated; a run that was killed goes on from the ledger whatever its steps are called.
If the change is meant, say so in CHANGELOG.md with the mapping that an update needs, and write the file anew:
  python -m tests.beam_pipelines.test_identity"""


class Namer:
    """Coders and states of a graph in words that do not depend on the ids that a build gives out."""

    def __init__(self, parts: protos.Components) -> None:
        self._parts, self._known = parts, dict[str, str]()
        self.rows: dict[str, str] = {}
        """Fields of rows, by what stands for them."""
        self.held: dict[str, str] = {}
        """Modules and fields of the records that bags hold pickled: a pickle has module, name, and the values in this order."""

    def coder(self, coder_id: str) -> str:
        if coder_id not in self._known:
            self._known[coder_id] = self._coder(coder_id)
        return self._known[coder_id]

    def _coder(self, coder_id: str) -> str:
        coder = self._parts.coders[coder_id]
        urn, payload = coder.spec.urn, coder.spec.payload
        if urn == "beam:coder:row:v1":
            fields = self._fields(schema_pb2.Schema.FromString(payload))
            name = f"row-{hashlib.sha256(fields.encode()).hexdigest()[:6]}"
            self.rows[name] = fields
            return name
        inner = ",".join(map(self.coder, coder.component_coder_ids))
        if urn == "beam:coder:pickled_python:v1":
            made = coders.Coder.from_runner_api(coder, self._context())
            name, inner = type(made).__name__, inner or self._of(made)
        else:
            name = urn.removeprefix("beam:coder:").removesuffix(":v1")
        return f"{name}({inner})" if inner else name

    @functools.cache  # noqa: B019  (one namer for a test)
    def _context(self) -> object:
        from apache_beam.runners.pipeline_context import PipelineContext

        return PipelineContext(self._parts)

    def _of(self, coder: coders.Coder) -> str:
        """What a coder of Python's says of itself beyond its class."""
        kind = getattr(coder, "proto_message_type", None) or getattr(coder, "_type_hint", None)
        return getattr(kind, "__name__", "") if kind else ""

    def _fields(self, schema: schema_pb2.Schema) -> str:
        return ",".join(f"{field.name}:{self._type(field.type)}" for field in schema.fields)

    def _type(self, kind: schema_pb2.FieldType) -> str:
        which = kind.WhichOneof("type_info")
        optional = "?" if kind.nullable else ""
        if which == "atomic_type":
            return schema_pb2.AtomicType.Name(kind.atomic_type).lower() + optional
        if which in ("array_type", "iterable_type"):
            return f"[{self._type(getattr(kind, which).element_type)}]{optional}"
        if which == "map_type":
            return (
                f"{{{self._type(kind.map_type.key_type)}:{self._type(kind.map_type.value_type)}}}{optional}"
            )
        if which == "row_type":
            return f"({self._fields(kind.row_type.schema)}){optional}"
        logical = kind.logical_type
        return f"{logical.urn.split(':')[-2] if ':' in logical.urn else logical.urn}{optional}"

    def states(self, step: protos.PTransform) -> Iterator[str]:
        if step.spec.urn != "beam:transform:pardo:v1":
            return
        payload = protos.ParDoPayload.FromString(step.spec.payload)
        for name, state in sorted(payload.state_specs.items()):
            kind = state.WhichOneof("spec")
            spec = getattr(state, kind)
            held = [
                f"{field.removesuffix('_coder_id')} {self.coder(getattr(spec, field))}"
                for field in ("key_coder_id", "value_coder_id", "element_coder_id", "accumulator_coder_id")
                if getattr(spec, field, "")
            ]
            if kind == "read_modify_write_spec":
                held = [f"value {self.coder(spec.coder_id)}"]
            if kind == "bag_spec" and held == ["element FastPrimitivesCoder"]:
                held += filter(None, [self._records(payload)])
            yield f"state {name}: {kind.removesuffix('_spec')} {' of '.join(held)}"
        for name, timer in sorted(payload.timer_family_specs.items()):
            yield f"timer {name}: {protos.TimeDomain.Enum.Name(timer.time_domain).lower()}"

    def _records(self, payload: protos.ParDoPayload) -> str:
        """The records that a step may keep of what comes to it, by what its `process` says it takes; their fields go to `held`."""
        process = type(pickler.loads(payload.do_fn.payload)[0]).process
        taken = [kind for name, kind in get_type_hints(process).items() if name == "keyed"]
        return ",".join(sorted({name for kind in taken for name in self._hold(kind)}))

    def _hold(self, kind: Any) -> list[str]:
        """The names of the records in a type, once those and all that they are made of are noted."""
        if not hasattr(kind, "_fields"):
            return [name for inner in get_args(kind) for name in self._hold(inner)]
        if kind.__name__ not in self.held:
            hints = get_type_hints(kind)
            fields = ",".join(f"{field}:{_plain(hints[field])}" for field in kind._fields)
            self.held[kind.__name__] = f"{kind.__module__} {fields}"
            for hint in hints.values():
                self._hold(hint)
        return [kind.__name__]


def _plain(kind: Any) -> str:
    return kind.__name__ if type(kind) is type else re.sub(r"[A-Za-z_.]+\.", "", str(kind))


def identity_of(pipeline: protos.Pipeline) -> str:
    """A paragraph a step, by name: its kind, the coders of what it gives, its states and timers."""
    namer = Namer(pipeline.components)
    paragraphs = []
    for step in pipeline.components.transforms.values():
        if not step.unique_name:
            continue  # the root
        kind = step.spec.urn.removeprefix("beam:transform:").removesuffix(":v1")
        lines = [f"{step.unique_name} [{kind}]"]
        for tag, collection in sorted(step.outputs.items()):
            if not step.subtransforms:
                coder = pipeline.components.pcollections[collection].coder_id
                lines.append(f"  {tag} -> {namer.coder(coder)}")
        lines += [f"  {line}" for line in namer.states(step)]
        paragraphs.append("\n".join(lines))
    rows = [f"{name} = {fields}" for name, fields in sorted(namer.rows.items())]
    held = [f"{name} = {fields}" for name, fields in sorted(namer.held.items())]
    return "\n".join([*sorted(paragraphs), *rows, *held]) + "\n"


def graph_of(job: Job, model: Encoder) -> protos.Pipeline:
    pipeline = beam.Pipeline(runner="FnApiRunner")
    build(pipeline | "Sources" >> beam.Create(job.sources), job, model)
    return pipeline.to_runner_api()


def least(out: Path) -> str:
    """What a folder of images and an output make."""
    prepared = prepare(parse_options({"input": [str(REPOSITORY / "examples/images")], "output": str(out)}))
    return identity_of(graph_of(prepared.job, prepared.model))


def everything(out: Path) -> str:
    """Every option on that adds steps."""
    values = {
        "input": [str(REPOSITORY / "examples/images")],
        "output": str(out),
        "geometric": True,
        "judge_existing": True,
        "loss_existing": True,
        "tagger": ["classes", "vlm"],
    }
    with scripted_server() as server:
        asked = values | {"vlm_base_url": [server.url], "loss_existing": False}
        prepared = prepare(parse_options(asked))
    job, to = prepared.job, prepared.job.to
    # The graph asks only whether there is one of these.
    losses = LossSource(LocalSpec("model", "", "f", "cpu", "float32"), None, job.reach, to)
    unwanted = job.tagging._replace(drop=DropRule(()), screen=job.tagging.look)
    job = job._replace(
        tagging=unwanted,
        options=job.options.model_copy(
            update={"loss_existing": True, "decontaminate": ["bench=x"], "max_error_rate": ["any=1"]}
        ),
        losses=losses,
        against=[KeptPack("", "", None, frozenset())],
        benchmarks=[job.sources[0]._replace(name="bench")],
    )
    assert isinstance(job.benchmarks[0], Source)
    return identity_of(graph_of(job, prepared.model))


def stream(out: Path, **more: object) -> str:
    """Notices of a subscription, into a folder whose cells are another's affair."""
    values = {
        "input": [str(REPOSITORY / "examples/images")],
        "output": str(out),
        "subscription": "projects/a-project/subscriptions/objects",
    }
    options = parse_as(StreamOptions, values | more)
    prepared, streaming = stream_images.prepare_stream(options, [])
    job = prepared.job
    # The graph asks only whether there are such models.
    looking = job.tagging._replace(drop=DropRule(()), screen=job.tagging.look) if more else job.tagging
    pipeline = beam.Pipeline(runner="FnApiRunner")
    constructing = stream_images.constructing(
        options, prepared._replace(job=job._replace(tagging=looking)), streaming
    )
    constructing(pipeline)
    return identity_of(pipeline.to_runner_api())


def stream_everything(out: Path) -> str:
    """Every option on that adds steps, and listings in place of notices."""
    bench = f"bench={REPOSITORY / 'examples/images'}"
    return stream(out, subscription="", decontaminate=[bench], tagger=["classes", f"{__name__}:Looking"])


class Looking:
    """A tagger of the user's own."""

    fingerprint = "looking 1"
    names = ("seen",)

    def tags(self, pixels: np.ndarray) -> list[Tag]:
        return []


VARIANTS = {
    "curate_least": least,
    "curate_everything": everything,
    "stream": stream,
    "stream_everything": stream_everything,
}


def complaint(path: str, golden: str, now: str) -> str:
    """What has changed, and what that does to a job that is updated; empty where nothing has."""
    lines = difflib.unified_diff(golden.splitlines(), now.splitlines(), lineterm="", n=0)
    changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    shown = "\n".join(changed[:60])
    return EXPLANATION.format(count=len(changed), path=path, difference=shown) if changed else ""


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_coders_and_states_are_what_they_were(name: str, tmp_path: Path) -> None:
    golden, now = (GOLDEN / f"{name}.txt").read_text(), VARIANTS[name](tmp_path / "out")
    if said := complaint(f"golden/{name}.txt", golden, now):
        pytest.fail(said, pytrace=False)


def test_a_change_is_explained() -> None:
    golden = (GOLDEN / "curate_least.txt").read_text()
    renamed = golden.replace("\nCommit [", "\nPutInForce [")
    said = complaint("golden/x.txt", golden, renamed)
    assert "-Commit [" in said and "+PutInForce [" in said and "transform_name_mapping: {OLD: NEW}" in said
    assert "python -m tests.beam_pipelines.test_identity" in said and not complaint("", golden, golden)


class _Place(NamedTuple):
    row: int
    column: int


class _Piece(NamedTuple):
    place: _Place
    names: list[str]


SEEN = CombiningValueStateSpec("seen", sum)
LAST = ReadModifyWriteStateSpec("last", coders.BytesCoder())
WAITING = BagStateSpec("waiting", coders.FastPrimitivesCoder())


class _Counting(beam.DoFn):
    def process(
        self,
        keyed: tuple[bytes, tuple[int, _Piece]],
        seen: Any = beam.DoFn.StateParam(SEEN),
        last: Any = beam.DoFn.StateParam(LAST),
        waiting: Any = beam.DoFn.StateParam(WAITING),
    ) -> Iterator[int]:
        seen.add(1)
        yield seen.read()


def test_a_state_is_part_of_a_steps_identity_with_the_records_that_it_holds() -> None:
    """The main job has none; a job that has is held by the same words."""
    pipeline = beam.Pipeline(runner="FnApiRunner")
    keyed = beam.Map(lambda keyed: keyed).with_output_types(beam.typehints.Tuple[bytes, Any])
    elements = pipeline | beam.Create([(b"a", (1, _Piece(_Place(1, 2), [])))])
    elements | "Keyed" >> keyed | "Count" >> beam.ParDo(_Counting())
    lines = [line.strip() for line in identity_of(pipeline.to_runner_api()).splitlines()]
    assert {
        "state seen: combining accumulator FastPrimitivesCoder",
        "state last: read_modify_write value bytes",
        "state waiting: bag element FastPrimitivesCoder of _Piece",
        f"_Piece = {__name__} place:_Place,names:list[str]",
        f"_Place = {__name__} row:int,column:int",
    } <= {*lines}


def test_every_state_of_the_stream_says_how_its_bytes_are_read() -> None:
    states = re.findall(r"^  state .*$", (GOLDEN / "stream.txt").read_text(), re.MULTILINE)
    assert states and not [line for line in states if not re.search(r"(value|element|accumulator) \w+", line)]


if __name__ == "__main__":
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    for name, make in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            (GOLDEN / f"{name}.txt").write_text(make(Path(folder) / "out"))
        print(f"rewritten: golden/{name}.txt", file=sys.stderr)
