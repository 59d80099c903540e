"""What servers say of themselves before any work starts: which model answers, and what it can do."""

import difflib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from PIL import Image

from shards.errors import BadRequest
from synthesis.backend import Ask, Picture, VlmFailure, schema_of
from synthesis.client import ChatClient
from synthesis.limits import UNLIMITED
from synthesis.server import Server

_QUESTION = "What colour is this? Answer in one word."
_SCHEMA = schema_of({"colour": {"type": "string", "maxLength": 20}, "sure": {"type": "boolean"}})
_ATTEMPTS = 2


class ProbeResult(NamedTuple):
    """The model that answers, whether it takes images, makes answers fit a JSON schema, and counts tokens: all servers alike."""

    model: str
    sees_images: bool
    obeys_schema: bool = True
    counts_tokens: bool = True


def probe(client: ChatClient, allow_text_only: bool) -> ProbeResult:
    """Ask every server, side by side, for its models, then short questions about a plain picture.

    An empty `client.model` means the only model served. Costs one list request and two to six tiny calls a server. A server that
    takes an image and ignores it cannot be told from one that sees it. Where one of several does not obey schemas none is asked
    to, so that what is asked does not depend on who answers. Raises BadRequest for a server that does not answer, a model it does
    not serve, servers that differ, and, unless `allow_text_only`, a model that refuses images.
    """
    alone = [
        replace(client, base_urls=[url], limits=UNLIMITED, run="", obeys_schema=True)
        for url in client.base_urls
    ]
    for one in alone:
        one.max_attempts = min(_ATTEMPTS, client.max_attempts)
    with ThreadPoolExecutor(min(32, len(alone))) as threads:
        models = list(threads.map(_served_model, alone))
        for one, model in zip(alone, models, strict=True):
            if model != models[0]:
                raise BadRequest(
                    f"vlm-base-url: {one.base_urls[0]} serves '{model}' and {alone[0].base_urls[0]} serves '{models[0]}'; all of"
                    " them must serve one model, which --vlm-model may name"
                )
        found = list(threads.map(_able, [one.with_model(models[0]) for one in alone]))
    for one, able in zip(alone, found, strict=True):
        if able.refused and not allow_text_only:
            raise BadRequest(
                f"vlm-model: '{models[0]}' at {one.base_urls[0]} refuses images ({able.refused[:200]}); serve a model that sees,"
                " or give --allow-text-only to write about tags and captions"
            )
        if bool(able.refused) != bool(found[0].refused):
            raise BadRequest(
                f"vlm-base-url: of {alone[0].base_urls[0]} and {one.base_urls[0]} only one takes images"
            )
    return ProbeResult(
        models[0],
        not found[0].refused,
        all(able.obeys_schema for able in found),
        all(able.counts_tokens for able in found),
    )


class _Able(NamedTuple):
    """What one server can do. `refused`: why it takes no image, empty where it does."""

    refused: str
    obeys_schema: bool
    counts_tokens: bool


def _served_model(client: ChatClient) -> str:
    url = client.base_urls[0]
    server = Server(url, client.api_key_env)
    try:
        served = _patiently(client, server)
    except VlmFailure as failure:
        raise _does_not_answer(client, failure) from None
    finally:
        server.close()
    if not client.model and len(served) == 1:
        return served[0]
    if client.model in served and client.model:
        return client.model
    names = ", ".join(served[:10]) or "none"
    if not client.model:
        raise BadRequest(f"vlm-model: {url} serves {len(served)} models, name one of: {names}")
    close = difflib.get_close_matches(client.model, served, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"it serves: {names}"
    raise BadRequest(f"vlm-model: {url} does not serve '{client.model}'; {hint}")


def _patiently(client: ChatClient, server: Server) -> list[str]:
    for _ in range(client.max_attempts - 1):
        try:
            return server.models(client.timeout_s)
        except VlmFailure as failure:
            if not failure.transient:
                raise
            client.sleep(1.0)
    return server.models(client.timeout_s)


def _able(client: ChatClient) -> _Able:
    with client:
        picture, refused = [Picture("plain", _plain_jpeg)], ""
        refusal = _refusal(client, picture)
        if refusal is not None:
            # Servers refuse images with 4xx or 500 (llama.cpp). If the same words alone are answered, it was the image.
            words = _refusal(client, [])
            if words is not None or not (refusal.code == "vlm_refused" or refusal.status in (500, 501)):
                raise _does_not_answer(client, words or refusal)
            picture, refused = [], refusal.message
        obeys_schema = _obeys_schema(client, picture)
        return _Able(refused, obeys_schema, client.spent().guessed == 0)


def _obeys_schema(client: ChatClient, pictures: Sequence[Picture]) -> bool:
    """Whether a question that does not speak of JSON is answered with it, at once."""
    before = client.spent().requests
    try:
        client.chat(Ask(_QUESTION, pictures, max_tokens=64, schema=_SCHEMA))
    except VlmFailure:
        return False
    return client.spent().requests == before + 1


def _refusal(client: ChatClient, pictures: Sequence[Picture]) -> VlmFailure | None:
    try:
        client.chat(Ask(_QUESTION, pictures, max_tokens=8))
    except VlmFailure as failure:
        return None if failure.code == "vlm_empty" else failure
    return None


def _plain_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def _does_not_answer(client: ChatClient, failure: VlmFailure) -> BadRequest:
    if failure.status in (401, 403):
        check = "check the key that --vlm-api-key-env names"
    elif failure.code in ("vlm_unreachable", "vlm_timeout"):
        check = "check that the server runs, and its host, port and firewall"
    else:
        check = "check that the url is that of an OpenAI-compatible server"
    return BadRequest(
        f"vlm-base-url: {client.base_urls[0]} does not answer ({failure.code}: {failure.message}); {check}"
    )
