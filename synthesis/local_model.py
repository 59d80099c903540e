"""A vision-language or language model of transformers in this process: from a folder or a hub name, and how messages become its input."""

import contextlib
import functools
import hashlib
import inspect
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import torch
from PIL import Image
from torch.nn.functional import pad
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash

from shards.errors import BadRequest
from shards.ids import digest
from synthesis.backend import VlmFailure

Dtype = Literal["auto", "bfloat16", "float32"]
_FINGERPRINTED = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
_LOADING = threading.RLock()
_MARK = "a mark that no template holds"


class LocalSpec(NamedTuple):
    """Which model, and how it runs: a folder or hub name, the hub's commit, torch device, `bfloat16` or `float32`.

    `fingerprint` is that of a folder's files, empty for a hub name, whose `revision` says as much. Workers must find the same there.
    """

    path: str
    revision: str
    fingerprint: str
    device: str
    dtype: str

    @property
    def name(self) -> str:
        """What the model is called in records and keys of calls: no folder of this machine, and everything that its answers depend on."""
        if self.fingerprint:
            return f"local@{self.fingerprint[:16]} {self.dtype}"
        return f"{self.path}@{self.revision[:16]} {self.dtype}"


class Message(NamedTuple):
    """One turn: `role` is `system`, `user` or `assistant`; `parts` texts and pictures in order."""

    role: str
    parts: Sequence[str | Image.Image]


class Inputs(NamedTuple):
    """What the model's processor makes of one text and its pictures, tensors of a batch of one."""

    tensors: Mapping[str, torch.Tensor]

    @property
    def length(self) -> int:
        return int(self.tensors["input_ids"].shape[1])

    @property
    def has_pictures(self) -> bool:
        return "pixel_values" in self.tensors


def find_local(path: str, device: str, dtype: Dtype, asked_by: str) -> LocalSpec:
    """The spec of a folder or a hub name. Reads every file of a folder once, for its fingerprint. Raises BadRequest, which names `asked_by`.

    `auto` is bfloat16 on CUDA and float32 elsewhere.
    """
    chosen = dtype if dtype != "auto" else "bfloat16" if torch.device(device).type == "cuda" else "float32"
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BadRequest(f"{asked_by} {path}: the folder holds no config.json, so no transformers model")
        return LocalSpec(str(folder.resolve()), "", _fingerprint(folder), device, chosen)
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise BadRequest(
            f"{asked_by} {path}: is no folder; give one with a transformers model, or a hub name"
        )
    with _as_bad_request(asked_by, path):
        revision = extract_commit_hash(cached_file(path, "config.json"), None)
    if not revision:
        raise BadRequest(
            f"{asked_by} {path}: the hub does not tell its commit; download it, and give the folder"
        )
    return LocalSpec(path, revision, "", device, chosen)


