"""Steps of a run: each a process that ends in time, whatever it does.

The summary grows as they end, so that a run that is cut off has told what it
knew.  Only the standard library is imported.
"""
from __future__ import annotations

import contextlib
import os
import pathlib
import shlex
import signal
import subprocess
import time
from typing import Any, Callable, Mapping, NamedTuple, Sequence

# Seconds that a process has to say what it did, and that its death may take.
GRACE = 5.0
# A step that has less is left out.
LEAST = 8.0
# Of a step, Python may take this to import what it needs.
START = 12.0
# The exit status of a step that cannot be done on this machine.
NOT_HERE = 77


class Step(NamedTuple):
    """What is run.

    Attributes:
        name: In the summary, and for ``--only``.
        seconds: Its share of the time, at most.
        command: In it, ``{seconds}`` is what it may take for measuring.
        env: Added to the environment.
        is_needed: Whether the others are pointless where it cannot be done.

    """

    name: str
    seconds: float
    command: Sequence[str]
    env: Mapping[str, str] = {}
    is_needed: bool = False


def send_to_group(process: Any, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _hear_interrupts() -> None:
    # What a shell starts in the background ignores them, as do its children.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_process(
        command: Sequence[str], seconds: float, out: Any,
        grace: float = GRACE, **options: Any) -> int | None:
    """Returns the exit status, or ``None`` where the time was up.

    It is interrupted first, as pytest and the benchmark then say what they
    have; then it is killed.  Its children do not outlive it, in any case.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=out,
        stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=_hear_interrupts, **options)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        send_to_group(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        return None
    finally:
        send_to_group(process, signal.SIGKILL)
        # One that waits for a device may not even die of this.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)


def outcome_of(status: int | None) -> str:
    return {None: 'out of time', 0: 'done', NOT_HERE: 'not possible here'}.get(
        status, f'failed ({status})')


def last_line(path: pathlib.Path, start: int) -> str:
    """What a step said last, made fit for a table."""
    with path.open('rb') as f:
        f.seek(max(start, path.stat().st_size - 4096))
        lines = f.read().decode('utf-8', 'replace').split('\n')
    lines = [line.strip(' =') for line in lines if line.strip(' =')]
    return lines[-1].replace('|', '/')[:160] if lines else ''


class Summary:
    """A table in a file, a line for each step as it ends; printed as well."""

    def __init__(self, path: pathlib.Path, title: str) -> None:
        self.path = path
        self.write(f'# {title}\n\n| step | outcome | seconds | said last |\n'
                   '| --- | --- | ---: | --- |')

    def write(self, text: str) -> None:
        print(text, flush=True)
        with self.path.open('a', encoding='utf-8') as f:
            f.write(text + '\n')

    def add(self, name: str, outcome: str, seconds: float, said: str) -> None:
        self.write(f'| {name} | {outcome} | {seconds:.1f} | {said} |')


def run_steps(
        steps: Sequence[Step], seconds: float, summary: Summary,
        log: pathlib.Path, clock: Callable[[], float] = time.monotonic,
        env: Mapping[str, str] = os.environ, **options: Any) -> bool:
    """Runs them in turn; returns whether all that could be done succeeded.

    Args:
        steps: The most important first: the time may be up before the end.
        seconds: For all of them.  What one leaves is for the later ones.
        summary: Gets a line for each.
        log: The file that gets their output.
        clock: Seconds that pass.
        env: Their environment.
        options: For ``subprocess.Popen``.

    """
    end = clock() + seconds
    is_good = True
    missing = ''
    for step in steps:
        begin = clock()
        limit = min(step.seconds, end - begin - 2 * GRACE)
        if missing or limit < LEAST:
            is_good = False
            summary.add(
                step.name, 'left out', 0, missing or 'the time was up')
            continue
        for_measuring = str(int(max(1, limit - START)))
        command = [for_measuring if part == '{seconds}' else part
                   for part in step.command]
        with log.open('a', encoding='utf-8') as out:
            out.write(f'\n===== {step.name}, {limit:.0f} s at most: '
                      f'{shlex.join(command)}\n')
            out.flush()
            start = out.tell()
            status = run_process(
                command, limit, out, env={**env, **step.env}, **options)
        summary.add(step.name, outcome_of(status), clock() - begin,
                    last_line(log, start))
        is_good &= status in (0, NOT_HERE)
        if step.is_needed and status == NOT_HERE:
            missing = f'there is no {step.name}'
    return is_good
