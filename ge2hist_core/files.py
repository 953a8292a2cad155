"""Writing files so that a reader never meets half of one, and reading JSON and tables that may be damaged."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ge2hist_core.types import BadInput

__all__ = ["atomic_folder", "atomic_path", "parse_json", "separator_line", "sha256_file", "write_json"]

MAX_DEPTH = 50
"""Brackets within brackets in JSON, many times what any file of GE2Hist has. Python's own limit depends on the caller,
and what is nested almost as deep cannot be printed in a message."""


_UMASK = os.umask(0o022)
os.umask(_UMASK)


def _share(path: Path) -> None:
    """Give a file the rights that new files have: some writers make it readable to its owner alone."""
    if path.is_file() and not path.is_symlink():
        path.chmod(0o666 & ~_UMASK)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file path beside ``path``; it takes that name only if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers such as numpy, PIL and anndata look at it.
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield temporary
        _share(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """As :func:`atomic_path` for a whole folder. An existing folder of that name is replaced at the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _share(file)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN is refused: a reader in another language cannot parse it."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def parse_json(text: str | bytes, what: str, cure: str) -> Any:
    """The value of a JSON text that a user may have given.

    Parameters
    ----------
    text: characters, or bytes in UTF-8, UTF-16 or UTF-32.
    what, cure: begin and end of the sentence that refuses the text, such as "The recipe" and "give a recipe.json".

    Raises
    ------
    BadInput: not JSON, nested more than 50 deep, or a whole number of more than 4300 digits.
    """
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{what} is not valid JSON ({error}): {cure}.") from None
    except ValueError:  # Python refuses to convert so many digits
        raise BadInput(f"{what} has a whole number of thousands of digits: {cure}.") from None
    except RecursionError:
        value = None
        depth = MAX_DEPTH + 1
    else:
        depth = _depth(value)
    if depth > MAX_DEPTH:
        raise BadInput(f"{what} is nested more than {MAX_DEPTH} deep: {cure}.")
    return value


def _depth(value: Any) -> int:
    """Lists and dicts within each other, counted as far as one beyond the limit."""
    depth, level = 0, [value]
    while (level := [node for node in level if isinstance(node, list | dict)]) and depth <= MAX_DEPTH:
        depth += 1
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    return depth


def separator_line(line: str) -> str | None:
    """The separator that a table's first line states, as ``sep=;`` does for Excel; None for any other line."""
    stated = re.fullmatch(r'"?sep=([,;|\t])"?\s*', line, re.IGNORECASE)
    return stated and stated[1]


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
