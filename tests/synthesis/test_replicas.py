import contextlib
import hashlib
import pickle
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from shards.errors import BadRequest, RunFailed
from synthesis.backend import Ask, VlmFailure, schema_of
from synthesis.client import ChatClient
from synthesis.limits import Limits
from synthesis.probe import ProbeResult, probe
from synthesis.replicas import DEAD_AFTER, FIRST_REST_S, MAX_HOMES, Replicas
from tests.hostile_vlm import HostileVlm, several, text_of

KEY = "canary-5b1d0e"
DEAD = VlmFailure("vlm_unreachable", "refused", transient=True)
BUSY = VlmFailure("vlm_rate_limited", "busy", 429, True, 20.0)


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def ids(count: int) -> list[bytes]:
    return [hashlib.sha256(str(number).encode()).digest() for number in range(count)]


def image_of(body: dict) -> str:
    return text_of(body).split()[0]


def ask_about(client: ChatClient, image: bytes, calls: int = 3) -> list[str]:
    return [client.chat(Ask(f"{image.hex()} {call}"), image).text for call in range(calls)]


def test_the_least_loaded_is_asked_and_an_image_stays() -> None:
    replicas = Replicas(3, Clock())
    first, second, third = (replicas.take(affinity).replica for affinity in (b"a", b"b", b"c"))
    assert {first, second, third} == {0, 1, 2}
    assert replicas.take(b"b").replica == second
    replicas.answered(first)
    assert replicas.take(b"d").replica == first
    assert replicas.take(b"a").replica == first


def test_a_dead_replica_gives_its_images_away_and_is_tried_again() -> None:
    clock = Clock()
    replicas = Replicas(2, clock)
    assert replicas.take(b"a").replica == 0
    replicas.failed(0, DEAD)
    for _ in range(DEAD_AFTER - 1):
        assert replicas.take(b"a") == (0, 0.0, False, False)
        replicas.failed(0, DEAD)
    assert replicas.take(b"a").replica == 1
    assert {replicas.take(affinity).replica for affinity in ids(5)} == {1}
    clock.sleep(FIRST_REST_S)
    trial = replicas.take(b"b")
    assert (trial.replica, trial.trial) == (0, True)
    # One trial at a time.
    assert replicas.take(b"c").replica == 1
    replicas.failed(0, DEAD)
    clock.sleep(FIRST_REST_S)
    assert replicas.take(b"d").replica == 1
    clock.sleep(FIRST_REST_S)
    assert replicas.take(b"e").trial
    replicas.answered(0)
    assert replicas.take(b"f") == (0, 0.0, False, False)
    # Who was moved stays where it is.
    assert replicas.take(b"a").replica == 1


def test_a_call_that_failed_is_no_trial_while_another_replica_lives() -> None:
    clock = Clock()
    replicas = Replicas(2, clock)
    for _ in range(DEAD_AFTER):
        assert replicas.take(b"a").replica == 0
        replicas.failed(0, DEAD)
    clock.sleep(FIRST_REST_S)
    assert replicas.take(b"a", again=True) == (1, 0.0, False, False)
    trial = replicas.take(b"b")
    assert (trial.replica, trial.trial) == (0, True)
    for _ in range(DEAD_AFTER):
        replicas.failed(1, DEAD)
    replicas.failed(0, DEAD)
    clock.sleep(FIRST_REST_S)
    assert replicas.take(b"a", again=True).trial, "there is no other"


def test_a_replica_that_asked_to_be_left_alone_is_none_that_a_retry_waits_for() -> None:
    clock = Clock()
    replicas = Replicas(2, clock)
    for _ in range(DEAD_AFTER):
        replicas.failed(replicas.take(b"a").replica, DEAD)
    clock.sleep(FIRST_REST_S)
    assert replicas.take(b"a", again=True).replica == 1
    replicas.failed(1, BUSY)
    assert replicas.take(b"a", again=True) == (0, 0.0, True, False)


def test_all_dead_is_told_with_the_time_of_the_next_trial() -> None:
    clock = Clock()
    replicas = Replicas(2, clock)
    for _ in range(2 * DEAD_AFTER):
        replicas.failed(replicas.take(b"").replica, DEAD)
    turn = replicas.take(b"a")
    assert turn.all_dead and turn.replica == -1 and 0 < turn.wait_s <= FIRST_REST_S
    clock.sleep(turn.wait_s)
    assert replicas.take(b"a").trial


def test_a_replica_that_lost_its_model_draws_no_load() -> None:
    replicas = Replicas(2, Clock())
    for _ in range(DEAD_AFTER):
        assert replicas.take(b"a").replica == 0
        replicas.failed(0, VlmFailure("vlm_refused", "no such model", 404))
    assert replicas.take(b"a").replica == 1
    # A request's own fault says nothing.
    for _ in range(2 * DEAD_AFTER):
        replicas.failed(replicas.take(b"a").replica, VlmFailure("vlm_refused", "too long", 400))
    assert replicas.take(b"a").replica == 1


