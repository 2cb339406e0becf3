"""Each row of the table of silent faults is right now."""
from __future__ import annotations

import csv
import pathlib
import shutil

import pytest

from tests.tools import silent
from tests.tools.silent import __main__ as command

ROOT = pathlib.Path(__file__).resolve().parents[2]
SLOW = 'train_in_test_mode', 'moving_average'
CASES = [pytest.param(
    c, id=c.id, marks=[pytest.mark.slow] * c.id.startswith(SLOW))
    for c in silent.ALL]


@pytest.mark.parametrize('case', CASES)
def test_fault(case):
    text, ok = silent.outcome_now(case)
    assert ok, text


@pytest.mark.parametrize('case', [p for p in CASES if p.values[0].theirs])
def test_fault_of_chainer(case):
    text, ok = silent.outcome_of_chainer(case)
    assert not ok, f'not a fault of the built-in hook any more: {text}'


def test_a_version_without_a_function_or_an_argument():
    def without_function(make_hook):
        silent.cases.public('optimizer_hooks.no_such_function')

    def without_argument(make_hook):
        make_hook(no_such=1)

    def fails(make_hook):
        raise KeyError

    assert [silent.outcome_now(silent.Case('', run, False)) for run in (
        without_function, without_argument, fails)] == [
            ('no `optimizer_hooks.no_such_function`', False),
            ('no argument `no_such`', False), ('`KeyError`', False)]


def test_before_is_the_package_of_the_checkout(tmp_path, capsys):
    shutil.copytree(ROOT / 'sn_function', tmp_path / 'sn_function')
    init = tmp_path / 'sn_function/__init__.py'
    text = init.read_text(encoding='utf-8')
    entry = "'ChainSpectralNormalization': 'chain'"
    assert entry in text
    init.write_text(text.replace(entry, "'Other': 'chain'"), encoding='utf-8')
    arguments = ['--before', str(tmp_path), '--only', 'repr_of_chain_hook']
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert "no `ChainSpectralNormalization` | `ChainSpectralNorm" in out


@pytest.mark.parametrize('arguments', [[], ['--rst']])
def test_command(arguments, capsys):
    assert command.main([*arguments, '--only', 'repr_of_']) == 0
    out = capsys.readouterr().out
    assert "Chainer's hook" in out
    assert out.count('repr_of_') == 3


def test_command_fails_where_a_case_does(capsys, monkeypatch):
    case = silent.Case('a case', lambda make_hook: ('bad', False), False)
    monkeypatch.setattr(command, 'ALL', [case])
    assert command.main([]) == 1
    assert capsys.readouterr().err == 'wrong: a case\n'


def test_docs_have_every_fault_with_its_test():
    text = (ROOT / 'docs/faults.rst').read_text(encoding='utf-8')
    rows = list(csv.reader(
        line.strip() for line in text.splitlines() if line.endswith('``')
        and line.startswith('    ')))
    assert [(row[0], row[-1]) for row in rows] == [
        (c.name.replace('`', '``'), f'``{c.id}``') for c in silent.ALL]
