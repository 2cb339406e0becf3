"""Extensions of the trainer: samples with a score, a bar, and snapshots."""
from __future__ import annotations

import os
import signal
import sys
from typing import Any, Callable

import digits_score
import numpy
import sample_grid
from chainer import training
from chainer.training import extensions
from digits_data import Images
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from sngan_models import Generator


class Samples(training.Extension):
    """Draws ``samples.png``, and reports the ``distance`` in its title.

    The generated images are those of the final scores: of the same noise and
    classes.
    """

    priority = training.PRIORITY_WRITER     # LogReport reads what it reports

    def __init__(self, images: Images, gen: Generator, noise: Any) -> None:
        self.images, self.gen, self.noise = images, gen, noise

    def initialize(self, trainer: training.Trainer) -> None:
        self.scorer = digits_score.Scorer(self.images, self.gen.device)

    def __call__(self, trainer: training.Trainer) -> None:
        labels = self.images.test_labels[:len(self.noise)]
        distance = self.scorer.distance(self.gen.sample(self.noise, labels))
        trainer.observation['distance'] = distance
        sample_grid.draw(
            self.images, self.gen, self.noise,
            f'generated, iteration {trainer.updater.iteration}: '
            f'Frechet distance {distance:.2f}',
            os.path.join(trainer.out, 'samples.png'))


class Bar(training.Extension):
    """A progress bar in the last line of a terminal, else nothing.

    What is printed in its ``with`` block appears above it.
    """

    trigger = 1, 'iteration'

    def __init__(self, last: int, console: Console) -> None:
        self.last = last
        # Shorter than a line of 80, where the terminal adds ^C.
        self.progress = Progress(
            TextColumn('{task.description:9}'), BarColumn(16),
            MofNCompleteColumn(), TextColumn('iterations,'),
            TimeElapsedColumn(), TextColumn('gone,'), TimeRemainingColumn(),
            TextColumn('left'),
            console=console, disable=not console.is_terminal)

    def __enter__(self) -> Bar:
        self.task = self.progress.add_task('preparing', total=self.last)
        self.progress.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.progress.stop()

    def __call__(self, trainer: training.Trainer) -> None:
        self.progress.update(
            self.task, description='training',
            completed=trainer.updater.iteration)


class PlainOutput:
    """Standard output without the terminal codes of ``PrintReport``."""

    def write(self, text: str) -> None:
        sys.stdout.write(text.replace('\033[J', ''))

    def flush(self) -> None:
        sys.stdout.flush()


class RandomState(training.Extension):
    """Keeps NumPy's random state in snapshots.

    With it a resumed run draws the same noise and the same batches as a run
    without a stop, and ends with the same numbers.
    """

    def __call__(self, trainer: training.Trainer) -> None:
        pass

    def serialize(self, serializer: Any) -> None:
        state = numpy.random.get_state(legacy=False)
        inner = state['state']
        inner['key'] = serializer('key', inner['key'])
        inner['pos'] = int(serializer('pos', inner['pos']))
        state['has_gauss'] = int(serializer('has_gauss', state['has_gauss']))
        state['gauss'] = float(serializer('gauss', state['gauss']))
        numpy.random.set_state(state)


class Snapshots(training.Extension):
    """Snapshots when ``trigger`` says so, and after Ctrl-C.

    The first Ctrl-C lets the iteration end, because a snapshot within one
    could not be resumed exactly.  Then it, or a second one at once, raises
    KeyboardInterrupt.

    Attributes:
        newest: Path of the last snapshot, if any.
    """

    trigger = 1, 'iteration'

    def __init__(self, trigger: Callable[[training.Trainer], bool]) -> None:
        self.save = extensions.snapshot()
        self.priority = self.save.priority - 1  # after all other extensions
        self.is_due = trigger
        self.is_interrupted = False
        self.newest: str | None = None

    def initialize(self, trainer: training.Trainer) -> None:
        # A shell has what it starts in the background ignore Ctrl-C.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, *args: Any) -> None:
        self.is_interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self, trainer: training.Trainer) -> None:
        if self.is_interrupted or self.is_due(trainer):
            self.save(trainer)
            self.newest = os.path.join(
                trainer.out, self.save.filename.format(trainer))
        if self.is_interrupted:
            raise KeyboardInterrupt

    def finalize(self) -> None:
        if signal.getsignal(signal.SIGINT) == self.interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
