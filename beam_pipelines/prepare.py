"""From options to a job: the whole request is checked, and what it needs is opened and loaded, before anything is written."""

import difflib
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from beam_pipelines.codes import CODES, FAILURES
from beam_pipelines.elsewhere import check_reachable, encoder_here
from beam_pipelines.launch import beam_options, cores_each, is_dataflow, is_local
from beam_pipelines.located import passed_over
from beam_pipelines.options import CurateOptions, flag
from beam_pipelines.sources import (
    check_output,
    count_gone,
    count_protected,
    find_benchmarks,
    find_sources,
    image_origins,
    name_of,
    wanted_sources,
)
from beam_pipelines.taggers import Tagging, tagging
from beam_pipelines.wording import plural
from embeddings.duplicates import DuplicateRule, Group
from embeddings.encoder import Encoder, EncoderSpec, load_encoder
from images.align import ALIGNER
from images.decode import Limits as DecodeLimits
from images.decode import decoder_of
from images.fetch import Reach
from images.rewrite import Rewrite
from images.sources.source import Source
from images.web import WebOptions
from shards.errors import BadRequest, RunFailed
from shards.ledger import (
    AlignmentRow,
    CallRow,
    CellsRow,
    ImageRow,
    Ledger,
    LossRow,
    RefRow,
    SearchRow,
    TagsRow,
    url_epoch,
)
from shards.snapshot import Destination, StoredPack, open_by_id, open_snapshot, read_current, split_at
from shards.spool import FOLDER, spooled_uris
from shards.storage import Storage, rooted, storage_of
from synthesis.artifact import read_artifact, types_digest
from synthesis.backends import BackendOptions, Found, call_budget_s, find_backend
from synthesis.client import ChatClient
from synthesis.generate import Method, parse_forms, prompts_asked
from synthesis.languages import check_language
from synthesis.limits import Limits, Prices, check_limits
from synthesis.planner import LookupPlanner, Planner, load_tag_table
from synthesis.prompts import load_prompts
from synthesis.quotas import PPM, Allotment, read_quotas, whole_quotas
from synthesis.seeds import SeedBank
from synthesis.served import ServedModel, check_command, serve
from synthesis.taxonomy import BUNDLED, Taxonomy, open_taxonomy
from transforms.against import KeptPack
from transforms.calls import Backend
from transforms.commit import RunFacts
from transforms.filter import FilterRule, parse_expressions
from transforms.geometric import AlignRule
from transforms.limit import ANY
from transforms.losses import LossSource
from transforms.recall import Memory
from transforms.route import Search

MAX_GONE = 0.1
"""Fraction of an earlier run's images that may be missing from a run's input before `--replace` is asked for."""


class Synthesis(NamedTuple):
    """How conversations are made: by whom, and how. `note` says by whom in words."""

    backend: Backend
    method: Method
    note: str


class Planning(NamedTuple):
    """Which types images are asked for, how many of each, and examples of them, where a planner was fitted.

    `affecting` is what of it may change bytes.
    """

    planner: Planner
    allotment: Allotment
    seeds: SeedBank | None
    taxonomy: Taxonomy
    affecting: Mapping[str, str]


class Job(NamedTuple):
    """A request that was found good: all that `build` needs."""

    options: CurateOptions
    sources: Sequence[Source]
    encoder: EncoderSpec
    to: Destination
    facts: RunFacts
    synthesis: Synthesis | None
    planning: Planning
    losses: LossSource | None
    memory: Memory
    search: Search
    align: AlignRule | None
    tagging: Tagging
    reach: Reach
    stored: Sequence[StoredPack]
    against: Sequence[KeptPack]
    progress: str
    benchmarks: Sequence[Source]


class Prepared(NamedTuple):
    """A checked request, and what was loaded to check it.

    `images` counts distinct references, `gone` those of the snapshot in force that are not in this input,
    `protected` those of each benchmark.
    """

    job: Job
    model: Encoder
    pipeline_options: PipelineOptions
    images: int
    gone: int
    protected: Mapping[str, int]


