"""One worker for long runs: a short queue, progress, cancel. Knows neither pages nor models.

A job is known by a key, the hash of what it makes; whoever asks for the same key shares the job. What a job makes it
writes to disk itself (:class:`perturb.cache.DiskCache`), so a page that is closed or run again loses nothing and finds
the state by polling. A shared job ends only when everybody who wants it has cancelled: who asked for it or watches it,
and has looked at it within the last seconds. A tab that was closed no longer counts.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ge2hist_core.types import BadInput
from perturb.run import Progress

__all__ = ["JobState", "QueueFull", "Work", "Worker"]

Work = Callable[[Callable[[Progress], None], threading.Event], object]
"""``work(on_progress, cancel)``: does the job, reports, ends soon after ``cancel`` is set."""

AWAY_S = 10.0
"""A page polls several times a second; one that has not for so long is closed or shows something else."""

REMEMBERED = 256
"""Finished jobs whose state is kept, the latest ones."""


class QueueFull(BadInput):
    """The worker has as many jobs as it may hold."""


@dataclass(frozen=True)
class JobState:
    """What a page sees of a job.

    Parameters
    ----------
    status: ``queued``, ``running``, ``done``, ``failed`` or ``cancelled``.
    position: jobs before this one, 0 when running or over.
    progress: the last report, None before the first.
    message: one sentence for the user when failed, else empty.
    """

    status: str
    position: int = 0
    progress: Progress | None = None
    message: str = ""

    @property
    def over(self) -> bool:
        return self.status in ("done", "failed", "cancelled")


@dataclass
class _Job:
    key: str
    work: Work
    owners: dict[str, float]
    number: int
    state: JobState = field(default_factory=lambda: JobState("queued"))
    cancel: threading.Event = field(default_factory=threading.Event)


class Worker:
    """One thread that does one job after the other.

    Parameters
    ----------
    max_queue: jobs that may wait; a further one is refused.
    """

    def __init__(self, max_queue: int = 8) -> None:
        self.max_queue = max_queue
        self._jobs: OrderedDict[str, _Job] = OrderedDict()
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, key: str, work: Work, owner: str) -> None:
        """Ask for a job. The same key while it waits or runs joins that job; a job that is over starts anew.

        Raises
        ------
        QueueFull: ``max_queue`` jobs are waiting.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the worker is closed")
            job = self._jobs.get(key)
            if job is not None and not job.state.over and not job.cancel.is_set():
                job.owners[owner] = time.monotonic()
                return
            if sum(other.state.status == "queued" for other in self._jobs.values()) >= self.max_queue:
                raise QueueFull(f"{self.max_queue} runs are waiting already: try again when one of them is done.")
            self._jobs.pop(key, None)
            self._jobs[key] = _Job(key, work, {owner: time.monotonic()}, next(self._numbers))
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="perturb worker", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    @property
    def keys(self) -> tuple[str, ...]:
        """Jobs that are remembered, the oldest first."""
        with self._changed:
            return tuple(self._jobs)

    def state(self, key: str, owner: str | None = None) -> JobState | None:
        """State of a job, None for one that was never asked for or is forgotten (look on disk then).

        Whoever looks under a name wants the job from then on, as if it had asked for it.
        """
        with self._changed:
            job = self._jobs.get(key)
            if job is None:
                return None
            if owner is not None and not job.state.over:
                job.owners[owner] = time.monotonic()
            if job.state.status != "queued":
                return job.state
            before = sum(not other.state.over and other.number < job.number for other in self._jobs.values())
            return replace(job.state, position=before)

    def cancel(self, key: str, owner: str) -> None:
        """Withdraw one owner's wish; without owners left a waiting job is dropped and a running one is told to stop.

        Owners that have not looked for ``AWAY_S`` seconds do not count any more.
        """
        with self._changed:
            job = self._jobs.get(key)
            if job is None or job.state.over:
                return
            job.owners.pop(owner, None)
            if all(time.monotonic() - seen > AWAY_S for seen in job.owners.values()):
                job.cancel.set()
                if job.state.status == "queued":
                    job.state = JobState("cancelled")
            self._changed.notify_all()

    def wait(self, key: str, timeout: float | None = None) -> JobState | None:
        """State of a job once it is over, or after ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: (job := self._jobs.get(key)) is None or job.state.over, timeout)
        return self.state(key)

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._changed:
            self._closed = True
            for job in self._jobs.values():
                job.cancel.set()
                if job.state.status == "queued":
                    job.state = JobState("cancelled")
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _next(self) -> _Job | None:
        with self._changed:
            while not self._closed:
                for job in self._jobs.values():
                    if job.state.status == "queued":
                        job.state = JobState("running")
                        return job
                self._changed.wait()
        return None

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            self._finish(job, self._do(job))

    def _do(self, job: _Job) -> JobState:
        from ge2hist_core.sampler import Stopped

        def on_progress(progress: Progress) -> None:
            with self._changed:
                job.state = JobState("running", progress=progress)
                self._changed.notify_all()

        try:
            job.work(on_progress, job.cancel)
        except Stopped:
            return JobState("cancelled")
        except BadInput as error:
            return JobState("failed", message=str(error))
        except Exception as error:
            logging.getLogger(__name__).exception("job %s failed", job.key)
            return JobState(
                "failed", message=f"The run ended with an internal error ({type(error).__name__}: {error})."
            )
        return JobState("done")

    def _finish(self, job: _Job, state: JobState) -> None:
        with self._changed:
            job.state = state
            job.work = _nothing  # lets go of the model and the cells that the closure holds
            over = [key for key, other in self._jobs.items() if other.state.over]
            for key in over[: max(0, len(over) - REMEMBERED)]:
                del self._jobs[key]
            self._changed.notify_all()


def _nothing(on_progress: Callable[[Progress], None], cancel: threading.Event) -> None:
    """Work of a job that is over."""