def test_a_pause_that_one_answer_asked_for_holds_for_all_calls() -> None:
    clock = Clock()
    alone = Replicas(1, clock)
    alone.failed(alone.take(b"a").replica, BUSY)
    turn = alone.take(b"other")
    assert turn.replica == -1 and 20 <= turn.wait_s <= 22 and not turn.all_dead
    clock.sleep(turn.wait_s)
    assert alone.take(b"other").replica == 0
    two = Replicas(2, clock)
    assert two.take(b"a").replica == 0
    two.failed(0, BUSY)
    assert two.take(b"a").replica == two.take(b"b").replica == 1


def test_few_images_are_remembered() -> None:
    replicas = Replicas(2, Clock())
    for number in range(MAX_HOMES + 10):
        replicas.answered(replicas.take(number.to_bytes(4)).replica)
    assert len(replicas._homes) == MAX_HOMES


def test_four_servers_share_the_load_and_see_an_image_alone() -> None:
    with several(4, share=0.0, latency_s=0.005) as servers:
        with (
            ChatClient([server.base_url for server in servers], "a-model") as client,
            ThreadPoolExecutor(8) as threads,
        ):
            list(threads.map(lambda image: ask_about(client, image), ids(120)))
        served = [server.served.total() for server in servers]
        assert sum(served) == 360
        assert max(served) <= 1.1 * 90 and min(served) >= 0.9 * 90, served
        homes = [{image_of(body) for body in server.bodies} for server in servers]
        assert sum(len(images) for images in homes) == 120
        assert max(servers[0].counts.values()) == 1


def test_one_dies_and_everything_completes() -> None:
    with several(4, share=0.0, latency_s=0.003) as servers:
        urls = [server.base_url for server in servers]
        with ChatClient(urls, "a-model") as client, ThreadPoolExecutor(8) as threads:
            client.sleep = lambda seconds: time.sleep(min(seconds, 0.02))
            dying = threading.Timer(0.1, servers[2].stop)
            dying.start()
            answers = list(threads.map(lambda image: ask_about(client, image), ids(120)))
            dying.join()
        assert len(answers) == 120 and all(len(told) == 3 for told in answers)
        homes: Counter[str] = Counter()
        for server in servers:
            homes.update({image_of(body) for body in server.bodies})
        # Only images that the dead one had begun were seen by another.
        assert sum(1 for seen in homes.values() if seen > 1) <= 8
        servers[2].start()  # its fixture stops it


def test_a_server_that_comes_back_is_asked_again() -> None:
    clock = Clock()
    with several(2, share=0.0) as servers, contextlib.ExitStack() as stack:
        urls = [server.base_url for server in servers]
        client = stack.enter_context(ChatClient(urls, "a-model", sleep=clock.sleep, clock=clock))
        for image in ids(2):
            ask_about(client, image)
        port, before = int(urls[0].rsplit(":", 1)[1]), servers[0].served.total()
        assert before == 3
        servers[0].stop()
        for image in ids(12)[2:]:
            ask_about(client, image)
        servers[0].start(port)
        clock.sleep(120)
        for image in ids(22)[12:]:
            ask_about(client, image)
        assert servers[0].served.total() - before >= 12


def test_all_dead_fails_each_call_and_then_the_run() -> None:
    clock = Clock()
    with several(2) as servers:
        urls = [server.base_url for server in servers]
        for server in servers:
            server.stop()
        limits = Limits(patience_s=120)
        with ChatClient(urls, "a-model", limits=limits, sleep=clock.sleep, clock=clock) as client:
            began, failed = clock.now, 0
            with pytest.raises(
                RunFailed, match=r"has answered for 120 s, \d+ calls in a row .*the same command"
            ):
                while True:
                    with pytest.raises(VlmFailure) as caught:
                        client.chat(Ask("Why?"), b"")
                    assert caught.value.code == "vlm_unreachable" and caught.value.transient
                    failed += 1
            assert failed >= 4 and 120 <= clock.now - began < 600
            # The rest of the batch is not burnt either, until as much time has passed again.
            asked = sum(client.asked())
            with pytest.raises(RunFailed):
                client.chat(Ask("Why?"))
            assert sum(client.asked()) == asked
        for server in servers:
            server.start()


def test_one_success_in_between_keeps_a_run_going() -> None:
    clock = Clock()
    # .9 ** 5: 59 of 100 calls fail, now and then more than five in a row.
    with HostileVlm(share=0.9, faults=("503",)) as server:
        limits = Limits(patience_s=1000)
        client = ChatClient(server.base_url, "a-model", limits=limits, sleep=clock.sleep, clock=clock)
        failed = 0
        with client:
            for number in range(60):
                try:
                    client.chat(Ask(str(number)))
                except VlmFailure:
                    failed += 1
        assert 20 < failed < 60


