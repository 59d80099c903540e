import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from shards.errors import BadRequest
from synthesis.backend import Ask, Picture, VlmFailure
from synthesis.backends import BackendOptions, find_backend
from synthesis.client import ChatClient
from synthesis.limits import UNLIMITED, Limits, Meter, Prices
from tests.hostile_vlm import HostileVlm, says
from tests.synthesis.test_replicas import Clock


def calls_until_over(client: ChatClient, at_once: int = 1) -> int:
    """How many calls are answered before the budget ends the rest."""

    def asked(number: int) -> int:
        try:
            client.chat(Ask(f"case {number}", max_tokens=10))
        except VlmFailure as failure:
            assert failure.code == "vlm_over_budget" and failure.transient
            return 0
        return 1

    with client, ThreadPoolExecutor(at_once) as threads:
        return sum(threads.map(asked, range(40)))


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize(
    "limits", [Limits(tokens=100), Limits(cost=0.001, prices=Prices(5.0, 15.0)), Limits(tokens=99)]
)
def test_budgets_are_passed_by_what_is_in_flight_at_most(limits: Limits, at_once: int) -> None:
    with HostileVlm(share=0.0, latency_s=0.01) as server:
        server._calm = lambda body, key: says("ok", 8, 4)  # type: ignore[method-assign]
        # 12 tokens a call, and 8 * 5 + 4 * 15 = 100 millionths: nine and ten calls.
        enough = 10 if limits.cost else 9
        client = ChatClient(server.base_url, "m", limits=limits)
        answered = calls_until_over(client, at_once)
        assert enough <= answered <= enough + at_once - 1
        assert server.counts.total() == answered


def test_a_server_that_does_not_count_is_charged_what_it_may_have_used() -> None:
    with HostileVlm(share=0.0) as server:
        server._calm = lambda body, key: says("ok")  # type: ignore[method-assign]
        client = ChatClient(server.base_url, "m", limits=Limits(tokens=100))
        # `case 7` has six bytes, and the answer may have ten tokens.
        assert calls_until_over(client) == 7
        wanted = BackendOptions([server.base_url], limits=Limits(tokens=100))
        with pytest.raises(BadRequest, match="^--token-budget: .* does not say how many tokens"):
            find_backend(wanted)
        assert find_backend(wanted._replace(limits=UNLIMITED)).note == "a-model, JSON asked for in words"


def test_nothing_is_begun_after_the_time_and_no_picture_loaded() -> None:
    with HostileVlm(share=0.0) as server:
        assert calls_until_over(ChatClient(server.base_url, "m", limits=Limits(until=time.time() - 1))) == 0
        with ChatClient(server.base_url, "m", limits=Limits(until=time.time() - 1)) as client:
            picture = Picture("a", lambda: pytest.fail("loaded"))
            with pytest.raises(VlmFailure, match="--vlm-budget-s is over"):
                client.chat(Ask("Why?", [picture]))
        soon = ChatClient(server.base_url, "m", limits=Limits(until=time.time() + 0.15))
        server.latency_s = 0.05
        assert 1 <= calls_until_over(soon) <= 4


def test_an_empty_answer_costs_too() -> None:
    with HostileVlm(share=0.0) as server:
        server._calm = lambda body, key: says(" ", 50, 1)  # type: ignore[method-assign]
        with ChatClient(server.base_url, "m", limits=Limits(tokens=100)) as client:
            codes = []
            for _ in range(3):
                with pytest.raises(VlmFailure) as caught:
                    client.chat(Ask("Why?"))
                codes.append(caught.value.code)
        assert codes == ["vlm_empty", "vlm_empty", "vlm_over_budget"]


def test_the_rate_spaces_requests_and_waiting_for_a_turn_is_no_timeout() -> None:
    with HostileVlm(share=0.0) as server:
        client = ChatClient(server.base_url, "m", limits=Limits(rate=10), budget_s=1.0)
        with client, ThreadPoolExecutor(24) as threads:
            began = time.monotonic()
            assert all(threads.map(lambda number: client.chat(Ask(str(number))).text, range(24)))
        took = time.monotonic() - began
        # The first 10 are one second's, the others come one by one.
        assert 1.35 <= took < 10
        times = sorted(server.began)
        assert times[23] - times[9] > 1.0


def test_turns_of_a_slow_rate_come_one_by_one() -> None:
    clock = Clock()
    meter = Meter(Limits(rate=0.5), clock)
    waits = [meter.turn_in_s() for _ in range(4)]
    assert waits == [0.0, 2.0, 4.0, 6.0]
    clock.sleep(100)
    assert [meter.turn_in_s() for _ in range(2)] == [0.0, 2.0]
    assert all(later > earlier for earlier, later in pairwise(waits))


def test_no_more_requests_at_a_time_than_allowed_over_all_clients_of_a_run() -> None:
    with HostileVlm(share=0.0, latency_s=0.05) as server:
        first = ChatClient(server.base_url, "m", limits=Limits(concurrency=3, tokens=10_000), run="a run")
        second = pickle.loads(pickle.dumps(first))
        with first, second, ThreadPoolExecutor(12) as threads:
            began = time.monotonic()
            clients = [first, second] * 6
            list(threads.map(lambda pair: pair[1].chat(Ask(str(pair[0]))), enumerate(clients)))
            assert time.monotonic() - began >= 4 * 0.05
            assert first.spent() == second.spent() and first.spent().requests == 12
        # What was spent outlives the connections.
        with pickle.loads(pickle.dumps(first)) as third:
            assert third.spent().requests == 12
        with ChatClient(server.base_url, "m", limits=first.limits, run="another") as other:
            assert other.spent().requests == 0


def test_shares_add_up_to_no_more_than_the_whole() -> None:
    whole = Limits(concurrency=10, rate=9.0, tokens=100, cost=1.0, until=5.0, patience_s=7.0)
    share = whole.share(3)
    assert share == Limits(3, 3.0, 33, pytest.approx(1 / 3), None, 5.0, 7.0)
    assert UNLIMITED.share(3) == UNLIMITED
    assert Limits(concurrency=2, tokens=2).share(5) == Limits(concurrency=1, tokens=1)


def test_money_needs_prices() -> None:
    with pytest.raises(BadRequest, match="--max-cost 3: give --vlm-price-in and --vlm-price-out"):
        find_backend(BackendOptions(["http://127.0.0.1:9"], limits=Limits(cost=3.0, prices=Prices(0, 0))))