def error_rates(options: CurateOptions) -> dict[str, float]:
    """The fraction of inputs that may fail, by code or `any`. Raises BadRequest."""
    rates = {}
    for text in options.max_error_rate:
        code, _, number = text.partition("=")
        if code != ANY and code not in FAILURES:
            close = difflib.get_close_matches(code, [ANY, *sorted(FAILURES)], 1)
            hint = f"; did you mean {close[0]}?" if close else "; docs/codes.md lists them"
            what = "nothing fails with that code" if code in CODES else "no such code"
            raise BadRequest(f"--max-error-rate {text}: {what}{hint}")
        try:
            rates[code] = float(number)
        except ValueError:
            rates[code] = math.nan
        if not 0 <= rates[code] <= 1:
            raise BadRequest(f"--max-error-rate {text}: a fraction from 0 to 1 is needed, as in {code}=0.01")
    return rates


def filter_rule(options: CurateOptions) -> FilterRule:
    """What an image must be like to be used."""
    limits = {name: getattr(options, name) for name in FilterRule._fields if name != "expressions"}
    return FilterRule(**limits, expressions=tuple(options.filter))


def call_limits(options: CurateOptions, pipeline_options: PipelineOptions) -> Limits:
    """What each worker process may ask of the model: its share of what the job may. Raises BadRequest."""
    shared = [
        flag(name)
        for name in ("vlm_job_concurrency", "vlm_rate", "token_budget", "max_cost")
        if getattr(options, name)
    ]
    if shared and not is_local(pipeline_options) and "workers" not in options.model_fields_set:
        raise BadRequest(
            f"{shared[0]}: is shared out among the workers: give --workers, the most worker processes that the runner starts"
        )
    limits = Limits(
        concurrency=options.vlm_job_concurrency,
        rate=options.vlm_rate,
        tokens=options.token_budget,
        cost=options.max_cost,
        prices=Prices(options.vlm_price_in, options.vlm_price_out),
        until=time.time() + options.vlm_budget_s if options.vlm_budget_s else 0.0,
        patience_s=options.vlm_patience_s,
    ).share(options.workers)
    concurrency = min(limits.concurrency or options.vlm_concurrency, options.vlm_concurrency)
    return limits._replace(concurrency=concurrency)


def method_of(options: CurateOptions) -> Method:
    """How conversations are to be made. Raises BadRequest."""
    return Method(
        load_prompts(Path(options.prompts) if options.prompts else None, options.prompt_version),
        parse_forms(options.answer_forms),
        options.judge_min,
        options.relevance,
        options.agreement,
        options.fuse_calls,
        check_language(options.answer_language),
        options.drop_suspect,
    )


def found_backend(options: CurateOptions, limits: Limits, run: str, elsewhere: bool = False) -> Found | None:
    """Probe the endpoints, start the server, or load the model, that are asked for. Raises BadRequest where they cannot be used as asked.

    Of a model that runs `elsewhere` alone only the configuration is read: its weights may be more than this machine holds. A server
    that is started there is taken at its user's word.
    """
    if options.vlm_serve:
        for name in ("vlm_base_url", "vlm_local"):
            if getattr(options, name):
                raise BadRequest(
                    f"--vlm-serve {options.vlm_serve}: {flag(name)} names another model: give one of them"
                )
    if options.vlm_serve and elsewhere:
        return _served_elsewhere(options, limits, run)
    if options.vlm_local:
        for name in ("vlm_base_url", "vlm_model", "vlm_api_key_env"):
            if getattr(options, name):
                raise BadRequest(
                    f"--vlm-local {options.vlm_local}: the model runs in this process; {flag(name)} is for an endpoint: give one of them"
                )
        # transformers takes seconds to import.
        from synthesis.local import describe_local, open_local

        find = describe_local if elsewhere else open_local
        vlm = find(options.vlm_local, options.device, options.vlm_local_dtype, options.vlm_local_batch)
        if not (vlm.sees_images or options.allow_text_only):
            raise BadRequest(
                f"--vlm-local {options.vlm_local}: takes no images; give a vision-language model, or --allow-text-only to write"
                " about tags and captions"
            )
        return Found(vlm, vlm.sees_images, vlm.model)
    # Worker processes of this machine share one server, which answers the more at a time the more it is asked.
    urls = [_served_here(options.vlm_serve)] if options.vlm_serve else options.vlm_base_url
    if not urls:
        return None
    return find_backend(
        BackendOptions(
            urls,
            options.vlm_model,
            options.vlm_api_key_env,
            options.vlm_timeout_s,
            options.allow_text_only,
            limits,
            run,
        )
    )


