"""Each row of the table of defects: wrong in Chainer's hook, right in ours."""
import csv
import pathlib

import pytest

from tests.tools import defects


@pytest.mark.parametrize('case', [
    pytest.param(c, id=c.run.__name__, marks=[pytest.mark.slow] * (
        c.run is defects.float16_large_shape)) for c in defects.CASES])
def test_defect(case):
    text, ok = defects.run(case.run, defects.ours)
    assert ok, text
    text, ok = defects.run(case.run, defects.builtin)
    assert not ok, f'not a defect of the built-in hook any more: {text}'


def test_documentation_has_every_defect_with_its_test():
    page = pathlib.Path(__file__).parents[2] / 'docs' / 'defects.rst'
    _, table = page.read_text(encoding='utf-8').split(':header-rows: 1\n\n')
    rows = list(csv.reader(
        table.split('\n\n')[0].splitlines(), skipinitialspace=True))
    assert [(row[0], row[3]) for row in rows[1:]] == [
        (case.name.replace('`', '``'), f'``{case.run.__name__}``')
        for case in defects.CASES]


def test_an_exception_is_an_outcome_that_is_not_right():
    def fails(make_hook):
        raise KeyError

    assert defects.run(fails, defects.ours) == ('`KeyError`', False)


@pytest.mark.parametrize('arguments', [[], ['--rst']])
def test_command_prints_every_case(arguments, capsys, monkeypatch):
    cases = defects.CASES[:3]
    monkeypatch.setattr(defects, 'CASES', cases)
    assert defects.main(arguments) == 0
    out = capsys.readouterr().out
    assert 'Chainer 7.8.1' in out
    for c in cases:
        assert c.name.split()[0].replace('`', '') in out.replace('`', '')
