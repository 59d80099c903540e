"""Reading the encoded bytes that a reference names, wherever they lie."""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from images.decode import DECODER, Limits
from images.files import Content, Files, is_url
from images.rewrite import Rewrite, rewritten
from images.sandbox import DecodePool, shared_pool
from images.sources import copy_members
from images.web import Web, WebOptions
from shards.errors import BadData
from shards.ids import image_id_of
from shards.ledger import RefRow, ref_key
from shards.records import MediaRef

_AHEAD = 8
"""Requests to buckets at a time, per worker: clients keep ten connections open."""
T = TypeVar("T")


class Fetched(NamedTuple):
    """Encoded bytes, their id, and the etag that they were read under, empty where they may have changed meanwhile."""

    encoded: bytes
    image_id: bytes
    etag: str


def ref_rows(ref: MediaRef, fetched: Fetched, spooled: MediaRef | None = None) -> list[RefRow]:
    """What the ledger keeps of a reference that was fetched, and copied to `spooled`; nothing where it may have changed meanwhile."""
    if not fetched.etag:
        return []
    place = (spooled.uri, spooled.offset) if spooled else ("", 0)
    return [RefRow(ref_key(ref, fetched.etag), fetched.image_id, len(fetched.encoded), *place)]


class Reach(NamedTuple):
    """What a worker needs to know to fetch.

    `spools` are folders of copies: nothing is to be remembered of what lies there. `epoch` counts how often all urls were to be
    fetched anew: a url is taken for unchanged until then. What is fetched is kept as `rewrite` says. `limits` cap an image, and a worker
    has `decoders` processes that decode and rewrite, 0 for as many as cores.
    """

    web: WebOptions
    spools: tuple[str, ...] = ()
    epoch: int = 0
    rewrite: Rewrite = Rewrite()
    limits: Limits = Limits()
    decoders: int = 1


def decoders_of(reach: Reach) -> DecodePool:
    """The decoding processes of this process. Every borrower closes them."""
    return shared_pool(reach.limits, reach.decoders)


class Fetcher:
    """Reads references one by one. Safe to use from threads."""

    def __init__(self, files: Files, reach: Reach) -> None:
        self._files, self._reach, self._max_bytes = files, reach, reach.web.max_bytes

    @functools.cached_property
    def web(self) -> Web:
        """The client of this process."""
        return Web(self._reach.web)

    def etag(self, ref: MediaRef) -> str:
        """What changes whenever what a reference names is written or replaced; empty where nothing can be said."""
        return "" if self._is_spooled(ref) else self._as_kept(self._etag_found(ref))

    def _etag_found(self, ref: MediaRef) -> str:
        if is_url(ref.uri):
            return f"url {self._reach.epoch}"
        try:
            return self._files.state(ref.uri).etag
        except BadData:
            return ""

    def _as_kept(self, etag: str) -> str:
        rewrite = self._reach.rewrite.fingerprint
        return f"{rewrite}, {DECODER} {etag}" if etag and rewrite else etag

    def _is_spooled(self, ref: MediaRef) -> bool:
        return ref.uri.startswith(self._reach.spools)

    def kept(self, encoded: bytes | BadData) -> bytes | BadData:
        """Bytes as they are to be kept; what is BadData already stays so."""
        reach = self._reach
        if isinstance(encoded, BadData) or not reach.rewrite.fingerprint:
            return encoded
        try:
            return self._pool.run(rewritten, encoded, reach.rewrite, reach.limits.max_pixels)
        except BadData as error:
            return error

    @functools.cached_property
    def _pool(self) -> DecodePool:
        return decoders_of(self._reach)

    def etags(self, refs: Sequence[MediaRef]) -> list[str]:
        """`etag` of each, in order; a file that several lead into is looked at once."""
        firsts = {ref.uri: ref for ref in refs}
        known = dict(zip(firsts, _ahead(self.etag, list(firsts.values())), strict=True))
        return [known[ref.uri] for ref in refs]

    def fetch(self, ref: MediaRef) -> bytes:
        """The encoded bytes of a reference, as they are to be kept.

        Raises BadData: `file_missing`, `not_a_file`, `unreadable`, `empty_file`, `too_many_bytes`; for a url as `Web.fetch`, for a
        member as `copy_members`; and as `rewritten`.
        """
        return self._read(ref).data

    def _read(self, ref: MediaRef) -> Content:
        found = self._found(ref)
        if self._is_spooled(ref):
            return Content(found.data, "")
        kept = self.kept(found.data)
        if isinstance(kept, BadData):
            raise kept
        return Content(kept, self._as_kept(found.etag))

    def _found(self, ref: MediaRef) -> Content:
        if is_url(ref.uri):
            return Content(self.web.fetch(ref.uri), self._etag_found(ref))
        if ref.member:
            before = self._etag_found(ref)
            ((_, copied),) = copy_members(ref.uri, [ref], self._files, self._max_bytes)
            if isinstance(copied, BadData):
                raise copied
            return Content(copied, before if before == self._etag_found(ref) else "")
        read = self._files.read(ref.uri, ref.offset, ref.length, self._max_bytes)
        if not read.data:
            raise BadData("empty_file", "zero bytes")
        return read

    def fetch_known(self, ref: MediaRef) -> Fetched:
        """Also what is known of them from now on. Raises as `fetch`."""
        encoded, etag = self._read(ref)
        return Fetched(encoded, image_id_of(encoded), etag)

    def fetch_ahead(self, refs: Sequence[MediaRef]) -> Iterator[Fetched | BadData]:
        """`fetch_known` of each in order, or why there is nothing. In memory: `_AHEAD` images beyond those that were taken."""

        def fetched(ref: MediaRef) -> Fetched | BadData:
            try:
                return self.fetch_known(ref)
            except BadData as error:
                return error

        return _ahead(fetched, refs)

    def fetch_again(self, ref: MediaRef, image_id: bytes) -> bytes:
        """The bytes of an image that was read before. Raises BadData `source_changed` where they are no longer the same."""
        try:
            encoded = self.fetch(ref)
        except BadData as error:
            changed = BadData("source_changed", f"cannot be read again: {error}")
            raise changed.after(error.attempts) from error
        if image_id_of(encoded) != image_id:
            raise BadData("source_changed", "holds other bytes than when it was first read")
        return encoded

    def fetch_all_again(self, known: Sequence[tuple[MediaRef, bytes]]) -> Iterator[bytes | BadData]:
        """`fetch_again` of each (reference, image_id) in order, or why it cannot be had. In memory as `fetch_ahead`."""

        def fetched(ref: MediaRef, image_id: bytes) -> bytes | BadData:
            try:
                return self.fetch_again(ref, image_id)
            except BadData as error:
                return error

        return _ahead(fetched, [ref for ref, _ in known], [image_id for _, image_id in known])


def _ahead(ask: Callable[..., T], refs: Sequence[MediaRef], *more: Sequence[Any]) -> Iterator[T]:
    """What `ask` gives for each reference, and what goes with it, in order; where that takes requests to buckets, several at a time."""
    if not any("://" in ref.uri and not is_url(ref.uri) for ref in refs):
        yield from map(ask, refs, *more)
        return
    waiting = deque[Future[T]]()
    with ThreadPoolExecutor(_AHEAD, "fetch") as threads:
        try:
            for asked in zip(refs, *more, strict=True):
                if len(waiting) == _AHEAD:
                    yield waiting.popleft().result()
                waiting.append(threads.submit(ask, *asked))
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
