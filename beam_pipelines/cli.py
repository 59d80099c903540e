"""The `shardmill` command. Imports neither torch nor Beam until a command that needs them runs."""

import contextlib
import inspect
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.progress import Progress

from beam_pipelines.cloud.commands import add_commands
from beam_pipelines.cloud.dataflow import names_dataflow
from beam_pipelines.options import (
    CurateOptions,
    SourceOptions,
    StreamOptions,
    flag,
    parse_as,
    parse_options,
)
from shards.errors import AbortedByLimit, BadRequest, ShardmillError

# click's, which newer versions of typer carry within themselves under a private name.
UsageError: Any = typer.BadParameter.__base__
DONE, FAILED, BAD_REQUEST, ABORTED, INTERRUPTED = 0, 1, 2, 3, 130

_HELP = """Mill raw images into training shards for vision-language models.

Every image has a recorded fate. Start with:

  shardmill demo

  shardmill curate --input photos/ --output shards/

  shardmill report shards/
"""

app = typer.Typer(
    help=_HELP,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
_TAKE_BEAM_OPTIONS = ("curate", "stream", "submit", "fit-planner")
_beam_args: list[str] = []
"""What stood after `--`, split off before the command line is parsed."""


def _say(text: str) -> None:
    Console().print(text, highlight=False, soft_wrap=True, markup=False)


def _local(output: str) -> Path:
    """What is written to this machine only. Raises BadRequest for a bucket."""
    from shards.storage import is_remote

    if is_remote(output):
        raise BadRequest(f"--output {output}: is written to this machine only; name a local folder")
    return Path(output).expanduser()


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, nothing elsewhere."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def _flags_of(model: type[BaseModel]) -> list[inspect.Parameter]:
    """One typer parameter per field. Values stay text here: the model checks them, so that a rule is written once."""
    parameters = []
    for name, field in model.model_fields.items():
        if field.annotation == list[SourceOptions]:
            continue  # in the YAML only
        shown = (
            ""
            if field.default in (None, "", []) or isinstance(field.default, bool) or field.is_required()
            else f" [default: {_shown(field.default)}]"
        )
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        annotation: Any = bool | None if field.annotation is bool else str | None
        if field.annotation == list[str]:
            annotation = list[str] | None
        setting = typer.Option(
            flag(name) + (f"/--no-{flag(name)[2:]}" if field.default is True else ""),
            help=f"{field.description or ''}{shown}",
            metavar=None if annotation == (bool | None) else _metavar(field.annotation),
            rich_help_panel=str(extra.get("group", "Options")),
        )
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, setting]
            )
        )
    return parameters


def _shown(default: Any) -> str:
    return default.human_readable(decimal=True) if hasattr(default, "human_readable") else str(default)


def _metavar(annotation: Any) -> str:
    choices = getattr(annotation, "__args__", ())
    if choices and all(isinstance(choice, str) for choice in choices):
        return "|".join(choices)
    text = str(annotation)
    return "N" if "int" in text else "X" if "float" in text else "SIZE" if "ByteSize" in text else "TEXT"


