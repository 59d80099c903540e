"""Rewrites docs/options.md, docs/codes.md and container/image_spec.json from the code that defines them; `--check` only compares.

python docs/make.py
"""

import ast
import functools
import json
import sys
from pathlib import Path

from beam_pipelines.cloud.dataflow import DataflowOptions
from beam_pipelines.cloud.template import spec
from beam_pipelines.codes import CODES, FAILURES
from beam_pipelines.options import StreamOptions, flag

DOCS = Path(__file__).parent


def options_page() -> str:
    """Every option of the main job, by group, and those of the streaming job."""
    lines = [
        "# Options of `shardmill curate` and `shardmill stream`",
        "",
        "Each is a flag (`--max-samples 24`) and a line of a `--config` YAML file (`max_samples: 24`); flags win. *Bytes* marks the",
        "options that may change what is written for the same input: they are part of a snapshot's id. Beam's own options come",
        "after `--`. Those under Streaming are of `shardmill stream` alone ([streaming](streaming.md)).",
    ]
    group = ""
    for name, field in StreamOptions.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        if extra["group"] != group:
            group = str(extra["group"])
            lines += ["", f"## {group}", "", "| option | default | bytes | meaning |", "|---|---|---|---|"]
        default = field.default
        shown = default.human_readable(decimal=True) if hasattr(default, "human_readable") else default
        text = "" if shown in ("", None, []) else f"`{shown}`"
        written = name if name == "sources" else flag(name)
        if default is True:
            written += f"`, `--no-{flag(name)[2:]}"
        lines.append(
            f"| `{written}` | {text} | {'yes' if extra['affects_bytes'] else ''} | {field.description} |"
        )
    lines += ["", *dataflow_table()]
    return "\n".join(lines) + "\n"


def dataflow_table() -> list[str]:
    """Every line of the `dataflow:` block, by group."""
    lines = [
        "## The `dataflow:` block",
        "",
        "Lines of a block in the YAML, for `shardmill submit` and `shardmill template run` ([Dataflow](dataflow.md)). None changes bytes.",
        "",
        "| group | line | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, field in DataflowOptions.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        default = (
            ""
            if field.default in ("", 0, None, [], {}) and field.default is not False
            else f"`{field.default}`"
        )
        default = default.replace("`True`", "`true`").replace("`False`", "`false`")
        lines.append(f"| {extra['group']} | `{name}` | {default} | {field.description} |")
    return lines


def codes_page() -> str:
    """Every reason code with its meaning."""
    lines = [
        "# Reason codes",
        "",
        "The `code` column of `decisions` and `dead`: stable names for what became of an image, a sample or a call. What is dead failed, and",
        "`--max-error-rate CODE=FRACTION` may name its code: of the references, samples or conversations that came to a stage no more than that fraction",
        "may fail there so, else the run ends with exit code 3 before the next stage.",
        "",
        "| code | dead | meaning |",
        "|---|---|---|",
        *(
            f"| `{code}` | {'yes' if code in FAILURES else ''} | {meaning} |"
            for code, meaning in CODES.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def template_spec(job: str) -> str:
    """A Flex Template's specification, with a name in the place of the image."""
    image = "REGION-docker.pkg.dev/PROJECT/REPOSITORY/shardmill:TAG"
    return json.dumps(spec(job, image), indent=1, ensure_ascii=False) + "\n"


def image_requirements() -> str:
    """What the image installs before the code: setup.py's own requirements, those of `gcp`, and weights that a package carries."""
    tree = ast.parse((DOCS.parent / "setup.py").read_text())
    literals = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    weights = [one for one in literals["EXTRAS"]["demo"] if one.startswith("efficientnet")]
    wanted = sorted({*literals["REQUIRES"], *literals["EXTRAS"]["gcp"], *weights})
    return "# Made from setup.py by `make docs`.\n" + "".join(f"{line}\n" for line in wanted)


PAGES = {
    "options.md": options_page,
    "codes.md": codes_page,
    "../container/image_spec.json": functools.partial(template_spec, "curate"),
    "../container/stream_spec.json": functools.partial(template_spec, "stream"),
    "../container/requirements.txt": image_requirements,
}


def main() -> int:
    """Exit code 1 where `--check` finds a page that is not what the code says."""
    stale = [
        name
        for name, page in PAGES.items()
        if not (DOCS / name).exists() or (DOCS / name).read_text() != page()
    ]
    if "--check" not in sys.argv:
        for name in stale:
            (DOCS / name).write_text(PAGES[name]())
    print(f"{'stale' if '--check' in sys.argv else 'rewritten'}: {', '.join(stale) or 'none'}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
