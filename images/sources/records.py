"""From a record (a JSON object, a row, what a tar holds under one key) to a sample, its fields unchanged.

A conversation is `conversations` (LLaVA, Infinity-MM: `from`, `value`), `messages` (`role`, `content`) or `texts` (FineVision, The
Cauldron: `user`, `assistant`); a caption becomes the answer to a turn that only shows the image, as LLaVA's pretraining data has it.
Every field that is neither an image nor a conversation travels in `extra_json`.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from images.files import join_uri
from images.sources.source import Source
from shards.errors import BadData
from shards.records import MediaRef, Origin, SourceImage, SourceSample, Turn

CONVERSATION_FIELDS = ("conversations", "messages", "texts")
"""Fields that may hold a conversation; the first that is not empty does."""
IMAGE_FIELDS = ("image", "images")
_MARK = "<image>"
_SPEAKERS = {"user": "human", "assistant": "gpt"}
"""LLaVA's words for the roles of messages, so that one conversation is one sample, whatever form it came in. Others stay."""
_IMAGE_PARTS = ("image", "image_url")
_ABSENT: tuple[Any, ...] = (None, "", [])


def _text_of(content: Any) -> str:
    """A message's text. Parts are put together with nothing between them, and `<image>` where an image goes."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise BadData("bad_record", "a turn that is not text")
    texts = []
    for part in content:
        kind, text = part.get("type"), part.get("text")
        if kind == "text" and isinstance(text, str):
            texts.append(text)
        elif kind in _IMAGE_PARTS and not any(
            isinstance(part.get(k), str | dict) for k in (*_IMAGE_PARTS, "url")
        ):
            texts.append(_MARK)
        elif kind in _IMAGE_PARTS:
            raise BadData("bad_record", "an image inside a message, not in a field of its own")
        else:
            raise BadData("bad_record", f"a part of a message of type {kind!r}")
    return "".join(texts)


def _said(turn: Any) -> tuple[list[tuple[Any, Any]], dict[str, Any]]:
    """(speaker, words) that one element of a conversation holds, and what else it holds. Raises TypeError, KeyError."""
    rest = {key: value for key, value in turn.items() if value is not None}
    if "from" in rest:
        pairs = [(rest.pop("from"), rest.pop("value"))]
    elif "role" in rest:
        role = rest.pop("role")
        pairs = [(_SPEAKERS.get(role, role), _text_of(rest.pop("content")))]
    else:
        pairs = [("human", rest.pop("user")), ("gpt", rest.pop("assistant"))]
    return pairs, rest


def _turns(source: Source, record: dict[str, Any]) -> tuple[str, list[Turn], list[dict[str, Any]]]:
    """The field that holds the conversation, its turns, and what else its elements hold: empty where they hold no more."""
    named = source.columns.get("conversation")
    for field in (named,) if named else CONVERSATION_FIELDS:
        given: Any = record.get(field)
        if given in _ABSENT or (field == "texts" and not _speaks(given)):
            continue
        try:
            said = [_said(turn) for turn in given]
        except (AttributeError, TypeError, KeyError) as error:
            forms = "`from` and `value`, `role` and `content`, or `user` and `assistant`"
            raise BadData("bad_record", f"a turn without {forms}") from error
        turns = [Turn(*pair) for pairs, _ in said for pair in pairs]
        if not all(isinstance(text, str) for turn in turns for text in turn):
            raise BadData("bad_record", "a turn that is not text")
        return field, turns, [rest for _, rest in said] if any(rest for _, rest in said) else []
    return "", [], []


def _speaks(texts: Any) -> bool:
    """Whether `texts` is a conversation: other data sets have captions there."""
    return isinstance(texts, list) and all(isinstance(turn, dict) and "user" in turn for turn in texts)


def caption_turns(caption: str, num_images: int) -> list[Turn]:
    """An image and its caption as a conversation."""
    return [Turn("human", "\n".join(["<image>"] * num_images)), Turn("gpt", caption)]


def checked_name(name: str) -> str:
    """A url, or a name that stays below the image root. Raises BadData `bad_record` for any other."""
    if "://" not in name and (name.startswith("/") or ".." in name.split("/") or "\0" in name):
        raise BadData("bad_record", f"image {name!r} lies outside the image root")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise BadData("bad_record", f"image {name!r} is no text: {error}") from error
    return name


def image_names(record: dict[str, Any], named: str = "") -> list[str]:
    """What the field `named`, else `image` or `images`, names, in order. Raises BadData `bad_record`."""
    fields = (named,) if named else IMAGE_FIELDS
    given = [record[key] for key in fields if record.get(key) not in _ABSENT]
    if len(given) > 1:
        raise BadData("bad_record", "both `image` and `images`; say which by the source's columns")
    images = given[0] if given else []
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadData("bad_record", "`image` is neither a name nor a list of names")
    return [checked_name(name) for name in names]


def named_image(source: Source, name: str) -> SourceImage:
    """The image of a url, or of a name below the source's image root. Raises BadData `bad_record` for a name outside."""
    uri = name if "://" in checked_name(name) else join_uri(source.image_root, name)
    return SourceImage(Origin(source.priority, source.name, name, 0), MediaRef(uri, 0, -1))


def sample_of(
    source: Source,
    origin: Origin,
    record: Any,
    images: Callable[[dict[str, Any]], Sequence[SourceImage]],
    image_fields: Iterable[str] = IMAGE_FIELDS,
) -> SourceSample:
    """The sample that a record makes. `images` finds its images; `image_fields` do not travel as extra fields.

    What a turn holds besides speaker and words travels as `FIELD_rest`, one object per element of the conversation.
    Raises BadData `bad_record`.
    """
    if not isinstance(record, dict):
        raise BadData("bad_record", f"a {type(record).__name__}, not an object")
    found = images(record)
    field, turns, turns_rest = _turns(source, record)
    caption = record.get(source.columns.get("caption", "caption"))
    if not turns and found and isinstance(caption, str) and caption:
        turns = caption_turns(caption, len(found))
    if not found and not turns:
        raise BadData("bad_record", "neither an image nor a conversation")
    rest = {key: value for key, value in record.items() if key not in (*image_fields, field, "conversations")}
    if turns_rest:
        rest.setdefault(f"{field}_rest", turns_rest)
    try:
        extra_json = json.dumps(rest, sort_keys=True, ensure_ascii=False, allow_nan=False)
        for text in (
            extra_json,
            *itertools.chain.from_iterable(turns),
            *(image.origin.name for image in found),
        ):
            text.encode()
    except (ValueError, RecursionError) as error:
        raise BadData("bad_record", f"holds what is no text or number: {error}") from error
    said = {role: record.get(source.columns.get(role, role)) for role in ("license", "language", "weight")}
    return SourceSample(
        origin,
        found,
        turns,
        str(said["license"] or source.license),
        str(said["language"] or source.language),
        _weight(said["weight"], source.weight),
        extra_json,
    )


def _weight(given: Any, default: float) -> float:
    return float(given) if isinstance(given, int | float) and not isinstance(given, bool) else default
