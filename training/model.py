"""The vision-language model: a pretrained timm tower, a two-layer projector, a language model, as transformers' FastVlm.

Only the projector learns. The saved folder loads without remote code: `AutoModelForImageTextToText.from_pretrained(FOLDER)`.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from embeddings.backbone import load_backbone
from shards.errors import BadRequest
from shards.records import Geometry
from training.language_models import LanguageModel, load_language_model

from timm.data.config import resolve_model_data_config  # isort: skip  (after embeddings.backbone, which mends its import)
from transformers import (  # isort: skip  (likewise: it imports torchvision)
    CLIPImageProcessorPil,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    TimmWrapperConfig,
    TimmWrapperModel,
)
from transformers.models.fast_vlm.modeling_fast_vlm import FastVlmMultiModalProjector  # isort: skip

IMAGE_TOKEN = "<image>"
IGNORED = -100
"""The label of a token that is not learned, as in transformers and in torch's cross entropy."""


class Tower(NamedTuple):
    """A pretrained image tower and how it wants its input.

    `grid` (rows, columns) of the feature map, so rows x columns visual tokens; `mean` and `std` per channel, of pixels in [0, 1].
    """

    model: TimmWrapperModel
    geometry: Geometry
    mean: tuple[float, ...]
    std: tuple[float, ...]
    grid: tuple[int, int]


class VisionLanguageModel(NamedTuple):
    """A `FastVlmForConditionalGeneration`, its tokenizer (which knows `<image>`), and what its tower wants."""

    model: Any  # transformers' annotations contradict themselves: `generate`, for one, refuses every model
    tokenizer: PreTrainedTokenizerBase
    tower: Tower

    @property
    def visual_tokens(self) -> int:
        return self.tower.grid[0] * self.tower.grid[1]


def frozen_dtype(device: torch.device) -> torch.dtype:
    """What frozen weights are kept in: bfloat16 on CUDA, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 arithmetic on CUDA; nothing elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=frozen_dtype(device) == torch.bfloat16)


def load_tower(name: str) -> Tower:
    """A convolutional timm model as FastVlm's tower, float32, with pretrained weights.

    Raises BadRequest for an unknown name, weights that cannot be had, or a model without a square map of features.
    """
    backbone, _ = load_backbone(name, asked_by="--vision")
    config: dict[str, Any] = resolve_model_data_config(backbone)
    size = config["input_size"][1]
    with torch.no_grad():
        features = backbone.forward_features(torch.zeros(1, *config["input_size"]))  # type: ignore[operator]
    width = int(backbone.num_features)  # type: ignore[arg-type]
    if features.ndim != 4 or features.shape[1] != width or features.shape[2] != features.shape[3]:
        raise BadRequest(
            f"--vision {name}: gives features of shape {tuple(features.shape[1:])}, wanted are ({width}, N, N); "
            "use a convolutional model such as tf_efficientnet_lite0"
        )
    # FastVlm reads `hidden_size`, which the wrapper's configuration does not declare.
    wrapper = TimmWrapperConfig(architecture=name, do_pooling=False, hidden_size=width)  # type: ignore[call-arg]
    tower = TimmWrapperModel(wrapper)
    loaded = tower.timm_model.load_state_dict(backbone.state_dict(), strict=False)
    assert not loaded.missing_keys, (
        loaded.missing_keys
    )  # unexpected ones are the classifier's, which the tower leaves out
    geometry = Geometry(size, config["crop_pct"], config["interpolation"], config["crop_mode"])
    grid = (features.shape[2], features.shape[3])
    return Tower(tower, geometry, tuple(config["mean"]), tuple(config["std"]), grid)


def build_model(vision: str, lm: str, device: torch.device) -> VisionLanguageModel:
    """Tower and language model frozen, in float32 on the CPU and bfloat16 on CUDA; a fresh projector in float32 that learns.

    The projector's first weights come from torch's global generator. The model is in evaluation mode and stays there: a frozen
    tower's batch norm must not follow the batches. Raises BadRequest as `load_tower` and `load_language_model` do.
    """
    dtype = frozen_dtype(device)
    tower = load_tower(vision)
    language = load_language_model(lm, dtype)
    image_token_id = _add_image_token(language)
    language.model.config.name_or_path = ""  # it would be saved, and may be a folder of this machine
    config = FastVlmConfig(
        vision_config=tower.model.config,
        text_config=language.model.config,
        image_token_index=image_token_id,
        image_seq_length=tower.grid[0] * tower.grid[1],
    )
    # The skeleton costs nothing on the meta device; each of its parts is then replaced by one with weights.
    with torch.device("meta"):
        model: Any = FastVlmForConditionalGeneration(config)
    model.model.vision_tower = tower.model
    model.model.multi_modal_projector = FastVlmMultiModalProjector(config)
    model.model.language_model = language.model.base_model
    model.lm_head = language.model.get_output_embeddings()
    model.generation_config = language.model.generation_config
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.model.vision_tower.to(dtype)
    return VisionLanguageModel(model.eval().to(device), language.tokenizer, tower)


def _add_image_token(language: LanguageModel) -> int:
    """Make `<image>` one token. Its embedding is never read: visual tokens take its places.

    New rows are the mean of all others, so the new tokens' logits are the mean of the logits: never the highest.
    """
    model: Any = language.model
    tokenizer: Any = language.tokenizer
    known = tokenizer.get_vocab()
    if IMAGE_TOKEN not in known:
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            with torch.no_grad():
                layer.weight[rows:] = layer.weight[:rows].mean(dim=0)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def learned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def next_token_loss(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    pixel_values: torch.Tensor,
) -> torch.Tensor:
    """Mean cross entropy over the labels that are not -100, of tensors as in `Batch`: the model's own loss, for less.

    Logits are computed only where something is learned: the head is half of a small model's work, and nine places in ten are
    visual tokens, prompt and padding.
    """
    hidden = model.model(
        input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, use_cache=False
    ).last_hidden_state  # (B, T, D)
    targets = labels[:, 1:]
    learned = targets != IGNORED
    logits = model.lm_head(hidden[:, :-1][learned])  # (learned tokens, vocabulary)
    return nn.functional.cross_entropy(logits.float(), targets[learned])


def save_model(vlm: VisionLanguageModel, folder: Path) -> None:
    """Weights as safetensors, configuration, tokenizer and processor, as `from_pretrained` of the Auto classes expects them."""
    dtype = vlm.model.get_input_embeddings().weight.dtype
    vlm.model.model.multi_modal_projector.to(dtype)
    vlm.model.save_pretrained(folder)
    processor(vlm).save_pretrained(folder)


def processor(vlm: VisionLanguageModel) -> LlavaProcessor:
    """transformers' own processor for this model: the same tokens, and the same pixels within a few of 255 levels."""
    tower, size = vlm.tower, vlm.tower.geometry.size
    shorter = int(size / tower.geometry.crop_pct)
    squash = tower.geometry.crop_mode == "squash"
    images = CLIPImageProcessorPil(
        size={"height": size, "width": size} if squash else {"shortest_edge": shorter},
        resample=_RESAMPLE[tower.geometry.interpolation],
        do_center_crop=not squash,
        crop_size={"height": size, "width": size},
        image_mean=list(tower.mean),
        image_std=list(tower.std),
    )
    patch = size // tower.grid[0]
    return LlavaProcessor(
        image_processor=images,
        tokenizer=vlm.tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="full",
        chat_template=vlm.tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
        # A padded convolution can give one row more than size // stride.
        num_additional_image_tokens=vlm.visual_tokens - (size // patch) ** 2,
    )


_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers, which processors store."""
