"""What every page has: templates that escape what they show, and a place where it lies."""

import os
from pathlib import Path

import jinja2

from beam_pipelines.wording import one_line, plural, sample_title, tried_text, visible
from shards.errors import BadRequest
from shards.files import write_atomically
from shards.snapshot import Snapshot


def environment() -> jinja2.Environment:
    """Of the templates of pages: what they show is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "visible": visible,
        "name": one_line,
        "count": "{:,}".format,
        "plural": plural,
        "title": sample_title,
        "tried": tried_text,
        "percent": lambda part, whole: f"{part / whole:.1%}" if whole else "0 %",
        "width": lambda part, whole: f"{100 * part / whole:.3f}" if whole else "0",
    }
    return environment


def html_target(output: str, name: str) -> Path:
    """Where a page called `name` by default is to lie. Raises BadRequest for a file that cannot be written."""
    target = Path(output).expanduser()
    if target.is_dir():
        raise BadRequest(f"--output {output}: is a folder; name a file, as {target / name}")
    if not target.parent.is_dir():
        raise BadRequest(f"--output {output}: there is no folder {target.parent}")
    if not os.access(target.parent, os.W_OK):
        raise BadRequest(f"--output {target}: this user may not write in {target.parent}")
    return target


def save_page(page: str, snapshot: Snapshot, name: str, target: Path | None) -> str:
    """Write a page to `target`, or as `name` into the snapshot's folder, and return where it lies."""
    data = page.encode(errors="replace")
    if target is None:
        snapshot.storage.write(name, data)
        return f"{snapshot.storage.root}/{name}"
    write_atomically(target, data)
    return str(target)
