"""Loading ahead: threads prepare the next pieces of work while the current one is computed.

A piece depends on its number alone, with its draws from streams named by that number, and pieces come out in order, so
what is learned is the same with any number of workers. Workers are threads: decoding pictures, drawing numbers and
copying arrays leave Python's lock free, the decoded chunks of a store are shared, and nothing has to be copied into
other processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ge2hist_core.types import BadInput

__all__ = ["ahead", "share"]

Number = TypeVar("Number")
Piece = TypeVar("Piece")


def ahead(make: Callable[[Number], Piece], numbers: Iterable[Number], workers: int) -> Generator[Piece, None, None]:
    """``make(number)`` for each number, in order; ``workers`` threads keep two pieces each ready.

    With 0 workers each piece is made when it is asked for. An error of ``make`` is raised where its piece is due.
    Closing the iterator drops the pieces that nobody asked for.
    """
    if workers == 0:
        yield from map(make, numbers)
        return
    waiting: deque[Future[Piece]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="loader") as pool:
        try:
            for number in numbers:
                waiting.append(pool.submit(make, number))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for piece in waiting:
                piece.cancel()


def share(name: str, size: int, processes: int, index: int, parts: int = 1) -> list[slice]:
    """Where process ``index`` finds its ``parts`` equal parts of a batch of ``size``.

    Raises
    ------
    BadInput: the batch cannot be cut into equal parts; ``name`` is its setting.
    """
    each, left = divmod(size, processes * parts)
    if left or not each:
        raise BadInput(
            f"{name} is {size}, which {processes} processes with {parts} accumulation steps cannot share evenly: "
            f"choose a multiple of {processes * parts}."
        )
    first = index * parts
    return [slice(each * i, each * (i + 1)) for i in range(first, first + parts)]
