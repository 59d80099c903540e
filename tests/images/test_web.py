"""Fetching by url, against real servers on loopback: what is dialled, what is bounded, what each failure is called."""

import asyncio
import contextlib
import datetime
import gzip
import hashlib
import itertools
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from email.utils import format_datetime
from pathlib import Path

import pytest

import images.web
from images.addresses import PUBLIC_PORTS
from images.dial import dial_address, resolve_host
from images.web import TRANSIENT, Web, WebOptions, robots_tag
from shards.errors import BadData, BadRequest
from tests.forked import forked
from tests.images.loopback_web import Answer, LoopbackWeb, Request, answer, reset

OPEN = WebOptions(allow_private=True, per_host=64, per_host_rate=0, timeout_s=5)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images.web, "_FIRST_WAIT_S", 0.01)


def code_of(web: Web, url: str, sha256: str = "") -> str:
    with pytest.raises(BadData) as caught:
        web.fetch(url, sha256)
    return caught.value.code


def codes_of(answers: dict[str, Answer | bytes], options: WebOptions = OPEN) -> dict[str, str]:
    """The code of each path, `kept` where it gave bytes."""

    def act(request: Request, connection: socket.socket) -> bytes | None:
        chosen = answers[request.path]
        return chosen if isinstance(chosen, bytes) else chosen(request, connection)

    with LoopbackWeb(act) as server, Web(options) as web:
        outcomes = web.fetch_all((server.url(path), "") for path in answers)
        return {
            path: outcome.code if isinstance(outcome, BadData) else "kept"
            for path, outcome in zip(answers, outcomes, strict=True)
        }


# --- What is dialled


class Diversion:
    """Dials a loopback port instead of every address, and remembers the addresses."""

    def __init__(self, port_of: Callable[[str], int]) -> None:
        self.port_of, self.dialled = port_of, []

    async def __call__(self, address: str, port: int) -> socket.socket:
        self.dialled.append((address, port))
        return await dial_address("127.0.0.1", self.port_of(address))


NAMES = {
    "metadata.google.internal": ["169.254.169.254"],
    "intranet.example": ["10.0.0.7"],
    "mixed.example": ["93.184.215.14", "127.0.0.1"],
    "mixed6.example": ["93.184.215.14", "::1"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "zone.example": ["fe80::1%2"],
    "public.example": ["93.184.215.14"],
    "other.example": ["2606:4700::1111"],
    "broken.example": ["no address"],
}


def resolve(host: str) -> list[str]:
    if host in NAMES:
        return NAMES[host]
    if host.endswith("localhost"):
        return resolve_host("localhost")
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


BLOCKED = [
    *("http://127.0.0.1/", "http://127.255.255.254/", "http://[::1]/", "http://0.0.0.0/", "http://[::]/"),
    *("http://localhost/", "http://LOCALHOST/", "http://localhost./", "http://sub.localhost/"),
    *("http://10.0.0.1/", "http://172.16.0.1/", "http://192.168.0.1/", "http://100.64.0.1/"),
    *(
        "http://169.254.169.254/latest/meta-data/",
        "https://169.254.169.254/",
        "http://metadata.google.internal/",
    ),
    *("http://100.100.100.200/", "http://168.63.129.16/", "http://[fd00:ec2::254]/", "http://192.0.0.192/"),
    *(
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:a9fe:a9fe]/",
        "http://[::127.0.0.1]/",
        "http://[::a9fe:a9fe]/",
    ),
    *("http://[64:ff9b::169.254.169.254]/", "http://[64:ff9b::7f00:1]/", "http://[64:ff9b:1::7f00:1]/"),
    *("http://[2002:7f00:1::]/", "http://[2002:a9fe:a9fe::1]/", "http://[2001:0:a9fe:a9fe::1]/"),
    *(
        "http://[fe80::1]/",
        "http://[fec0::1]/",
        "http://[fc00::1]/",
        "http://[ff02::1]/",
        "http://[ff0e::1]/",
    ),
    *("http://224.0.0.1/", "http://255.255.255.255/", "http://240.0.0.1/", "http://198.18.0.1/"),
    *("http://192.0.2.1/", "http://198.51.100.1/", "http://203.0.113.1/", "http://[2001:db8::1]/"),
    *("http://127。0。0。1/", "http://[2a00:1450::5efe:7f00:1]/", "http://intranet.example/"),
    *("http://mixed.example/", "http://mixed6.example/", "http://nat64.example/", "http://zone.example/"),
    *("http://broken.example/", "http://public.example:22/", "http://public.example:6379/"),
]
BAD_URLS = [
    *(
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.1/",
        "http://127.1/",
        "http://0/",
        "http://0177.0.0.1/",
    ),
    *(
        "http://017700000001/",
        "http://127.0.0.1.1/",
        "http://0x7f.0.0.0x1/",
        "http://127.0.0.256/",
        "http://1.2.3.4.0x/",
    ),
    *("http://①②⑦.⓪.⓪.①/", "http://１２７.0.0.1/", "http://ⓛocalhost/", "http://[::1", "http://::1/"),
    *("http://[fe80::1%25eth0]/", "http://[fe80::1%eth0]/", "http://[v1.a]/", "http://[127.0.0.1]/"),
    *(
        "http://user:pass@127.0.0.1/",
        "http://public.example@127.0.0.1/",
        "http://127.0.0.1:80@public.example/",
        "http://@/",
    ),
    *(
        "http:///etc/passwd",
        "http://",
        "http:127.0.0.1",
        "//127.0.0.1/",
        "/etc/passwd",
        "",
        " http://public.example/",
    ),
    *(
        "file:///etc/passwd",
        "ftp://127.0.0.1/",
        "gopher://127.0.0.1:6379/_x",
        "data:image/png;base64,",
        "dict://127.0.0.1/",
    ),
    *("javascript:alert(1)", "unix:///run/docker.sock", "httpx://127.0.0.1/", "http+unix://%2Frun/"),
    *(
        "http://public.example\\@127.0.0.1/",
        "http:\\\\127.0.0.1\\",
        "http://public.example/\\..\\",
        "http:/\\127.0.0.1/",
    ),
    *(
        "http://public.example/\r\nHost: 127.0.0.1",
        "http://public.example\r\n/",
        "http://public.example/a\nb",
        "http://a\tb/",
    ),
    *(
        "http://public.example\x00.evil/",
        "http://%31%32%37.0.0.1/",
        "http://127.0.0.1%2f@public.example/",
        "http://a b/",
    ),
    *(
        "http://a..b/",
        "http://.a/",
        "http://a../",
        "http://./",
        "http://public.example:0/",
        "http://public.example:65536/",
    ),
    *(
        "http://public.example:80:80/",
        "http://public.example:-1/",
        "http://public.example:x/",
        "http://\ud800.example/",
    ),
    *(
        "http://" + "a" * 64 + ".example/",
        "http://" + "a." * 130 + "example/",
        "http://public.example/" + "a" * 8192,
    ),
]


