"""What a pipeline's graph carries, as bytes to be searched."""

import base64
import bz2

from apache_beam.portability.api import beam_runner_api_pb2 as protos


def payloads_of(graph: protos.Pipeline) -> list[bytes]:
    """What steps carry: pickled functions, decompressed."""
    return [graph.SerializeToString(), *(unpickled(step) for step in graph.components.transforms.values())]


def unpickled(step: protos.PTransform) -> bytes:
    if step.spec.urn != "beam:transform:pardo:v1":
        return b""
    payload = protos.ParDoPayload.FromString(step.spec.payload).do_fn.payload
    return bz2.decompress(base64.b64decode(payload)) if payload else b""
