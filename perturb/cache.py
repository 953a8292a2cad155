"""Results on disk, by the hash of what determines them; old and many ones go. Arrays and JSON, never pickles.

An arm (the pictures of one set of cells with one perturbation) is stored apart from the comparison of two arms, so that
moving a slider leaves the unedited arm as it is.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ge2hist_core.files import atomic_path, write_json
from ge2hist_core.types import BadInput

__all__ = ["DiskCache", "engine_fingerprint", "report_folder", "versions"]

_KEY = re.compile(r"[0-9a-f]{64}")


@functools.cache
def engine_fingerprint() -> str:
    """16 hexadecimal digits that change when this project's code or the libraries behind its numbers change."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for package in ("ge2hist_core", "perturb"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    for name in ("torch", "diffusers", "numpy", "scipy"):
        digest.update(f"{name} {importlib.metadata.version(name)}".encode())
    return digest.hexdigest()[:16]


LIBRARIES = ("torch", "diffusers", "numpy", "scipy", "pandas")


def versions() -> dict[str, str]:
    """What the last digits of a result depend on besides its recipe: Python, libraries, processor and threads.

    Sums are split among torch's threads, and rounded as the processor's vector units round.
    """
    import torch

    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
    }


class DiskCache:
    """Arrays (``.npz``) and JSON values by 64-digit key in one folder, shared by threads and processes.

    Parameters
    ----------
    folder: created when something is stored. Each version of the engine has its own part.
    max_bytes, max_age_s: after a store, entries unused for longer, then the longest unused ones, are removed.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 2**30, max_age_s: float = 30 * 86400.0) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.max_age_s = max_age_s

    def _path(self, key: str, suffix: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"cache key is {key!r}: expected 64 hexadecimal digits")
        return self.folder / engine_fingerprint() / f"{key}{suffix}"

    def load_arrays(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays stored under ``key``, or None. A damaged file counts as absent and is removed."""
        path = self._path(key, ".npz")
        try:
            with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            os.utime(path)
        except OSError:  # not there, or not to be opened just now
            return None
        except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
            path.unlink(missing_ok=True)
            return None
        return arrays

    def store_arrays(self, key: str, arrays: dict[str, np.ndarray]) -> None:
        """Keep arrays of numbers and fixed-width text.

        Raises
        ------
        ValueError: an array of Python objects.
        """
        if any(array.dtype.hasobject for array in arrays.values()):
            raise ValueError("arrays of Python objects are not stored")
        with atomic_path(self._path(key, ".npz")) as temporary:
            np.savez_compressed(temporary, allow_pickle=False, **arrays)
        self.prune()

    def load_json(self, key: str) -> Any:
        """The value stored under ``key``, or None. A damaged file counts as absent and is removed."""
        path = self._path(key, ".json")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            os.utime(path)
        except OSError:  # not there, or not to be opened just now
            return None
        except (ValueError, RecursionError):
            path.unlink(missing_ok=True)
            return None
        return value

    def store_json(self, key: str, value: Any) -> None:
        """Keep a JSON value (no NaN)."""
        write_json(self._path(key, ".json"), value)
        self.prune()

    def prune(self) -> None:
        """Remove entries unused for ``max_age_s``, then the longest unused until ``max_bytes`` hold the rest."""
        entries = []
        for path in self.folder.glob("*/*"):
            try:
                entries.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:  # another process pruned it
                continue
        oldest, total = time.time() - self.max_age_s, 0
        for used, size, path in sorted(entries, reverse=True):
            total += size
            if used < oldest or total > self.max_bytes:
                path.unlink(missing_ok=True)


MARK = ".ge2hist"
"""Hidden file of a report's folder: the hash of what the report is about."""


@contextmanager
def report_folder(out: str | Path, cache: str | Path | None, key: str) -> Iterator[DiskCache]:
    """Make sure that a report can be written before anything is drawn, and give the cache to draw with.

    Without a cache of the user's own, finished work is kept in ``out/.work`` until the report is written: what was
    interrupted goes on with the same command.

    Parameters
    ----------
    out: of the report. key: hash of what it is about.

    Raises
    ------
    BadInput: a folder that cannot be written, or that holds another report: files of both would be mixed.
    """
    out, kept = Path(out), Path(cache) if cache else Path(out) / ".work"
    mark = out / MARK
    try:
        held = mark.read_text(encoding="utf-8") if mark.is_file() else None
        if held != key and out.is_dir() and any(path.name != ".work" for path in out.iterdir()):
            raise BadInput(f"--out {out} is not empty and holds no report of this very work: give a new folder.")
        for folder in (out, kept):
            folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(mark) as temporary:
            temporary.write_text(key, encoding="utf-8")
        with atomic_path(kept / "writable") as temporary:
            temporary.touch()
        (kept / "writable").unlink()
    except OSError as error:
        raise BadInput(f"Cannot write to {error.filename} ({error.strerror}): give another --out or --cache.") from None
    yield DiskCache(kept)
    if not cache:
        shutil.rmtree(kept, ignore_errors=True)
