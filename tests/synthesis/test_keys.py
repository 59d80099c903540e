"""Keys by reference: from the environment, and from a Secret Manager on the loopback."""

import base64
import json
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import google.auth
import pytest
from google.auth.credentials import AnonymousCredentials

from shards.errors import BadRequest
from synthesis import keys
from synthesis.backend import Ask
from synthesis.client import ChatClient
from tests.scripted_vlm import scripted_server

NAME = "projects/test-proj/secrets/vlm-key/versions/3"
KEY = "canary-81c0"


class _Secrets(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        known = self.path == f"/v1/{NAME}:access"
        data = json.dumps(
            {"payload": {"data": base64.b64encode(f"{KEY}\n".encode()).decode()}} if known else {}
        )
        self.send_response(200 if known else 403)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data.encode())


@pytest.fixture(autouse=True)
def secret_manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Secrets)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setattr(keys, "SERVICE", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setattr(google.auth, "default", lambda scopes: (AnonymousCredentials(), "test-proj"))
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_client_reads_its_key_from_a_secret_where_it_calls() -> None:
    with scripted_server(key=KEY) as server, ChatClient(server.url, "scripted-vlm", NAME) as client:
        assert client.chat(Ask("What do you see?")).text == "A red picture, I think."
        assert KEY.encode() not in pickle.dumps(client) and KEY not in repr(client)
    with scripted_server(key="another") as server, ChatClient(server.url, "scripted-vlm", NAME) as client:
        with pytest.raises(Exception, match="401") as raised:
            client.chat(Ask("What do you see?"))
        assert KEY not in str(raised.value)


def test_what_a_reference_does_not_lead_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILL_KEY", " k ")
    assert keys.read_key("MILL_KEY") == "k"
    monkeypatch.setenv("MILL_KEY", "k\u00e9y")
    with pytest.raises(BadRequest, match="no header can carry"):
        keys.read_key("MILL_KEY")
    with pytest.raises(BadRequest, match=r"versions/9: 403.*secretmanager.versions.access"):
        keys.read_key(NAME[:-1] + "9")
    with pytest.raises(BadRequest, match=r"projects/x is not set"):
        keys.read_key("projects/x")
