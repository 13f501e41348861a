"""The thread that decodes. Requests join the batch between two blocks, and leave it when they have ended.

At most `batch` responses are under way at once; the others wait in the order in which they came. Where decoding fails,
those under way get the error and the next ones begin anew.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence

from pipelines.serving.answer import Answer, Piece
from student_train.using.decoding import Decoding, Row
from student_train.using.load import LoadedStudent

Event = Piece | Exception


class Job:
    """A response that is asked for. `deliver` is called from the engine's thread, after each block."""

    def __init__(self, row: Row, answer: Answer, deliver: Callable[[Event], None]) -> None:
        self.row, self.answer, self.deliver = row, answer, deliver
        self.cancelled = False
        """Set by whoever asked, when nobody waits for it any more."""


class Full(Exception):
    """As many wait as may."""


class Stopping(Exception):
    """The engine ends before the response does."""


class Engine:
    """`start` it, `submit` jobs, `stop` it: jobs that are not done get an error."""

    def __init__(
        self, student: LoadedStudent, block: int, guidance: float, batch: int, waiting: int
    ) -> None:
        self.batch = batch
        self._student, self._block, self._guidance, self._most = student, block, guidance, waiting
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        self.tokenizing = threading.Lock()
        """Whoever encodes or decodes text holds it: a tokenizer has settings that a call changes while it runs."""
        self._thread = threading.Thread(target=self._work, name="decoding", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether it takes jobs."""
        return self._thread.is_alive() and not self._stopping

    @property
    def load(self) -> tuple[int, int]:
        """Responses under way, and waiting."""
        return len(self._running), len(self._waiting)

    def start(self) -> None:
        """Once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends after the step at hand."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """All or none. Full where more would wait than may."""
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
            free = self.batch - len(self._running)
            if self._stopping or len(self._waiting) + len(jobs) > self._most + max(free, 0):
                raise Full
            self._waiting += jobs
            self._changed.notify()

    def _work(self) -> None:
        while True:
            decoding = Decoding(
                self._student.model, self._student.special, self._block, self._guidance
            )
            try:
                while self._next(decoding):
                    self._round(decoding)
                error: Exception = Stopping("the server is stopping")
            except Exception as failure:  # whatever it is, those who wait must hear of it
                print(f"tide serve: {type(failure).__name__}: {failure}", file=sys.stderr)
                error = failure.with_traceback(
                    None
                )  # its frames would keep the cache of what failed
            self._fail(error)
            if self._stopping:
                return

    def _fail(self, error: Exception) -> None:
        """Tell those under way, and when stopping all others too."""
        with self._changed:
            told = self._running + (list(self._waiting) if self._stopping else [])
            self._running = []
            if self._stopping:
                self._waiting.clear()
        for job in told:
            job.deliver(error)

    def _next(self, decoding: Decoding) -> bool:
        """Wait for work, and let what waits join; False when stopping."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._running or self._waiting)
            if self._stopping:
                return False
            coming: list[Job] = []
            while self._waiting and len(self._running) + len(coming) < self.batch:
                job = self._waiting.popleft()
                if not job.cancelled:
                    coming.append(job)
            self._running = self._running + coming
        if coming:
            decoding.join([job.row for job in coming])
        return True

    def _round(self, decoding: Decoding) -> None:
        """One block of all that are under way."""
        if not self._running:
            return
        for _ in decoding.next_block(self._block):
            if self._stopping:
                return
        with self.tokenizing:
            pieces = [job.answer.read(job.row.made) for job in self._running]
        going = [
            piece.reason is None and not job.cancelled
            for job, piece in zip(self._running, pieces, strict=True)
        ]
        for job, piece in zip(self._running, pieces, strict=True):
            job.deliver(piece)
        decoding.keep(going)
        with self._changed:
            self._running = [job for job, goes in zip(self._running, going, strict=True) if goes]