def _served_here(command: str) -> str:
    try:
        return serve(command)
    except RunFailed as error:
        raise BadRequest(str(error)) from error


def _served_elsewhere(options: CurateOptions, limits: Limits, run: str) -> Found:
    if not options.vlm_model:
        raise BadRequest(
            f"--vlm-serve {options.vlm_serve}: workers start it elsewhere, so --vlm-model must say what it serves"
        )
    check_command(options.vlm_serve)
    client = ChatClient(
        (),
        options.vlm_model,
        options.vlm_api_key_env,
        options.vlm_timeout_s,
        budget_s=call_budget_s(options.vlm_timeout_s),
        limits=check_limits(limits),
        run=run,
    )
    note = f"{options.vlm_model}, served by each worker"
    return Found(ServedModel(options.vlm_serve, client), not options.allow_text_only, note)


def prepare_synthesis(
    to: Destination, options: CurateOptions, reach: Reach, limits: Limits, elsewhere: bool = False
) -> Synthesis | None:
    """Who answers, and how they are asked; None where nobody is to. Raises BadRequest."""
    method = method_of(options)
    found = found_backend(options, limits, to.token, elsewhere)
    if found is None:
        return None
    if options.judge_existing and not (options.judge_min or options.agreement):
        raise BadRequest("--judge-existing: with --judge-min 0 and --no-agreement nothing is asked")
    if options.judge_existing and not found.sees_images:
        raise BadRequest(
            f"--judge-existing: '{found.backend.model}' sees no images, so it cannot judge what is said of them"
        )
    backend = Backend(
        found.backend,
        options.vlm_max_pixels if found.sees_images else None,
        reach,
        limits.concurrency,
        to,
        [segment for storage in ledgers_of(to, options) for segment in Ledger(storage, CallRow).segments()],
        options.vlm_revision,
    )
    return Synthesis(backend, method, found.note)


def prepare_planning(options: CurateOptions) -> Planning:
    """The planner, and what it may plan. Raises BadRequest."""
    taxonomy = open_taxonomy(options.taxonomy)
    name = options.taxonomy if options.taxonomy in BUNDLED else types_digest(taxonomy)
    affecting = {"taxonomy": name}
    planner: Planner
    seeds = None
    if options.planner:
        fitted = read_artifact(options.planner)
        if fitted.types_sha256 != types_digest(taxonomy):
            raise BadRequest(
                f"--planner {options.planner}: was fitted to the types of {fitted.taxonomy}; give --taxonomy {fitted.taxonomy}"
            )
        planner, seeds = fitted.planner, fitted.seeds
        affecting["planner"] = fitted.planner.artifact_hash
    else:
        try:
            planner = LookupPlanner(load_tag_table(taxonomy))
        except BadRequest as error:
            raise BadRequest(
                f"--taxonomy {options.taxonomy}: the table that plans without --planner knows the types of Infinity-MM alone ({error});"
                " give --planner, fitted with this taxonomy"
            ) from error
    quotas = read_quotas(options.quota, taxonomy, options.max_samples)
    rest = None
    if options.max_samples is not None:
        rest = options.max_samples - sum(quota.slots for quota in quotas)
    allotment = Allotment(quotas, rest, options.types_per_image, round(options.explore * PPM))
    return Planning(planner, allotment, seeds, taxonomy, affecting)


