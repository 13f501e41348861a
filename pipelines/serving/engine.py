"""How a student is served, and the thread that decodes: requests join the batch between two blocks,
and leave it when they end.

At most `batch` responses are under way at once; the others wait in the order in which they came.
Where decoding fails, those under way get the error and the next ones begin anew.
"""

import codecs
import itertools
import logging
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Full
from typing import Any, Literal

from shared.system.files import TideError
from student_train.using.decoding import Decoding, Row
from student_train.using.settings import SampleConfig
from student_train.using.student import LoadedStudent, Stops, until_eos

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeConfig:
    """Limits of the server, and how it samples where a request does not say."""

    name: str  # of the model, as requests must say it
    sampling: SampleConfig = field(default_factory=SampleConfig)
    batch: int = 16  # responses under way at once
    waiting: int = 256  # responses that may wait for a place; beyond, requests get status 503
    body_bytes: int = 4 << 20  # of a request
    prompt_seconds: float = 10.0  # for the template and the tokenizer
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    api_key: str | None = field(default=None, repr=False)  # the bearer token of requests
    cors: tuple[str, ...] = ()  # origins whose pages may ask; "*": any
    log: bool = False  # a line for each request, without its text

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("waiting", 0), ("body_bytes", 1), ("port", 0)):
            if getattr(self, name) < least:
                raise TideError(f"{name} is {getattr(self, name)}", expected=f"at least {least}")
        for name in ("name", "api_key"):
            if (value := getattr(self, name)) is not None and not value.strip():
                raise TideError(f"{name} is empty", fix="give one, or leave the option out")
        for origin in self.cors:
            if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise TideError(f"{origin!r} is no origin", expected="scheme://name[:port], or *")

    @property
    def local(self) -> bool:
        return self.host in ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Piece:
    """More text of a response; `reason` where it is the last. `tokens` are those so far."""

    text: str
    tokens: int
    reason: Literal["stop", "length"] | None = None
    step: dict[str, Any] | None = None  # the block at hand after a step (`Engine._shown`)


class Answer:
    """Text of at most `limit` tokens, as blocks settle: what may begin a stop, or is half a
    character, waits for the next block.
    """

    def __init__(self, stops: Stops, limit: int) -> None:
        self._stops, self._limit, self._sent = stops, limit, 0

    def read(self, made: Sequence[int]) -> Piece:
        """What is new in a response whose finished blocks are `made`."""
        whole = until_eos(list(made), self._stops.student.special.eos)
        kept = whole[: self._limit]
        text, stopped = self._stops.cut(kept)
        reason: Literal["stop", "length"] | None = None
        if stopped or (len(whole) < len(made) and len(whole) <= self._limit):
            reason = "stop"
        elif len(made) >= self._limit:
            reason = "length"
        else:
            text = text.rstrip("\ufffd")  # of a character whose bytes are not all there
            text = text[: len(text) - self._stops.may_begin(text)]
        more, self._sent = text[self._sent :], max(self._sent, len(text))
        return Piece(more, len(kept), reason)


@dataclass(eq=False)
class Job:
    row: Row
    answer: Answer
    deliver: Callable[[Piece | Exception], None]  # called from the engine's thread, each block
    steps: bool = False  # whether each step is told, too
    cancelled: bool = False  # set by whoever asked, when nobody waits for it any more


class Stopping(Exception):
    """The engine ends before the response does."""


class Engine:
    """`start` it, `submit` jobs, `stop` it: jobs that are not done get an error."""

    def __init__(self, student: LoadedStudent, config: ServeConfig) -> None:
        self._student, self._config = student, config
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        # Who encodes or decodes text holds it: a call changes a tokenizer's settings while it runs.
        self.tokenizing = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="decoding", daemon=True)
        self.start = self._thread.start
        added = student.tokenizer.backend.added_tokens_decoder
        self._silent = {token for token, entry in added.items() if entry.special}

    def load(self) -> tuple[bool, int, int]:
        """Whether it takes jobs, how many are under way, and how many wait."""
        alive = self._thread.is_alive() and not self._stopping
        return alive, len(self._running), len(self._waiting)

    def stop(self) -> None:
        """Ends after the step at hand."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """All or none. Full where more would wait than may."""
        with self._changed:
            self._waiting = [job for job in self._waiting if not job.cancelled]
            free = max(self._config.batch - len(self._running), 0)
            if self._stopping or len(self._waiting) + len(jobs) > self._config.waiting + free:
                raise Full
            self._waiting += jobs
            self._changed.notify()

    def _work(self) -> None:
        student, sampling = self._student, self._config.sampling
        while not self._stopping:
            decoding = Decoding(student.model, student.special, sampling)
            try:
                while not self._stopping:
                    self._round(decoding)
                error: Exception = Stopping("the server is stopping")
            except Exception as failure:  # whatever it is, those who wait must hear of it
                logger.error("decoding failed: %s: %s", type(failure).__name__, failure)
                error = failure.with_traceback(None)  # its frames would keep the failed cache
            with self._changed:
                told = [*self._running, *(self._waiting if self._stopping else ())]
                self._running = []
            for job in told:
                job.deliver(error)

    def _shown(self, row: Row, start: int) -> dict[str, Any]:
        """Its tokens from `start` on; a character of several tokens stands with the last."""
        tokenizer, special = self._student.tokenizer, self._student.special
        known = row.config.remasking != "random"  # which goes without probabilities
        decoder, tokens = codecs.getincrementaldecoder("utf-8")("replace"), list[Any]()
        for token, sure in zip(row.state[start:], row.sure.tolist(), strict=False):
            if token == special.mask:
                decoder.reset()
                tokens.append(None)
                continue
            text = "" if token in self._silent else decoder.decode(tokenizer.token_bytes[token])
            tokens.append({"token": text, "probability": round(sure, 4) if known else None})
        return {"start": start, "tokens": tokens}

    def _round(self, decoding: Decoding) -> None:
        """Wait for work, let what waits join, and decode one block of all that are under way."""
        # 1. Who joins
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._running or self._waiting)
            wanted = [job for job in self._waiting if not job.cancelled]
            free = max(self._config.batch - len(self._running), 0)
            coming, self._waiting = wanted[:free], wanted[free:]
            self._running = self._running + coming
        if self._stopping or not self._running:
            return
        if coming:
            decoding.join([job.row for job in coming])
        # 2. A block
        watched = [(job, len(job.row.made)) for job in self._running if job.steps]
        for _ in decoding.next_block():
            if self._stopping:
                return
            for job, start in watched:
                job.deliver(Piece("", len(job.row.state), step=self._shown(job.row, start)))
        # 3. What is new of each, and who stays
        with self.tokenizing:
            pieces = [job.answer.read(job.row.made) for job in self._running]
        going = []
        for job, piece in zip(self._running, pieces, strict=True):
            going.append(piece.reason is None and not job.cancelled)
            job.deliver(piece)
        decoding.keep(going)
        with self._changed:
            self._running = list(itertools.compress(self._running, going))
