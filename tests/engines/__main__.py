"""Gets an engine, runs the tests on it and says in one sentence what they showed: `python -m tests.engines flink|prism`.

Engines come from Maven Central and the Go module proxy, in fixed versions, into examples/.build/engines, which is not committed.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "examples" / ".build" / "engines"
PRISM = "github.com/apache/beam/sdks/v2/go/cmd/prism@v2.77.0"
JARS_SHA256 = "ce29e5a20231aade03dbe908e23e288906d3e0645a69b56b226018868d2e9ed0"
"""Of the lines `NAME SHA256` of all jars that flink.pom.xml leads to, sorted."""
UNFETCHED = os.EX_TEMPFAIL
SHOWN = {
    "flink": "On a Flink cluster the batch job gave the bytes of a local run and the streaming job lost and doubled nothing, also when a TaskManager was killed.",
    "prism": "On Prism the batch job gave the bytes of a local run, and the streaming job lost and doubled nothing.",
}


def sha256_of(jars: Path) -> str:
    lines = (
        f"{jar.name} {hashlib.sha256(jar.read_bytes()).hexdigest()}\n" for jar in sorted(jars.glob("*.jar"))
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def fetch(what: str, command: Sequence[str], **environment: str) -> None:
    """Raises SystemExit with `UNFETCHED`, after saying that nothing was tested."""
    print(f"getting {what} into {BUILD}, once; it takes some minutes", flush=True)
    code = subprocess.run(command, env=os.environ | environment).returncode
    if code:
        print(
            f"{what} could not be fetched, so nothing was tested on it: {command[0]} ended with {code}, for the reason above",
            file=sys.stderr,
        )
        raise SystemExit(UNFETCHED)


def fetch_flink() -> None:
    """Flink, Beam's runner for it and all they need, as Maven resolves them."""
    jars = BUILD / "flink"
    if jars.is_dir() and sha256_of(jars) == JARS_SHA256:
        return
    shutil.rmtree(jars, ignore_errors=True)
    copy = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={jars}"]
    fetch("Flink's jars", ["mvn", "-B", "-q", "-C", "-f", str(HERE / "flink.pom.xml"), *copy])
    if (found := sha256_of(jars)) != JARS_SHA256:
        raise SystemExit(f"the jars in {jars} are not those that were tested: {found}, not {JARS_SHA256}")


def fetch_prism() -> None:
    """Prism from source; the Go toolchain checks every module against the public checksum database."""
    if not (BUILD / "bin" / "prism").exists():
        fetch("Prism", ["go", "install", PRISM], GOBIN=str(BUILD / "bin"), GOFLAGS="-trimpath")


PRISM_ARGS = ["--runner=PrismRunner", f"--prism_location={BUILD / 'bin' / 'prism'}"]
"""Options that name Prism to a pipeline, which starts and stops it."""
FETCH = {"flink": (fetch_flink, ("java", "mvn")), "prism": (fetch_prism, ("go",))}


def missing_tools(engine: str) -> list[str]:
    """What getting and running an engine needs and the path has not."""
    return [tool for tool in FETCH[engine][1] if shutil.which(tool) is None]


def main(engine: str) -> int:
    get, _ = FETCH[engine]
    missing = missing_tools(engine)
    if missing:
        print(f"{engine.title()} was not tried: {' and '.join(missing)} not on the path.")
        return 0
    BUILD.mkdir(parents=True, exist_ok=True)
    get()
    failed = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", str(HERE / f"test_{engine}.py")]
    ).returncode
    if not failed:
        print(SHOWN[engine])
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
