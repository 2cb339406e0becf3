"""Tables that tools print: for the documentation, or to be read at once."""
from __future__ import annotations

import csv
import io
import textwrap
from typing import Sequence


def rst_of(rows: Sequence[Sequence[str]]) -> str:
    """A table as the documentation has it; the first row is the header."""
    file = io.StringIO()
    csv.writer(file, lineterminator='\n').writerows(
        [cell.replace('`', '``') for cell in row] for row in rows)
    return ('.. csv-table::\n    :header-rows: 1\n\n'
            + textwrap.indent(file.getvalue(), '    '))


def show(rows: Sequence[Sequence[str]], as_rst: bool) -> None:
    if as_rst:
        print(rst_of(rows), end='')
        return
    for row in [rows[0], ['---'] * len(rows[0]), *rows[1:]]:
        print(f'| {" | ".join(row)} |')