def test_hostile_urls_reach_nothing() -> None:
    assert len(BLOCKED) >= 45 and len(BAD_URLS) >= 45
    with LoopbackWeb(lambda *_: answer(b"secret")) as canary:
        diversion = Diversion(lambda address: canary.port)
        with Web(OPEN._replace(allow_private=False), resolve, diversion) as web:
            outcomes = list(web.fetch_all((url, "") for url in [*BLOCKED, *BAD_URLS]))
            codes = [getattr(outcome, "code", outcome) for outcome in outcomes]
            expected = ["address_blocked"] * len(BLOCKED) + ["bad_url"] * len(BAD_URLS)
            wrong = [(u, c) for u, c, e in zip([*BLOCKED, *BAD_URLS], codes, expected, strict=True) if c != e]
            assert not wrong
            assert canary.connections == 0 and diversion.dialled == []
            # The canary sings where it may: the diversion would have shown a dial.
            assert web.fetch("http://public.example/") == b"secret"
        assert canary.connections == 1 and diversion.dialled == [("93.184.215.14", 80)]


def test_each_hop_of_a_redirect_is_checked() -> None:
    places = [url for url in [*BLOCKED, *BAD_URLS] if "\r" not in url and "\n" not in url and "//" in url]
    # What a browser would resolve against the page is no way out either.
    places = [
        url
        for url in places
        if url.isascii() and "\x00" not in url and "\t" not in url and url.startswith("http")
    ]
    assert len(places) > 60

    def leads_on(request: Request, _: socket.socket) -> bytes:
        place = places[int(request.path[1:])]
        return answer(b"", (301, 302, 303, 307, 308)[int(request.path[1:]) % 5], f"Location: {place}")

    with LoopbackWeb(leads_on) as public, LoopbackWeb(lambda *_: answer(b"secret")) as canary:
        diversion = Diversion(lambda address: public.port if address == "93.184.215.14" else canary.port)
        with Web(OPEN._replace(allow_private=False), resolve, diversion) as web:
            asked = [(f"http://public.example/{number}", "") for number in range(len(places))]
            for place, outcome in zip(places, web.fetch_all(asked), strict=True):
                assert isinstance(outcome, BadData), place
                assert outcome.code in ("address_blocked", "bad_url"), (place, outcome.code)
        assert canary.connections == 0
        assert {address for address, _ in diversion.dialled} == {"93.184.215.14"}


