"""Tables of plain text."""
from __future__ import annotations

from typing import Iterable, Sequence


def text(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns lines of columns, each as wide as its longest cell."""
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return '\n'.join(
        '  '.join(map(str.ljust, line, widths)).rstrip() for line in cells)


def shape_text(shape: tuple[int, ...] | None) -> str:
    """Returns a shape as ``3x4``; ``None`` is that of a lazy parameter."""
    return 'lazy' if shape is None else 'x'.join(map(str, shape)) or 'scalar'
