"""The facts of a snapshot's images, from the ledger of its folder."""

from collections.abc import Sequence
from typing import Any

from images.decode import decoder_of
from shards.errors import BadRequest
from shards.ledger import ImageRow, Ledger, image_key
from shards.snapshot import Snapshot
from shards.storage import Storage


def image_rows(
    snapshot: Snapshot,
    image_ids: Sequence[bytes],
    others: Sequence[Storage] = (),
    numerics: str | None = None,
) -> dict[bytes, ImageRow]:
    """What the ledgers of a snapshot's folder and of `others` hold of images, of numerics that its run used where there are some.

    `numerics` are the run's own where they are known: it preferred these. Memory: facts and embeddings. Raises BadRequest where some
    are missing.
    """
    encoders = [text.partition(" ")[::2] for text in snapshot.manifest.versions.get("encoders", ())]
    ours = {numerics for _, numerics in encoders} if numerics is None else {numerics}
    decoder = decoder_of(snapshot.manifest.options.get("decode", "exact"))
    id_of = {
        image_key(image_id, decoder, fingerprint): image_id
        for fingerprint in sorted({fingerprint for fingerprint, _ in encoders})
        for image_id in image_ids
    }
    rows: dict[bytes, ImageRow] = {}

    def rank(row: ImageRow) -> Any:
        return row.numerics not in ours, row

    storages = [snapshot.storage, *others]
    for storage in storages:
        for row in Ledger(storage, ImageRow).matching(id_of):
            image_id = id_of[row.key]
            if not row.code and (image_id not in rows or rank(row) < rank(rows[image_id])):
                rows[image_id] = row
    missing = len(image_ids) - len(rows)
    if missing:
        asked = ", ".join(f"{storage.root}/ledger" for storage in storages)
        elsewhere = ", without --reuse-from" if len(storages) == 1 else ""
        raise BadRequest(
            f"{asked}: knows nothing of {missing:,} of the {len(image_ids):,} images wanted of it; run"
            f" `shardmill curate` again with the same options{elsewhere}"
        )
    return rows
