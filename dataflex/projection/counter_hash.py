"""Random bits as a pure function of a seed and an index."""

from __future__ import annotations

from typing import TypeVar

import torch

MASK = 0xFFFFFFFF

IntOrTensor = TypeVar("IntOrTensor", int, torch.Tensor)


def hash32(values: IntOrTensor) -> IntOrTensor:
    """MurmurHash3's 32-bit finalizer, on an int or an int64 tensor below 2³² (Appleby, public domain)."""
    values = ((values ^ (values >> 16)) * 0x85EBCA6B) & MASK
    values = ((values ^ (values >> 13)) * 0xC2B2AE35) & MASK
    return values ^ (values >> 16)


def counter_hash(seed: int, stream: int, counters: IntOrTensor) -> IntOrTensor:
    """32 random bits for each counter (an int, or an int64 tensor, below 2⁶³), independent by `seed` and `stream`."""
    key = hash32(hash32(seed & MASK) ^ hash32((seed >> 32 & MASK) + 0x9E3779B9 + stream & MASK))
    high = hash32((counters >> 32) ^ key)
    return hash32((counters & MASK) ^ hash32(high + 0x632BE5AB & MASK))
