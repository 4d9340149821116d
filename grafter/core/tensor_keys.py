"""The keys under which a rank announces single tensors."""

from __future__ import annotations

# Begins the key of one tensor's point; keys of modules begin with their names.
_TENSOR_MARK = "\t"


def is_tensor_key(key: str) -> bool:
    """Of what a rank has announced: whether it is one tensor's."""
    return key.startswith(_TENSOR_MARK)
