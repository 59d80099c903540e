"""The dataset card: README.md with the front matter that the Hugging Face hub and `datasets` read. A function of the snapshot alone."""

from collections.abc import Mapping
from typing import Any

import yaml

from shards.export.fields import Written
from shards.export.tally import NOT_STATED, Tally
from shards.snapshot import Funnel, Manifest

MAX_LISTED = 50
"""Licenses or sources that the card lists before it sums up the rest."""
ANYWHERE = "path/to/this/folder"
"""Stands for the folder where the card shows how to load it: a card knows no place."""
_HUB_LICENSES = """
    afl-3.0 apache-2.0 bsd-2-clause bsd-3-clause cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 gfdl gpl-3.0 mit odbl odc-by openrail pddl unlicense
"""
"""The hub's identifiers for licenses that data carries. Source: huggingface.co/docs/hub/repositories-licenses"""
_SIZES = [
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
]
_GENERATORS = {
    "source": "as they were read",
    "vlm": "written by a model that saw the image",
    "text-only": "written by a model that was told tags and caption, and saw no image",
}


def hub_license(licenses: Mapping[str, int]) -> str:
    """The hub's identifier where all records have one license that it knows; `unknown` where none states one; else `other`."""
    if set(licenses) <= {NOT_STATED}:
        return "unknown"
    only = next(iter(licenses)).lower() if len(licenses) == 1 else ""
    return only if only in _HUB_LICENSES.split() else "other"


def _front_matter(snapshot_id: str, written: Written, tally: Tally) -> str:
    # `datasets` caches a folder by its last name, its configuration and the patterns of its files, none of which it reads: without
    # the id, a new export would load as the one that lay under this name before.
    config = f"snapshot-{snapshot_id[:12]}"
    matter: dict[str, Any] = {
        "license": hub_license(tally.licenses),
        "task_categories": ["image-text-to-text"],
        "size_categories": [next((name for limit, name in _SIZES if tally.records < limit), "1B<n<10B")],
        "tags": ["shardmill"],
    }
    if written.data_files:
        files = [{"split": "train", "path": list(written.data_files)}]
        matter["configs"] = [{"config_name": config, "default": True, "data_files": files}]
    if written.features:
        matter["dataset_info"] = {"config_name": config, "features": list(written.features)}
    return yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)


def _plain(text: str) -> str:
    """Text of a source as one line of Markdown code."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def _listed(counts: Mapping[str, int], what: str) -> str:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    lines = [
        f"- {text if text == NOT_STATED else _plain(text)}: {_plural(count, 'sample')}"
        for text, count in ranked[:MAX_LISTED]
    ]
    if rest := ranked[MAX_LISTED:]:
        lines.append(f"- {len(rest):,} more {what}: {_plural(sum(count for _, count in rest), 'sample')}")
    return "\n".join(lines) or "- none"


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _funnel(unit: str, funnel: Funnel) -> str:
    return (
        f"Of {_plural(funnel.input, unit)} read, {funnel.kept:,} were kept; {funnel.duplicate:,} were duplicates of others, "
        f"{funnel.filtered:,} were left out by a rule, {funnel.dead:,} could not be used."
    )


def card_text(manifest: Manifest, format: str, how_to_load: str, written: Written, tally: Tally) -> str:
    """The whole README.md. `how_to_load` is the line for the folder `ANYWHERE`."""
    left_out = "".join(
        f"\nLeft out, because the format cannot say it: {_plural(count, 'sample')} {reason}."
        for reason, count in sorted(tally.left_out.items())
    )
    generators = "; ".join(
        f"{count:,} {_GENERATORS.get(name, _plain(name))}" for name, count in sorted(tally.generators.items())
    )
    return f"""---
{_front_matter(manifest.snapshot_id, written, tally)}---

# Shardmill snapshot {manifest.snapshot_id[:12]}

{_plural(tally.records, "sample")} with {_plural(tally.images, "image")} in the format `{format}`; {tally.text_only:,} of text only.
Conversations: {generators or "none"}.{left_out}

```python
{how_to_load}
```

## How it came to be

{_funnel("image", manifest.funnels["image"])}
{_funnel("sample", manifest.funnels["sample"])}
{_plural(manifest.synthesised, "sample")} were synthesised besides.

Snapshot: `{manifest.snapshot_id}`

## Sources

{_listed(tally.sources, "sources")}

## Licenses, by record

{_listed(tally.licenses, "licenses")}
"""