def _command(
    model: type[BaseModel], name: str, *extra: inspect.Parameter, to: typer.Typer = app
) -> Callable[..., Any]:
    """Register a function as a command whose flags are a model's fields; it gets what was set as a dict."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            function({key: value for key, value in values.items() if value not in (None, [])})

        parameters = [*_flags_of(model), *extra]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        command.__doc__ = function.__doc__
        to.command(name, rich_help_panel=None)(command)
        return function

    return register


_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default="",
    annotation=Annotated[
        str, typer.Option("--config", help="YAML file of options; flags win.", metavar="FILE")
    ],
)


@app.command()
def demo(
    output: Annotated[
        str, typer.Option(help="Folder for the demo's input, shards, model and report.")
    ] = "demo",
    max_samples: Annotated[
        int, typer.Option(min=0, help="Images to synthesise a conversation for; 0 for none.")
    ] = 24,
    train: Annotated[bool, typer.Option(help="Train a small model on the result.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of what is planted.")] = 0,
) -> None:
    """Plant near duplicates, look-alikes and broken files among real images, mill them, and say what was found.

    shardmill demo --output /tmp/demo
    """
    from beam_pipelines.demo import run_demo

    run_demo(_local(output), max_samples, train, seed, Console(stderr=True))


@_command(CurateOptions, "curate", _CONFIG)
def curate(values: dict[str, Any]) -> None:
    """Read images, drop duplicates, tag, synthesise, write shards.

    shardmill curate --input photos/ --output shards/

    shardmill curate --input llava.json --image-root images/ --output shards/

    shardmill curate --input photos/ --output shards/ --vlm-base-url http://localhost:8000/v1 --limit 100

    Beam's own options come after `--`:  ... -- --runner=FnApiRunner
    """
    _curate(parse_options(values, values.pop("config", "")), _beam_args)


@_command(StreamOptions, "stream", _CONFIG)
def stream(values: dict[str, Any]) -> None:
    """Commit images as they arrive: a window of them at a time, each a child of the snapshot in force, until stopped.

    shardmill stream --input photos/ --output shards/

    shardmill stream --input gs://bucket/photos --subscription projects/P/subscriptions/S --output gs://bucket/shards

    shardmill compact shards/   folds the windows into one snapshot

    Beam's own options come after `--`:  ... -- --runner=FlinkRunner
    """
    options = parse_as(StreamOptions, values, values.pop("config", ""))
    if names_dataflow(_beam_args):
        from beam_pipelines.cloud.submit import submit

        submit("stream", options, _beam_args, Console())
        return
    from beam_pipelines.stream_images import stream as run_stream

    snapshot_id = run_stream(options, _beam_args)
    if options.dry_run:
        _say("dry run: nothing written")
    elif snapshot_id:
        _say(f"snapshot {snapshot_id[:12]} in {options.output}")
        _say(f"next: shardmill compact {options.output}")


def _curate(options: CurateOptions, beam_args: Sequence[str]) -> None:
    if names_dataflow(beam_args):
        from beam_pipelines.cloud.submit import submit

        submit("curate", options, beam_args, Console())
        return
    from beam_pipelines.curate_images import curate as run_curate

    snapshot = run_curate(options, beam_args)
    if snapshot is None:
        _say("dry run: nothing written")
        return
    from beam_pipelines.funnel import funnel_text

    _say(funnel_text(snapshot.manifest))
    _say(f"snapshot {snapshot.id[:12]} in {options.output}")
    _say(f"next: shardmill report {options.output}")
    if any(sample.conversation for sample in snapshot.samples()):
        _say(f"      shardmill train --data {options.output} --output model/")
    else:
        _say(
            "      no sample has a conversation to train on: give LLaVA JSON, or --vlm-base-url to have some made"
        )


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def train(context: typer.Context) -> None:
    """Train a small vision-language model on a run's shards. See `shardmill train --help`.

    shardmill train --data shards/ --output model/ --max-steps 30 --lm tiny
    """
    done = subprocess.run([sys.executable, "-m", "training.train", *context.args])
    raise typer.Exit(done.returncode if done.returncode >= 0 else 128 - done.returncode)


@app.command()
def report(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A run's folder, or OUT@ID.")],
    output: Annotated[str, typer.Option(help="HTML file. Default: OUT/report.html.")] = "",
) -> None:
    """Write one self-contained HTML page: funnels, duplicates, tags, conversations, dead letters.

    shardmill report shards/
    """
    from beam_pipelines.pages.report import write_report

    written = write_report(path, output)
    _say(f"report: {written}")
    _say("next: open it in a browser; every image's fate is in the decisions table it names")


@app.command()
def explain(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A run's folder, or OUT@ID.")],
    what: Annotated[
        str, typer.Argument(metavar="NAME_OR_ID", help="An image's name, or the start of an id.")
    ],
) -> None:
    """Say what became of an image or sample, and why.

    shardmill explain shards/ cat.jpg
    """
    from beam_pipelines.explain import explain_text
    from shards.snapshot import open_snapshot

    _say(explain_text(open_snapshot(path), what))


@contextlib.contextmanager
def _decoding() -> Iterator[Callable[[Iterable[bytes]], Iterator[object]]]:
    """Decoding without caps: those that the user chose for curation already let these images pass."""
    import psutil

    from images.decode import Limits, facts_of
    from images.sandbox import DecodePool

    limits = Limits(max_bytes=2 << 30, max_pixels=sys.maxsize)
    with DecodePool(limits, seconds=3600, memory_bytes=psutil.virtual_memory().total) as pool:
        yield lambda encoded: pool.map(facts_of, encoded, limits)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A run's folder, or OUT@ID.")],
    deep: Annotated[bool, typer.Option("--deep", help="Decode every image too.")] = False,
) -> None:
    """Check every file of a snapshot: there, whole, with the records the manifest counts, and every sample's images.

    shardmill verify shards/

    shardmill verify shards/ --deep
    """
    from shards.snapshot import open_snapshot
    from shards.verify import verify_snapshot

    snapshot = open_snapshot(path)
    files = snapshot.files()
    faults = 0
    with _progress("files", len(files)) as advance, contextlib.ExitStack() as stack:
        decode_all = stack.enter_context(_decoding()) if deep else None
        for fault in verify_snapshot(snapshot, decode_all, lambda _: advance()):
            _say(str(fault))
            faults += 1
    if faults:
        raise ShardmillError(
            f"{path}: {faults} faults; delete the files named and run `shardmill curate` again with the same options to mend"
        )
    _say(f"{path}: snapshot {snapshot.id[:12]} is whole: {len(files)} files")


@app.command()
def export(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A run's folder, or OUT@ID.")],
    output: Annotated[str, typer.Option(help="New folder for the export.")],
    format: Annotated[
        str, typer.Option(help="hf, joined-tfrecord, webdataset, llava, messages or infinity-mm.")
    ] = "hf",
) -> None:
    """Join samples and images for other trainers, with a dataset card.

    shardmill export shards/ --format hf --output export/
    """
    from rich.progress import track

    from shards.export import export_snapshot
    from shards.records import Sample
    from shards.snapshot import open_snapshot

    console, folder = Console(stderr=True), _local(output)

    def watch(samples: Iterable[Sample], total: int) -> Iterable[Sample]:
        return track(
            samples, "export", total, console=console, transient=True, disable=not console.is_terminal
        )

    written = export_snapshot(open_snapshot(path), format, folder, watch)
    left_out = "".join(f"; left out: {count} {reason}" for reason, count in written.left_out.items())
    _say(f"{written.num_records} samples in {output}{left_out}")
    _say(f"next: {written.how_to_load}")


_UPKEEP: dict[str, Any] = {"rich_help_panel": "Upkeep"}


@app.command("retry-failed", **_UPKEEP)
def retry_failed(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A run's folder.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, write nothing.")
    ] = False,
) -> None:
    """Run again what a folder's last run was asked for: what succeeded is remembered, what failed for the moment is tried again.

    shardmill retry-failed shards/
    """
    _run_again(path, {"dry_run": dry_run})


def _run_again(path: str, changes: dict[str, Any]) -> None:
    """What the folder's last run was asked for, with some options changed, where it was asked."""
    from beam_pipelines.request import read_request
    from shards.storage import rooted, storage_of

    out = rooted(path)
    storage = storage_of(out)
    if not storage.exists():
        raise BadRequest(f"{path}: no such folder")
    request = read_request(storage)
    try:
        os.chdir(request.folder)
    except OSError as error:
        raise BadRequest(f"{path}: was run in {request.folder}, which is gone ({error.strerror})") from error
    _curate(
        request.options.model_copy(update={"output": out, "refetch": False} | changes),
        request.beam_args,
    )


