"""Losses of real models: of the answers' tokens alone, lower for the true answer, never 0 for a failure."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from shards.errors import BadData, RunFailed
from shards.records import Turn
from synthesis.backend import Picture
from synthesis.local import LocalVlm
from synthesis.local_model import load_local
from synthesis.losses import LossModel, _messages, token_losses
from tests.synthesis.test_local import jpeg
from tests.tiny_vlm import QUESTION


def turns(*values: str) -> list[Turn]:
    return [Turn("gpt" if number % 2 else "human", value) for number, value in enumerate(values)]


def colour_said(said: str) -> list[Turn]:
    return turns(f"<image>\n{QUESTION}", said)


@pytest.fixture(scope="module")
def losses(tiny_vlm: LocalVlm) -> LossModel:
    return LossModel(tiny_vlm.spec)


def test_the_true_answer_about_a_picture_has_the_lower_loss(losses: LossModel) -> None:
    found = {
        (shown, said): losses.loss_milli(colour_said(said), [jpeg(shown)])
        for shown in ("red", "blue")
        for said in ("red", "blue")
    }
    assert all(isinstance(loss, int) and loss > 0 for loss in found.values())
    assert found["red", "red"] + 1000 < found["red", "blue"]
    assert found["blue", "blue"] + 1000 < found["blue", "red"]
    assert found["red", "red"] == losses.loss_milli(colour_said("red"), [jpeg("red")])


def test_the_true_answer_in_words_has_the_lower_loss(smollm2: LocalVlm) -> None:
    losses = LossModel(smollm2.spec)
    told = {
        said: losses.loss_milli(
            turns("What is the capital of France?", f"The capital of France is {said}."), []
        )
        for said in ("Paris", "Madrid", "green")
    }
    assert told["Paris"] + 100 < told["Madrid"] < told["green"]


def test_it_is_the_loss_of_the_answers_tokens_and_no_others(tiny_vlm: LocalVlm) -> None:
    model = load_local(tiny_vlm.spec)
    conversation = turns(f"<image>\n{QUESTION}", "red and more", "Why?", "Because it is.")
    messages = _messages(conversation, [jpeg("red")])
    found = token_losses(model, messages)
    answers = [model.tokenizer.encode(text + "<|im_end|>") for text in ("red and more", "Because it is.")]
    assert len(found) == sum(map(len, answers))

    # The whole conversation at once, with labels where the answers' ids lie: transformers' own loss.
    (image,) = (part for part in messages[0].parts if not isinstance(part, str))
    inputs = model.inputs(model.render(messages, ask_on=False), [image])
    ids = inputs.tensors["input_ids"][0].tolist()
    labels = torch.full((1, len(ids)), -100)
    for answer in answers:
        (place,) = (at for at in range(len(ids)) if ids[at : at + len(answer)] == answer)
        labels[0, place : place + len(answer)] = torch.tensor(answer)
    with torch.inference_mode():
        whole = model.model(**inputs.tensors, labels=labels).loss
    torch.testing.assert_close(found.mean(), whole, rtol=1e-4, atol=0)
    assert LossModel(tiny_vlm.spec).loss_milli(conversation, [jpeg("red")]) == round(
        1000 * found.double().mean().item()
    )


def test_a_prompt_moves_a_loss_only_by_what_it_says(tiny_vlm: LocalVlm) -> None:
    model = load_local(tiny_vlm.spec)
    short, long = (
        token_losses(model, _messages(turns(prompt, "red"), [])) for prompt in ("Colour?", "Colour? " * 40)
    )
    assert len(short) == len(long) == 2, "the word and the end of the turn"


def test_pictures_in_later_turns_go_where_they_are_named(tiny_vlm: LocalVlm, losses: LossModel) -> None:
    two = turns(f"<image>\n{QUESTION}", "red", f"And this? <image> {QUESTION}", "blue")
    red, blue = jpeg("red"), jpeg("blue")
    right, swapped = losses.loss_milli(two, [red, blue]), losses.loss_milli(two, [blue, red])
    assert right != swapped
    messages = _messages(two, [red, blue])
    kinds = [[type(part).__name__ for part in message.parts] for message in messages]
    assert kinds == [["Image", "str"], ["str"], ["str", "Image", "str"], ["str"]]


@pytest.mark.parametrize(
    ("conversation", "pictures", "code"),
    [
        (colour_said("red"), 0, "loss_bad_images"),
        (turns(QUESTION, "red"), 1, "loss_bad_images"),
        (turns("<image> <image> Which?", "red"), 1, "loss_bad_images"),
        (turns("Which?", "this <image>"), 1, "loss_bad_turns"),
        ([Turn("robot", "Which?"), Turn("gpt", "red")], 0, "loss_bad_turns"),
        ([Turn("gpt", "red")], 0, "loss_bad_turns"),
        (turns("word " * 9000, "red"), 0, "loss_too_long"),
    ],
)
def test_a_failure_is_a_code_and_never_a_loss(
    losses: LossModel, conversation: Sequence[Turn], pictures: int, code: str
) -> None:
    with pytest.raises(BadData) as raised:
        losses.loss_milli(conversation, [jpeg("red")] * pictures)
    assert raised.value.code == code


def test_a_loss_that_is_no_number_is_no_loss(losses: LossModel, tiny_vlm: LocalVlm) -> None:
    head: Any = load_local(tiny_vlm.spec).model.lm_head
    handle = head.register_forward_hook(lambda module, given, out: out * float("nan"))
    try:
        with pytest.raises(BadData) as raised:
            losses.loss_milli(colour_said("red"), [jpeg("red")])
    finally:
        handle.remove()
    assert raised.value.code == "loss_not_finite"


def test_a_sample_that_breaks_the_model_is_found_and_a_broken_model_raises(
    losses: LossModel, tiny_vlm: LocalVlm
) -> None:
    model: Any = load_local(tiny_vlm.spec).model
    broken_from = 60

    def breaks(module: Any, given: Any, named: dict[str, Any]) -> None:
        if named["input_ids"].shape[1] >= broken_from:
            raise RuntimeError("shapes")

    handle = model.register_forward_pre_hook(breaks, with_kwargs=True)
    try:
        with pytest.raises(BadData, match="RuntimeError: shapes") as raised:
            losses.loss_milli(colour_said("red"), [jpeg("red")])
        assert raised.value.code == "loss_failed"
        broken_from = 1
        with pytest.raises(RunFailed, match="no loss of anything: shapes"):
            losses.loss_milli(colour_said("red"), [jpeg("red")])
    finally:
        handle.remove()


def test_a_picture_that_is_gone_keeps_its_code(losses: LossModel) -> None:
    def gone() -> bytes:
        raise BadData("source_changed", "gone")

    with pytest.raises(BadData) as raised:
        losses.loss_milli(colour_said("red"), [Picture("gone", gone)])
    assert raised.value.code == "source_changed"


def test_threads_change_no_loss(losses: LossModel) -> None:
    asked = [(colour_said(said), [jpeg(shown)]) for shown in ("red", "blue") for said in ("red", "blue")] * 2
    alone = [losses.loss_milli(*one) for one in asked]
    with ThreadPoolExecutor(losses.threads, initializer=losses.begin_thread) as threads:
        assert list(threads.map(lambda one: losses.loss_milli(*one), asked)) == alone


def test_a_model_without_eyes_gets_the_words(smollm2: LocalVlm) -> None:
    losses = LossModel(smollm2.spec)
    assert losses.loss_milli(turns("<image>\nSay hello.", "Hello."), [jpeg("red")]) == losses.loss_milli(
        turns("Say hello.", "Hello."), []
    )