def prepare_losses(
    options: CurateOptions, to: Destination, reach: Reach, synthesises: bool, elsewhere: bool = False
) -> LossSource | None:
    """Load the model that losses come from, if there is one; where it runs `elsewhere`, its configuration. Raises BadRequest."""
    if not options.loss_model:
        if options.loss_existing:
            raise BadRequest("--loss-existing: needs a model that gives losses: --loss-model FOLDER")
        return None
    if not (synthesises or options.loss_existing):
        raise BadRequest(
            f"--loss-model {options.loss_model}: nothing is synthesised; --loss-existing to filter what was collected"
        )
    from synthesis.local_model import find_local, load_local, takes_images

    spec = find_local(options.loss_model, options.device, "auto", "--loss-model")
    sees_images = (
        takes_images(spec, "--loss-model") if elsewhere else load_local(spec, "--loss-model").sees_images
    )
    if not (sees_images or options.allow_text_only):
        raise BadRequest(
            f"--loss-model {options.loss_model}: takes no images; give a vision-language model, or --allow-text-only for losses"
            " of the words alone"
        )
    known = [
        segment for storage in ledgers_of(to, options) for segment in Ledger(storage, LossRow).segments()
    ]
    return LossSource(spec, options.vlm_max_pixels if sees_images else None, reach, to, known)


def prepare(options: CurateOptions, beam_args: Sequence[str] = ()) -> Prepared:
    """Check a whole request before anything is written. Raises BadRequest."""
    parse_expressions(options.filter)
    planning = prepare_planning(options)
    pipeline_options = beam_options(beam_args, options.workers)
    FileSystems.set_options(pipeline_options)  # endpoints and credentials of buckets
    elsewhere = is_dataflow(pipeline_options)
    if elsewhere:
        check_reachable(options)
    sources = find_sources(options)
    benchmarks = find_benchmarks(options.decontaminate)
    check_output(options.output, sources, benchmarks)
    origins = image_origins(sources, options.limit, options.seed)
    protected = count_protected(benchmarks)
    error_rates(options)
    limits = call_limits(options, pipeline_options)
    to = Destination(rooted(options.output), uuid.uuid4().hex)
    base_id = read_current(to.storage).snapshot
    base = open_by_id(to.storage, base_id) if base_id else None
    gone, before = count_gone(base, origins) if base else (0, 0)
    if gone > MAX_GONE * before and not options.replace:
        raise BadRequest(
            f"--output {options.output}: {gone} of {before} images of the snapshot there are not in this input, which is to be"
            " the whole input; --replace if that is meant"
        )
    cores = cores_each(pipeline_options)
    # 0 is all: one spec, so one loaded model, for all who ask for that
    threads = 0 if cores == os.cpu_count() else cores
    spec = EncoderSpec(options.encoder, options.encoder_weights, options.device, options.batch_size, threads)
    model = load_encoder(encoder_here(spec) if elsewhere else spec)
    reach = reach_of(to, options, cores)
    served_elsewhere = bool(options.vlm_serve) and not is_local(pipeline_options)
    synthesis = prepare_synthesis(to, options, reach, limits, elsewhere or served_elsewhere)
    losses = prepare_losses(options, to, reach, synthesis is not None, elsewhere)
    stored = base.stored_packs() if base else []
    # Which hardware workers have is not known here: of rows that differ by it alone a fixed one is taken.
    memory = recall_from(to, options, model, "" if elsewhere else model.numerics)
    search, against = search_for(to, options, model), kept_packs(options.against)
    who = synthesis.backend if synthesis is not None else None
    known_tags = [
        segment for storage in ledgers_of(to, options) for segment in Ledger(storage, TagsRow).segments()
    ]
    align, tags = align_rule(to, options, reach), tagging(options, model, reach, who, known_tags)
    affecting = options.affecting_bytes() | {
        "encoder_weights": model.weights_sha256,
        "batch_size": model.batch_size,
    }
    _, own_rules = duplicate_rules(options)
    if own_rules:
        affecting["duplicate_rules"] = {name: rule._asdict() for name, rule in own_rules.items()}
    if tags.told != ["classes"]:
        affecting["taggers"] = sorted(tags.told)
    if align is not None:
        affecting["aligner"] = ALIGNER
    if against:
        affecting["against"] = sorted({kept.snapshot_id for kept in against})
    if synthesis is not None:
        affecting["vlm_model"] = synthesis.backend.client.model
        sees_images = synthesis.backend.max_pixels is not None
        asked = prompts_asked(synthesis.method, sees_images, options.judge_existing)
        affecting["prompts"] = [synthesis.method.prompts[name].prompt_id for name in asked]
        affecting |= planning.affecting
    if losses is not None:
        affecting |= {"loss_model": losses.spec.name, "vlm_max_pixels": options.vlm_max_pixels}
    metrics = {
        "sources": [source._asdict() for source in sources],
        "benchmarks": [source._asdict() for source in benchmarks],
        "images": len(origins),
        "quotas": whole_quotas(planning.allotment.quotas),
        "own_thresholds": own_thresholds(options),
        "against": [list(pair) for pair in sorted({(kept.out, kept.snapshot_id) for kept in against})],
        "other_ledgers": [storage.root for storage in ledgers_of(to, options)[1:]],
        "numerics": memory.numerics,
    }
    facts = RunFacts(base_id, affecting, metrics)
    progress = str(to.storage.scratch_path(to.token) / "progress") if is_local(pipeline_options) else ""
    job = Job(
        options=options,
        sources=sources,
        encoder=spec,
        to=to,
        facts=facts,
        synthesis=synthesis,
        planning=planning,
        losses=losses,
        memory=memory,
        search=search,
        align=align,
        tagging=tags,
        reach=reach,
        stored=stored,
        against=against,
        progress=progress,
        benchmarks=benchmarks,
    )
    return Prepared(job, model, pipeline_options, len(origins), gone, protected)


