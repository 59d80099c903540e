"""A model of transformers in this process as a chat backend: no server, no network; calls of several threads go in batches.

Decoding is plain: the likeliest token at temperature 0, else a draw by the request's own seed; a model's generation defaults (penalties,
top-p) are not used. What an answer is does not depend on the requests that it shares a batch with but for rounding: kernels sum in
another order for another batch size or padding, so where two tokens are within it of each other another one may be taken. Batches of
one (`--vlm-local-batch 1`) are free of that.
"""

import functools
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from PIL import Image
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from shards.errors import BadRequest, RunFailed
from synthesis.backend import Ask, Picture, Reply, VlmFailure
from synthesis.batching import Batcher
from synthesis.local_model import (
    Dtype,
    Inputs,
    LocalModel,
    LocalSpec,
    Message,
    collate,
    find_local,
    load_local,
    takes_images,
)
from synthesis.structured import DoesNotFit, fitting_reply, stated


class _Request(NamedTuple):
    inputs: Inputs
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class LocalVlm:
    """A ChatBackend over the model of a spec, which every process loads once. Threads may share it; it pickles as its spec.

    `batch_size` is the most requests of one batch.
    """

    spec: LocalSpec
    sees_images: bool
    batch_size: int = 8

    @property
    def model(self) -> str:
        return self.spec.name

    def chat(self, ask: Ask, affinity: bytes = b"") -> Reply:
        """Answer one request. Raises VlmFailure for what is wrong with it, RunFailed where the model answers nothing any more.

        A schema is stated in the prompt; an answer that does not fit it is asked for once more, with what is wrong.
        """
        engine = _engine(self.spec, self.batch_size)
        pictures = [_decoded(picture) for picture in ask.pictures]
        messages = [Message("user", [*pictures, stated(ask) if ask.schema else ask.prompt])]
        reply = engine.answer(messages, ask)
        if not ask.schema:
            return reply

        def again(told: str) -> Reply:
            return engine.answer(
                [*messages, Message("assistant", [reply.text]), Message("user", [told])], ask
            )

        try:
            return fitting_reply(reply, ask.schema, again)
        except DoesNotFit as error:
            raise VlmFailure("vlm_bad_response", f"the answer does not fit the schema: {error}") from None

    def open(self) -> Self:
        """Nothing: the first call loads the model."""
        return self

    def end(self) -> None:
        """Nothing, as `close`."""

    def close(self) -> None:
        """Nothing: the model stays for whoever else asks it in this process."""


def open_local(path: str, device: str, dtype: Dtype = "auto", batch_size: int = 8) -> LocalVlm:
    """Find and load a model, and have it answer once. Raises BadRequest where it cannot be had or does not answer."""
    spec = find_local(path, device, dtype, "--vlm-local")
    try:
        engine = _engine(spec, batch_size)
    except RunFailed as error:
        raise BadRequest(f"--vlm-local {path}: {error}") from error
    return LocalVlm(spec, engine.model.sees_images, batch_size)


def describe_local(path: str, device: str, dtype: Dtype = "auto", batch_size: int = 8) -> LocalVlm:
    """What `open_local` gives, without loading the model, which runs on another machine. Raises BadRequest."""
    spec = find_local(path, device, dtype, "--vlm-local")
    return LocalVlm(spec, takes_images(spec, "--vlm-local"), batch_size)


def _decoded(picture: Picture) -> Image.Image:
    try:
        with Image.open(io.BytesIO(picture.load())) as image:
            return image.convert("RGB")
    except OSError as error:
        raise VlmFailure("vlm_refused", f"the picture cannot be decoded: {error}") from None


_STARTING = threading.RLock()


def _engine(spec: LocalSpec, batch_size: int) -> "Engine":
    with _STARTING:
        return _started(spec, batch_size)


@functools.lru_cache(maxsize=1)
def _started(spec: LocalSpec, batch_size: int) -> "Engine":
    return Engine(load_local(spec), batch_size)


