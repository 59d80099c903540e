import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from embeddings import backbone, torchvision_fix
from embeddings.encoder import Encoder, EncoderSpec, load_encoder
from images.decode import Limits, decode
from shards.errors import BadRequest

SPEC = EncoderSpec(batch_size=8)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(SPEC)


@pytest.fixture(scope="module")
def pixels(encoder: Encoder, corpus: list[Path]) -> np.ndarray:
    return np.stack([decode(p.read_bytes(), encoder.geometry, Limits()).pixels for p in corpus[:8]])


def test_bits_do_not_depend_on_position_or_company(encoder: Encoder, pixels: np.ndarray) -> None:
    alone = [encoder.encode(pixels[index : index + 1]) for index in range(8)]
    together = encoder.encode(pixels)
    backwards = encoder.encode(pixels[::-1])
    for index in range(8):
        for alone_part, together_part, backwards_part in zip(alone[index], together, backwards, strict=True):
            assert np.array_equal(alone_part[0], together_part[index])
            assert np.array_equal(alone_part[0], backwards_part[7 - index])


def test_bits_do_not_depend_on_threads_or_on_how_many_come_at_once(
    encoder: Encoder, pixels: np.ndarray
) -> None:
    several = np.concatenate([pixels, pixels[::-1], pixels[:3]])
    one, three = Encoder(SPEC._replace(threads=1)), Encoder(SPEC._replace(threads=3))
    for spec in (one, three):
        for ours, theirs in zip(spec.encode(several), encoder.encode(pixels), strict=True):
            assert np.array_equal(ours[:8], theirs)
            assert np.array_equal(ours[8:16], theirs[::-1])
            assert np.array_equal(ours[16:], theirs[:3])


def test_vectors_are_unit_and_centred_and_scores_probabilities(encoder: Encoder, pixels: np.ndarray) -> None:
    vectors, scores = encoder.encode(pixels)
    assert vectors.dtype == scores.dtype == np.float16
    assert vectors.shape == (8, 1280) and scores.shape == (8, 1000)
    assert np.allclose(np.linalg.norm(vectors.astype(np.float64), axis=1), 1, atol=2e-3)
    assert np.allclose(scores.astype(np.float64).sum(axis=1), 1, atol=2e-2)
    # Features of a relu are all positive: uncentred, unlike images would be alike.
    raw = encoder.features(pixels)
    raw /= np.linalg.norm(raw, axis=1, keepdims=True)
    upper = np.triu_indices(8, 1)
    assert (vectors @ vectors.T)[upper].mean() < (raw @ raw.T)[upper].mean() - 0.1


def test_it_knows_what_it_sees(encoder: Encoder, corpus: list[Path]) -> None:
    by_name = {path.stem: path for path in corpus}
    for name, expected in {
        "cup-of-espresso": "espresso",
        "echidna": "echidna",
        "traffic-light": "traffic light",
    }.items():
        one = decode(by_name[name].read_bytes(), encoder.geometry, Limits()).pixels[None]
        top = encoder.encode(one)[1][0].argsort()[-5:]
        assert any(expected in encoder.class_names[index] for index in top), name


def test_fingerprint_holds_what_decides_bits(encoder: Encoder) -> None:
    assert Encoder(SPEC).fingerprint == encoder.fingerprint
    assert Encoder(SPEC._replace(batch_size=4)).fingerprint != encoder.fingerprint
    assert Encoder(SPEC._replace(threads=1)).fingerprint == encoder.fingerprint


def test_weights_from_a_file(encoder: Encoder, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, sha256 = backbone.load_backbone("tf_efficientnet_lite0")
    save_file(dict(model.state_dict()), tmp_path / "w.safetensors")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        assert backbone.load_backbone("tf_efficientnet_lite0", str(tmp_path / name))[1] == sha256
    with pytest.raises(BadRequest, match="does not fit the model"):
        backbone.load_backbone("resnet18", str(tmp_path / "w.pth"))


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('ran')",)


def test_bad_requests(tmp_path: Path) -> None:
    torch.save({"state_dict": Malicious()}, tmp_path / "evil.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    for name, weights, message in (
        ("tf_efficientnet_lite9", "auto", "did you mean tf_efficientnet_lite"),
        ("tf_efficientnet_lite0", str(tmp_path / "none.pth"), "no such file"),
        ("tf_efficientnet_lite0", str(tmp_path / "evil.pth"), "refused"),
        ("tf_efficientnet_lite0", str(tmp_path / "bad.safetensors"), "not a safetensors file"),
    ):
        with pytest.raises(BadRequest, match=message):
            backbone.load_backbone(name, weights)
    with pytest.raises(BadRequest, match="cannot be had here"):
        Encoder(EncoderSpec(device="cuda:9"))


def test_the_fix_does_nothing_where_operators_load() -> None:
    if torchvision_fix._operators_load():
        assert torchvision_fix.LIBRARY is None
    else:
        assert torchvision_fix.LIBRARY is not None


def test_an_encoder_loads_no_compiler() -> None:
    lines = "import sys, embeddings.encoder; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", lines], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_compiler_is_asked_where_torchvision_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = types.SimpleNamespace(is_compile_supported=lambda device: device == "cuda")
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", compiler)
    asked = sys.modules["torchvision.ops.roi_align"].is_compile_supported
    assert asked("cuda") and not asked("cpu")