@app.command(**_UPKEEP)
def sweep(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A run's folder, or OUT@ID.")],
    cosine: Annotated[
        str, typer.Option(metavar="A:B", help="Values of --cosine to try: A:B, A:B:STEP or one.")
    ] = "",
    phash: Annotated[
        str, typer.Option("--phash", "--phash-bits", metavar="A:B", help="The same of --phash-bits.")
    ] = "",
    structure: Annotated[str, typer.Option(metavar="A:B", help="The same of --structure.")] = "",
    output: Annotated[str, typer.Option(help="HTML file. Default: OUT/sweep.html.")] = "",
    apply: Annotated[
        bool,
        typer.Option(
            "--apply", help="Run the folder's last request again with these thresholds, one value each."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --apply: say what would be done, write nothing.")
    ] = False,
) -> None:
    """Count what a snapshot would keep at other thresholds of near duplicates, one varied at a time; no image is read for it.

    shardmill sweep shards/

    shardmill sweep shards/ --cosine 0.90:0.99 --phash 0:8 --structure 0.06:0.16

    shardmill sweep shards/ --structure 0.10 --apply
    """
    from beam_pipelines.pages.sweep import write_page
    from beam_pipelines.sweep import (
        COSINE,
        PHASH,
        STRUCTURE,
        ranges_of,
        run_sweep,
        single_values,
        sweep_text,
        telling_of,
    )
    from shards.snapshot import open_snapshot, split_at

    snapshot = open_snapshot(path)
    given = {COSINE: cosine, PHASH: phash, STRUCTURE: structure}
    if dry_run and not apply:
        raise BadRequest("--dry-run: goes with --apply; without that nothing but the page is written")
    if apply:
        if split_at(path)[1] is not None:
            raise BadRequest(f"--apply {path}: runs a folder's last request again; give {split_at(path)[0]}")
        _run_again(path, single_values(given, snapshot) | {"dry_run": dry_run})
        return
    telling = telling_of(snapshot)
    swept = run_sweep(snapshot, telling, ranges_of(given, telling), _progress)
    written = write_page(snapshot, swept, output)
    _say(sweep_text(swept))
    _say(f"page: {written}")
    if swept.judged:
        curve = swept.curves[-1]
        value = curve.values[max(0, curve.here - 1)]
        _say(
            f"next: open it in a browser; shardmill sweep {path} {curve.knob.flag} {value} --apply puts one in force"
        )


@app.command("fit-tagger", **_UPKEEP)
def fit_tagger(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A run's folder, or OUT@ID.")],
    output: Annotated[str, typer.Option(help="The tagger: a .safetensors file.")],
    labels: Annotated[
        str,
        typer.Option(
            metavar="folders|captions|FIELD",
            help="An image's labels: the name of its folder, words of its captions, or a field of its samples.",
        ),
    ] = "folders",
    vocabulary: Annotated[
        str,
        typer.Option(metavar="FILE", help="With captions: one tag a line, other words for it after commas."),
    ] = "",
    least_images: Annotated[int, typer.Option(min=1, help="Labels of fewer images are left out.")] = 10,
    held_out: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Fraction of the images that it is tried on, not fitted.")
    ] = 0.2,
    penalty: Annotated[float, typer.Option(min=0.0, help="Weight of half the squared weights.")] = 1.0,
) -> None:
    """Learn tags from a run whose images bear labels, by a linear head over their embeddings; no image is read.

    shardmill curate --input labelled/ --output labelled-shards/

    shardmill fit-tagger labelled-shards/ --output tagger.safetensors

    shardmill curate --input photos/ --output shards/ --tagger classes --tagger tagger.safetensors
    """
    from beam_pipelines.fit_tagger import fit_tagger as fit
    from beam_pipelines.fit_tagger import fitted_text, labels_of, write_tagger
    from embeddings.tagger import tagger_bytes
    from shards.snapshot import open_snapshot

    target = _local(output)
    snapshot = open_snapshot(path)
    fitted = fit(snapshot, labels_of(snapshot, labels, vocabulary), least_images, held_out, penalty)
    write_tagger(target, tagger_bytes(fitted.tagger, fitted.evaluation))
    _say(fitted_text(fitted))
    _say(f"{target}; use it with --tagger {target}")


