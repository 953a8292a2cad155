"""Named, seeded random streams, always drawn on the CPU.

Every random draw of the project comes from ``stream(seed, name, *index)``. Streams with different names or
indices are independent, so that adding one consumer never shifts another, and picture 17 is the same picture in
a batch of any size.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

__all__ = ["normal", "stream", "uniforms"]


def _key(seed: int, name: str, index: tuple[int | str, ...]) -> int:
    text = "\x1f".join([str(int(seed)), name, *(str(part) for part in index)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def stream(seed: int, name: str, *index: int | str) -> np.random.Generator:
    """Independent generator for one consumer.

    Parameters
    ----------
    seed: the user's seed.
    name: what the draws are for, e.g. ``"x_T"``.
    index: anything that tells draws of the same name apart (cell id, gene, step).
    """
    return np.random.Generator(np.random.Philox(key=_key(seed, name, index)))


def uniforms(seed: int, name: str, keys: list[str], *index: int | str) -> np.ndarray:
    """One number in [0, 1) per key, ``[key]`` float64, each depending on (seed, name, index, key) alone.

    A hash, not a sequence: removing or reordering keys leaves the numbers of the others as they are.
    """
    prefix = hashlib.blake2b("\x1f".join([str(int(seed)), name, *map(str, index), ""]).encode(), digest_size=8)
    out = np.empty(len(keys), dtype=np.float64)
    for i, key in enumerate(keys):
        h = prefix.copy()
        h.update(key.encode())
        out[i] = (int.from_bytes(h.digest(), "little") >> 11) * 2.0**-53
    return out


def normal(seed: int, name: str, shape: tuple[int, ...], *index: int | str) -> torch.Tensor:
    """Standard normal float32 tensor of the given shape from one named stream."""
    return torch.from_numpy(stream(seed, name, *index).standard_normal(shape, dtype=np.float32))