@pytest.mark.parametrize("fresh_s", [0.0, 60.0])
def test_a_name_that_changes_its_address_gains_nothing(monkeypatch, fresh_s: float) -> None:
    monkeypatch.setattr(images.web, "_ADDRESSES_FRESH_S", fresh_s)
    answers = itertools.chain([["93.184.215.14"]], itertools.repeat(["127.0.0.1"]))

    def goodbye(request: Request, connection: socket.socket) -> None:
        connection.sendall(answer(b"public", 200, "Connection: close"))

    with LoopbackWeb(goodbye) as public, LoopbackWeb(lambda *_: answer(b"secret")) as canary:
        diversion = Diversion(lambda address: public.port if address == "93.184.215.14" else canary.port)
        with Web(OPEN._replace(allow_private=False), lambda _: next(answers), diversion) as web:
            assert web.fetch("http://rebinding.example/1") == b"public"
            if fresh_s:
                assert web.fetch("http://rebinding.example/2") == b"public"
            else:
                assert code_of(web, "http://rebinding.example/2") == "address_blocked"
        assert canary.connections == 0
        assert next(answers) == ["127.0.0.1"]


def test_the_next_address_is_tried_and_a_name_is_looked_up_once() -> None:
    looked_up = []

    def two(host: str) -> list[str]:
        looked_up.append(host)
        return ["2606:4700::1111", "93.184.215.14"]

    async def only_the_second(address: str, port: int) -> socket.socket:
        if ":" in address:
            raise OSError(101, "Network is unreachable")
        return await dial_address("127.0.0.1", server.port)

    closed = OPEN._replace(allow_private=False)
    with LoopbackWeb(lambda *_: answer(b"x")) as server, Web(closed, two, only_the_second) as web:
        assert list(web.fetch_all([("http://two.example/", "")] * 50)) == [b"x"] * 50
    assert looked_up == ["two.example"]


def test_private_ports_and_addresses_where_allowed() -> None:
    with LoopbackWeb(lambda *_: answer(b"x")) as server:
        assert server.port not in PUBLIC_PORTS
        with Web(OPEN) as web:
            assert web.fetch(server.url()) == web.fetch(server.url(host="localhost")) == b"x"
            assert code_of(web, "http://169.254.169.254/") == "address_blocked"
        with Web(OPEN._replace(allow_private=False)) as web:
            assert code_of(web, server.url()) == "address_blocked"
        assert server.connections == 2


def test_a_slow_or_failing_resolver() -> None:
    def slow(host: str) -> list[str]:
        if host == "slow.example":
            released.wait(10)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    released = threading.Event()
    with Web(OPEN._replace(timeout_s=0.5), slow) as web:
        assert code_of(web, "http://slow.example/") == "http_timeout"
        assert code_of(web, "http://failing.example/") == "http_unreachable"
        released.set()


def test_nothing_of_the_environment_is_used_and_nothing_is_carried_on(monkeypatch, tmp_path: Path) -> None:
    with LoopbackWeb(lambda *_: answer(b"proxied")) as canary:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, canary.url())
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

        def biscuits(request: Request, _: socket.socket) -> bytes:
            if request.path == "/first":
                return answer(b"", 302, "Location: /second", "Set-Cookie: a=b", "WWW-Authenticate: Basic")
            return answer(b"x")

        with LoopbackWeb(biscuits) as server, Web(OPEN) as web:
            assert web.fetch(server.url("/first")) == b"x"
            assert [request.path for request in server.requests] == ["/first", "/second"]
            for request in server.requests:
                assert request.headers.keys() == {"host", "user-agent", "accept", "accept-encoding"}
                assert request.headers["user-agent"].startswith("shardmill/")
                assert request.headers["host"] == f"127.0.0.1:{server.port}"
        assert canary.connections == 0


