"""The facts of a snapshot's images, from the ledger of its folder."""

from collections.abc import Sequence
from typing import Any

from images.decode import decoder_of
from shards.errors import BadRequest
from shards.ledger import ImageRow, Ledger, image_key
from shards.snapshot import Snapshot


def image_rows(snapshot: Snapshot, image_ids: Sequence[bytes]) -> dict[bytes, ImageRow]:
    """What the folder's ledger holds of images of a snapshot, of numerics that the run used where there are some.

    Memory: their facts and embeddings. Raises BadRequest where some are missing.
    """
    encoders = [text.partition(" ")[::2] for text in snapshot.manifest.versions.get("encoders", ())]
    ours = {numerics for _, numerics in encoders}
    decoder = decoder_of(snapshot.manifest.options.get("decode", "exact"))
    id_of = {
        image_key(image_id, decoder, fingerprint): image_id
        for fingerprint in sorted({fingerprint for fingerprint, _ in encoders})
        for image_id in image_ids
    }
    rows: dict[bytes, ImageRow] = {}

    def rank(row: ImageRow) -> Any:
        return row.numerics not in ours, row

    for row in Ledger(snapshot.storage, ImageRow).matching(id_of):
        image_id = id_of[row.key]
        if not row.code and (image_id not in rows or rank(row) < rank(rows[image_id])):
            rows[image_id] = row
    missing = len(image_ids) - len(rows)
    if missing:
        raise BadRequest(
            f"{snapshot.storage.root}/ledger: knows nothing of {missing:,} of the {len(image_ids):,} images wanted of it; run"
            " `shardmill curate` again with the same options, without --reuse-from"
        )
    return rows
