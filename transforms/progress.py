"""Progress for a launcher on the same machine: small files of counts, since Beam's counters reach it only at the end."""

import os
import time
from pathlib import Path

_EVERY_S = 0.5


class ProgressFile:
    """Counts what this process has done of one activity in `FOLDER/ACTIVITY.PID`; does nothing where `folder` is empty.

    Retried bundles count twice; nothing is computed from it.
    """

    def __init__(self, folder: str, activity: str) -> None:
        self._path = Path(folder) / f"{activity}.{os.getpid()}" if folder else None
        self._count, self._written = 0, 0.0

    def advance(self) -> None:
        self._count += 1
        if time.monotonic() - self._written > _EVERY_S:
            self.write()

    def write(self) -> None:
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(str(self._count))
            self._written = time.monotonic()


def counts(folder: str) -> dict[str, int]:
    """What all processes together have done so far, by activity."""
    done: dict[str, int] = {}
    for file in Path(folder).glob("*.*") if folder else ():
        try:
            count = int(file.read_text())
        except (OSError, ValueError):  # being written
            continue
        done[file.stem] = done.get(file.stem, 0) + count
    return done
