import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from embeddings.backbone import load_backbone, torch_device
from images.geometry import model_input
from shards.errors import BadRequest
from shards.snapshot import open_snapshot
from training.data import Batch, batches, usable_samples
from training.language_models import cache_folder
from training.model import (
    autocast,
    build_model,
    learned_parameters,
    load_tower,
    next_token_loss,
    save_model,
)


@pytest.fixture(scope="module")
def batch(data, encoder, tiny):
    snapshot = open_snapshot(str(data))
    samples = usable_samples(snapshot.samples()).samples
    return next(batches(samples, snapshot.media, encoder, tiny.tower, 3))


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny, folder)
    return folder


def test_the_tower_is_the_pretrained_timm_model(tiny, batch):
    timm_model, _ = load_backbone("tf_efficientnet_lite0")
    with torch.inference_mode():
        expected = timm_model.forward_features(batch.pixel_values)
        features = tiny.model.model.vision_tower(batch.pixel_values).last_hidden_state
    assert expected.shape == (3, 1280, 7, 7)
    assert torch.equal(features, expected)


def test_only_the_projector_learns(tiny):
    names = {name for name, parameter in tiny.model.named_parameters() if parameter.requires_grad}
    assert names == {
        f"model.multi_modal_projector.linear_{layer}.{what}"
        for layer in (1, 2)
        for what in ("weight", "bias")
    }
    assert sum(parameter.numel() for parameter in learned_parameters(tiny.model)) == 1_070_208


def test_the_loss_is_the_models_own(tiny, batch):
    with torch.inference_mode():
        ours = next_token_loss(tiny.model, *batch)
        own = tiny.model(**batch._asdict()).loss
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=0)


def test_a_reloaded_model_gives_the_same_bits(tiny, batch, saved):
    again = AutoModelForImageTextToText.from_pretrained(saved).eval()
    inputs = {name: value for name, value in batch._asdict().items() if name != "labels"}
    with torch.inference_mode():
        assert torch.equal(again(**inputs).logits, tiny.model(**inputs).logits)
    assert {path.suffix for path in saved.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_what_is_saved_names_no_folder_of_this_machine(saved):
    for path in saved.glob("*.json"):
        assert str(cache_folder()) not in path.read_text(), path.name
    assert json.loads((saved / "config.json").read_text())["text_config"]["num_hidden_layers"] == 3


def test_transformers_processor_prepares_the_same_input(saved, encoder, tiny):
    processor = AutoProcessor.from_pretrained(saved)
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    image = Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC)
    messages = [{"role": "user", "content": "<image>\nWhat?"}]
    prompt = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == encoder.prompt(messages)
    ours = model_input(image, tiny.tower.geometry) / 255 * 2 - 1
    apart = np.abs(inputs["pixel_values"][0].permute(1, 2, 0).numpy() - ours) * 127.5
    assert apart.mean() < 1


def test_the_image_token_is_never_the_likeliest(tiny, batch):
    inputs = {name: value for name, value in batch._asdict().items() if name != "labels"}
    with torch.inference_mode():
        logits = tiny.model(**inputs, logits_to_keep=4).logits
    mean = logits[..., :49152].mean(dim=-1, keepdim=True)
    torch.testing.assert_close(logits[..., 49152:], mean.expand(-1, -1, 64), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tf_efficientnet_lite9", "--vision tf_efficientnet_lite9: timm has no such model; did you mean"),
    ],
)
def test_a_tower_that_cannot_be_had_is_a_bad_request(name, says):
    with pytest.raises(BadRequest) as raised:
        load_tower(name)
    assert str(raised.value).startswith(says)


def test_a_tower_without_a_grid_is_a_bad_request(monkeypatch):
    import timm

    transformer = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    monkeypatch.setattr("training.model.load_backbone", lambda name, asked_by: (transformer, ""))
    with pytest.raises(BadRequest, match=r"features of shape \(197, 192\).*convolutional"):
        load_tower("vit_tiny_patch16_224")


def test_a_device_that_cannot_be_had_is_a_bad_request():
    for name in ("warp", "cuda:99"):
        with pytest.raises(BadRequest, match=f"--device {name}: cannot be had"):
            torch_device(name)


def test_what_cuda_does_in_bfloat16_trains_and_reloads(monkeypatch, batch, tmp_path):
    monkeypatch.setattr("training.model.frozen_dtype", lambda device: torch.bfloat16)
    vlm = build_model("tf_efficientnet_lite0", "tiny", torch.device("cpu"))
    learned = learned_parameters(vlm.model)
    one = Batch(*(tensor[:1] for tensor in batch))  # bfloat16 is slow on a CPU
    with autocast(torch.device("cpu")):
        loss = next_token_loss(vlm.model, *one)
    loss.backward()
    assert {p.dtype for p in learned} == {p.grad.dtype for p in learned} == {loss.dtype} == {torch.float32}
    save_model(vlm, tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs = {name: value for name, value in one._asdict().items() if name != "labels"} | {
        "logits_to_keep": 2
    }
    with torch.inference_mode():
        logits = again(**inputs).logits
        assert logits.dtype == torch.bfloat16
        assert torch.equal(logits, vlm.model(**inputs).logits)
