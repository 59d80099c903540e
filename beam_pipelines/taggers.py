"""Who gives tags in a run, and which tags are not wanted: opened and checked before anything is written."""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from beam_pipelines.options import CurateOptions
from embeddings.encoder import Encoder
from embeddings.pixel_taggers import VLM, bundled_that_gives, is_pixel_tagger, names_of
from images.fetch import Reach
from shards.errors import BadRequest
from shards.ledger import Segment
from transforms.calls import Backend
from transforms.look import LookRule
from transforms.tag import DropRule, Head, TagRule, Unwanted, load_head


class Tagging(NamedTuple):
    """Which tags images get, and which are not wanted. `told` is what a snapshot's id says of the taggers.

    `drop` is for what stored facts tell, `screen` are the models that look at every image for unwanted tags, `look` the others, which
    see kept images alone.
    """

    rule: TagRule
    look: LookRule | None
    told: Sequence[str]
    unwanted: Sequence[Unwanted] = ()
    drop: DropRule | None = None
    screen: LookRule | None = None


def open_heads(options: CurateOptions, model: Encoder) -> dict[str, Head]:
    """By path. Raises BadRequest."""
    heads = {}
    for path in dict.fromkeys(options.tagger):
        if path == "classes" or is_pixel_tagger(path):
            continue
        try:
            heads[path] = load_head(path)
        except OSError as error:
            raise BadRequest(
                f"--tagger {path}: cannot be read ({error}); classes, ocr, safety, module:function, or a file of `shardmill fit-tagger`"
            ) from error
        if heads[path].tagger.encoder != model.fingerprint:
            raise BadRequest(
                f"--tagger {path}: was fitted on vectors of another encoder ({heads[path].tagger.encoder})"
            )
    return heads


def tagging(
    options: CurateOptions, model: Encoder, reach: Reach, asked: Backend | None, known: Sequence[Segment]
) -> Tagging:
    """Open all taggers once. `asked` is whom synthesis asks, `known` what ledgers hold of tags. Raises BadRequest."""
    vlm = asked.client if asked is not None and asked.max_pixels is not None else None
    names = list(dict.fromkeys(options.tagger))
    heads = open_heads(options, model)
    if VLM in names and vlm is None:
        raise BadRequest("--tagger vlm: needs a model that sees images: --vlm-base-url or --vlm-local")
    base = LookRule({}, reach, known, vlm)
    looking = {name: base.open(name) for name in names if is_pixel_tagger(name)}
    fingerprints = {name: tagger.fingerprint for name, tagger in looking.items()}
    class_names = model.class_names if "classes" in names else ()
    rule = TagRule(class_names, options.tag_min_score, options.max_tags, tuple(heads))
    told = ["classes"] if "classes" in names else []
    told += [*(head.sha256 for head in heads.values()), *fingerprints.values()]

    may_give: dict[str, Sequence[str] | None] = {"classes": class_names}
    may_give |= {path: head.tagger.names for path, head in heads.items()}
    may_give |= {name: names_of(tagger) for name, tagger in looking.items()}
    unwanted = unwanted_tags(options, may_give)

    def gives_one(name: str) -> bool:
        given = may_give[name]
        return bool(unwanted) and (given is None or bool(_folded(given) & {one.name for one in unwanted}))

    drop = None
    if gives_one("classes") or any(map(gives_one, heads)):
        dropping_heads = tuple(path for path in heads if gives_one(path))
        drop = DropRule(tuple(unwanted), class_names if gives_one("classes") else (), dropping_heads)

    def among(screens: bool) -> LookRule | None:
        chosen = {name: found for name, found in fingerprints.items() if gives_one(name) == screens}
        return base._replace(fingerprints=chosen) if chosen else None

    return Tagging(rule, among(False), told, unwanted, drop, among(True))


def unwanted_tags(options: CurateOptions, may_give: dict[str, Sequence[str] | None]) -> Sequence[Unwanted]:
    """What --drop-tag names, in its order. `may_give`: the tags of each tagger, None where that may be any. Raises BadRequest."""
    unwanted = {}
    for text in options.drop_tag:
        name, given, number = text.rpartition("=")
        name = (name if given else text).strip()
        try:
            min_score = float(number) if given else options.tag_min_score
        except ValueError:
            min_score = -1.0
        if not (name and 0 < min_score <= 1):
            why = "" if given else f"--tag-min-score is {options.tag_min_score:g}: "
            raise BadRequest(
                f"--drop-tag {text}: {why}a name and a score above 0 and at most 1 are needed, as in unsafe=0.8; a name that holds = needs a score"
            )
        if not any(given is None or name.casefold() in _folded(given) for given in may_give.values()):
            raise BadRequest(f"--drop-tag {text}: no --tagger gives such a tag{_hint(name, may_give)}")
        if name.casefold() in unwanted:
            raise BadRequest(f"--drop-tag {text}: stands there twice; give it one score")
        unwanted[name.casefold()] = Unwanted(name.casefold(), min_score)
    return list(unwanted.values())


def _folded(names: Sequence[str]) -> set[str]:
    return {name.casefold() for name in names}


def _hint(name: str, may_give: dict[str, Sequence[str] | None]) -> str:
    """Who gives the tag, else the most similar of those that are given, else all of them."""
    bundled = bundled_that_gives(name.casefold())
    if bundled:
        return f"; --tagger {bundled} does"
    all_names = {one.casefold(): one for given in may_give.values() for one in given or ()}
    close = difflib.get_close_matches(name.casefold(), all_names, 1)
    if close:
        return f"; did you mean '{all_names[close[0]]}'?"
    few = sorted(all_names.values())
    return f"; they give {', '.join(few)}" if 0 < len(few) <= 20 else ""
