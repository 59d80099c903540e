"""Jobs whose workers are other machines than this one: what such a request may name, and what this machine need not have."""

import os
from collections.abc import Iterable
from pathlib import Path

import apache_beam as beam
from apache_beam.pipeline import PipelineVisitor
from apache_beam.transforms.resources import parse_resource_hints

from beam_pipelines.options import CurateOptions, flag
from embeddings.encoder import EncoderSpec, default_batch_size
from embeddings.pixel_taggers import is_pixel_tagger
from shards.errors import BadRequest
from shards.storage import is_remote

MODEL_STEPS = frozenset({"EmbedImages", "EmbedKept", "SearchBucket", "FilterCollected", "FilterWritten"})
"""Steps that run models on `--device`, and the one that compares vectors there."""
LOCAL_VLM_STEPS = frozenset({"LookAtAll", "LookAtImages", "JudgeExisting", "Synthesise"})
"""Steps that ask the model, which with `--vlm-local` and `--vlm-serve` runs where they run."""
_LOOPBACK = ("//localhost", "//127.0.0.1", "//[::1]")


def check_reachable(options: CurateOptions) -> None:
    """Raises BadRequest for what workers would look for on this machine."""
    named = [("--input", text.partition("=")[2] if "=" in text else text) for text in options.input]
    named += [("sources: path", source.path) for source in options.sources]
    named += [("sources: image_root", source.image_root) for source in options.sources]
    named += [("--image-root", options.image_root), ("--output", options.output)]
    named += [("--decontaminate", text.partition("=")[2]) for text in options.decontaminate]
    named += [("--reuse-from", text) for text in options.reuse_from]
    named += [("--against", text) for text in options.against]
    named += [
        ("--tagger", name) for name in options.tagger if name != "classes" and not is_pixel_tagger(name)
    ]
    for name, text in named:
        if text and not is_remote(text):
            raise BadRequest(
                f"{name} {text}: is on this machine, where Dataflow's workers cannot read it; copy it to a bucket and give"
                f" gs://BUCKET/{os.path.basename(text.rstrip('/')) or 'FOLDER'}"
            )
    for field in ("encoder_weights", "vlm_local", "loss_model"):
        path = getattr(options, field)
        if path and Path(path).exists() and not Path(path).is_absolute():
            raise BadRequest(
                f"{flag(field)} {path}: workers look for it in their image; give its absolute path there, which must hold the same"
                " here, or a hub name"
            )
    for url in options.vlm_base_url:
        if any(host in url for host in _LOOPBACK):
            raise BadRequest(
                f"--vlm-base-url {url}: is this machine, which every worker would take for itself; give an address in their network, or"
                " --vlm-serve, a server that every worker starts"
            )


def encoder_here(spec: EncoderSpec) -> EncoderSpec:
    """What this machine loads to know an encoder that runs elsewhere: the same weights and batch size, on the CPU."""
    return spec._replace(
        device="cpu", batch_size=spec.batch_size or default_batch_size(spec.device), threads=1
    )


class _Hinting(PipelineVisitor):  # type: ignore[misc]  # Beam is untyped
    def __init__(self, hints: dict[str, bytes], steps: Iterable[str]) -> None:
        self._hints, self._steps = hints, frozenset(steps)

    def visit_transform(self, node: beam.pipeline.AppliedPTransform) -> None:
        if self._steps & set(node.full_label.split("/")):
            node.resource_hints = {**node.resource_hints, **self._hints}


def hint_accelerator(pipeline: beam.Pipeline, options: CurateOptions) -> None:
    """Ask for `--accelerator` for the steps that run models, and for them alone. Nothing happens where it is not given."""
    if options.accelerator:
        steps = MODEL_STEPS | (LOCAL_VLM_STEPS if options.vlm_local or options.vlm_serve else frozenset())
        pipeline.visit(_Hinting(parse_resource_hints({"accelerator": options.accelerator}), steps))
