"""Keys of endpoints, by reference: an environment variable, or a version of a secret in Google's Secret Manager."""

import base64
import os
import re
from typing import Any

from shards.errors import BadRequest

SECRET = re.compile(r"projects/[^/\s]+/secrets/[\w-]+/versions/[\w-]+")
SERVICE = "https://secretmanager.googleapis.com/v1"
_TIMEOUT_S = 30.0


def read_key(reference: str) -> str:
    """The key that a reference names, on the machine that asks. Raises BadRequest where it cannot be had, or fits no header."""
    key = _of_secret(reference) if SECRET.fullmatch(reference) else os.environ.get(reference, "").strip()
    if not key:
        raise BadRequest(f"vlm-api-key-env: the environment variable {reference} is not set")
    if not (key.isascii() and key.isprintable()):
        raise BadRequest(f"vlm-api-key-env: {reference} holds characters no header can carry")
    return key


def _of_secret(name: str) -> str:
    try:
        import google.auth
        from google.auth.exceptions import GoogleAuthError
        from google.auth.transport.requests import AuthorizedSession
        from requests.exceptions import RequestException
    except ImportError as error:
        raise BadRequest(
            f"vlm-api-key-env: {name} needs the extra `gcp`: pip install 'shardmill[gcp]'"
        ) from error
    try:
        credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
        with AuthorizedSession(credentials) as session:
            answer: Any = session.get(f"{SERVICE}/{name}:access", timeout=_TIMEOUT_S)
            answer.raise_for_status()
            return base64.b64decode(answer.json()["payload"]["data"]).decode().strip()
    except (GoogleAuthError, RequestException, ValueError, KeyError) as error:
        raise BadRequest(
            f"vlm-api-key-env: {name}: {' '.join(str(error).split())[:200]}; whoever runs this needs secretmanager.versions.access"
        ) from error
