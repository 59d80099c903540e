"""Calls to a model: what is planned -> what a chain of calls makes of it, every answer through the ledger.

Two passes with a barrier between them. The first asks for what the ledger does not know and puts each answer there. The second reads
all that the ledger holds by then and walks the same chains again, without a model and without pictures: what goes on is a function
of the ledger, whichever worker asked and however often.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, Protocol

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import AsSingleton
from apache_beam.transforms.window import GlobalWindows
from apache_beam.typehints.decorators import no_annotations

from images.fetch import Reach, decoders_of
from shards.errors import BadData
from shards.ledger import CALL_FLUSH_ROWS, CallRow, Ledger, Segment
from shards.records import SourceImage
from shards.snapshot import Destination
from synthesis.backend import ChatBackend, Picture
from synthesis.backends import ModelBackend
from synthesis.calls import KnownCalls, Revision
from transforms.ledgers import ReadLedger, ReadSegments
from transforms.pictures import picture_of, picture_recipe
from transforms.progress import ProgressFile

COUNTER = "calls"
_WAITING = 2
"""Images that are taken from the runner for each one in work, so that no thread waits for the next."""
_SPARE = 4
"""One image more is in work for so many requests at a time: while one reads its answer, renders a prompt or decodes, another's is sent."""


def callers(concurrency: int) -> int:
    """Threads, and so images in work, that keep so many requests going."""
    return concurrency + -(-concurrency // _SPARE)


class Backend(NamedTuple):
    """Who is asked, and how: at most `max_pixels` pixels of an image are sent, none where that is None; `concurrency` requests at
    a time per worker. `known` are the segments of calls at the start, of this folder's ledger and of others; `revision` is the
    user's name for the model's weights."""

    client: ModelBackend
    max_pixels: int | None
    reach: Reach
    concurrency: int
    to: Destination
    known: Sequence[Segment] = ()
    revision: str = ""

    @property
    def whose(self) -> Revision:
        return Revision(self.client.model, self.revision)


PictureOf = Callable[[bytes, SourceImage], Picture]
"""An image as the model gets it, by id and reference."""


class Chain(Protocol):
    """What is asked about an item, and what comes of it. The same answers lead to the same calls."""

    def run(self, item: Any, backend: ChatBackend, picture_of: PictureOf) -> Any:
        """All calls, one after the other, and what they give. Raises BadData."""

    def outputs(self, item: Any, result: Any) -> Iterator[Any]:
        """Elements of what `run` gave, tagged."""

    def failure(self, item: Any, error: BadData) -> Iterator[Any]:
        """Elements of an item whose calls did not all bring an answer, tagged."""


class Failure(NamedTuple):
    """Why the calls about an item ended before their time, and how often the last of them was tried."""

    code: str
    message: str
    attempts: int


def _unseen(image_id: bytes, source_image: SourceImage, max_pixels: int) -> Picture:
    return Picture(picture_recipe(image_id, max_pixels), _not_loaded)


def _not_loaded() -> NoReturn:
    raise AssertionError("a picture was asked for where all answers are known")


class _Answered(NamedTuple):
    """How many answers were known, how many were asked for, and what ended the chain before its time."""

    known: int
    asked: int
    failure: tuple[bytes, Failure] | None


class _Call(beam.DoFn):
    """Yields the failures alone: the answers are in the ledger, and are there before a bundle ends."""

    def __init__(self, chain: Chain, backend: Backend, progress: str, activity: str) -> None:
        self._chain, self._backend = chain, backend
        self._progress_folder, self._activity = progress, activity

    def setup(self) -> None:
        self._callers = ThreadPoolExecutor(callers(self._backend.concurrency))
        self._pool = decoders_of(self._backend.reach)
        self._picture_of = functools.partial(
            picture_of,
            max_pixels=self._backend.max_pixels or 0,  # where that is None no picture is asked for
            reach=self._backend.reach,
            pool=self._pool,
        )
        self._progress = ProgressFile(self._progress_folder, self._activity)
        self._rows = Ledger(self._backend.to.storage, CallRow).writer(self._backend.to.token, CALL_FLUSH_ROWS)
        self._at_work: set[Future[_Answered]] = set()

    def process(self, joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[Any]:
        item_id, groups = joined
        rows = list(groups["rows"])
        for item in groups["items"]:
            self._at_work.add(self._callers.submit(self._answer, item_id, item, rows))
        # Threads go on while the next elements come: at a bundle's end alone they run dry.
        yield from self._finished(_WAITING * self._backend.concurrency)

    def _answer(self, item_id: bytes, item: Any, rows: Sequence[CallRow]) -> _Answered:
        backend = self._backend
        calls = KnownCalls(item_id, backend.whose, rows, backend.client, self._rows.append)
        failure = None
        try:
            self._chain.run(item, calls, self._picture_of)
        except BadData as error:
            failure = item_id, Failure(error.code, str(error), error.attempts)
        return _Answered(calls.known, calls.asked, failure)

    def _finished(self, may_wait: int) -> Iterator[Any]:
        """What is done, until at most so many are not."""
        try:
            while len(self._at_work) > may_wait:
                done, self._at_work = wait(self._at_work, return_when=FIRST_COMPLETED)
                for future in done:
                    answered = future.result()
                    self._progress.advance()
                    Metrics.counter(COUNTER, "known").inc(answered.known)
                    Metrics.counter(COUNTER, "made").inc(answered.asked)
                    if answered.failure is not None:
                        Metrics.counter(COUNTER, f"failed_{answered.failure[1].code}").inc()
                        yield answered.failure
        except BaseException:
            # What ends the run must not cost answers that are paid for.
            for future in self._at_work:
                future.cancel()
            wait(self._at_work)
            self._at_work = set()
            self._rows.flush()
            raise

    def finish_bundle(self) -> Iterator[Any]:
        failures = list(self._finished(0))
        self._rows.flush()
        self._progress.write()
        yield from map(GlobalWindows.windowed_value, failures)

    def teardown(self) -> None:
        self._callers.shutdown()
        self._pool.close()
        self._backend.client.close()


class _Read(beam.DoFn):
    def __init__(self, chain: Chain, backend: Backend) -> None:
        self._chain, self._whose = chain, backend.whose
        self._picture_of = functools.partial(_unseen, max_pixels=backend.max_pixels or 0)

    def process(self, joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[Any]:
        item_id, groups = joined
        failures = [
            BadData(code, message, attempts=attempts) for code, message, attempts in groups["failures"]
        ]
        rows = list(groups["rows"])
        for item in groups["items"]:
            try:
                result = self._chain.run(item, KnownCalls(item_id, self._whose, rows), self._picture_of)
            except BadData as error:
                yield from self._chain.failure(item, failures[0] if failures else error)
            else:
                yield from self._chain.outputs(item, result)


def _segments_now(_: Any, done: int, backend: Backend) -> list[Segment]:
    """What the ledgers hold once all calls are made; other folders' as they were."""
    own = Ledger(backend.to.storage, CallRow).segments()
    return own + [segment for segment in backend.known if segment.root != backend.to.storage.root]


@dataclass
class AskModel(beam.PTransform):
    """PCollection[(id, item)], each id once -> what `chain` gives for each item, by tag.

    Calls of one item follow each other in one worker; items run side by side. Each answer is in the ledger before it counts, failures
    never are. An item whose calls failed is one where the second pass finds no answer. Shuffled: items, twice, and the rows of the
    ledger, twice. In batch alone: the barrier waits for all calls.
    """

    chain: Chain
    backend: Backend
    item: Any
    record: Any
    tags: Sequence[str] = field(default_factory=list)
    progress: str = ""
    activity: str = "conversations"

    @no_annotations
    def expand(self, items: beam.PCollection) -> Any:
        pipeline = items.pipeline
        failed = (
            {
                "items": items,
                "rows": pipeline | "KnownCalls" >> ReadLedger(self.backend.known, CallRow, "image_id"),
            }
            | "JoinCalls" >> beam.CoGroupByKey()
            | "Call"
            >> beam.ParDo(_Call(self.chain, self.backend, self.progress, self.activity)).with_output_types(
                beam.typehints.Tuple[bytes, Failure]
            )
        )
        after = AsSingleton(failed | "CallsDone" >> beam.combiners.Count.Globally())
        answers = (
            pipeline
            | "Once" >> beam.Create([None])
            | "SegmentsNow" >> beam.FlatMap(_segments_now, after, self.backend).with_output_types(Segment)
            | "Answers" >> ReadSegments(CallRow, "image_id")
        )
        return (
            {"items": items, "rows": answers, "failures": failed}
            | "JoinAnswers" >> beam.CoGroupByKey()
            | "ReadAnswers"
            >> beam.ParDo(_Read(self.chain, self.backend))
            .with_output_types(self.record)
            .with_outputs(*self.tags, main="main")
        )
