"""Answers that are known already, in the place of calls: a backend that asks another only for what it does not know."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from shards.ledger import CallRow, call_key, smallest_per_key
from synthesis.answers import json_of
from synthesis.backend import Ask, ChatBackend, Reply, VlmFailure


class Revision(NamedTuple):
    """Whose answers these are: the model's name, and what its user calls its weights."""

    model: str
    name: str


class KnownCalls:
    """The calls about one image, in one chain: a `ChatBackend`.

    Of rows of one key the smallest answers. What is not among them is asked of `backend`, checked, and given to `note`; without a
    backend it is a failure. A failure is never noted: it would be taken for an answer.
    """

    def __init__(
        self,
        image_id: bytes,
        revision: Revision,
        rows: Iterable[CallRow],
        backend: ChatBackend | None = None,
        note: Callable[[CallRow], None] | None = None,
    ) -> None:
        self._image_id, self._revision = image_id, revision
        self._rows = smallest_per_key(rows)
        self._backend, self._note = backend, note
        self.known = self.asked = 0

    @property
    def model(self) -> str:
        return self._revision.model

    def chat(self, ask: Ask, affinity: bytes = b"") -> Reply:
        """What is known, or what the model answers now. Raises VlmFailure, and `vlm_unanswered` where nobody may be asked."""
        key = call_key(self._image_id, self._revision.model, ask.told(), self._revision.name)
        row = self._rows.get(key)
        if row is not None:
            self.known += 1
        else:
            if self._backend is None:
                raise VlmFailure("vlm_unanswered", "no answer is in the ledger")
            try:
                reply = self._backend.chat(ask, affinity or self._image_id)
            except VlmFailure as failure:
                self.asked += failure.code != "vlm_over_budget"  # which no server has seen
                raise
            self.asked += 1
            if ask.schema:
                json_of(reply.text, ask.schema)
            row = CallRow(key, self._image_id, reply.text, reply.prompt_tokens, reply.completion_tokens)
            self._rows[key] = row
            if self._note is not None:
                self._note(row)
        return Reply(row.answer, row.prompt_tokens, row.completion_tokens)

    def close(self) -> None:
        """Nothing is held here."""
