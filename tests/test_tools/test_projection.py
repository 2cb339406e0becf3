"""The table of docs/monitoring.rst is that of tests.tools.projection."""
from __future__ import annotations

import pathlib

from tests.tools import projection

DOCS = pathlib.Path(__file__).resolve().parents[2] / 'docs/monitoring.rst'


def test_table_has_every_case():
    text = DOCS.read_text(encoding='utf-8')
    rows = [line for line in text.splitlines() if line.count('%,') == 3]
    assert [row[:26].strip() for row in rows] == [
        name for name, *_ in projection.CASES]


def test_row():
    """It comes back from 4 to 0.3, and never stays above 1."""
    assert projection.measured(projection.square, 1, 5)[1:] == [
        '0.0%', '0.300']
