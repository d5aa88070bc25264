"""What Ray Data maps over batches: Arrow table in, Arrow table out. Nothing here knows Ray.

::

    manifest rows --read.read_photos--> facts, measurements, crops --encode.Encode--> embeddings
    embeddings    --caption.Caption, where asked for--> embeddings with captions --score.Score--> scores

A row that fails keeps its identity, gets `error_kind` and `error_message`, and travels on with nulls. Each stage is a
module of its own because its workers load what it needs and no more: readers never import torch, nor do scorers.
"""

from collections.abc import Callable

#: Told how many rows were finished and how many of them have an error.
Report = Callable[[int, int], None]

#: Columns between read and encode: the raw uint8 crop of each encoder, and of the captioner where it wants another.
CROP_COLUMNS = ("clip_crop", "dinov2_crop", "captioner_crop")
