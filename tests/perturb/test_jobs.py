"""Jobs wait on events, not on the clock: each test says itself when the work goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from ge2hist_core.config import SampleConfig
from ge2hist_core.model import GE2Hist
from ge2hist_core.sampler import Stopped
from ge2hist_core.types import BadInput, Cells
from perturb.cache import DiskCache
from perturb.edits import Perturbation
from perturb.jobs import REMEMBERED, QueueFull, Worker
from perturb.recipe import Recipe
from perturb.result import load_result
from perturb.run import Progress, run

PATIENCE = 120.0
"""Seconds until a hanging test fails; nothing is asserted about time."""


class Gate:
    """Work that reports once, then goes on when told to, or stops when cancelled."""

    def __init__(self) -> None:
        self.running, self.go, self.runs = threading.Event(), threading.Event(), 0

    def __call__(self, on_progress, cancel: threading.Event) -> None:
        self.runs += 1
        on_progress(Progress(0.5, "half"))
        self.running.set()
        while not self.go.wait(0.005):
            if cancel.is_set():
                raise Stopped


def nothing(on_progress, cancel: threading.Event) -> None:
    on_progress(Progress(1.0, "all"))


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker(max_queue=2)
    yield worker
    worker.close()


def test_states_from_queue_to_done(worker: Worker) -> None:
    first, second = Gate(), Gate()
    worker.submit("a", first, "ann")
    assert first.running.wait(PATIENCE)
    worker.submit("b", second, "ben")
    worker.submit("c", nothing, "cat")
    running, waiting, last = worker.state("a"), worker.state("b"), worker.state("c")
    assert (running.status, running.progress.fraction, running.progress.text) == ("running", 0.5, "half")
    assert (waiting.status, waiting.position, last.position) == ("queued", 1, 2)
    assert worker.state("d") is None
    first.go.set()
    second.go.set()
    assert worker.wait("c", PATIENCE).status == "done"
    assert worker.state("a").status == worker.state("b").status == "done"


def test_a_full_queue_refuses_and_frees_up(worker: Worker) -> None:
    gate = Gate()
    worker.submit("a", gate, "ann")
    assert gate.running.wait(PATIENCE)
    worker.submit("b", nothing, "ann")
    worker.submit("c", nothing, "ann")
    with pytest.raises(QueueFull, match="2 runs are waiting already"):
        worker.submit("d", nothing, "ben")
    worker.submit("b", nothing, "ben")  # joins, takes no place
    worker.cancel("c", "ann")
    worker.submit("d", nothing, "ben")
    gate.go.set()
    assert worker.wait("d", PATIENCE).status == "done"
    assert worker.state("c").status == "cancelled"


def test_two_users_of_one_job_and_only_the_last_cancel_stops_it(worker: Worker) -> None:
    gate = Gate()
    worker.submit("a", gate, "ann")
    assert gate.running.wait(PATIENCE)
    worker.submit("a", Gate(), "ben")
    worker.cancel("a", "ann")
    assert worker.state("a").status == "running"
    worker.cancel("a", "cat")  # a stranger changes nothing
    worker.cancel("a", "ben")
    assert worker.wait("a", PATIENCE).status == "cancelled"
    assert gate.runs == 1


def test_a_tab_that_watches_can_cancel_what_a_closed_tab_started(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reload makes a new owner; the old one is never heard of again and must not keep the job alive."""
    gate = Gate()
    worker.submit("a", gate, "before the reload")
    assert gate.running.wait(PATIENCE)
    worker.state("a", "after the reload")
    worker.cancel("a", "after the reload")
    assert worker.state("a").status == "running", "the first tab was there a moment ago"
    monkeypatch.setattr("perturb.jobs.AWAY_S", 0.0)
    worker.state("a", "after the reload")
    worker.cancel("a", "after the reload")
    assert worker.wait("a", PATIENCE).status == "cancelled"


def test_a_cancelled_job_asked_for_again_runs_anew(worker: Worker) -> None:
    gate = Gate()
    worker.submit("a", gate, "ann")
    assert gate.running.wait(PATIENCE)
    worker.cancel("a", "ann")
    worker.submit("a", nothing, "ann")
    assert worker.wait("a", PATIENCE).status == "done"


def test_failures_are_told_and_the_worker_goes_on(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    def bad_input(on_progress, cancel) -> None:
        raise BadInput("The data have no cell 'x': choose another.")

    def bug(on_progress, cancel) -> None:
        raise ZeroDivisionError("by zero")

    worker.submit("a", bad_input, "ann")
    assert worker.wait("a", PATIENCE).message == "The data have no cell 'x': choose another."
    worker.submit("b", bug, "ann")
    failed = worker.wait("b", PATIENCE)
    assert failed.status == "failed" and "internal error (ZeroDivisionError: by zero)" in failed.message
    assert "job b failed" in caplog.text
    worker.submit("c", nothing, "ann")
    assert worker.wait("c", PATIENCE).status == "done"


def test_memory_stays_bounded(worker: Worker) -> None:
    for i in range(REMEMBERED + 20):
        worker.submit(str(i), nothing, "ann")
        assert worker.wait(str(i), PATIENCE) is not None
    assert worker.state("0") is None
    assert worker.state(str(REMEMBERED + 19)).status == "done"


def test_close_cancels_what_waits_and_what_runs() -> None:
    worker, gate = Worker(), Gate()
    worker.submit("a", gate, "ann")
    assert gate.running.wait(PATIENCE)
    worker.submit("b", nothing, "ann")
    worker.close()
    assert worker.state("a").status == worker.state("b").status == "cancelled"
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit("c", nothing, "ann")


def test_users_at_once_get_their_own_results_from_disk(
    worker: Worker, tiny_bundle: GE2Hist, demo_cells: Cells, tmp_path
) -> None:
    """Ann closes her tab, Ben waits; both results lie on disk under their own recipe."""
    cache = DiskCache(tmp_path)
    plain = Recipe("d" * 64, tiny_bundle.sha256, ("cell-3",), sample=SampleConfig(steps=2), seeds=(0, 1))
    recipes = [replace(plain, perturbation=Perturbation.parse(text)) for text in ("GAPDH:x4", "GAPDH:ko")]
    for recipe, owner in zip(recipes, ("ann", "ben"), strict=True):

        def work(on_progress, cancel, recipe: Recipe = recipe) -> None:
            run(recipe, tiny_bundle, demo_cells, cache=cache, on_progress=on_progress, cancel=cancel)

        worker.submit(recipe.hash, work, owner)
    for recipe in recipes:
        assert worker.wait(recipe.hash, PATIENCE).status == "done"
        found = load_result(recipe.hash, cache)
        alone = run(recipe, tiny_bundle, demo_cells)
        assert found is not None and found.recipe == recipe
        np.testing.assert_array_equal(found.edited_arm.images, alone.edited_arm.images)
