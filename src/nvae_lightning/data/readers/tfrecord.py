"""Glow's TFRecords of CelebA HQ and ImageNet 32, in their tar archive or unpacked.

A record is a ``tf.train.Example`` with ``shape`` (height, width, channels) and ``data``, the
pixels. Shards are ``train/train-r08-s-0000-of-0040.tfrecords`` and so on: r08 is a side of 2^8.
Source: Kingma & Dhariwal 2018, whose splits the NVAE paper follows.
"""

import re
import struct
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from nvae_lightning.data.files import check_bytes
from nvae_lightning.data.readers.base import (
    Source,
    Splits,
    Wanted,
    check_splits,
    from_pixels,
    require,
    split_name,
)
from nvae_lightning.data.readers.container import Container

_SHARD = re.compile(r"\.tfrecords?$", re.IGNORECASE)
_RESOLUTION = re.compile(r"-r(\d\d)-")
_HEADER = struct.Struct("<QI")  # length of the record and its masked CRC-32C
_FOOTER = struct.Struct("<I")  # masked CRC-32C of the record


class TFRecords(Source):
    """Records of some shards of a container.

    Args:
        container: Container of the shards.
        shards: Paths of the shards in the container.

    Raises:
        ValueError: If a shard ends within a record.
    """

    def __init__(self, container: Container, shards: Sequence[str]) -> None:
        self.container = container
        self.places = [
            (shard, offset, length)
            for shard in shards
            for offset, length in _records(container, shard)
        ]
        super().__init__([f"{shard}@{offset}" for shard, offset, _ in self.places])

    def image(self, index: int) -> Image.Image:
        """Return an image.

        Raises:
            ValueError: If the record is damaged.
        """
        example_pb2 = require("tfrecord.example_pb2", "tfrecord")
        shard, offset, length = self.places[index]
        with self.container.open(shard) as file:
            check_bytes(length)
            file.seek(offset)
            record = file.read(length)
            (checksum,) = _FOOTER.unpack(file.read(_FOOTER.size))
        if checksum != _masked_crc(record):
            raise ValueError("its checksum does not match its bytes; fetch the shard again")
        features = example_pb2.Example.FromString(record).features.feature
        for name in ("shape", "data"):
            if name not in features:
                raise ValueError(f"the record has no feature '{name}', but {', '.join(features)}")
        shape = tuple(features["shape"].int64_list.value)
        values = features["data"].bytes_list.value
        if len(shape) != 3 or shape[2] not in (1, 3) or not values:
            raise ValueError(f"the record has pixels of shape {shape}, not a grey or colour image")
        return from_pixels(np.frombuffer(values[0], np.uint8).reshape(shape))


def find(container: Container, wanted: Wanted) -> Splits | None:
    """Find the shards of a container.

    Of several resolutions, choose the smallest that is large enough, or else the largest.

    Raises:
        ValueError: If a split is missing or a shard is damaged.
    """
    path = container.path
    shards = [name for name in container.names if _SHARD.search(name)]
    if not shards:
        return None
    sides = {2 ** _resolution(shard) for shard in shards}
    side = min((s for s in sides if s >= wanted.image_size), default=max(sides))
    by_split: dict[str, list[str]] = {}
    for shard in shards:
        name = PurePosixPath(shard)
        which = split_name(name.parent.name) or split_name(re.split(r"[-_.]", name.name)[0])
        if which is not None and 2 ** _resolution(shard) == side:
            by_split.setdefault(which, []).append(shard)
    if not by_split:
        raise ValueError(
            f"'{path}' has TFRecords, but none in a folder train or validation; move them there"
        )
    splits = check_splits(by_split, f"'{path}'")
    read = {shard for chosen in splits.values() for shard in chosen}
    reason = "TFRecords of another resolution, or in a folder that is not a split"
    left_out = container.unread(read, dict.fromkeys(shards, reason))
    sources = {name: TFRecords(container, chosen) for name, chosen in splits.items()}
    return Splits("TFRecords", sources, left_out)


def _resolution(shard: str) -> int:
    match = _RESOLUTION.search(shard)
    return int(match[1]) if match else 0


def _records(container: Container, shard: str) -> list[tuple[int, int]]:
    """Return offset and length of each record."""
    found = []
    with container.open(shard) as file:
        file.seek(0, 2)
        end = file.tell()
        position = 0
        while position < end:
            file.seek(position)
            header = file.read(_HEADER.size)
            length = _HEADER.unpack(header)[0] if len(header) == _HEADER.size else end
            start = position + _HEADER.size
            position = start + length + _FOOTER.size
            if position > end or _masked_crc(header[:8]) != _HEADER.unpack(header)[1]:
                raise ValueError(
                    f"'{container.path}': the shard {shard} is damaged at byte {start}; "
                    "fetch it again"
                )
            found.append((start, length))
    return found


def _masked_crc(data: bytes) -> int:
    """Return the CRC-32C of `data` as TFRecords store it: rotated by 15 bits, plus a constant."""
    crc = require("crc32c", "tfrecord").crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
