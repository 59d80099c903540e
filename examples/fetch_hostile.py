"""Fetches the odd and hostile images of a codec's own tests into .build/ beside this script, which is not committed.

    python examples/fetch_hostile.py

Source: the Debian package libjxl-testdata (CC0, BSD and Apache licences, 225 files, 44 of them found by fuzzers), fetched with
apt-get and unpacked without root. tests/images/test_hostile.py reads them where they are.
"""

import subprocess
import tempfile
from pathlib import Path

PACKAGE = "libjxl-testdata"
FOLDER = Path(__file__).parent / ".build" / PACKAGE


def main() -> None:
    if not FOLDER.exists():
        fetch()
    print(f"{sum(path.is_file() for path in FOLDER.rglob('*'))} files in {FOLDER}")


def fetch() -> None:
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as work:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=work, check=True)
        (package,) = Path(work).glob(f"{PACKAGE}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), f"{work}/unpacked"], check=True)
        Path(f"{work}/unpacked").rename(FOLDER)


if __name__ == "__main__":
    main()