_PLANNING: dict[str, Any] = {"rich_help_panel": "Planning"}
_TAXONOMY_HELP = "infinity_mm, infinity_mm_normalised, or a YAML file of instruction types."


@app.command("fit-planner", **_PLANNING)
def fit_planner(
    seed: Annotated[
        str, typer.Option(help="LLaVA or Infinity-MM records with image tags and instruction tags.")
    ],
    output: Annotated[str, typer.Option(help="Folder for the planner, here or at gs://.")],
    image_root: Annotated[str, typer.Option(help="Folder that image names are relative to.")] = "",
    taxonomy: Annotated[str, typer.Option(help=_TAXONOMY_HELP)] = "infinity_mm_normalised",
    scores: Annotated[
        str, typer.Option(metavar="weighted|count", help="A tag counts by its score, or 1.")
    ] = "weighted",
    smooth_idf: Annotated[bool, typer.Option(help="As if one more type had every tag.")] = True,
    sublinear_tf: Annotated[bool, typer.Option(help="1 + ln(count) in place of counts.")] = True,
    aggregate: Annotated[
        str, typer.Option(metavar="sum|max|mean", help="What the weights of an image's tags make.")
    ] = "sum",
    level: Annotated[
        str, typer.Option(metavar="leaf|second|first", help="Level of the types that are told apart.")
    ] = "leaf",
    seeds_per_type: Annotated[int, typer.Option(min=0, help="Examples kept of each type.")] = 16,
    pictures: Annotated[bool, typer.Option(help="Keep small pictures with the examples.")] = True,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of such a picture at most.")] = 256 * 256,
) -> None:
    """Count which image tags go with which instruction types in a seed, for `shardmill curate --planner`.

    shardmill fit-planner --seed seed.jsonl --image-root images/ --output planner/
    """
    from beam_pipelines.fit_planner import Fitting
    from beam_pipelines.fit_planner import fit_planner as run_fit
    from synthesis.tfidf import TfidfOptions

    options: Any = TfidfOptions(scores, smooth_idf, sublinear_tf, aggregate, level)  # type: ignore[arg-type]
    sides = max_pixels if pictures else None
    done = run_fit(Fitting(seed, output, image_root, taxonomy, options, seeds_per_type, sides), _beam_args)
    for code, (count, first) in done.skipped.items():
        _say(f"skipped {count:,} {code}, as: {first}")
    _say(
        f"planner {done.artifact_hash[:12]} in {output}: {done.types:,} types, {done.tags:,} tags,"
        f" {done.records:,} records by type, {done.seeds:,} examples"
    )
    _say(f"next: shardmill curate ... --vlm-base-url URL --planner {output}")


