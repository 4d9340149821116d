"""A checksum of a tensor's values, by which ranks that hold copies of it are compared without sending them."""

from __future__ import annotations

import hashlib

import torch

from grafter.core.measures.flat_chunks import FlatReader

# Parts that are hashed at once.
_STEP = 1 << 20


def checksum_of_values(tensor: torch.Tensor) -> str:
    """SHA-256 of dtype, shape, and the values in the order of the flattened index, whatever the strides and the device.

    Every NaN counts as the same one; -0.0 and 0.0 are two values.
    """
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    reader = FlatReader(tensor)
    for start in range(0, reader.parts, _STEP):
        parts = reader.read(start, min(start + _STEP, reader.parts)).cpu()
        nan = parts != parts if parts.dtype.is_floating_point else None
        if nan is not None and bool(nan.any()):
            parts = parts.masked_fill(nan, torch.nan)
        found.update(parts.view(torch.uint8).numpy().data)
    return found.hexdigest()
