"""How unlikely a model finds the answers of a conversation: the mean loss of their tokens, and of no others.

A conversation is laid out by the model's own chat template and tokenised piece by piece, as at inference, where a prompt is
tokenised without what follows it. So which token is whose is known from how it came to be: the tokens of an assistant's turn, up to
and with the one that ends it, are the answer; the prompt, the pictures and the template's own tokens are not.
"""

import io
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from PIL import Image

from shards.errors import BadData, RunFailed
from shards.records import Turn
from synthesis.backend import Picture, VlmFailure
from synthesis.local_model import Inputs, LocalModel, LocalSpec, Message, load_local

IMAGE_TOKEN = "<image>"
_HARMLESS = (Message("user", ["Say yes."]), Message("assistant", ["Yes."]))
_ROLES: Mapping[str, str] = {"human": "user", "gpt": "assistant", "system": "system"}


class _Piece(NamedTuple):
    """A piece of a conversation as its template writes it, and the pictures that it names."""

    text: str
    pictures: Sequence[Image.Image]
    is_answer: bool


class LossModel:
    """A model that gives losses. Its forwards are of one sample each, on a CPU in one thread each: kernels sum in another order for
    another batch or number of threads, and a loss must not depend on the company that a sample keeps.

    `threads` is how many threads keep the device busy; each calls `begin_thread` first.
    """

    def __init__(self, spec: LocalSpec) -> None:
        self._model = load_local(spec, "--loss-model")
        self._on_cpu = self._model.device.type == "cpu"
        self.threads = len(os.sched_getaffinity(0)) if self._on_cpu else 4
        # On a GPU threads overlap only in what comes before.
        self._turn = threading.Semaphore(self.threads if self._on_cpu else 1)
        self._check_alive()

    def _check_alive(self) -> None:
        """Raises RunFailed unless the model gives a loss of a plain conversation."""
        try:
            losses = token_losses(self._model, _HARMLESS)
        except (BadData, RuntimeError, ValueError, IndexError) as error:
            raise RunFailed(f"{self._model.spec.name} gives no loss of anything: {error}") from error
        if not losses.isfinite().all():
            raise RunFailed(f"{self._model.spec.name} gives no loss of anything: its logits are no numbers")

    def begin_thread(self) -> None:
        """What a thread that asks for losses does once."""
        if self._on_cpu:
            torch.set_num_threads(1)

    def loss_milli(self, conversation: Sequence[Turn], pictures: Sequence[Picture]) -> int:
        """Mean loss over all tokens of all answers, in thousandths of a nat per token.

        The n-th `<image>` of the conversation is the n-th picture; a model that sees none gets the words alone. Raises BadData with a
        code of docs/codes.md, and what `load` of a picture raises; RunFailed where the model gives no loss of anything any more.
        """
        messages = _messages(conversation, pictures if self._model.sees_images else None)
        with self._turn:
            try:
                losses = token_losses(self._model, messages)
            except (RuntimeError, ValueError, IndexError) as error:  # no room is a RuntimeError
                failure = f"{type(error).__name__}: {error}"[:300]
            else:
                failure = ""
            if failure:
                self._check_alive()
                raise BadData("loss_failed", f"the model fails at it: {failure}")
        if not losses.isfinite().all():
            raise BadData("loss_not_finite", "some token's loss is no number")
        return round(1000 * float(losses.double().mean()))


def _messages(conversation: Sequence[Turn], pictures: Sequence[Picture] | None) -> list[Message]:
    texts = [turn.value.split(IMAGE_TOKEN) for turn in conversation]
    named = sum(len(parts) - 1 for parts in texts)
    if pictures is not None and named != len(pictures):
        raise BadData("loss_bad_images", f"the conversation names {named} images and has {len(pictures)}")
    images = iter([_decoded(picture) for picture in pictures or ()])
    messages = []
    for turn, (first, *others) in zip(conversation, texts, strict=True):
        if turn.speaker not in _ROLES or (others and turn.speaker == "gpt"):
            raise BadData("loss_bad_turns", f"a turn of '{turn.speaker}' cannot be laid out")
        parts: list[str | Image.Image] = [first.strip()]
        for text in others:
            parts += [next(images), text.strip()] if pictures is not None else [text.strip()]
        messages.append(Message(_ROLES[turn.speaker], [part for part in parts if part != ""]))
    return messages


