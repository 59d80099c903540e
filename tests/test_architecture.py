"""The rooms and who may import whom, read from the code itself."""

import ast
import importlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
ROOMS = ("shards", "images", "embeddings", "synthesis", "transforms", "beam_pipelines", "training")
MAY_IMPORT = {
    "shards": set(),
    "images": {"shards"},
    "embeddings": {"shards"},
    "synthesis": {"shards"},
    "training": {"shards", "images", "embeddings"},
    "transforms": {"shards", "images", "embeddings", "synthesis"},
    "beam_pipelines": {"shards", "images", "embeddings", "synthesis", "transforms"},
}
BEAM = {"transforms", "beam_pipelines"}
TORCH = {"embeddings", "synthesis", "training"}
TORCH_MODULES = {"torch", "torchvision", "timm", "faiss", "transformers"}
# What stages share: how a model is asked, how a fate is recorded, where bytes and pictures lie, what was worked out before, how progress
# is shown, which images meet.
SHARED_BY_STAGES = {
    "transforms.calls",
    "transforms.fates",
    "transforms.filesystems",
    "transforms.ledgers",
    "transforms.objects",
    "transforms.pictures",
    "transforms.progress",
    "transforms.route",
}


def imports_of(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def files_of(room: str) -> list[Path]:
    return sorted((REPOSITORY / room).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    files = files_of(room)
    assert files
    for path in files:
        for name in imports_of(path):
            top = name.split(".")[0]
            if top in ROOMS and top != room:
                assert top in MAY_IMPORT[room], f"{path.name} imports {name}"
            assert top != "tensorflow", path
            assert top not in ("tests", "benchmarks"), path
            if top == "apache_beam":
                assert room in BEAM, f"{path} imports Beam"
            if top in TORCH_MODULES:
                assert room in TORCH, f"{path} imports {name}"


def test_stages_never_import_each_other() -> None:
    for path in files_of("transforms"):
        own = {name for name in imports_of(path) if name.startswith("transforms.")}
        assert own <= SHARED_BY_STAGES, f"{path.name} imports {own}"


def test_setup_lists_every_package_and_imports_nothing_of_ours() -> None:
    tree = ast.parse((REPOSITORY / "setup.py").read_text())
    listed = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PACKAGES"
    )
    folders = {path.parent for room in ROOMS for path in files_of(room)}
    assert sorted(listed) == sorted(".".join(folder.relative_to(REPOSITORY).parts) for folder in folders)
    assert imports_of(REPOSITORY / "setup.py") == {"setuptools"}


def test_what_is_tested_beside_tensorflow_is_there() -> None:
    """Those tests have an environment of their own, so that the normal ones never load them."""
    tree = ast.parse((REPOSITORY / "tests" / "tensorflow" / "test_tf.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if str(node.module).startswith(("shards.", "tests.made"))]
    assert len(ours) > 4
    for node in ours:
        module = importlib.import_module(str(node.module))
        assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_help_is_quick_and_loads_neither_torch_nor_beam() -> None:
    script = (
        "import sys; from beam_pipelines.cli import run; code = run(['--help']);"
        "heavy = sorted({'torch', 'apache_beam', 'timm', 'transformers', 'pyarrow'} & set(sys.modules));"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "curate" in done.stdout
    # Measured .5 s of a core; seconds on the clock would be those of a busy machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_nothing_is_called_utils() -> None:
    names = {path.stem for room in ROOMS for path in files_of(room)}
    assert not names & {"utils", "util", "common", "helpers", "misc"}