class Engine:
    """Answers requests of any number of threads, in batches of at most `batch_size`. Raises RunFailed if the model answers nothing."""

    def __init__(self, model: LocalModel, batch_size: int) -> None:
        self.model = model
        self._fits = batch_size
        self._batcher: Batcher[_Request, Reply] = Batcher(
            self.answers, batch_size, lambda request: request.inputs.has_pictures
        )
        plain = [Image.new("RGB", (64, 64), (200, 30, 30))] if model.sees_images else []
        # Answered at the start, it tells later whether a request or the model is at fault.
        self._harmless = self.request(
            [Message("user", [*plain, "What colour is this?"])], Ask("", max_tokens=2)
        )
        self._check_alive()

    def answer(self, messages: Sequence[Message], ask: Ask) -> Reply:
        """The answer to a conversation whose last turn is the user's. Raises VlmFailure and RunFailed."""
        with self._batcher.coming():
            request = self.request(messages, ask)
        return self._batcher.submit(request)

    def request(self, messages: Sequence[Message], ask: Ask) -> _Request:
        """What goes into a batch. Raises VlmFailure where the model cannot take it."""
        pictures = [part for message in messages for part in message.parts if isinstance(part, Image.Image)]
        if pictures and not self.model.sees_images:
            raise VlmFailure("vlm_refused", "the model takes no images")
        inputs = self.model.inputs(self.model.render(messages, ask_on=True), pictures)
        if inputs.length + ask.max_tokens > self.model.max_tokens:
            raise VlmFailure(
                "vlm_refused",
                f"{inputs.length} tokens and {ask.max_tokens} of an answer are more than the model's {self.model.max_tokens}",
            )
        return _Request(inputs, ask.max_tokens, ask.temperature, ask.seed)

    def answers(self, batch: Sequence[_Request]) -> list[Reply | Exception]:
        """A reply or a VlmFailure for each, whatever the others are like. A batch that fails is halved until each that fails is alone.

        Raises RunFailed if the model fails at a request that it answered before.
        """
        if len(batch) > self._fits:
            return [answer for part in _halves(batch) for answer in self.answers(part)]
        try:
            return self._generated(batch)
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            # Its frames hold the tensors that had no room.
            failure = error.with_traceback(None)
        out_of_memory = _is_out_of_memory(failure)
        if self.model.device.type == "cuda" and out_of_memory:
            torch.cuda.empty_cache()
        if len(batch) > 1:
            if out_of_memory:
                self._fits = max(1, len(batch) // 2)
            return [answer for part in _halves(batch) for answer in self.answers(part)]
        if out_of_memory:
            return [
                VlmFailure("vlm_out_of_memory", f"{batch[0].inputs.length} tokens, alone: {failure}"[:300])
            ]
        self._check_alive()
        return [
            VlmFailure("vlm_refused", f"the model fails at it: {type(failure).__name__}: {failure}"[:300])
        ]

    def _check_alive(self) -> None:
        try:
            (answer,) = self._generated([self._harmless])
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            raise RunFailed(f"{self.model.spec.name} fails at every request: {error}") from error
        if isinstance(answer, VlmFailure) and answer.code != "vlm_empty":
            raise RunFailed(f"{self.model.spec.name} fails at every request: {answer.message}")

    @torch.inference_mode()
    def _generated(self, batch: Sequence[_Request]) -> list[Reply | Exception]:
        model = self.model
        tensors = model.to_device(collate([request.inputs for request in batch], model.pad_id))
        start = tensors["input_ids"].shape[1]
        chooser = _Chooser(batch, model.device)
        config = GenerationConfig(
            max_new_tokens=max(request.max_tokens for request in batch),
            do_sample=False,
            eos_token_id=model.end_ids,
            pad_token_id=model.pad_id,
        )
        ids = model.model.generate(
            **tensors,
            generation_config=config,
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([_OwnLimit(batch, start, model.device)]),
        )[:, start:].tolist()
        broken = chooser.broken.tolist()
        return [self._reply(*row) for row in zip(batch, ids, broken, strict=True)]

    def _reply(self, request: _Request, ids: Sequence[int], broken: bool) -> Reply | Exception:
        if broken:
            return VlmFailure("vlm_bad_response", f"logits that are no numbers, in {self.model.spec.dtype}")
        ids = ids[: request.max_tokens]
        ends = [place for place, token in enumerate(ids) if token in self.model.end_ids]
        said = ids[: ends[0]] if ends else ids
        text = self.model.tokenizer.decode(said, skip_special_tokens=True).strip()
        if not text:
            return VlmFailure("vlm_empty", "the answer is empty")
        # A token may hold a part of a character.
        text = text.encode(errors="replace").decode()
        return Reply(text, request.inputs.length, len(said) + bool(ends))


class _Chooser(LogitsProcessor):
    """Adds to the logits of each request what makes the highest a draw by its own temperature and seed (Gumbel's trick).

    So a request draws the same whatever is beside it. `broken` marks requests some of whose logits are not numbers.
    """

    def __init__(self, batch: Sequence[_Request], device: torch.device) -> None:
        self._drawn = [
            (row, request.temperature, torch.Generator(device).manual_seed(request.seed))
            for row, request in enumerate(batch)
            if request.temperature > 0
        ]
        self.broken = torch.zeros(len(batch), dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        scores = scores.float()
        self.broken |= scores.isnan().any(dim=1)
        for row, temperature, generator in self._drawn:
            noise = torch.empty_like(scores[row]).exponential_(generator=generator)
            scores[row] = scores[row] / temperature - noise.log()
        return scores


class _OwnLimit(StoppingCriteria):
    """Ends each request at its own number of tokens."""

    def __init__(self, batch: Sequence[_Request], start: int, device: torch.device) -> None:
        self._last = torch.tensor([start + request.max_tokens for request in batch], device=device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # type: ignore[override]
        return input_ids.shape[1] >= self._last


def _halves(batch: Sequence[_Request]) -> tuple[Sequence[_Request], Sequence[_Request]]:
    middle = (len(batch) + 1) // 2
    return batch[:middle], batch[middle:]


def _is_out_of_memory(error: BaseException) -> bool:
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