def _fingerprint(folder: Path) -> str:
    """sha256 over names and contents of what transformers loads; a model card or a log beside it does not count."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in _FINGERPRINTED:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digest(found).hex()


@contextlib.contextmanager
def _as_bad_request(asked_by: str, path: str) -> Any:
    # OSErrors are the hub's and a folder's; the others are what a configuration or weights of something else lead to.
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadRequest(f"{asked_by} {path}: cannot be loaded ({reason})") from error


def load_local(spec: LocalSpec, asked_by: str = "--vlm-local") -> "LocalModel":
    """The model of a spec, loaded once per process, whatever the number of threads that ask. Raises BadRequest."""
    with _LOADING, _as_bad_request(asked_by, spec.path):
        return _load(spec)


def takes_images(spec: LocalSpec, asked_by: str) -> bool:
    """Whether the model of a spec is a vision-language model, from its configuration alone. Raises BadRequest."""
    with _as_bad_request(asked_by, spec.path):
        config = AutoConfig.from_pretrained(spec.path, **_where(spec))
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _where(spec: LocalSpec) -> dict[str, Any]:
    return {"revision": spec.revision} if spec.revision else {}


# Two: one that answers, and one whose losses filter.
@functools.lru_cache(maxsize=2)
def _load(spec: LocalSpec) -> "LocalModel":
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return LocalModel(spec)


class LocalModel:
    """The loaded model with its processor. `sees_images`: whether it is a vision-language model, and no language model alone.

    Texts are tokenised as its own chat template lays them out. Of its generation defaults only the ids that end an answer are used.
    """

    def __init__(self, spec: LocalSpec) -> None:
        self.spec = spec
        self.device = torch.device(spec.device)
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        where = _where(spec)
        config = AutoConfig.from_pretrained(spec.path, **where)
        self.sees_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        auto = AutoModelForImageTextToText if self.sees_images else AutoModelForCausalLM
        self.model: Any = auto.from_pretrained(spec.path, dtype=self.dtype, **where).eval().to(self.device)
        self.processor: Any = (AutoProcessor if self.sees_images else AutoTokenizer).from_pretrained(
            spec.path, **where
        )
        self.tokenizer: Any = self.processor.tokenizer if self.sees_images else self.processor
        if not (self.processor.chat_template or self.tokenizer.chat_template):
            raise ValueError("it has no chat template; give an instruction-tuned model")
        self.image_token = str(getattr(self.processor, "image_token", "") or "")
        self.end_ids = self._end_ids()
        self.pad_id = next(
            found for found in (self.tokenizer.pad_token_id, *self.end_ids) if found is not None
        )
        self.max_tokens = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 1 << 20)
        self.keeps_some_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        control = {*self.tokenizer.all_special_tokens, self.image_token}
        self._control_tokens = sorted(filter(None, control), key=len, reverse=True)
        self._takes_parts = self._template_takes_parts()

    def _end_ids(self) -> list[int]:
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends, self.tokenizer.eos_token_id]
        found = sorted({int(end) for end in ends if end is not None})
        if not found:
            raise ValueError(
                "neither its generation config nor its tokenizer names the token that ends an answer"
            )
        return found

    def _template_takes_parts(self) -> bool:
        """Whether the chat template wants a message as a list of parts, as processors' do, or as one text, as tokenizers' do."""
        parts = [{"type": "image"}] if self.sees_images else []
        content = [*parts, {"type": "text", "text": _MARK}]
        try:
            text = self._apply([{"role": "user", "content": content}], True)
        except (jinja2.TemplateError, TypeError, ValueError):
            return False
        # A template that prints the list shows its braces.
        return _MARK in text and "{'type'" not in text and (not self.sees_images or self.image_token in text)

    def render(self, messages: Sequence[Message], ask_on: bool) -> str:
        """The conversation as the template writes it; `ask_on` opens the assistant's turn at its end.

        The tokens that open turns or stand for pictures are taken out of texts: what is data opens no turn. Raises VlmFailure
        `vlm_refused` where the template does not take these turns.
        """
        laid_out = [{"role": message.role, "content": self._content(message.parts)} for message in messages]
        try:
            return self._apply(laid_out, ask_on)
        except (jinja2.TemplateError, IndexError) as error:  # IndexError: of no turns at all
            raise VlmFailure("vlm_refused", f"the chat template does not take these turns: {error}") from None

    def _apply(self, messages: list[dict[str, Any]], ask_on: bool) -> str:
        owner = self.processor if self.processor.chat_template else self.tokenizer
        return str(owner.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask_on))

    def _content(self, parts: Sequence[str | Image.Image]) -> str | list[dict[str, str]]:
        if self._takes_parts:
            return [
                {"type": "text", "text": self.plain(part)} if isinstance(part, str) else {"type": "image"}
                for part in parts
            ]
        return "\n".join(self.plain(part) if isinstance(part, str) else self.image_token for part in parts)

    def plain(self, text: str) -> str:
        """A text without the tokenizer's control tokens and the token that stands for a picture."""
        while any(token in text for token in self._control_tokens):  # taking one out may put another together
            for token in self._control_tokens:
                text = text.replace(token, "")
        return text

    def inputs(self, text: str, pictures: Sequence[Image.Image], first: bool = True) -> Inputs:
        """Tokens of a rendered text and pixels of its pictures, on the CPU. `first`: it begins the conversation.

        Raises VlmFailure `vlm_refused` where the processor does not take them.
        """
        bos = self.tokenizer.bos_token
        begins = first and not (bos and text.startswith(bos))  # many templates write it themselves
        given: dict[str, Any] = {"images": [list(pictures)]} if pictures else {}
        try:
            made = self.processor(text=[text], return_tensors="pt", add_special_tokens=begins, **given)
        except (ValueError, IndexError, TypeError) as error:
            raise VlmFailure("vlm_refused", f"the processor does not take it: {error}") from None
        return Inputs(dict(made))

    def to_device(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors where the model is, those of floats in its dtype."""
        return {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in tensors.items()
        }


def collate(batch: Sequence[Inputs], pad_id: int) -> dict[str, torch.Tensor]:
    """One batch of several: what goes along the tokens is padded on the left; pictures are joined, filled up with zeros where they differ."""
    longest = max(one.length for one in batch)
    joined = {}
    for name in batch[0].tensors:
        tensors = [one.tensors[name] for one in batch]
        if all(
            tensor.shape == one.tensors["input_ids"].shape for tensor, one in zip(tensors, batch, strict=True)
        ):
            value = pad_id if name == "input_ids" else 0
            tensors = [pad(tensor, (longest - tensor.shape[1], 0), value=value) for tensor in tensors]
        else:
            sizes = [max(lengths) for lengths in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
            tensors = [_filled(tensor, sizes) for tensor in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def _filled(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    missing = [size - has for size, has in zip(sizes, tensor.shape[1:], strict=True)]
    return pad(tensor, [side for more in reversed(missing) for side in (0, more)]) if any(missing) else tensor
