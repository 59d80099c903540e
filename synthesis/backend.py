"""What synthesis asks of a model, whatever serves it: one request, one reply, and failures with stable codes."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from shards.errors import BadData
from shards.ids import canonical_json


class VlmFailure(BadData):
    """A call that brought no usable answer: it becomes a dead letter under `code`.

    `status` is the HTTP status where there was one. `transient` failures were tried again first.
    """

    def __init__(
        self, code: str, message: str, status: int = 0, transient: bool = False, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(code, message)
        self.message, self.status = message, status
        self.transient, self.retry_after_s = transient, retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        failure = (self.code, self.message, self.status, self.transient, self.retry_after_s)
        return VlmFailure, failure, {"attempts": self.attempts}


@dataclass
class Picture:
    """An image of a request. `recipe` determines the JPEG bytes that `load` makes: which image, and how it was decoded and re-encoded.

    So a picture is its recipe, as a call is, and one that was answered before needs no pixels. A chain sends one picture with most of
    its calls: in base64 it is made once.
    """

    recipe: str
    load: Callable[[], bytes] = field(compare=False)
    _base64: bytes = field(default=b"", init=False, repr=False, compare=False)

    def base64(self) -> bytes:
        if not self._base64:
            self._base64 = base64.b64encode(self.load())
        return self._base64


class Ask(NamedTuple):
    """One request: pictures in order, then the text. All of it affects the answer.

    `schema` is the JSON schema that the answer is to follow, as canonical JSON; empty for free text.
    """

    prompt: str
    pictures: Sequence[Picture] = ()
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    schema: str = ""

    def told(self) -> dict[str, Any]:
        """What the answer depends on, for a call's key: recipes stand for pictures."""
        return {**self._asdict(), "pictures": [picture.recipe for picture in self.pictures]}


class Reply(NamedTuple):
    """The raw text of an answer, and what it cost; 0 tokens where the server does not say."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ChatBackend(Protocol):
    """A model that answers. `chat` raises VlmFailure and nothing else for what one request can do wrong.

    Requests of one `affinity` go to one replica, where there are several: servers that cache prefixes then see an image once.
    """

    @property
    def model(self) -> str: ...

    def chat(self, ask: Ask, affinity: bytes = b"") -> Reply: ...


def schema_of(properties: Mapping[str, Any]) -> str:
    """A JSON schema of an object that has exactly these properties, for `Ask.schema`."""
    return canonical_json(
        {
            "type": "object",
            "properties": dict(properties),
            "required": sorted(properties),
            "additionalProperties": False,
        }
    ).decode()
