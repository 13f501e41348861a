"""Data parallelism by units of work: one process for each copy of the teacher, all writing into one cache.

A unit belongs to whichever process is free, and a shard is whole or absent, so a process may die at any moment: its
unit goes back to the others, and it is started again a few times before the run gives up.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from tqdm import tqdm

from shared.cache.shards import Unit
from shared.system.errors import TideError
from teacher_cache.run.load_engine import load_engine
from teacher_cache.run.overlap import Source, run_pipeline
from teacher_cache.run.plan import CachePlan
from teacher_cache.run.progress import Progress
from teacher_cache.run.tables.pilot import make_tables
from teacher_cache.run.units import sources, together
from teacher_cache.run.work import UnitWork

_RESTARTS = 3


@dataclass(frozen=True)
class _Ask:
    """A process wants units."""


@dataclass(frozen=True)
class _Wrote:
    unit: Unit
    examples: int
    busy: float


@dataclass(frozen=True)
class _Failed:
    reason: str


@dataclass(frozen=True)
class _Done:
    """A process has nothing left to write."""


def _serve(plan: CachePlan, parent: Connection) -> None:
    """One process: ask for units until there are none, and tell what was written."""
    try:
        engine = load_engine(plan)
        speaking = (
            threading.Lock()
        )  # units are asked for in one thread, written ones told of in another

        def tell(event: object) -> None:
            with speaking:
                parent.send(event)

        def taken() -> Source:
            while True:
                tell(_Ask())
                units = parent.recv()
                if units is None:
                    return
                yield from sources(plan, [units])

        def progress(work: UnitWork, busy: float) -> None:
            tell(_Wrote(work.unit, work.examples, busy))

        with closing(engine):
            run_pipeline(plan, engine, taken(), progress)
        parent.send(_Done())
    except TideError as error:
        parent.send(_Failed(str(error)))
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        pass  # the parent is gone, or ends the run


@contextmanager
def _devices(index: int, each: int) -> Any:
    """The environment under which process `index` sees its own `each` GPUs and no others."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    every = before.split(",") if before else [str(i) for i in range((index + 1) * each)]
    os.environ[name] = ",".join(every[index * each : (index + 1) * each])
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@dataclass
class _Member:
    process: Any
    pipe: Connection
    in_hand: set[Unit] = field(default_factory=set)
    finished: bool = False


class _Crew:
    """The processes, and the units that nobody has in hand. Each process has a pipe of its own: one that is killed
    in the middle of a word takes nothing of the others with it.
    """

    def __init__(self, plan: CachePlan, units: Sequence[Unit]) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._plan = plan
        self._todo = deque(together(plan, units))
        self._waiting: list[_Member] = []
        self._deaths = 0
        self.on_death: Callable[[], None] = lambda: None
        self._members = [self._start(index) for index in range(plan.config.engine.data_parallel)]

    def _start(self, index: int) -> _Member:
        ours, theirs = self._context.Pipe()
        with _devices(index, self._plan.config.engine.tensor_parallel):
            process = self._context.Process(
                target=_serve, args=(self._plan, theirs), name=f"tide-worker-{index}"
            )
            process.start()
        theirs.close()
        return _Member(process, ours)

    def events(self) -> Iterator[_Wrote]:
        """Shards as they are written, until all are. TideError where a process meets one, or too many die."""
        while not all(member.finished for member in self._members):
            ready = wait([member.pipe for member in self._members if not member.finished])
            for index, member in enumerate(self._members):
                if member.pipe in ready:
                    yield from self._hear(index, member)

    def _hear(self, index: int, member: _Member) -> Iterator[_Wrote]:
        try:
            event = member.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._replace(index, member)
            return
        match event:
            case _Ask():
                self._waiting.append(member)
            case _Wrote(unit=unit):
                member.in_hand.discard(unit)
                yield event
            case _Failed(reason=reason):
                raise TideError(reason)
            case _Done():
                member.finished = True
        self._hand_out()

    def _hand_out(self) -> None:
        """Units to those who wait. Who finds none left is sent home once no unit can come back any more."""
        while self._waiting and self._todo:
            member, units = self._waiting.pop(0), self._todo.popleft()
            member.in_hand |= set(units)
            self._tell(member, units)
        if not self._todo:
            for member in self._waiting:
                self._tell(member, None)
            self._waiting.clear()

    @staticmethod
    def _tell(member: _Member, units: list[Unit] | None) -> None:
        with suppress(
            BrokenPipeError, ConnectionResetError
        ):  # it died just now: its pipe's end will say so
            member.pipe.send(units)

    def _replace(self, index: int, member: _Member) -> None:
        """Put a dead process's units back and start another in its place."""
        member.process.join()
        self._deaths += 1
        self.on_death()
        if self._deaths > _RESTARTS:
            raise TideError(
                f"worker processes died {self._deaths} times, the last with exit code {member.process.exitcode}",
                expected="processes that live to the end",
                fix="run the same command again: finished shards are kept. Exit code -9 is often a lack of memory: "
                "lower engine.data_parallel or engine.tokens_per_batch",
            )
        tqdm.write(
            f"worker {index} died (exit code {member.process.exitcode}); another takes its place"
        )
        self._todo.extendleft(reversed(together(self._plan, sorted(member.in_hand))))
        self._waiting = [other for other in self._waiting if other is not member]
        self._members[index] = self._start(index)

    def close(self, patience: float) -> None:
        """End every process, at first by itself."""
        for member in self._members:
            member.pipe.close()
        for member in self._members:
            member.process.join(timeout=patience)
            if member.process.is_alive():
                member.process.terminate()
                member.process.join(timeout=10)
            if member.process.is_alive():
                member.process.kill()


def _write_tables(plan: CachePlan, result: Connection) -> None:
    """A process of its own: score the pilot sample."""
    try:
        with closing(load_engine(plan)) as engine:
            make_tables(plan, engine)
        result.send(_Done())
    except TideError as error:
        result.send(_Failed(str(error)))


def tables_by_worker(plan: CachePlan) -> None:
    """Score the pilot sample in a process that has its GPUs to itself and gives them back. TideError where it ends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with _devices(0, plan.config.engine.tensor_parallel):
        process = context.Process(target=_write_tables, args=(plan, theirs), name="tide-pilot")
        process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = _Failed("")
    finally:
        ours.close()
        process.join(timeout=30)
        if process.is_alive():
            process.terminate()
            process.join()
    if isinstance(answer, _Failed):
        raise TideError(
            answer.reason
            or f"the process that scored the pilot sample died (exit code {process.exitcode})",
            fix=None
            if answer.reason
            else "run the same command again; exit code -9 is often a lack of memory",
        )


def run_workers(plan: CachePlan, units: Sequence[Unit]) -> None:
    """Compute `units` in `engine.data_parallel` processes under one progress bar."""
    crew = _Crew(plan, units)
    patience = 0.0
    try:
        with Progress(plan, units) as progress:
            crew.on_death = progress.failed
            for event in crew.events():
                progress.wrote(
                    event.unit, event.examples, event.busy, plan.config.engine.data_parallel
                )
        patience = 30.0
    finally:
        crew.close(patience)
