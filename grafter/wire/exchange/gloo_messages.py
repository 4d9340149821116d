"""What gloo sends as one message: chunks of large pieces, and several small pieces together.

Both ends compute the same messages from the shapes and dtypes of the pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from grafter.core.processes import Abandoned
from grafter.wire.exchange.staging import as_tensor

# A piece that is not contiguous in CPU memory is sent through two buffers of this size.
CHUNK_BYTES = 8 << 20
# Pieces up to this size share a message; each message takes a round trip.
SMALL_BYTES = 256 << 10
# How many messages a sender has under way at a time.
IN_FLIGHT = 2


def parcels(sizes: Sequence[int]) -> Iterator[range]:
    """Which neighbouring pieces share a message, by their numbers of bytes: small ones, up to a chunk. Pure."""
    start = together = 0
    for number, nbytes in enumerate(sizes):
        if nbytes > SMALL_BYTES or together + _aligned(nbytes) > CHUNK_BYTES:
            if number > start:
                yield range(start, number)
            start, together = number, 0
            if nbytes > SMALL_BYTES:
                yield range(number, number + 1)
                start = number + 1
                continue
        together += _aligned(nbytes)
    if len(sizes) > start:
        yield range(start, len(sizes))


def _aligned(nbytes: int) -> int:
    """Parts of a message are aligned for every dtype."""
    return -(-nbytes // 16) * 16


def messages_of(tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The messages that send these tensors to one peer: uint8, contiguous, in CPU memory."""
    for parcel in parcels([tensor.numel() * tensor.element_size() for tensor in tensors]):
        if len(parcel) == 1:
            yield from _readable_chunks(tensors[parcel[0]])
            continue
        parts = [tensors[number] for number in parcel]
        message = torch.empty(sum(_aligned(part.numel() * part.element_size()) for part in parts), dtype=torch.uint8)
        for place, part in _places(message, parts):
            _read_into(place, part)
        yield message


def _places(message: torch.Tensor, parts: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each part's place in a message, as a contiguous tensor of its dtype and shape; with the part."""
    offset = 0
    for part in parts:
        nbytes = part.numel() * part.element_size()
        yield as_tensor(message[offset : offset + nbytes], part.dtype, tuple(part.shape)), part
        offset += _aligned(nbytes)


def landings_of(tensors: Sequence[torch.Tensor]) -> Iterator[Landing]:
    """The messages that one peer sends for these tensors, and where their bytes belong."""
    for parcel in parcels([tensor.numel() * tensor.element_size() for tensor in tensors]):
        parts = [tensors[number] for number in parcel]
        if len(parts) > 1:
            yield Landing(parts, sum(_aligned(part.numel() * part.element_size()) for part in parts))
            continue
        shape, itemsize = tuple(parts[0].shape), parts[0].element_size()
        indices = [index for index, _ in _split(shape, itemsize, CHUNK_BYTES)]
        for index, nbytes in zip(indices, chunk_sizes(shape, itemsize), strict=True):
            yield Landing([parts[0][index] if index else parts[0]], nbytes)


@dataclass(frozen=True)
class Landing:
    """The parts of staged values that one message carries."""

    parts: Sequence[torch.Tensor]
    nbytes: int

    def room(self) -> torch.Tensor:
        """Memory to receive into: the part itself if it is contiguous, else a buffer of at most a chunk."""
        if self._is_contiguous:
            return _as_bytes(self.parts[0])
        return torch.empty(self.nbytes, dtype=torch.uint8)

    def unpack(self, message: torch.Tensor) -> None:
        """Copy a message that was received into a buffer to its parts."""
        if not self._is_contiguous:
            for place, part in _places(message, self.parts):
                part.copy_(place)

    @property
    def _is_contiguous(self) -> bool:
        return len(self.parts) == 1 and self.parts[0].is_contiguous()


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def _split(shape: Sequence[int], itemsize: int, limit: int) -> Iterator[tuple[tuple[slice | int, ...], int]]:
    """Indices that cut a tensor into parts of at most `limit` bytes, in row-major order; with each part's bytes."""
    row_bytes = itemsize
    for size in shape[1:]:
        row_bytes *= size
    if not shape or shape[0] * row_bytes <= limit:
        nbytes = row_bytes * shape[0] if shape else itemsize
        if nbytes:
            yield (), nbytes
        return
    if row_bytes <= limit:
        rows = limit // row_bytes
        for start in range(0, shape[0], rows):
            stop = min(start + rows, shape[0])
            yield (slice(start, stop),), (stop - start) * row_bytes
        return
    for row in range(shape[0]):
        for index, nbytes in _split(shape[1:], itemsize, limit):
            yield (row, *index), nbytes


def chunk_sizes(shape: Sequence[int], itemsize: int) -> Iterator[int]:
    """The numbers of bytes of the chunks of a tensor of this shape. Pure; both ends compute them."""
    for _, nbytes in _split(shape, itemsize, CHUNK_BYTES):
        yield nbytes


def _readable_chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The chunks of a tensor. Raises Abandoned if it cannot be read, which is not the peer's fault."""
    try:
        yield from chunks_of(tensor)
    except RuntimeError as error:
        raise Abandoned(f"a sender cannot read its tensor: {first_line(error)}") from error


def _read_into(place: torch.Tensor, tensor: torch.Tensor) -> None:
    try:
        place.copy_(tensor.detach())
    except RuntimeError as error:
        raise Abandoned(f"a sender cannot read its tensor: {first_line(error)}") from error


def chunks_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor as contiguous uint8 chunks in CPU memory; a chunk is copied only if it is not that already."""
    plain = tensor.detach()
    # A copy also does the conjugation and negation that torch has deferred.
    as_it_lies = plain.device.type == "cpu" and not plain.is_conj() and not plain.is_neg()
    buffers: list[torch.Tensor] = []
    for number, (index, nbytes) in enumerate(_split(tuple(plain.shape), plain.dtype.itemsize, CHUNK_BYTES)):
        part = plain[index] if index else plain
        if as_it_lies and part.is_contiguous():
            yield part.reshape(-1).view(torch.uint8)
            continue
        # At most `IN_FLIGHT` messages are under way, so the chunk that was in this buffer has been sent.
        turn = number % IN_FLIGHT
        if turn == len(buffers):
            buffers.append(torch.empty(nbytes, dtype=torch.uint8, pin_memory=part.device.type == "cuda"))
        elif buffers[turn].numel() < nbytes:
            buffers[turn] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=part.device.type == "cuda")
        chunk = buffers[turn][:nbytes]
        chunk.view(part.dtype).view(part.shape).copy_(part)
        yield chunk


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
