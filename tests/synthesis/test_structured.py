import json

import pytest

from synthesis.backend import Ask, VlmFailure, schema_of
from synthesis.client import ChatClient
from synthesis.structured import DoesNotFit, fitting_json, stated
from tests.hostile_vlm import HostileVlm, says

SCHEMA = schema_of(
    {
        "score": {"type": "integer", "minimum": 1, "maximum": 10},
        "kind": {"enum": ["word", "phrase"]},
        "parts": {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 2},
    }
)
GOOD = {"score": 8, "kind": "word", "parts": ["a"]}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(GOOD),
        f" \n{json.dumps(GOOD, indent=2)}\n",
        f"Here it is:\n```json\n{json.dumps(GOOD)}\n```\nThat is all.",
        f"Sure! {json.dumps(GOOD)} I hope it helps.",
    ],
)
def test_json_is_found_in_an_answer(text: str) -> None:
    assert json.loads(fitting_json(text, SCHEMA)) == GOOD


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("eight", "it is not JSON, or cut off"),
        (json.dumps(GOOD)[:-5], "it is not JSON, or cut off"),
        ("[" * 100_000, "it is not JSON"),
        ('{"score": NaN}', "it is not JSON"),
        ("[1]", "the answer is not of type object"),
        (json.dumps(GOOD | {"score": 11}), "'score' is more than 10"),
        (json.dumps(GOOD | {"score": 0}), "'score' is less than 1"),
        (json.dumps(GOOD | {"score": "8"}), "'score' is not of type integer"),
        (json.dumps(GOOD | {"score": 8.5}), "'score' is not of type integer"),
        (json.dumps(GOOD | {"score": True}), "'score' is not of type integer"),
        (json.dumps(GOOD | {"kind": "essay"}), 'is none of ["word", "phrase"]'),
        (json.dumps(GOOD | {"parts": ["a", "b", "c"]}), "'parts' has more items than 2"),
        (json.dumps(GOOD | {"parts": ["a", ""]}), "item 1 of 'parts' has fewer characters than 1"),
        (json.dumps(GOOD | {"more": 1}), "has 'more', which is not asked for"),
        (json.dumps({"score": 8, "kind": "word"}), "the answer has no 'parts'"),
    ],
)
def test_what_does_not_fit_is_told(text: str, error: str) -> None:
    with pytest.raises(DoesNotFit) as caught:
        fitting_json(text, SCHEMA)
    assert error in str(caught.value)


def test_a_schema_that_is_not_understood_is_a_bug_and_no_answer() -> None:
    with pytest.raises(TypeError, match="'pattern' is not checked"):
        fitting_json('{"a": "b"}', schema_of({"a": {"type": "string", "pattern": "b"}}))


def test_the_server_is_asked_for_a_schema_and_its_answer_checked() -> None:
    with HostileVlm(share=0.0) as server, ChatClient(server.base_url, "m") as client:
        reply = client.chat(Ask("Judge it.", schema=SCHEMA))
        assert json.loads(reply.text).keys() == GOOD.keys()
        [body] = server.bodies
        assert body["response_format"]["json_schema"]["schema"] == json.loads(SCHEMA)
        assert body["messages"] == [{"role": "user", "content": "Judge it."}]


def test_a_server_without_schemas_is_told_in_words() -> None:
    with HostileVlm(share=0.0) as server, ChatClient(server.base_url, "m", obeys_schema=False) as client:
        ask = Ask("Judge it.", schema=SCHEMA)
        assert json.loads(client.chat(ask).text).keys() == GOOD.keys()
        [body] = server.bodies
        assert "response_format" not in body and body["messages"][0]["content"] == stated(ask)


def test_a_wrong_answer_is_asked_for_once_more_with_the_error() -> None:
    answers = ['{"score": 11}', json.dumps(GOOD)]
    with HostileVlm(share=0.0) as server, ChatClient(server.base_url, "m") as client:
        server._calm = lambda body, key: says(answers[len(server.bodies) - 1], 10, 2)  # type: ignore[method-assign]
        reply = client.chat(Ask("Judge it.", schema=SCHEMA))
        assert json.loads(reply.text) == GOOD
        # Both were paid for.
        assert (reply.prompt_tokens, reply.completion_tokens) == (20, 4)
        first, wrong, error = server.bodies[1]["messages"]
        assert first == server.bodies[0]["messages"][0] and wrong["content"] == answers[0]
        assert "That does not fit: 'score' is more than 10." in error["content"]


def test_two_wrong_answers_are_a_failure() -> None:
    with (
        HostileVlm(share=1.0, faults=("wrong_schema",)) as server,
        ChatClient(server.base_url, "m") as client,
    ):
        with pytest.raises(VlmFailure, match="has 'nobody', which is not asked for|has no") as caught:
            client.chat(Ask("Judge it.", schema=SCHEMA))
        assert caught.value.code == "vlm_bad_json" and not caught.value.transient
        assert len(server.bodies) == 2
