"""Fit an encoder's centring vector: the mean of the mean features of several groups of images.

python -m benchmarks.fit_centring --encoder tf_efficientnet_lite0 photos/ clipart/ documents/

Every folder is one group and weighs the same, however many images it holds.
"""

import argparse
from pathlib import Path

import numpy as np

from embeddings import encoder as encoders
from images.decode import Limits, decode
from images.fetch import Fetcher, Reach
from images.files import LocalFiles
from images.web import WebOptions
from shards.errors import BadData
from shards.records import MediaRef


def mean_feature(encoder: encoders.Encoder, folder: Path, limit: int) -> np.ndarray:
    """Mean of pooled features before centring and normalising, float64 (D,), over at most `limit` images of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    step = max(1, len(files) // limit)
    fetcher = Fetcher(LocalFiles(), Reach(WebOptions(max_bytes=1 << 24)))
    batch, sums, count = [], 0, 0
    for path in [*files[::step][:limit], None]:
        if path is not None:
            try:
                encoded = fetcher.fetch(MediaRef(str(path), 0, -1))
                batch.append(decode(encoded, encoder.geometry, Limits()).pixels)
            except BadData:
                continue
        if batch and (path is None or len(batch) == encoder.images_at_once):
            sums = sums + encoder.features(np.stack(batch)).astype(np.float64).sum(axis=0)
            count += len(batch)
            batch = []
    print(f"{folder}: {count} images")
    return sums / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--encoder", default="tf_efficientnet_lite0")
    parser.add_argument("--limit", type=int, default=1000, help="images of one folder")
    arguments = parser.parse_args()
    encoder = encoders.Encoder(encoders.EncoderSpec(arguments.encoder))
    means = [mean_feature(encoder, folder, arguments.limit) for folder in arguments.folders]
    target = encoders.CENTRING / f"{arguments.encoder}.npy"
    target.parent.mkdir(exist_ok=True)
    np.save(target, np.mean(means, axis=0).astype(np.float32))
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