def _decoded(picture: Picture) -> Image.Image:
    with Image.open(io.BytesIO(picture.load())) as image:
        return image.convert("RGB")


def token_losses(model: LocalModel, messages: Sequence[Message]) -> torch.Tensor:
    """float32 (N,): the loss of each token of the assistant's turns, in order, in nats. Raises BadData."""
    tokenised: list[Inputs] = []
    is_answer: list[bool] = []
    for piece in _pieces(model, messages):
        try:
            inputs = model.inputs(piece.text, piece.pictures, first=not tokenised)
        except VlmFailure as failure:
            raise BadData("loss_bad_turns", failure.message) from None
        tokenised.append(inputs)
        is_answer += _answer_mask(inputs.tensors["input_ids"][0].tolist(), model.end_ids, piece.is_answer)
    if len(is_answer) > model.max_tokens:
        raise BadData(
            "loss_too_long", f"{len(is_answer)} tokens are more than the model's {model.max_tokens}"
        )
    tensors = _joined(tokenised)
    places = torch.tensor(is_answer).nonzero()[:, 0]
    if not len(places):
        raise BadData("loss_bad_turns", "the template leaves nothing of the answers")
    targets = tensors["input_ids"][0, places]
    return _forward(model, tensors, places - 1, targets)


def _pieces(model: LocalModel, messages: Sequence[Message]) -> Iterator[_Piece]:
    """The conversation in pieces, prompt and answer in turn, up to the last answer."""
    done, shown = "", 0
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        try:
            before = model.render(messages[:number], ask_on=True)
            after = model.render(messages[: number + 1], ask_on=False)
        except VlmFailure as failure:
            raise BadData("loss_bad_turns", failure.message) from None
        if not (before.startswith(done) and after.startswith(before)):
            raise BadData(
                "loss_bad_turns", "the template writes a turn otherwise once another one follows it"
            )
        pictures = [
            part for told in messages[shown:number] for part in told.parts if not isinstance(part, str)
        ]
        yield _Piece(before[len(done) :], pictures, False)
        yield _Piece(after[len(before) :], (), True)
        done, shown = after, number


def _answer_mask(ids: Sequence[int], end_ids: Sequence[int], is_answer: bool) -> list[bool]:
    """Of a piece's tokens those that are answer: none of a prompt; of an answer all up to the token that ends the turn."""
    end = next((place for place, token in enumerate(ids) if token in end_ids), len(ids) - 1)
    return [is_answer and place <= end for place in range(len(ids))]


def _joined(pieces: Sequence[Inputs]) -> dict[str, torch.Tensor]:
    """The pieces as one sequence: what goes along the tokens one after the other, pictures in order."""
    joined = {}
    for name in {name: None for piece in pieces for name in piece.tensors}:
        tensors = [piece.tensors.get(name) for piece in pieces]
        along = pieces[0].tensors["input_ids"].shape
        if tensors[0] is not None and tensors[0].shape == along:
            filled = [
                torch.zeros_like(piece.tensors["input_ids"]) if tensor is None else tensor
                for piece, tensor in zip(pieces, tensors, strict=True)
            ]
            joined[name] = torch.cat(filled, dim=1)
        else:
            joined[name] = torch.cat([tensor for tensor in tensors if tensor is not None])
    return joined


@torch.inference_mode()
def _forward(
    model: LocalModel, tensors: Mapping[str, torch.Tensor], places: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """The losses of `targets`, which the logits at `places` tell."""
    given, places, targets = model.to_device(tensors), places.to(model.device), targets.to(model.device)
    if model.keeps_some_logits:  # the head is most of a small model's work
        logits = model.model(**given, use_cache=False, logits_to_keep=places).logits[0]
    else:
        logits = model.model(**given, use_cache=False).logits[0, places]
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").cpu()
