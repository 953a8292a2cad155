"""Loading ahead: the same pieces in the same order, whatever the number of workers; shares of a batch."""

from __future__ import annotations

import threading
import time

import pytest

from ge2hist_core.loader import ahead, share
from ge2hist_core.types import BadInput


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_pieces_come_in_order_though_the_first_take_longest(workers: int):
    def make(i: int) -> int:
        time.sleep(0.002 * (20 - i))
        return i * i

    assert list(ahead(make, range(20), workers)) == [i * i for i in range(20)]


def test_pieces_are_made_by_threads_and_no_more_than_needed_ahead():
    made: list[int] = []
    names = set()

    def make(i: int) -> int:
        made.append(i)
        names.add(threading.current_thread().name)
        return i

    pieces = ahead(make, range(1000), 2)
    assert [next(pieces), next(pieces)] == [0, 1]
    pieces.close()
    assert len(made) <= 1 + 2 * (2 + 1) and all(name.startswith("loader") for name in names)


def test_an_error_comes_where_its_piece_is_due():
    def make(i: int) -> int:
        if i == 3:
            raise BadInput("piece 3")
        return i

    pieces = ahead(make, range(10), 2)
    assert [next(pieces) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(BadInput, match="piece 3"):
        next(pieces)


def test_shares_of_all_processes_make_up_the_batch():
    whole = list(range(24))
    shares = [whole[part] for index in range(3) for part in share("batch_size", 24, 3, index, 4)]
    assert all(len(part) == 2 for part in shares) and sum(shares, []) == whole
    with pytest.raises(BadInput, match="batch_size is 10, which 2 processes with 2 .* choose a multiple of 4"):
        share("batch_size", 10, 2, 0, 2)