def test_calls_that_fail_by_themselves_never_end_a_run() -> None:
    clock = Clock()
    with HostileVlm(share=1.0, faults=("html",)) as server:
        limits = Limits(patience_s=0.001)
        with ChatClient(server.base_url, "m", limits=limits, sleep=clock.sleep, clock=clock) as client:
            for number in range(40):
                clock.sleep(1)
                with pytest.raises(VlmFailure, match="not JSON"):
                    client.chat(Ask(str(number)))


def test_retry_after_holds_all_threads() -> None:
    with HostileVlm(share=0.0) as server:
        fails_once = iter(["429"])
        server.fault_of = lambda key, attempt: next(fails_once, "")  # type: ignore[method-assign]
        waits = threading.Event()

        def sleep(seconds: float) -> None:
            waits.set()
            time.sleep(seconds)

        with ChatClient(server.base_url, "m", sleep=sleep) as client, ThreadPoolExecutor(4) as threads:
            first = threads.submit(client.chat, Ask("first"))
            assert waits.wait(30)
            rest = [threads.submit(client.chat, Ask(str(number))) for number in range(3)]
            assert all(future.result().text for future in [first, *rest])
        refused, *others = server.began
        assert min(others) - refused >= 0.95


def test_who_cannot_ask_in_time_fails_without_asking() -> None:
    clock = Clock()
    with HostileVlm(share=1.0, faults=("429",), retry_after_s=3600) as server:
        with ChatClient(server.base_url, "m", sleep=clock.sleep, clock=clock) as client:
            for number in range(5):
                with pytest.raises(VlmFailure) as caught:
                    client.chat(Ask(str(number)))
                assert caught.value.code == "vlm_rate_limited" and caught.value.transient
        assert server.counts.total() == 1 and clock.now >= 1004


def test_with_hostile_servers_every_call_has_an_answer_or_a_code() -> None:
    asks = [Ask(f"case {number}", schema=schema_of({"score": {"type": "integer"}})) for number in range(80)]

    def outcome(client: ChatClient, ask: Ask) -> str:
        try:
            return client.chat(ask, ask.prompt.encode()).text
        except VlmFailure as failure:
            return failure.code

    with several(2, share=0.3, hang_s=3, retry_after_s=0) as servers, ThreadPoolExecutor(16) as threads:
        urls = [server.base_url for server in servers]
        with ChatClient(urls, "a-model", timeout_s=1) as client:
            client.sleep = lambda seconds: time.sleep(min(seconds, 0.02))
            hostile = list(threads.map(lambda ask: outcome(client, ask), asks))
        for server in servers:
            server.share = 0.0
        with ChatClient(urls, "a-model") as client:
            calm = list(threads.map(lambda ask: outcome(client, ask), asks))
    assert set(calm) == {'{"score": 7}'}
    good = [answer for answer in hostile if answer.startswith("{")]
    assert set(good) == {'{"score": 7}'} and 40 < len(good) < 80
    assert {answer for answer in hostile if not answer.startswith("{")} <= {
        "vlm_bad_response",
        "vlm_empty",
        "vlm_bad_json",
        "vlm_unreachable",
    }
    assert servers[0].counts.total() > 170  # 160 and what was tried again


def test_probe_wants_one_model_of_all_servers() -> None:
    with HostileVlm(share=0.0) as one, HostileVlm(share=0.0) as other:
        urls = [one.base_url, other.base_url]
        assert probe(ChatClient(urls, ""), False) == ProbeResult("a-model", True, True, True)
        other.obeys_schema = False
        assert probe(ChatClient(urls, ""), False) == ProbeResult("a-model", True, False, True)
        other.sees = False
        with pytest.raises(BadRequest, match="refuses images"):
            probe(ChatClient(urls, ""), False)
        with pytest.raises(BadRequest, match="only one takes images"):
            probe(ChatClient(urls, ""), True)
        other.sees, other.model = True, "another"
        with pytest.raises(BadRequest, match="serves 'another' and .* serves 'a-model'"):
            probe(ChatClient(urls, ""), False)
        with pytest.raises(BadRequest, match=f"{other.base_url}/v1 does not serve 'a-model'"):
            probe(ChatClient(urls, "a-model"), False)
        with pytest.raises(BadRequest, match="stands there twice"):
            ChatClient([urls[0], urls[0] + "/v1"], "")


def test_the_key_goes_to_every_replica_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_KEY", KEY)
    with several(2, share=0.0) as servers:
        client = ChatClient([server.base_url for server in servers], "a-model", "CANARY_KEY", run="r")
        with client:
            for image in ids(4):
                ask_about(client, image)
            said = repr(client) + str(vars(client)) + str(client.spent())
            assert KEY.encode() not in pickle.dumps(client) and KEY not in said
        for server in servers:
            assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
            server.stop()
        with client, pytest.raises(VlmFailure) as caught:
            client.sleep = lambda seconds: None
            client.chat(Ask("Why?"))
        assert KEY not in str(caught.value) + repr(caught.value.__dict__)
        for server in servers:
            server.start()
