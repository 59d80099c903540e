"""What a prompt looks like when it is sent."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.errors import BadRequest
from synthesis.prompts import SAMPLE_INPUTS, load_prompt, try_prompt
from synthesis.taxonomy import levels_of, load_taxonomy


def render_text(
    name: str, folder: Path | None, instruction_type: str, image: str, values: Sequence[str]
) -> str:
    """A prompt with sample values, or those given: an instruction type, an image that is sent with it, `INPUT=VALUE`.

    Raises BadRequest for what the prompt is not given, or cannot be rendered with.
    """
    wanted, _, version = name.partition("/")
    prompt = load_prompt(wanted, version or "v1", folder)
    inputs = {known: SAMPLE_INPUTS[prompt.name][known] for known in prompt.inputs}
    given: dict[str, Any] = {}
    if instruction_type:
        load_taxonomy().check(instruction_type)
        given |= zip(("family", "group", "task"), levels_of(instruction_type), strict=True)
    for text in values:
        key, sign, value = text.partition("=")
        if not sign or key not in inputs:
            close = difflib.get_close_matches(key, inputs, 1)
            hint = f"; did you mean {close[0]}?" if close else f"; it is given {', '.join(inputs)}"
            raise BadRequest(f"--set {text}: is no INPUT=VALUE of {prompt.name}/{prompt.version}{hint}")
        given[key] = _value(key, value, inputs[key])
    inputs |= {key: value for key, value in given.items() if key in inputs}
    rendered = try_prompt(prompt, inputs)
    lines = [f"{prompt.prompt_id}, at most {prompt.max_tokens} tokens of answer"]
    if image:
        lines.append(f"image 1: {_described(image)}")
    return "\n".join([*lines, "", rendered])


def _value(key: str, text: str, sample: Any) -> Any:
    if isinstance(sample, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        if isinstance(sample, list) and all(isinstance(item, str) for item in sample):
            return [part.strip() for part in text.split(",")]
        raise BadRequest(f"--set {key}={text}: needs JSON, as {json.dumps(sample)}") from None


def _described(image: str) -> str:
    from PIL import Image

    path = Path(image).expanduser()
    try:
        with Image.open(path) as opened:  # its header alone
            return f"{path}, {opened.format} of {opened.width} x {opened.height} pixels, sent again as JPEG within --vlm-max-pixels"
    except (OSError, ValueError) as error:
        raise BadRequest(f"--image {image}: is no image that can be read ({error})") from None
