"""What a training saves of itself, as bytes that tell whether they are whole."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import torch

_DIGEST_BYTES = hashlib.sha256().digest_size


def pack(values: dict[str, Any]) -> bytes:
    """Tensors, numbers, words, and lists and dicts of them, behind their own SHA-256."""
    file = io.BytesIO()
    torch.save(values, file)
    data = file.getvalue()
    return hashlib.sha256(data).digest() + data


def unpack(data: bytes) -> dict[str, Any] | None:
    """What `pack` was given, on the CPU; None where the bytes are not all that it wrote."""
    digest, rest = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(rest).digest() != digest:
        return None
    return torch.load(io.BytesIO(rest), map_location="cpu", weights_only=True)
