"""A run of the benchmark for a device, by CuPy or by PyTorch."""
from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any, Callable, Sequence

from tests.tools.benchmarks.gpu_report import (
    as_json,
    as_markdown,
    as_text,
    goals_text,
    load,
)
from tests.tools.benchmarks.report import Budget, text_of

# Of all sizes: SNGAN's for 32 x 32 and for 64 x 64, BigGAN's; a square one.
GOAL_SHAPES = (
    '64x3x3x3', '128x64x4x4', '256x128x4x4', '512x256x3x3', '512x512x3x3',
    '1024x1024x3x3', '4096x4096')
N_ROUNDS = 10


class Run:
    """Adds what it measures to a report, which is written at once.

    Whatever fails becomes an entry of the report.
    """

    name = ''
    parts: Sequence[str] = ()  # names of methods, the most important first

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.budget = Budget(args.seconds)
        self.report = load(args.out)
        self.report['machine'].update(self.machine(), command=args.command)

    def machine(self) -> dict[str, Any]:
        """What the numbers are measured on, and with."""
        raise NotImplementedError

    def clean(self) -> None:
        """Gives memory back after each measurement."""

    def __call__(self) -> dict[str, Any]:
        try:
            for part in self.args.parts:
                self.attempt(part, getattr(self, part))
        except KeyboardInterrupt:
            self.note(f'{self.name}: interrupted')
        self.save()
        return self.report

    def attempt(self, what: str, function: Callable[..., Any],
                *args: Any) -> None:
        # What an earlier process had to say of it.
        self.report['notes'] = [
            note for note in self.report['notes']
            if not note.startswith(f'{what}: ')]
        if self.budget.left <= 0:
            self.note(f'{what}: the time was up')
            return
        try:
            function(*args)
        except Exception as error:
            self.note(f'{what}: {text_of(error)}')
        self.clean()
        # Nothing here ends a compiler that hangs; the caller may set a limit.
        self.save()
        print(f'{what}: {self.budget.left:.0f} s left', flush=True)

    def note(self, text: str) -> None:
        if text not in self.report['notes']:
            self.report['notes'].append(text)

    def save(self) -> None:
        for path, render in (
                (self.args.out, as_json), (self.args.markdown, as_markdown)):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(render(self.report), encoding='utf-8')

    @classmethod
    def parser(cls, description: str) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument(
            'parts', nargs='*', metavar='PART',
            help=f'of {", ".join(cls.parts)}; all where none is given')
        parser.add_argument('--out', type=pathlib.Path,
                            help='JSON file; what is there is added to')
        parser.add_argument('--markdown', type=pathlib.Path,
                            help='Markdown file of all that is in it')
        parser.add_argument('--seconds', type=float, default=200.0,
                            help='measuring stops after this time')
        parser.add_argument('--command', help='said in the report')
        return parser

    @classmethod
    def parse_args(
            cls, parser: argparse.ArgumentParser, argv: Sequence[str] | None
    ) -> argparse.Namespace:
        args = parser.parse_args(argv)
        unknown = set(args.parts) - set(cls.parts)
        if unknown:
            parser.error(f'unknown: {", ".join(sorted(unknown))}')
        args.parts = args.parts or list(cls.parts)
        options = sys.argv[1:] if argv is None else argv
        args.command = args.command or ' '.join(
            [f'python -m tests.tools.benchmarks.{cls.name}', *options])
        return args

    @classmethod
    def main(cls, args: argparse.Namespace) -> None:
        run = cls(args)
        report = run()
        if args.markdown is None:
            print(as_text(report))
        print(goals_text(report))
