"""The job behind `shardmill annotate-seed`: a file of conversations in, the same records with instruction tags out, line by line."""

import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from images.sources.json_text import read_records
from images.sources.records import sample_of
from images.sources.source import Source
from shards.errors import BadData, BadRequest
from shards.ids import canonical_json, digest
from shards.records import Origin
from synthesis.annotate import PROMPT, annotate
from synthesis.backend import ChatBackend
from synthesis.prompts import load_prompt
from synthesis.taxonomy import Taxonomy

STAGE = "annotate"
FIELD = "annotation"
Watch = Callable[[str, int], contextlib.AbstractContextManager[Callable[[], None]]]


class Annotated(NamedTuple):
    """Records annotated now and before, and failures, which `dead_path` lists."""

    annotated: int
    known: int
    dead: int
    dead_path: Path


class _Record(NamedTuple):
    number: int
    record: Any
    key: str


def annotate_file(
    seed: Path, output: Path, taxonomy: Taxonomy, backend: ChatBackend, concurrency: int, watch: Watch
) -> Annotated:
    """Append to `output` each record of `seed` that is not in it yet, with `instruction_tags` and how they came to be.

    A record is known by its own content; one file holds answers to one prompt about one taxonomy by one model. Failures are lines of OUTPUT.dead.jsonl with a code each, written anew by every run. Lines are flushed as answers come, so that a killed run
    repeats at most what was in flight. In memory: keys of what is done, and twice `concurrency` records. Raises BadRequest.
    """
    prompt = load_prompt(PROMPT)
    how = {"prompt": prompt.prompt_id, "model": backend.model, "types_sha256": digest(taxonomy.types).hex()}
    dead_path = output.with_name(f"{output.stem}.dead.jsonl")
    if not seed.is_file():
        raise BadRequest(f"--seed {seed}: no such file")
    if not output.parent.is_dir():
        raise BadRequest(f"--output {output}: there is no folder {output.parent}")
    if output.exists() and output.samefile(seed):
        raise BadRequest(f"--output {output}: is --seed itself; name another file")
    done = _done(output, how)
    counts = {"annotated": 0, "known": 0, "dead": 0}

    def asked(one: _Record) -> list[str] | BadData:
        try:
            if isinstance(one.record, BadData):
                raise one.record
            sample = sample_of(_AS_TEXT, _AS_TEXT_ORIGIN, one.record, lambda _: ())
            return annotate(sample.conversation, taxonomy, backend, prompt)
        except BadData as error:
            return error

    def settle(one: _Record, answer: list[str] | BadData) -> None:
        if isinstance(answer, BadData):
            counts["dead"] += 1
            letter = {
                "stage": STAGE,
                "record": one.number,
                "code": answer.code,
                "message": str(answer),
                "key": one.key,
            }
            dead.write(canonical_json(letter) + b"\n")
        else:
            counts["annotated"] += 1
            told = {**how, "record_sha256": one.key}
            out.write(canonical_json({**one.record, "instruction_tags": list(answer), FIELD: told}) + b"\n")
            out.flush()

    waiting = deque[tuple[_Record, Future[list[str] | BadData]]]()
    with (
        output.open("ab") as out,
        dead_path.open("wb") as dead,
        ThreadPoolExecutor(concurrency) as callers,
        watch("records", sum(1 for _ in _records(seed))) as advance,
    ):
        for one in _records(seed):
            if one.key in done:
                counts["known"] += 1
                advance()
                continue
            done.add(one.key)
            waiting.append((one, callers.submit(asked, one)))
            if len(waiting) >= 2 * concurrency:
                first, future = waiting.popleft()
                settle(first, future.result())
                advance()
        for first, future in waiting:
            settle(first, future.result())
            advance()
    if not counts["dead"]:
        dead_path.unlink()
    return Annotated(counts["annotated"], counts["known"], counts["dead"], dead_path)


_AS_TEXT = Source(0, "seed", "", "llava", "")
_AS_TEXT_ORIGIN = Origin(0, "seed", "", 0)


def _records(seed: Path) -> Iterator[_Record]:
    with seed.open("rb") as stream:
        for number, record in read_records(stream):
            if isinstance(record, dict):
                record.pop(FIELD, None)
                key = digest({name: value for name, value in record.items() if name != "instruction_tags"})
                yield _Record(number, record, key.hex())
            else:
                error = (
                    record
                    if isinstance(record, BadData)
                    else BadData("bad_record", f"a {type(record).__name__}, not an object")
                )
                yield _Record(number, error, digest([number, str(error)]).hex())


def _done(output: Path, how: dict[str, str]) -> set[str]:
    """Keys of the records that are annotated in this way. What a killed run left of its last line is cut off."""
    if not output.exists():
        return set()
    found, whole = set(), 0
    with output.open("r+b") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                break
            try:
                told = json.loads(line)[FIELD]
                if any(told[name] != value for name, value in how.items()):
                    raise BadRequest(
                        f"--output {output}: was annotated with another prompt, model or taxonomy; name another file"
                    )
                found.add(str(told["record_sha256"]))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BadRequest(
                    f"--output {output}: holds a line that annotate-seed did not write; name another file"
                ) from error
            whole += len(line)
        stream.truncate(whole)
    return found
