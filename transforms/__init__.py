"""The stages, one file each, in the order the data flows: thin Beam wiring around `images`, `embeddings`, `synthesis`, `shards`.

Importing it gives every record a RowCoder: deterministic, and a third of pickle's time.
"""

from apache_beam import coders

from embeddings import contamination
from shards import ledger, records, snapshot

for _record in (
    records.SourceImage,
    records.SourceSample,
    records.EmbeddedImage,
    records.Verdict,
    records.TaggedImage,
    records.ImageFate,
    records.NamedImage,
    records.PlannedType,
    records.PlannedImage,
    records.Sample,
    records.Decision,
    records.DeadLetter,
    records.ShardFile,
    snapshot.StoredPack,
    ledger.Segment,
    ledger.RefRow,
    ledger.ImageRow,
    contamination.Print,
    contamination.Contact,
    contamination.BenchmarkCounts,
):
    coders.registry.register_coder(_record, coders.RowCoder)