def reach_of(to: Destination, options: CurateOptions, decoders: int) -> Reach:
    """How this run fetches."""
    limits = DecodeLimits(int(options.max_image_bytes), options.max_image_pixels)
    web = WebOptions(
        allow_private=options.allow_private,
        max_bytes=limits.max_bytes,
        timeout_s=options.url_timeout_s,
        concurrency=options.url_concurrency,
        per_host=options.url_per_host,
        per_host_rate=options.url_host_rate,
        retries=options.url_retries,
        disallowed_tags=() if options.ignore_robots else WebOptions().disallowed_tags,
    )
    spools = [f"{storage_of(rooted(folder)).uri(FOLDER)}/" for folder in (to.out, *options.reuse_from)]
    spools += [f"{storage_of(rooted(split_at(path)[0])).uri('media')}/" for path in options.against]
    rewrite = Rewrite(options.max_side, options.strip_metadata)
    epoch = url_epoch(to.storage) + options.refetch
    return Reach(web, tuple(spools), epoch, rewrite, limits, decoders)


def ledgers_of(to: Destination, options: CurateOptions) -> list[Storage]:
    """Folders whose ledgers this run reads. Raises BadRequest."""
    storages = [to.storage]
    for other in options.reuse_from:
        storage = storage_of(rooted(other))
        if not any(True for _ in storage.walk("ledger")):
            raise BadRequest(f"--reuse-from {other}: no ledger there; give the --output of an earlier run")
        storages.append(storage)
    # What another snapshot keeps was embedded in its folder's runs; without that ledger it is embedded again.
    return storages + [storage_of(rooted(split_at(path)[0])) for path in options.against]


def own_thresholds(options: CurateOptions) -> dict[str, dict[str, Any]]:
    """By name of a source, the fields of DuplicateRule that its entry in `sources:` says for itself."""
    said = {
        name_of(number, wanted): {
            "mode": wanted.dedup_mode,
            "cosine": wanted.cosine,
            "phash_bits": wanted.phash_bits,
            "structure": wanted.structure,
        }
        for number, wanted in enumerate(wanted_sources(options))
    }
    own = {
        name: {field: value for field, value in fields.items() if value is not None}
        for name, fields in said.items()
    }
    return {name: fields for name, fields in own.items() if fields}


def duplicate_rules(options: CurateOptions) -> tuple[DuplicateRule, dict[str, DuplicateRule]]:
    """The general rule, and by name those of sources that have their own."""
    general = DuplicateRule(options.dedup_mode, options.cosine, options.phash_bits, options.structure)
    rules = {name: general._replace(**fields) for name, fields in own_thresholds(options).items()}
    return general, {name: rule for name, rule in rules.items() if rule != general}