@app.command("annotate-seed", **_PLANNING)
def annotate_seed(
    seed: Annotated[str, typer.Option(help="JSON or JSON lines of conversations.")],
    output: Annotated[str, typer.Option(help="JSON lines file for the annotated records.")],
    vlm_base_url: Annotated[
        list[str], typer.Option(help="OpenAI-compatible endpoint; repeat it for several of one model.")
    ],
    vlm_model: Annotated[str, typer.Option(help="Model to ask for. Default: the one that is served.")] = "",
    vlm_api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "",
    vlm_timeout_s: Annotated[float, typer.Option(help="Seconds that one call may take.")] = 120,
    vlm_concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Records in work at a time.")] = 8,
    taxonomy: Annotated[str, typer.Option(help=_TAXONOMY_HELP)] = "infinity_mm_normalised",
) -> None:
    """Have a model say of each conversation which instruction types it asks for. A second run asks only for what is missing.

    shardmill annotate-seed --seed llava.json --output seed.jsonl --vlm-base-url http://localhost:8000/v1
    """
    from beam_pipelines.annotate_seed import annotate_file
    from synthesis.backends import BackendOptions, find_backend
    from synthesis.taxonomy import open_taxonomy

    known, target = open_taxonomy(taxonomy), _local(output)
    wanted = BackendOptions(vlm_base_url, vlm_model, vlm_api_key_env, vlm_timeout_s, allow_text_only=True)
    with contextlib.closing(find_backend(wanted).backend.open()) as asking:
        done = annotate_file(_local(seed), target, known, asking, vlm_concurrency, _progress)
    _say(f"{done.annotated:,} annotated now, {done.known:,} before; {done.dead:,} failed")
    if done.dead:
        _say(f"failures: {done.dead_path}; the same command asks for them again")
    if done.dead and not done.annotated + done.known:
        raise ShardmillError("no record was annotated")
    _say(f"next: shardmill fit-planner --seed {output} --output planner/")


