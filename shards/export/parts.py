"""Files of bounded size, numbered once it is known how many there are."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

MAX_FILE_BYTES = 500_000_000
"""Most bytes of a Parquet, tar or TFRecord file: what the Hugging Face hub and object stores are quick with."""

Item = TypeVar("Item")


def runs(sized: Iterable[tuple[int, Item]], max_bytes: int) -> Iterator[Iterator[Item]]:
    """Cut a stream of (size in bytes, item) into consecutive runs of at most `max_bytes`, read one after another.

    An item larger than that is a run of its own. A stream without items is one empty run. Two items are held at a time.
    """
    stream = iter(sized)
    waiting = next(stream, None)

    def run() -> Iterator[Item]:
        nonlocal waiting
        filled = 0
        while waiting is not None and (filled == 0 or filled + waiting[0] <= max_bytes):
            filled += waiting[0]
            item = waiting[1]
            waiting = next(stream, None)
            yield item

    yield run()
    while waiting is not None:
        yield run()


def unnumbered(folder: Path, prefix: str, number: int, suffix: str) -> Path:
    """Where file `number` is written until their count is known: `train-00000.tar`."""
    return folder / f"{prefix}-{number:05d}.{suffix}"


def numbered(paths: Sequence[Path]) -> list[str]:
    """Rename `train-00000.tar`, ... to `train-00000-of-00002.tar`, ...; the new names."""
    renamed = [path.with_name(f"{path.stem}-of-{len(paths):05d}{path.suffix}") for path in paths]
    for path, new in zip(paths, renamed, strict=True):
        path.rename(new)
    return [path.name for path in renamed]
