"""Every error that Shardmill raises on purpose, and what each means for a run.

Three fates: bad data becomes a dead letter and never raises; a bad request stops before work starts (`BadRequest`,
exit 2); a broken machine, model or folder raises one of the others (exit 1). More failures than the user allows end a run with
`AbortedByLimit` (exit 3).
"""

import copy
from typing import Any, Self


class ShardmillError(Exception):
    """Base of all errors below."""


class BadData(ShardmillError):
    """One item cannot be used: its fate is a dead letter with `code`; nothing else is lost.

    `code` is stable and documented in docs/codes.md; the message is for people; `item_id` is the id of the content, empty where
    it was never read; `attempts` is how often it was tried before it was given up, 0 where nothing was tried.
    """

    def __init__(self, code: str, message: str, item_id: bytes = b"", attempts: int = 1) -> None:
        super().__init__(message)
        self.code = code
        self.item_id = item_id
        self.attempts = attempts

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.code, str(self), self.item_id, self.attempts)

    def after(self, attempts: int) -> Self:
        """This failure, after so many attempts."""
        failure = copy.copy(self)  # several may share one, as the urls of a host that is not known
        failure.attempts = attempts
        return failure


class BadRequest(ShardmillError):
    """The request cannot be carried out as written: exit code 2, one line, nothing written."""


class RunFailed(ShardmillError):
    """The run broke off and committed nothing; what stood before still stands."""


class AbortedByLimit(ShardmillError):
    """The user's own limit on failures was passed: exit code 3, nothing committed."""


class SandboxBroken(ShardmillError):
    """The processes that decode images cannot be started, or die without an image at hand."""


class CommitConflict(RunFailed):
    """Another run committed to the same folder after this one started."""


class CorruptShard(ShardmillError):
    """A stored file does not hold the bytes that were written. Names the file and, where known, the record."""

    def __init__(self, path: str, what: str, record: int | None = None) -> None:
        self.path, self.what, self.record = path, what, record
        where = path if record is None else f"{path}, record {record}"
        super().__init__(f"{where}: {what}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.what, self.record)


class MissingShard(CorruptShard):
    """A stored file is not there."""
