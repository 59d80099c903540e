"""The image encoder: one forward gives the embedding that duplicates are found by and the class scores that tags come from."""

import functools
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from embeddings.backbone import load_backbone, torch_device
from shards.errors import BadRequest
from shards.ids import digest
from shards.records import Geometry

import timm  # isort: skip  (after the fix in embeddings.backbone)
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config  # isort: skip

T = TypeVar("T")

CENTRING = Path(__file__).parent / "centring"
"""One float32 (D,) vector per encoder name: its mean feature over a broad set of images. Fixed, so that no corpus moves verdicts."""


class EncoderSpec(NamedTuple):
    """What an encoder is made of: timm name, weights (see `load_backbone`), torch device, batch size of every forward.

    `batch_size` 0 is 8 on a CPU (as fast per image as 32, measured) and 128 elsewhere. `threads` is how many forwards run side by
    side on a CPU, 0 for one per core; it changes no bit.
    """

    name: str = "tf_efficientnet_lite0"
    weights: str = "auto"
    device: str = "cpu"
    batch_size: int = 0
    threads: int = 0


def default_batch_size(device: str) -> int:
    """Images of a forward on a device of this name, which need not be here."""
    return 8 if device == "cpu" else 128


class Encoder:
    """A timm model that maps uint8 images to unit vectors and class probabilities.

    Every forward runs on exactly `batch_size` images, padded with black ones, and on a CPU in one thread: kernels and their order
    of summation depend on the batch size and on the number of threads, so an image's bits would otherwise depend on the company
    it keeps and on the machine's cores. Cores are used by forwards that run side by side, which costs less CPU per image too.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        self.device = torch_device(spec.device)
        self.batch_size = spec.batch_size or default_batch_size(self.device.type)
        self.name = spec.name
        model, self.weights_sha256 = load_backbone(spec.name, spec.weights)
        config = resolve_model_data_config(model)
        self.geometry = _geometry(spec.name, config)
        self.class_names = _class_names(model)
        self._dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self._model: Any = model.to(self.device, self._dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._mean, self._std = (
            torch.tensor(config[key], device=self.device).view(1, 3, 1, 1) for key in ("mean", "std")
        )
        self._centre = _centring(spec.name, int(self._model.num_features)).to(self.device)
        threads = 1 if self.device.type != "cpu" else spec.threads or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(threads, "forward", initializer=torch.set_num_threads, initargs=(1,))
        self.images_at_once = self.batch_size * threads
        self.fingerprint = digest(
            {
                "name": spec.name,
                "weights": self.weights_sha256,
                "geometry": self.geometry._asdict(),
                "mean": list(config["mean"]),
                "std": list(config["std"]),
                "centring": self._centre.cpu().numpy().tobytes().hex(),
                "batch_size": self.batch_size,
            }
        ).hex()
        self.numerics = _numerics(self.device, self._dtype)

    def encode(
        self, pixels: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
        """uint8 (n, S, S, 3) RGB -> embeddings float16 (n, D), scores float16 (n, C). Fastest by `images_at_once`.

        Embedding rows are centred and L2-normalised, so inner product = cosine in [-1, 1] to float16's precision. Scores are the
        softmax over the encoder's classes; C = 0 where it has no classifier.
        """
        vectors, scores = zip(*self._forwards(self._encode_batch, pixels), strict=True)
        return np.concatenate(vectors)[: len(pixels)], np.concatenate(scores)[: len(pixels)]

    def features(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """uint8 (n, S, S, 3) -> pooled features float32 (n, D), neither centred nor normalised."""
        return np.concatenate([*self._forwards(self._features_of_batch, pixels)])[: len(pixels)]

    def _forwards(
        self, forward: Callable[[npt.NDArray[np.uint8]], T], pixels: npt.NDArray[np.uint8]
    ) -> Iterator[T]:
        """`forward` over padded batches, results in order."""
        padded = np.zeros((-(-len(pixels) // self.batch_size) * self.batch_size, *pixels.shape[1:]), np.uint8)
        padded[: len(pixels)] = pixels
        return self._pool.map(forward, np.split(padded, len(padded) // self.batch_size))

    @torch.inference_mode()
    def _encode_batch(
        self, batch: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
        pooled = self._pooled(batch)
        logits = self._model.get_classifier()(pooled) if self.class_names else pooled[:, :0]
        vectors = nn.functional.normalize(pooled.float() - self._centre, dim=1)
        scores = logits.float().softmax(dim=1)
        return vectors.to(torch.float16).cpu().numpy(), scores.to(torch.float16).cpu().numpy()

    @torch.inference_mode()
    def _features_of_batch(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return np.asarray(self._pooled(batch).float().cpu().numpy())

    def _pooled(self, batch: npt.NDArray[np.uint8]) -> torch.Tensor:
        images = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2)  # NHWC memory = channels_last
        images = ((images.float() / 255 - self._mean) / self._std).to(self._dtype)
        features = self._model.forward_features(images)
        pooled: torch.Tensor = self._model.forward_head(features, pre_logits=True)
        return pooled


@functools.lru_cache(maxsize=1)
def load_encoder(spec: EncoderSpec) -> Encoder:
    """The encoder of a spec, loaded once per process."""
    return Encoder(spec)


def _geometry(name: str, config: dict[str, object]) -> Geometry:
    size = config["input_size"]
    assert isinstance(size, tuple)
    if size[1] != size[2] or config["crop_mode"] not in ("center", "squash"):
        raise BadRequest(
            f"--encoder {name}: input {size}, crop mode {config['crop_mode']}: only square ones work"
        )
    crop_pct, interpolation = config["crop_pct"], config["interpolation"]
    assert isinstance(crop_pct, float)
    return Geometry(int(size[1]), crop_pct, str(interpolation), str(config["crop_mode"]))


def _class_names(model: nn.Module) -> tuple[str, ...]:
    """One name per class: the first of timm's synonyms for ImageNet heads, `class N` for others, none without a classifier."""
    num_classes = int(getattr(model, "num_classes", 0))
    subset = infer_imagenet_subset(model) if num_classes else None
    if subset is None:
        return tuple(f"class {index}" for index in range(num_classes))
    names = ImageNetInfo(subset)
    return tuple(names.index_to_description(index).split(",")[0] for index in range(num_classes))


def _centring(name: str, width: int) -> torch.Tensor:
    path = CENTRING / f"{name}.npy"
    if not path.exists():
        return torch.zeros(width)
    return torch.from_numpy(np.load(path, allow_pickle=False))


def _numerics(device: torch.device, dtype: torch.dtype) -> str:
    """What else decides the bits of a float result: another device, dtype, instruction set or torch rounds differently."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return (
        f"{hardware}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}, timm {timm.__version__}"
    )