# --- TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Callable[[str], tuple[ssl.SSLContext, ssl.SSLContext]]:
    """Makes (server's, client's) TLS contexts: a self-signed certificate for a name, and trust in it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def made(name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .sign(key, hashes.SHA256())
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        path = tmp_path_factory.mktemp("tls") / "both.pem"
        path.write_bytes(
            pem
            + key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(path)
        return server, ssl.create_default_context(cadata=pem.decode())

    return made


def test_tls_checks_the_host_name_and_names_it_to_the_server(authority) -> None:
    serving, trusting = authority("public.example")
    named = []
    serving.sni_callback = lambda _, name, __: named.append(name)
    body = random.Random(0).randbytes(3_000_000)
    with LoopbackWeb(lambda *_: answer(body), serving) as server:
        diversion = Diversion(lambda _: server.port)
        closed = OPEN._replace(allow_private=False, retries=0)
        with Web(closed, resolve, diversion, trusting) as web:
            assert web.fetch("https://public.example/") == body
            assert web.fetch("https://public.example./again") == body
            assert code_of(web, "https://other.example/") == "http_unreachable"
        assert server.connections == 2 and named == ["public.example", "other.example"]
        # Trusted by nobody but the context above.
        with Web(closed, resolve, diversion) as web:
            assert code_of(web, "https://public.example/") == "http_unreachable"
        assert sum(server.asked.values()) == 2
    assert [address for address, _ in diversion.dialled] == [
        "93.184.215.14",
        "2606:4700::1111",
        "93.184.215.14",
    ]


def test_no_tls_where_tls_is_asked_for(authority) -> None:
    with LoopbackWeb(lambda *_: answer(b"x")) as server, Web(OPEN._replace(retries=1)) as web:
        assert code_of(web, server.url().replace("http", "https")) == "http_unreachable"
        assert server.connections == 2 and not server.asked


# --- What each answer means


def test_statuses() -> None:
    expected = {
        404: "http_gone",
        410: "http_gone",
        401: "http_forbidden",
        403: "http_forbidden",
        451: "http_forbidden",
        400: "http_refused",
        402: "http_refused",
        418: "http_refused",
        204: "http_refused",
        206: "http_refused",
        300: "http_refused",
        302: "http_refused",
        304: "http_refused",
        101: "http_failed",
        408: "http_failed",
        425: "http_failed",
        429: "http_failed",
        500: "http_failed",
        503: "http_failed",
        599: "http_failed",
        999: "http_failed",
        200: "kept",
    }
    bodiless = (204, 304, 101)
    answers = {f"/{status}": answer(b"" if status in bodiless else b"x", status) for status in expected}
    assert codes_of(answers) == {f"/{status}": code for status, code in expected.items()}
    assert {code for status, code in expected.items() if status >= 500} <= TRANSIENT
    assert not TRANSIENT & {
        "http_gone",
        "http_forbidden",
        "http_refused",
        "robots_noai",
        "bad_url",
        "address_blocked",
    }


def test_only_what_may_pass_is_asked_for_again() -> None:
    with LoopbackWeb(lambda request, _: answer(b"", int(request.path[1:]))) as server, Web(OPEN) as web:
        for status, times in ((503, 4), (429, 4), (404, 1), (403, 1), (400, 1)):
            with pytest.raises(BadData) as caught:
                web.fetch(server.url(f"/{status}"))
            assert server.asked[f"/{status}"] == caught.value.attempts == times


def test_x_robots_tag() -> None:
    tags = {
        "/noai": ("noai",),
        "/image": ("noindex, NoImageAI",),
        "/second": ("index", "noai"),
        "/ours": ("shardmill: noai",),
        "/everyone": ("*: noai",),
        "/after": ("otherbot: index, shardmill: nofollow, noai",),
        "/date": ("unavailable_after: 25 Jun 2030 15:00:00 PST, noai",),
        "/others": ("otherbot: noai",),
        "/others-list": ("otherbot: nofollow, noai",),
        "/unasked": ("noindex, nofollow, max-snippet: -1",),
        "/empty": ("",),
    }
    answers = {
        path: answer(b"x", 200, *(f"X-Robots-Tag: {value}" for value in values))
        for path, values in tags.items()
    }
    codes = codes_of(answers)
    assert [path for path, code in codes.items() if code == "kept"] == [
        "/others",
        "/others-list",
        "/unasked",
        "/empty",
    ]
    assert set(codes.values()) == {"kept", "robots_noai"}
    assert set(codes_of(answers, OPEN._replace(disallowed_tags=())).values()) == {"kept"}
    assert codes_of(answers, OPEN._replace(disallowed_tags=("noindex",)))["/unasked"] == "robots_noai"
    assert codes_of(answers, OPEN._replace(user_agent="otherbot/2"))["/others"] == "robots_noai"
    assert robots_tag(["a:noai"], "a", frozenset({"noai"})) == "noai"


def test_a_forbidden_redirect_is_not_followed() -> None:
    answers = {"/a": answer(b"", 302, "Location: /b", "X-Robots-Tag: noai"), "/b": answer(b"x")}
    assert codes_of(answers) == {"/a": "robots_noai", "/b": "kept"}


def test_an_expected_hash() -> None:
    right = hashlib.sha256(b"x").hexdigest()
    with LoopbackWeb(lambda *_: answer(b"x")) as server, Web(OPEN) as web:
        assert web.fetch(server.url(), right) == web.fetch(server.url(), right.upper()) == b"x"
        for wrong in (hashlib.sha256(b"y").hexdigest(), right[:-1], "nonsense"):
            assert code_of(web, server.url(), wrong) == "hash_mismatch"


def test_redirects() -> None:
    def hops(request: Request, _: socket.socket) -> bytes:
        left = int(request.path[1:])
        return answer(b"x") if left == 0 else answer(b"moved", 302, f"Location: {left - 1}")

    def loop(request: Request, _: socket.socket) -> bytes:
        return answer(b"", 302, "Location: /loop")

    assert codes_of({**{f"/{left}": hops for left in range(8)}, "/loop": loop}) == {
        **{f"/{left}": "kept" for left in range(6)},
        "/6": "too_many_redirects",
        "/7": "too_many_redirects",
        "/loop": "too_many_redirects",
    }
    location = "/ü b".encode("latin-1")
    latin = b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n"
    assert codes_of({"/": latin, "/%C3%BC%20b": answer(b"x")})["/"] == "kept"


# --- Bounds


def forever(piece: bytes, head: bytes, every_s: float = 0.0) -> Answer:
    def act(request: Request, connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(10**6):
            connection.sendall(piece)
            time.sleep(every_s)

    return act


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CLOSED = b"HTTP/1.1 200 OK\r\n\r\n"


def test_bytes_are_bounded() -> None:
    bomb = gzip.compress(bytes(50_000_000))
    packed = gzip.compress(b"x" * 1000)
    answers: dict[str, Answer | bytes] = {
        "/declared": b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"x" * 100,
        "/endless": forever(b"x" * 1000, CLOSED),
        "/chunks": forever(b"3e8\r\n" + b"x" * 1000 + b"\r\n", CHUNKED),
        "/bomb": answer(bomb[:4000], 200, "Content-Encoding: gzip"),
        "/packed": answer(packed, 200, "Content-Encoding: gzip"),
        "/brotli": answer(b"x", 200, "Content-Encoding: br"),
        "/twice": answer(packed, 200, "Content-Encoding: gzip, gzip"),
        "/full": answer(b"x" * 4096),
        "/over": answer(b"x" * 4097),
        "/empty": answer(b""),
        "/headers": forever(b"X-Filler: " + b"x" * 1000 + b"\r\n", b"HTTP/1.1 200 OK\r\n"),
        "/line": forever(b"x" * 1000, b"HTTP/1.1 200 "),
        "/trailers": forever(b"X-Filler: " + b"x" * 1000 + b"\r\n", CHUNKED + b"1\r\nx\r\n0\r\n"),
    }
    assert codes_of(answers, OPEN._replace(max_bytes=4096, retries=1)) == {
        **dict.fromkeys(("/declared", "/endless", "/chunks", "/bomb", "/over"), "too_many_bytes"),
        "/packed": "kept",
        "/full": "kept",
        "/empty": "empty_file",
        "/brotli": "http_refused",
        "/twice": "http_refused",
        "/headers": "http_failed",
        "/line": "http_failed",
        "/trailers": "http_truncated",
    }


def test_time_is_bounded_however_the_server_drips() -> None:
    def silent(request: Request, connection: socket.socket) -> None:
        connection.recv(1)

    answers: dict[str, Answer | bytes] = {
        "/silent": silent,
        "/head": forever(b"x", b"HTTP/1.1 200 OK\r\nX-Drip: ", 0.02),
        "/body": forever(b"x", b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", 0.02),
        "/chunks": forever(b"1\r\nx\r\n", CHUNKED, 0.02),
        "/continue": forever(b"HTTP/1.1 100 Continue\r\n\r\n", b"", 0.02),
        "/redirects": lambda *_: time.sleep(0.15) or answer(b"", 302, "Location: /redirects"),
    }
    started = time.monotonic()
    codes = codes_of(answers, OPEN._replace(timeout_s=0.4, max_redirects=100, retries=10))
    assert codes == dict.fromkeys(answers, "http_timeout")
    assert time.monotonic() - started < 20


def test_a_server_that_takes_no_connection() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as bound:
        port = bound.getsockname()[1]
    with Web(OPEN) as web:
        assert code_of(web, f"http://127.0.0.1:{port}/") == "http_unreachable"

    async def never(address: str, port: int) -> socket.socket:
        await asyncio.sleep(60)
        raise AssertionError

    with Web(OPEN._replace(timeout_s=0.2, retries=1), dial=never) as web:
        assert code_of(web, "http://127.0.0.1/") in ("http_timeout", "http_unreachable")


def test_held_bytes_are_bounded_and_order_is_kept(monkeypatch) -> None:
    most = 0

    def measured(self, ticket, size: int) -> None:
        nonlocal most
        hold(self, ticket, size)
        most = max(most, self._bytes)

    hold = images.web._Held.hold
    monkeypatch.setattr(images.web._Held, "hold", measured)
    bodies = [bytes([number]) * 50_000 for number in range(60)]

    def act(request: Request, connection: socket.socket) -> bytes | None:
        number = int(request.path[1:])
        if number % 20 == 0:
            time.sleep(0.2)  # meanwhile those behind it come
        if number % 2:
            return answer(bodies[number])
        return CHUNKED + b"c350\r\n" + bodies[number] + b"\r\n0\r\n\r\n"

    with LoopbackWeb(act) as server, Web(OPEN._replace(max_held_bytes=200_000)) as web:
        fetched = list(web.fetch_all((server.url(f"/{number}"), "") for number in range(60)))
    assert fetched == bodies
    assert 150_000 <= most <= 200_000 + 50_000


def test_the_source_is_read_lazily() -> None:
    taken = itertools.count()
    with LoopbackWeb(lambda *_: answer(b"x")) as server, Web(OPEN._replace(concurrency=4)) as web:
        endless = web.fetch_all((server.url(f"/{number}"), "") for number in taken)
        assert list(itertools.islice(endless, 10)) == [b"x"] * 10
        endless.close()
        assert next(taken) <= 10 + 4 * 4
        assert web.fetch(server.url()) == b"x"


# --- Manners


def test_a_host_is_asked_by_few_at_a_time_over_few_connections() -> None:
    def slow(request: Request, connection: socket.socket) -> bytes:
        time.sleep(0.01)
        return answer(b"x", 404 if request.path == "/gone" else 200)

    with LoopbackWeb(slow) as server, Web(OPEN._replace(per_host=3)) as web:
        urls = [(server.url("/gone" if number % 5 == 0 else "/"), "") for number in range(60)]
        assert len(list(web.fetch_all(urls))) == 60
        assert server.most_busy <= 3 and server.connections <= 3


def test_the_overall_bound() -> None:
    def slow(request: Request, connection: socket.socket) -> bytes:
        time.sleep(0.01)
        return answer(b"x")

    options = OPEN._replace(concurrency=5, per_host=2)
    with LoopbackWeb(slow) as server, Web(options, dial=Diversion(lambda _: server.port)) as web:
        urls = [(server.url(host=f"127.0.0.{number % 9 + 1}"), "") for number in range(80)]
        assert list(web.fetch_all(urls)) == [b"x"] * 80
        assert 3 <= server.most_busy <= 5


def test_requests_a_second() -> None:
    options = OPEN._replace(per_host=4, per_host_rate=50)
    with LoopbackWeb(lambda *_: answer(b"x")) as server, Web(options) as web:
        started = time.monotonic()
        assert len(list(web.fetch_all([(server.url(), "")] * 24))) == 24
        assert time.monotonic() - started >= (24 - 4) / 50


def test_waiting_for_a_turn_costs_nothing_of_a_urls_time() -> None:
    options = OPEN._replace(per_host=1, per_host_rate=20, timeout_s=1.0, retries=0)
    with LoopbackWeb(lambda *_: answer(b"x")) as server, Web(options) as web:
        assert list(web.fetch_all([(server.url(), "")] * 24)) == [b"x"] * 24


def test_a_slow_host_holds_up_no_other() -> None:
    others_done = threading.Event()

    def act(request: Request, connection: socket.socket) -> bytes:
        if request.headers["host"].startswith("slow"):
            return answer(b"x" if others_done.wait(5) else b"held up")
        if sum(not one.headers["host"].startswith("slow") for one in server.requests) == 20:
            others_done.set()
        return answer(b"x")

    options = OPEN._replace(per_host=2, allow_private=False, concurrency=8, timeout_s=20)
    diversion = Diversion(lambda _: server.port)
    with LoopbackWeb(act) as server, Web(options, lambda _: ["93.184.215.14"], diversion) as web:
        hosts = ["slow.example" if number < 10 else f"h{number}.example" for number in range(30)]
        assert list(web.fetch_all((f"http://{host}/", "") for host in hosts)) == [b"x"] * 30


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_heeded_up_to_a_cap(monkeypatch, form: str) -> None:
    times = []

    def busy_once(request: Request, connection: socket.socket) -> bytes:
        times.append(time.monotonic())
        if len(times) > 1:
            return answer(b"x")
        later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2)
        value = "1" if form == "seconds" else format_datetime(later, usegmt=True)
        return answer(b"", 429, f"Retry-After: {value}")

    with LoopbackWeb(busy_once) as server, Web(OPEN._replace(per_host=1)) as web:
        assert list(web.fetch_all([(server.url("/1"), ""), (server.url("/2"), "")])) == [b"x", b"x"]
    assert times[1] - times[0] >= 0.9  # neither url came sooner; a date has whole seconds
    long = {"/": answer(b"", 503, "Retry-After: 3600")}
    started = time.monotonic()
    assert codes_of(long) == {"/": "http_failed"}
    assert time.monotonic() - started < 20


# --- Faults


def faulty(request: Request, connection: socket.socket) -> bytes | None:
    """What a path gives; three requests of ten fail, by the hash of path and count."""
    body = hashlib.sha256(request.path.encode()).digest() * 30
    draw = int.from_bytes(hashlib.sha256(f"{request.path} {request.nth}".encode()).digest()[:4], "big") % 100
    match draw // 5:
        case 0:
            return answer(b"", 503)
        case 1:
            return answer(b"", 429)
        case 2:
            connection.sendall(answer(body)[:-100])
            reset(connection)
        case 3:
            connection.sendall(answer(body)[:-100])
        case 4:
            reset(connection)
        case 5:
            connection.sendall(b"HTTP/1.1 what\r\n\r\n")
        case _:
            return answer(body)
    return None


def test_faults_pass() -> None:
    with LoopbackWeb(faulty) as server, Web(OPEN._replace(retries=12, per_host=16)) as web:
        paths = [f"/{number}" for number in range(500)]
        outcomes = list(web.fetch_all((server.url(path), "") for path in paths))
        assert outcomes == [hashlib.sha256(path.encode()).digest() * 30 for path in paths]
        assert sum(server.asked.values()) > 650


def test_a_body_that_breaks_off() -> None:
    half = answer(b"x" * 1000)[:-500]

    def cut(request: Request, connection: socket.socket) -> None:
        connection.sendall(half)

    def broken(request: Request, connection: socket.socket) -> None:
        connection.sendall(half)
        time.sleep(0.02)
        reset(connection)

    def chunks(request: Request, connection: socket.socket) -> None:
        connection.sendall(CHUNKED + b"5\r\nhello\r\n")

    packed = gzip.compress(random.Random(0).randbytes(1000))
    answers: dict[str, Answer | bytes] = {
        "/cut": cut,
        "/broken": broken,
        "/chunks": chunks,
        "/packed": answer(packed[:-20], 200, "Content-Encoding: gzip"),
        "/garbage": answer(b"not gzip at all", 200, "Content-Encoding: gzip"),
    }
    assert codes_of(answers) == dict.fromkeys(answers, "http_truncated")


def test_a_connection_that_was_closed_while_idle_is_no_failure() -> None:
    def one_each(request: Request, connection: socket.socket) -> None:
        connection.sendall(answer(b"x"))

    answered = set()

    def silent_at_the_second(request: Request, connection: socket.socket) -> bytes | None:
        if connection in answered:
            return None
        answered.add(connection)
        return answer(b"x")

    for act in (one_each, silent_at_the_second):
        with LoopbackWeb(act) as server, Web(OPEN._replace(retries=0)) as web:
            for _ in range(20):
                assert web.fetch(server.url()) == b"x"


def test_an_answer_to_no_question_is_taken_for_none() -> None:
    def eager(request: Request, connection: socket.socket) -> bytes:
        return answer(b"asked for " + request.path.encode()) + answer(b"not asked for")

    with LoopbackWeb(eager) as server, Web(OPEN) as web:
        for number in range(20):
            assert web.fetch(server.url(f"/{number}")) == f"asked for /{number}".encode()


def test_whatever_a_server_says_ends_in_bytes_or_a_code() -> None:
    pieces = [
        *(
            b"HTTP/1.1 200 OK\r\n",
            b"HTTP/1.0 302 \r\n",
            b"HTTP/1.1 ",
            b"\r\n",
            b"\r\n\r\n",
            b"\x00\xff",
            b"200",
            b":",
        ),
        *(
            b"Content-Length: 5\r\n",
            b"Content-Length: -1\r\n",
            b"Content-Length: 5, 6\r\n",
            b"Content-Length: \xb2\r\n",
        ),
        *(
            b"Transfer-Encoding: chunked\r\n",
            b"Location: \xff\xfe\r\n",
            b"Location: http://[\r\n",
            b"Location: ///\r\n",
        ),
        *(
            b"Content-Encoding: gzip\r\n",
            b"X-Robots-Tag: ,:,\r\n",
            b"Retry-After: -\r\n",
            b"5\r\nhello\r\n",
            b"0\r\n\r\n",
        ),
    ]

    def noise(request: Request, connection: socket.socket) -> None:
        drawn = random.Random(request.path)
        said = drawn.choice([[], [b"HTTP/1.1 200 OK\r\n"], [b"HTTP/1.1 302 Found\r\n"]])
        connection.sendall(
            b"".join(said + drawn.choices(pieces, k=drawn.randrange(1, 9))) + drawn.choice([b"", b"\r\n"])
        )

    with LoopbackWeb(noise) as server, Web(OPEN._replace(retries=0, timeout_s=2)) as web:
        outcomes = list(web.fetch_all((server.url(f"/{number}"), "") for number in range(300)))
        codes = {outcome.code for outcome in outcomes if isinstance(outcome, BadData)}
        assert {"http_failed", "http_truncated", "http_refused", "bad_url"} <= codes
        assert any(isinstance(outcome, bytes) for outcome in outcomes)


# --- Threads, forks, ends


def test_threads_share_one() -> None:
    with LoopbackWeb(lambda request, _: answer(request.path.encode())) as server, Web(OPEN) as web:
        found: dict[int, list[bytes | BadData]] = {}

        def work(worker: int) -> None:
            found[worker] = list(web.fetch_all((server.url(f"/{worker}/{n}"), "") for n in range(40)))

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {w: [f"/{w}/{n}".encode() for n in range(40)] for w in range(8)}


def test_a_forked_child_makes_its_own() -> None:
    with LoopbackWeb(lambda *_: answer(b"x")) as server, Web(OPEN) as web:
        assert web.fetch(server.url()) == b"x"

        def child() -> None:
            with pytest.raises(RuntimeError, match="another process"):
                web.fetch(server.url())
            with Web(OPEN) as own:
                assert own.fetch(server.url()) == b"x"

        assert forked(child) == 0
        assert web.fetch(server.url()) == b"x"


def test_closing_drops_what_is_under_way() -> None:
    with LoopbackWeb(lambda _, connection: connection.recv(1) and None) as server:
        web = Web(OPEN._replace(timeout_s=60))
        outcomes = web.fetch_all([(server.url(), "")] * 20)
        started = time.monotonic()
        threading.Timer(0.05, web.close).start()
        with pytest.raises(BaseException):  # noqa: B017
            next(outcomes)
        assert time.monotonic() - started < 5
        web.close()
        with pytest.raises(RuntimeError, match="closed"):
            web.fetch(server.url())
    assert not web._thread.is_alive()


def test_control_c_ends_it_at_once(tmp_path: Path) -> None:
    script = (
        "import signal, sys; from images.web import Web, WebOptions\n"
        # What a shell starts in the background, tests included, ignores it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with Web(WebOptions(allow_private=True, timeout_s=60)) as web:\n"
        "    print('under way', flush=True)\n"
        "    list(web.fetch_all([(sys.argv[1], '')] * 100))\n"
    )
    with LoopbackWeb(lambda _, connection: connection.recv(1) and None) as server:
        child = subprocess.Popen(
            [sys.executable, "-W", "error", "-X", "dev", "-c", script, server.url()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert child.stdout is not None and child.stdout.readline() == "under way\n"
        while not server.requests:
            time.sleep(0.01)
        time.sleep(0.5)  # until all are handed over: a coroutine that is interrupted on its way warns
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=20)
    assert child.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt"), errors


def test_a_user_agent_that_no_header_can_carry() -> None:
    for agent in ("", "a\r\nb: c", "ä"):
        with pytest.raises(BadRequest):
            Web(OPEN._replace(user_agent=agent))
