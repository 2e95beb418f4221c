"""zstd sections: byte planes, then independent frames of at most 1 MiB of content each."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import zstandard
from numpy.typing import NDArray

from adaptrt.errors import ChecksumError, FormatError
from adaptrt.tensor import PLAIN_ITEM_BYTES, align

FRAME_BYTES = 1 << 20  # content of every frame but the last
MAX_RATIO = 256  # content to stored bytes of a section; bounds what a small file can make a reader allocate
LEVEL = 9  # pinned: the same input must give the same bytes
PLANES = (1, 2, 4)

Bytes = NDArray[np.uint8]


def choose_planes(sizes: Sequence[tuple[str, int]]) -> int:
    """Item size that most bytes of a section have: splitting by it puts like bytes (exponents) side by side.

    `sizes` lists (dtype, bytes) of the section's tensors.
    """
    totals = dict.fromkeys(PLANES, 0)
    for dtype, nbytes in sizes:
        totals[PLAIN_ITEM_BYTES.get(dtype, 1)] += nbytes
    return max(PLANES, key=lambda planes: (totals[planes], -planes))


def compress(data: Bytes, planes: int) -> list[bytes]:
    """Frames of `data`, whose size is a multiple of 64."""
    split = np.concatenate([data[plane::planes] for plane in range(planes)])
    compressor = zstandard.ZstdCompressor(
        level=LEVEL, write_checksum=False, write_content_size=True, write_dict_id=False
    )
    return [
        compressor.compress(split[start : start + FRAME_BYTES].data)
        for start in range(0, split.size, FRAME_BYTES)
    ]


def pays(nbytes: int, stored: int, page: int) -> bool:
    """Whether compression saves at least a page and stays within the bounded ratio."""
    return align(stored, page) < align(nbytes, page) and nbytes <= MAX_RATIO * stored


def decompress(stored: Bytes, frames: Sequence[int], nbytes: int, planes: int, crc32: int) -> Bytes:
    """The `nbytes` of content; the caller has checked that they are at most MAX_RATIO times the stored bytes.

    Raises ChecksumError or FormatError, naming the frame.
    """
    if zlib.crc32(stored.data) != crc32:
        raise ChecksumError("stored bytes do not match their CRC-32")
    split = np.empty(nbytes, np.uint8)
    start = 0
    for number, frame_bytes in enumerate(frames):
        part = split[number * FRAME_BYTES : (number + 1) * FRAME_BYTES]
        part[:] = np.frombuffer(
            _decompress_frame(stored[start : start + frame_bytes], part.size, number), np.uint8
        )
        start += frame_bytes
    return _join(split, planes)


def _join(split: Bytes, planes: int) -> Bytes:
    """Interleave byte planes; plane by plane is ten times faster than one transposing copy."""
    joined = np.empty((split.size // planes, planes), np.uint8)
    for number, plane in enumerate(split.reshape(planes, -1)):
        joined[:, number] = plane
    return joined.reshape(-1)


def _decompress_frame(frame: Bytes, nbytes: int, number: int) -> bytes:
    if frame[:4].tobytes() != zstandard.FRAME_HEADER:  # leaves out skippable frames
        raise FormatError(f"frame {number} is no zstd frame")
    try:
        declared = zstandard.get_frame_parameters(frame.data).content_size
        if declared != nbytes:
            raise FormatError(f"frame {number} declares {declared} bytes, expected {nbytes}")
        return zstandard.ZstdDecompressor().decompress(
            frame.data, max_output_size=nbytes, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise FormatError(f"frame {number}: {error}") from error
