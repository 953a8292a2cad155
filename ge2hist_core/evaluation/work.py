"""Where a long evaluation keeps what it has drawn: one folder, a file per block, each written atomically.

A block's name is a hash of all that decides its content, so that nothing old is taken for new and a run that was
stopped goes on where it was. The files are a cache: deleting the folder costs time alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ge2hist_core.files import atomic_path

__all__ = ["BLOCK", "Kept", "Work"]

SCHEMA = 1
BLOCK = 16
"""Pictures per file: what an interrupted run loses at most."""


class Work:
    """Results by what decides them.

    Parameters
    ----------
    folder: None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def missing(self, asked: list[Any], n: int, block: int = BLOCK) -> int:
        """How many of ``n`` rows are still to be computed."""
        return sum(len(at) for path, at in self._parts(asked, n, block) if path is None or not path.is_file())

    def blocks(
        self, asked: list[Any], n: int, compute: Callable[[np.ndarray], np.ndarray], title: str, block: int = BLOCK
    ) -> np.ndarray:
        """Rows ``0 .. n-1`` of a result, computed block by block with a progress bar.

        Parameters
        ----------
        asked: plain JSON that decides the result. n: rows.
        compute: positions ``[k]`` -> rows ``[k, ...]``; a row depends on neither its block nor its neighbours.
        title: of the progress bar, which only shows when there is something to compute.
        """
        from tqdm import tqdm

        out = []
        with tqdm(total=n, desc=title, disable=self.missing(asked, n, block) == 0) as bar:
            for path, at in self._parts(asked, n, block):
                values = _read(path)
                if values is None or len(values) != len(at):
                    values = compute(at)
                    if path is not None:
                        _write(path, values)
                out.append(values)
                bar.update(len(at))
        return np.concatenate(out)

    def array(self, asked: list[Any], compute: Callable[[], np.ndarray]) -> np.ndarray:
        """One result as a whole."""
        path = None if self.folder is None else self.folder / f"{_name(asked)}.npy"
        values = _read(path)
        if values is None:
            values = compute()
            if path is not None:
                _write(path, values)
        return values

    def _parts(self, asked: list[Any], n: int, block: int) -> Iterator[tuple[Path | None, np.ndarray]]:
        folder = None if self.folder is None else self.folder / _name([*asked, n, block])
        for start in range(0, n, block):
            yield folder and folder / f"{start:06d}.npy", np.arange(start, min(start + block, n))


class Kept:
    """Features or distances of pictures that are computed once.

    Parameters
    ----------
    features: called, and asked for ``distance`` where it has one. asked: decides, with the pictures, the result.
    """

    def __init__(self, features: Any, asked: list[Any], work: Work) -> None:
        self.features, self.asked, self.work = features, asked, work
        self.name: str = features.name

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.work.array(["features", *self.asked, _digest(images)], lambda: self.features(images))

    def distance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        asked = ["distance", *self.asked, _digest(a), _digest(b)]
        return self.work.array(asked, lambda: self.features.distance(a, b))


def _digest(images: np.ndarray) -> str:
    head = json.dumps([str(images.dtype), images.shape]).encode()
    return hashlib.sha256(head + np.ascontiguousarray(images).tobytes()).hexdigest()


def _name(asked: list[Any]) -> str:
    return hashlib.sha256(json.dumps([SCHEMA, *asked]).encode()).hexdigest()[:32]


def _read(path: Path | None) -> np.ndarray | None:
    if path is None or not path.is_file():
        return None
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError):
        return None  # damaged: it is made again


def _write(path: Path, values: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        np.save(temporary, values, allow_pickle=False)