def kept_packs(against: Sequence[str]) -> list[KeptPack]:
    """The packs of the snapshots of --against. Raises BadRequest."""
    packs = []
    for path in against:
        try:
            snapshot = open_snapshot(path)
        except BadRequest as error:
            raise BadRequest(f"--against {error}") from error
        stored = snapshot.stored_packs()
        if len(stored) < len(snapshot.files("media")):
            raise BadRequest(
                f"--against {path}: media packs are missing or cut; `shardmill verify {path}` names them"
            )
        tombstones = frozenset(snapshot.tombstones())
        packs += [KeptPack(snapshot.storage.root, snapshot.id, pack, tombstones) for pack in stored]
    return packs


def search_for(to: Destination, options: CurateOptions, model: Encoder) -> Search:
    """How this run finds near duplicates."""
    general, own = duplicate_rules(options)
    groups = list(dict.fromkeys(Group(rule.thresholds) for rule in (general, *own.values())))
    group_of = {name: groups.index(Group(rule.thresholds)) for name, rule in own.items()}
    if options.against:
        groups.append(Group(general.thresholds, fixed=True))
    storages = ledgers_of(to, options)
    return Search(
        groups,
        to,
        group_of,
        prefer=options.prefer,
        recall=options.dedup_recall,
        device=options.device,
        encoder=model.fingerprint,
        cells=[segment for storage in storages for segment in Ledger(storage, CellsRow).segments()],
        searches=[segment for storage in storages for segment in Ledger(storage, SearchRow).segments()],
        any_orientation=options.any_orientation,
    )


def align_rule(to: Destination, options: CurateOptions, reach: Reach) -> AlignRule | None:
    """How geometric copies are found, if they are to be."""
    if not options.geometric:
        return None
    known = [
        segment for storage in ledgers_of(to, options) for segment in Ledger(storage, AlignmentRow).segments()
    ]
    return AlignRule(options.geometric_cosine, options.geometric_neighbours, reach, known)


def recall_from(to: Destination, options: CurateOptions, model: Encoder, numerics: str) -> Memory:
    """The ledgers that this run may recall from: its own folder's, and those of `--reuse-from`. `numerics` are the run's own."""
    storages = ledgers_of(to, options)
    refs = [segment for storage in storages for segment in Ledger(storage, RefRow).segments()]
    images = [segment for storage in storages for segment in Ledger(storage, ImageRow).segments()]
    spooled = frozenset(uri for storage in storages for uri in spooled_uris(storage))
    decoder, trusted = decoder_of(options.decode), not options.verify_refs
    return Memory(refs, images, decoder, model.fingerprint, numerics, trusted, spooled)


def plan_text(prepared: Prepared) -> str:
    job, images, gone = prepared.job, prepared.images, prepared.gone
    inputs = ", ".join(f"{source.path} ({source.format})" for source in job.sources)
    synthesis = "none (no --vlm-base-url or --vlm-local)"
    if job.synthesis is not None:
        sight = "sends images" if job.synthesis.backend.max_pixels else "text only: tags and captions"
        table = job.planning.affecting.get("planner", "")[:12]
        planned = f"planner {table}" if table else "planned by table"
        synthesis = f"{job.synthesis.note}, {sight}, {planned}"
    less = f"; {gone} of the snapshot in force are not among them" if gone else ""
    beside = passed_over(job.sources)
    note = f"\n{beside}" if beside else ""
    if job.against:
        snapshots = sorted({kept.snapshot_id[:12] for kept in job.against})
        note += (
            f"\nagainst {plural(len(snapshots), 'snapshot')} {', '.join(snapshots)}, whose images come first"
        )
    if job.benchmarks:
        sets = ", ".join(f"{name} ({plural(count, 'image')})" for name, count in prepared.protected.items())
        note += f"\ndecontaminated against {sets}, mode {job.options.decontaminate_mode}"
        given = {source.path for source in job.sources}
        for source in job.benchmarks:
            if source.path in given:
                note += f"\n{source.path} is --input and --decontaminate {source.name}: all of it will be filtered"
    if job.losses is not None:
        which = "collected and synthesised" if job.options.loss_existing else "synthesised"
        note += f"\nlosses of {which} samples by {job.losses.spec.name}; at most {job.options.loss_drop:.3g} dropped per {job.options.loss_by}"
    return f"{images} images from {inputs}{less}{note}\nencoder {job.encoder.name} on {job.encoder.device}; synthesis: {synthesis}"