@app.command(**_UPKEEP)
def pin(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A run's folder, or OUT@ID.")],
    name: Annotated[str, typer.Option(help="Name for the snapshot, so that OUT@NAME opens it.")] = "",
    remove: Annotated[str, typer.Option(help="Name of a pin to remove.")] = "",
) -> None:
    """Keep a snapshot whatever is collected, and give it a name. Without a name, list the pins.

    shardmill pin shards/ --name v1

    shardmill pin shards/ --remove v1
    """
    from shards.collect import pin as pin_snapshot
    from shards.collect import unpin
    from shards.snapshot import open_snapshot, read_pins

    snapshot = open_snapshot(path)
    if remove:
        unpin(snapshot.storage, remove)
        _say(f"{remove} is no pin any more")
    if name:
        pin_snapshot(snapshot.storage, name, snapshot.id)
        _say(f"{name} is snapshot {snapshot.id[:12]}; open it as {snapshot.storage.root}@{name}")
    if not name and not remove:
        for pinned, snapshot_id in sorted(read_pins(snapshot.storage).items()):
            _say(f"{pinned}  {snapshot_id}")


@app.command(**_UPKEEP)
def gc(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A run's folder.")],
    keep: Annotated[
        int, typer.Option(min=1, help="Snapshots to keep, the last in force and those before it.")
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, remove nothing.")] = False,
) -> None:
    """Remove what killed runs left, and old snapshots that are not pinned with what only they name. Keeps the ledger.

    shardmill gc shards/ --dry-run
    """
    from shards.collect import collect, find_garbage
    from shards.snapshot import open_snapshot

    storage = open_snapshot(path).storage
    with storage.alone():
        garbage = find_garbage(storage, keep)
        for snapshot_id in garbage.snapshots:
            _say(f"snapshot {snapshot_id[:12]}")
        if dry_run:
            for file in garbage.files:
                _say(f"{file.num_bytes:>15,}  {file.path}")
        else:
            with _progress("files", len(garbage.files)) as advance:
                for _ in collect(storage, garbage):
                    advance()
    does = "would go" if dry_run else "removed"
    _say(f"{len(garbage.files):,} files, {garbage.num_bytes:,} bytes {does}")


@app.command(**_UPKEEP)
def compact(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A run's folder.")],
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="After a stream: go on where more than a tenth of its images are gone from its inputs.",
        ),
    ] = False,
) -> None:
    """Pack the images of the snapshot in force as a first run would have, and merge the ledger. The snapshot keeps its id.

    The windows of a stream are folded first: the main job runs over what the stream was given, embeds nothing again, and keeps what a
    window held back for an image that is not kept itself.

    shardmill compact shards/
    """
    import uuid

    from shards.compact import compact as compact_storage
    from shards.snapshot import Destination, open_snapshot
    from shards.storage import rooted

    snapshot = open_snapshot(path)
    if snapshot.manifest.parent or snapshot.manifest.window:
        _run_again(path, {"replace": replace})
    to = Destination(rooted(snapshot.storage.root), uuid.uuid4().hex)
    with to.storage.hold():
        done = compact_storage(to)
    _say(
        f"{done.packs_before} packs are {done.packs_after} now, without {done.tombstones} images that no sample names;"
        f" {done.segments} ledger segments merged"
    )
    _say(f"next: shardmill gc {path}  # removes the old packs")


_prompts = typer.Typer(
    help="The prompts that synthesis sends: list, show or render them.", rich_markup_mode=None
)
app.add_typer(_prompts, name="prompts", rich_help_panel="Upkeep")
_FOLDER: Any = typer.Option("--prompts", help="Folder of your own prompts, NAME/VERSION.j2.", metavar="DIR")


def _own(folder: str) -> Path | None:
    return Path(folder).expanduser() if folder else None


