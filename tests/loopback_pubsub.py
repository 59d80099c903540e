"""A Pub/Sub on the loopback: the calls that publishers and pullers make, over gRPC, on the messages of google-cloud-pubsub itself."""

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import grpc
import pytest
from google.protobuf import empty_pb2
from google.pubsub_v1 import types

TOPIC = "projects/test-project/topics/objects"
SUBSCRIPTION = "projects/test-project/subscriptions/objects"
ACK_DEADLINE_S = 10.0


class LoopbackPubsub:
    """One topic and one subscription. What is pulled and not acknowledged comes again; `publish` takes a message as often as it is told."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[str, types.PubsubMessage]] = deque()
        self._pulled: dict[str, tuple[types.PubsubMessage, float]] = {}
        self._lock = threading.Lock()
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        handlers = {"Pull": self._pull, "Acknowledge": self._acknowledge, "ModifyAckDeadline": self._modify}
        requests = {
            "Pull": types.PullRequest,
            "Acknowledge": types.AcknowledgeRequest,
            "ModifyAckDeadline": types.ModifyAckDeadlineRequest,
        }
        service = grpc.method_handlers_generic_handler(
            "google.pubsub.v1.Subscriber",
            {name: _handler(handler, requests[name]) for name, handler in handlers.items()},
        )
        self._server.add_generic_rpc_handlers((service,))
        self.host = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def publish(self, attributes: Mapping[str, str], data: bytes = b"", message_id: str = "") -> None:
        message = types.PubsubMessage(
            data=data,
            attributes=dict(attributes),
            message_id=message_id or uuid.uuid4().hex[:16],
            publish_time={"seconds": int(time.time())},
        )
        with self._lock:
            self._waiting.append((uuid.uuid4().hex, message))

    def unacknowledged(self) -> int:
        with self._lock:
            return len(self._waiting) + len(self._pulled)

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def _pull(self, request: Any, _: Any) -> Any:
        end = time.monotonic() + 0.2
        while True:
            with self._lock:
                now = time.monotonic()
                for ack_id, (message, deadline) in list(self._pulled.items()):
                    if deadline < now:
                        del self._pulled[ack_id]
                        self._waiting.append((ack_id, message))
                count = min(request.max_messages, len(self._waiting))
                got = [self._waiting.popleft() for _ in range(count)]
                self._pulled |= {ack_id: (message, now + ACK_DEADLINE_S) for ack_id, message in got}
            if got or now >= end:
                received = [types.ReceivedMessage(ack_id=ack_id, message=message) for ack_id, message in got]
                return types.PullResponse(received_messages=received)
            time.sleep(0.01)

    def _acknowledge(self, request: Any, _: Any) -> Any:
        with self._lock:
            for ack_id in request.ack_ids:
                self._pulled.pop(ack_id, None)
        return empty_pb2.Empty()

    def _modify(self, request: Any, _: Any) -> Any:
        return empty_pb2.Empty()


def _handler(call: Callable[..., Any], request: Any) -> Any:
    def serialised(message: Any) -> bytes:
        kind = type(message)
        return kind.serialize(message) if hasattr(kind, "serialize") else message.SerializeToString()

    return grpc.unary_unary_rpc_method_handler(
        call, request_deserializer=request.deserialize, response_serializer=serialised
    )


@pytest.fixture
def pubsub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackPubsub]:
    server = LoopbackPubsub()
    server.start()
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", server.host)
    yield server
    server.stop()
