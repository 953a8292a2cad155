"""Named, seeded random streams, always drawn on the CPU.

Every random draw of the project comes from ``stream(seed, name, *index)``. Streams with different names or
indices are independent, so that adding one consumer never shifts another, and picture 17 is the same picture in
a batch of any size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["hash_keys", "normal", "pair_uniforms", "stream", "uniforms"]


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


def hash_keys(seed: int, name: str, keys: Sequence[str], *index: int | str) -> np.ndarray:
    """One 64-bit hash per key, ``[key]`` uint64, each depending on (seed, name, index, key) alone."""
    prefix = hashlib.blake2b("\x1f".join([str(int(seed)), name, *map(str, index), ""]).encode(), digest_size=8)
    out = np.empty(len(keys), dtype=np.uint64)
    for i, key in enumerate(keys):
        h = prefix.copy()
        h.update(key.encode())
        out[i] = int.from_bytes(h.digest(), "little")
    return out


def uniforms(seed: int, name: str, keys: Sequence[str], *index: int | str) -> np.ndarray:
    """One number in [0, 1) per key, ``[key]`` float64, each depending on (seed, name, index, key) alone.

    A hash, not a sequence: removing or reordering keys leaves the numbers of the others as they are.
    """
    return _unit(hash_keys(seed, name, keys, *index))


def pair_uniforms(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One number in [0, 1) per pair of hashes, float64, of the shape to which ``a`` and ``b`` broadcast.

    For numbers per (cell, gene): hash each cell and each gene once with :func:`hash_keys` (under different names),
    then mix in bulk. As with :func:`uniforms`, no pair's number depends on which other pairs are asked for.

    Parameters
    ----------
    a, b: uint64 arrays from :func:`hash_keys`.

    References
    ----------
    The mixer is the output function of SplitMix64: Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195.
    """
    z = np.bitwise_xor(a, b)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return _unit(z ^ (z >> np.uint64(31)))


def _unit(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(seed: int, name: str, shape: tuple[int, ...], *index: int | str) -> torch.Tensor:
    """Standard normal float32 tensor of the given shape from one named stream."""
    return torch.from_numpy(stream(seed, name, *index).standard_normal(shape, dtype=np.float32))