@_prompts.command("list")
def prompts_list(folder: Annotated[str, _FOLDER] = "") -> None:
    """Name, version, hash and purpose of every prompt.

    shardmill prompts list
    """
    from synthesis.prompts import load_prompt, prompt_files

    for file in prompt_files(_own(folder)):
        prompt = load_prompt(file.name, file.version, _own(folder))
        _say(f"{prompt.prompt_id}  {prompt.purpose}")


@_prompts.command("show")
def prompts_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As question, or question/v1.")],
    folder: Annotated[str, _FOLDER] = "",
) -> None:
    """Print a prompt's file: what it is given, how long the answer may be, and its template.

    shardmill prompts show judge
    """
    from synthesis.prompts import load_prompt, prompt_files

    wanted, _, version = name.partition("/")
    prompt = load_prompt(wanted, version or "v1", _own(folder))
    (file,) = (f for f in prompt_files(_own(folder)) if (f.name, f.version) == (prompt.name, prompt.version))
    print(file.path.read_text(encoding="utf-8"), end="")


@_prompts.command("render")
def prompts_render(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As question, or question/v1.")],
    folder: Annotated[str, _FOLDER] = "",
    instruction_type: Annotated[
        str, typer.Option("--type", help="Instruction type, as in the taxonomy.")
    ] = "",
    image: Annotated[str, typer.Option(help="Image that would be sent with it.", metavar="FILE")] = "",
    value: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="INPUT=VALUE in the place of the sample value; JSON or text. Repeatable.",
            metavar="INPUT=VALUE",
        ),
    ] = None,
) -> None:
    """Print what would be sent, with sample values where none are given.

    shardmill prompts render question --type "Coarse Perception/Image Scene/Identify indoor scene" --set caption="a kitchen"
    """
    from beam_pipelines.prompts import render_text

    _say(render_text(name, _own(folder), instruction_type, image, value or ()))


add_commands(app, _command, _beam_args)


@app.command()
def doctor() -> None:
    """Check this machine: versions, weights, devices, folders."""
    from beam_pipelines.doctor import diagnose

    checks = diagnose()
    for check in checks:
        _say(
            f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.found}{'' if check.ok else '; ' + check.advice}"
        )
    if not all(check.ok for check in checks):
        raise ShardmillError("this machine is not ready")


def run(argv: Sequence[str]) -> int:
    """Run a command line, give its exit code. What was asked wrongly is one line on standard error."""
    command_line = list(argv) or ["--help"]
    # Beam says at import what it lacks for a cloud that nobody asked for.
    logging.getLogger().setLevel(logging.ERROR)
    if os.environ.get("SHARDMILL_DEBUG"):
        logging.getLogger("shardmill").setLevel(logging.WARNING)
    if "--" in command_line:
        split = command_line.index("--")
        _beam_args[:] = command_line[split + 1 :]
        command_line = command_line[:split]
        if not command_line or command_line[0] not in _TAKE_BEAM_OPTIONS:
            takers = ", ".join(_TAKE_BEAM_OPTIONS)
            return _fail("shardmill", f"only {takers} take Beam's options after `--`", BAD_REQUEST)
    else:
        _beam_args.clear()
    name = f"shardmill {command_line[0]}"
    try:
        code = typer.main.get_command(app)(command_line, prog_name="shardmill", standalone_mode=False)
        if code == INTERRUPTED:  # click's own answer to Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else DONE
    except BadRequest as error:
        return _fail(name, error, BAD_REQUEST)
    except AbortedByLimit as error:
        return _fail(name, error, ABORTED)
    except ShardmillError as error:
        if error.__cause__ is not None and os.environ.get("SHARDMILL_DEBUG"):
            traceback.print_exception(error.__cause__)
        return _fail(name, error, FAILED)
    except OSError as error:  # a full disk, a vanished folder: the machine's fault, and one line says which
        return _fail(name, error, FAILED)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(name, "interrupted; what stood before still stands", INTERRUPTED)
    except UsageError as error:
        return _fail(name, error.format_message(), BAD_REQUEST)


def _fail(name: str, error: object, code: int) -> int:
    print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def main() -> None:
    """Entry point of the `shardmill` script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
