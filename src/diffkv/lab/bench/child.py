"""Engines in processes of their own, as their parent sees them."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from statistics import median
from threading import Timer
from typing import IO, Any

from diffkv.lab.bench.engine import ANSWER, Job

__all__ = ["Child", "in_rounds", "in_turn", "medians", "started"]

COMMAND = (sys.executable, "-m", "diffkv.lab.bench.engine")
TIMEOUT_SECONDS = 3600
CELL_SECONDS = 4.0
CELL_RUNS = 5
"""A cell that is over sooner runs again, at most so many times in all; its figures are medians."""


class Child:
    """An engine that starts with the `with` block, then waits, and ends with the block.

    Args:
        job: what it can run.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    def __enter__(self) -> "Child":
        self._log: IO[str] = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self._timer = Timer(TIMEOUT_SECONDS, self._process.kill)
        self._timer.daemon = True
        self._timer.start()
        self._tell(json.dumps(asdict(self._job)))
        self._is_started = False
        self._error: str | None = None
        return self

    def dismiss(self) -> None:
        """Tell the engine that there is nothing more to do; the block's end waits for its own."""
        given, self._process.stdin = self._process.stdin, None
        if given is not None:
            with suppress(BrokenPipeError):
                given.close()

    def __exit__(self, *_: object) -> None:
        self.dismiss()
        self._process.communicate()
        self._timer.cancel()
        if self._job.profile:
            print(self._read_log(), file=sys.stderr)
        self._log.close()

    def wait(self) -> None:
        """Return when the engine has started and is warm, or has failed."""
        if not self._is_started:
            self._is_started = True
            self._error = self._heard().get("error")

    def run(self, cell: int) -> dict[str, Any]:
        """Run a cell of the job; what went wrong, now or before, is in the result as `error`."""
        self.wait()
        if self._error is not None:
            return {"error": self._error}
        self._tell(str(cell))
        result = self._heard()
        self._error = result.get("error")
        return result

    def _tell(self, line: str) -> None:
        given = self._process.stdin
        assert given is not None
        with suppress(BrokenPipeError):  # what it has to say about its end is in its log
            given.write(line + "\n")
            given.flush()

    def _heard(self) -> dict[str, Any]:
        printed = self._process.stdout
        assert printed is not None
        for answer in printed:
            if answer.startswith(ANSWER):
                result: dict[str, Any] = json.loads(answer.removeprefix(ANSWER))
                return result
        last = (self._read_log().strip().splitlines() or ["no message"])[-1]
        return {"error": f"the engine ended with status {self._process.wait()}: {last}"}

    def _read_log(self) -> str:
        self._log.seek(0)
        return self._log.read()


def started(stack: ExitStack, jobs: Sequence[Job]) -> list[Child]:
    """An engine for every job, all warm, until the stack ends.

    They start at once, and end at once, since both are mostly Python's, which is one core's work.
    """
    children = [stack.enter_context(Child(job)) for job in jobs]
    for child in children:
        stack.callback(child.dismiss)
    for child in children:
        child.wait()
    return children


def in_rounds(
    jobs: Sequence[Job], rounds: int, apart: bool, say: Callable[[str], None]
) -> list[list[list[dict[str, Any]]]]:
    """What every job's engine found in every cell, with engines anew for each round: [job][round][cell].

    Args:
        jobs: jobs that have the same cells; one that failed is not started again.
        rounds: how often.
        apart: one engine at a time, where memory does not hold all.
        say: is told how far it is.
    """
    results: list[list[list[dict[str, Any]]]] = [[] for _ in jobs]
    for _ in range(rounds):
        alive = [
            (job, done)
            for job, done in zip(jobs, results, strict=True)
            if not (done and "error" in done[-1][-1])
        ]
        for group in [[each] for each in alive] if apart or not alive else [alive]:
            found = in_turn([job for job, _ in group], say)
            for (_, done), each in zip(group, found, strict=True):
                done.append(each)
    return results


def in_turn(jobs: Sequence[Job], say: Callable[[str], None]) -> list[list[dict[str, Any]]]:
    """Medians of every cell in every job's engine: [job][cell], with how many `runs` there were.

    All engines stay, and each run of a cell is taken by one after the other: a machine whose memory is
    now faster, now slower, is so for all of them.

    Args:
        jobs: jobs that have the same cells.
        say: is told how far it is.
    """
    with ExitStack() as stack:
        children = started(stack, jobs)
        say(f"  {len(jobs)} engine(s) started")
        num_cells, found = len(jobs[0].cells), []
        for cell in range(num_cells):
            found.append(_take_turns(children, cell))
            say(f"  {cell + 1} of {num_cells} cells")
    return [list(results) for results in zip(*found, strict=True)]


def _take_turns(children: Sequence[Child], cell: int) -> list[dict[str, Any]]:
    runs: list[list[dict[str, Any]]] = [[] for _ in children]
    for _ in range(CELL_RUNS):
        for child, mine in zip(children, runs, strict=True):
            mine.append(child.run(cell))
        if all(_is_measured(mine) for mine in runs):
            break
    return [{"runs": len(mine), **medians(mine)} for mine in runs]


def _is_measured(runs: Sequence[dict[str, Any]]) -> bool:
    return "error" in runs[-1] or sum(run["seconds"] for run in runs) >= CELL_SECONDS


def medians(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of every figure of several runs, in lists by place; or the first `error` there was."""
    failed = [result["error"] for result in results if "error" in result]
    if failed:
        return {"error": failed[0]}
    return {name: _median([result[name] for result in results]) for name in results[0]}


def _median(values: Sequence[Any]) -> Any:
    if isinstance(values[0], list):
        return [median(each) for each in zip(*values, strict=True)]
    return median(values)
