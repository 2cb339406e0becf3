"""What ``make upstream`` does with a checkout, and with what it finds there.

The checkout is a small one with tests of its own: Chainer's take long.
"""
import pytest

from tests.tools import upstream
from tests.tools.upstream import FAILED, PASSED, SKIPPED, Expected, expected
from tests.tools.upstream import __main__ as program

VERSIONS = {'python': '3.13.0', 'numpy': '2.4.6'}
SETTINGS = '''\
[tool:pytest]
filterwarnings =
    error
    # A comment.
    ignore::chainer.warnings.PerformanceWarning
markers =
    gpu: Tests to run on GPU
    cudnn: Tests to use cuDNN
    ideep: Tests to use IDeep
    slow: Tests thats takes time
'''
TESTS = '''\
import contextlib
import unittest
import warnings

import mock
import numpy
import pytest

import chainer
import sn_function


def test_passes():
    with mock.patch('chainer.config'):
        assert (numpy.int, numpy.object) == (int, object)
    assert numpy.complex_ is numpy.complex128
    assert numpy.product([2, 3]) == 6
    assert sn_function._compat.applied
    with pytest.raises(AttributeError):
        numpy.no_such_name


def test_trainer():
    assert chainer.testing.training.get_trainer_with_mock_updater()


def test_lent_to_the_tests_alone():
    code = compile('numpy.complex_', 'elsewhere.py', 'eval')
    has_it = 'complex_' in dir(numpy)
    with contextlib.nullcontext() if has_it else pytest.raises(AttributeError):
        eval(code, {'numpy': numpy, '__file__': 'elsewhere.py'})


@pytest.mark.parametrize('i', range(2))
def test_seed(i):
    assert numpy.random.randint(1 << 30) == 209652396


def test_performance():
    warnings.warn('', chainer.warnings.PerformanceWarning)


def test_warns():
    warnings.warn('a warning')


@pytest.mark.parametrize('x', [1], ids=['<object at 0x7f3a>'])
def test_object(x):
    raise RuntimeError('an object')


@pytest.mark.gpu
def test_gpu():
    raise AssertionError


def test_skipped():
    pytest.skip('no reason')


class TestCase(unittest.TestCase):

    def test_fails(self):
        raise TypeError('Parameterized test failed\\n(caused by)\\nthe error')
'''


@pytest.fixture
def checkout(tmp_path):
    directory = tmp_path / 'chainer'
    for name, text in {
            'chainer/_version.py': "__version__ = '7.8.1'\n",
            'setup.cfg': SETTINGS,
            'tests/conftest.py': 'from chainer import testing',
            'tests/chainer_tests/__init__.py': '',
            'tests/chainer_tests/test_some.py': TESTS,
            'tests/chainer_tests/a/test_broken.py': 'raise KeyError("x")\n',
            }.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')
    return directory


RULES = (
    Expected('mine', 'why it fails', ['test_some.py::*::test_fails'],
             error='the error'),
    Expected('mine', 'it warns', ['test_some.py::test_warns'],
             error='a warning'),
    Expected('mine', 'it has an object', ['::test_object[<object>]'],
             error='an object'),
    Expected('mine', 'it is broken', ['a/test_broken.py'], error='KeyError'),
)


def test_all_as_expected(checkout, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(program, 'EXPECTED', RULES)
    monkeypatch.setattr(program, 'LOGS', tmp_path)
    assert program.main([str(checkout), '--jobs', '2']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('python ')
    assert ', chainer 7.8.1, numpy ' in lines[0]
    assert lines[1:] == [
        '6 passed, 4 failed as expected, 1 skipped, 0 unexpected',
        '     1  mine: why it fails',
        '     1  mine: it warns',
        '     1  mine: it has an object',
        '     1  mine: it is broken']
    # Nothing is left in the checkout.
    assert sorted(p.name for p in checkout.rglob('*') if p.is_file()) == [
        '__init__.py', '_version.py', 'conftest.py', 'setup.cfg',
        'test_broken.py', 'test_some.py']


def test_what_is_unexpected(checkout, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(program, 'EXPECTED', (
        Expected('mine', 'why it fails', ['*::test_fails'], 'other error'),
        Expected('mine', 'no reason', ['test_some.py::test_passes']),
        Expected('mine', 'none', ['no_such_test']),
        *RULES[2:]))
    monkeypatch.setattr(program, 'LOGS', tmp_path)
    assert program.main([str(checkout), '--jobs', '1']) == 1
    lines = capsys.readouterr().out.splitlines()
    prefix = 'tests/chainer_tests/test_some.py::'
    assert lines[1:] == [
        '6 passed, 2 failed as expected, 1 skipped, 5 unexpected',
        '     1  mine: it has an object',
        '     1  mine: it is broken',
        f'unexpected: {prefix}test_warns',
        '    UserWarning: a warning',
        f'unexpected: {prefix}TestCase::test_fails',
        '    the error',
        f'passed, though expected to fail (no reason): {prefix}test_passes',
        'expected, but no test failed so: why it fails',
        'expected, but no test failed so: none']


def test_part_of_the_tests(checkout, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(program, 'EXPECTED', RULES)
    monkeypatch.setattr(program, 'LOGS', tmp_path)
    assert program.main([str(checkout), '--only', 'chainer_tests/a/']) == 0
    assert '0 passed, 1 failed as expected' in capsys.readouterr().out
    assert program.main([str(checkout), '--only', 'nothing']) == 1
    assert "has 'nothing' in its path" in capsys.readouterr().out


def test_pytest_that_does_not_start(checkout, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(program, 'LOGS', tmp_path)
    (checkout / 'setup.cfg').unlink()
    assert program.main([str(checkout), '--jobs', '1']) == 1
    log, = tmp_path.glob('*.log')
    assert f'see {log}' in capsys.readouterr().out
    assert "KeyError: 'tool:pytest'" in log.read_text('utf-8')


def test_pytest_that_stops(checkout, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(program, 'LOGS', tmp_path)
    (checkout / 'tests' / 'chainer_tests' / 'test_some.py').write_text(
        'import pytest\n\ndef test_exit():\n    pytest.exit("stop")\n')
    assert program.main([str(checkout), '--only', 'some']) == 1
    assert 'pytest ended with status 2' in capsys.readouterr().out


def test_not_a_checkout_of_chainer(tmp_path, capsys):
    assert program.main([str(tmp_path)]) == 1
    assert 'is not a checkout of Chainer' in capsys.readouterr().out
    assert program.main([str(tmp_path / 'no such')]) == 1
    assert 'is not a checkout of Chainer' in capsys.readouterr().out


def test_another_version(checkout, capsys):
    (checkout / 'chainer' / '_version.py').write_text("__version__ = '6.0'\n")
    assert program.main([str(checkout)]) == 1
    message = capsys.readouterr().out
    assert 'has the tests of Chainer 6.0' in message
    assert 'is 7.8.1' in message


@pytest.mark.parametrize('stack', ['3.8', '2.2/1.0', 'x'])
def test_no_such_stack(checkout, capsys, stack):
    assert program.main([str(checkout), '--stack', stack]) == 1
    assert repr(stack) in capsys.readouterr().out


def rule(*needs, **kwargs):
    return Expected('', '', kwargs.get('tests', ['*']), needs=needs)


@pytest.mark.parametrize(('needs', 'applies'), [
    ([], True),
    (['numpy>=2'], True),
    (['numpy>=2,<2.4'], False),
    (['numpy>=2', 'python<3.13'], False),
    (['python>=3.9', 'numpy<3'], True),
    (['h5py>=3'], False),
])
def test_needs(needs, applies):
    assert rule(*needs).applies(VERSIONS) == applies


def test_rule_of_another_stack_is_not_used():
    verdict = upstream.compare(
        {'a': (FAILED, 'x'), 'b': (PASSED, ''), 'c': (SKIPPED, '')}, VERSIONS,
        [rule('numpy<2')])
    assert verdict.unexpected == {'a': (FAILED, 'x')}
    assert verdict.counts == {PASSED: 1, FAILED: 1, SKIPPED: 1}
    assert (verdict.expected, verdict.passed, verdict.unused) == ([], [], [])


@pytest.mark.parametrize(('pattern', 'matches'), [
    ('test_x.py::T*_param_0_{a=[1]}', True),
    ('b/test_x.py', True),
    ('T*{a=[2]}', False),
    ('test_x.py::T_param_0', False),
    ('[ab]', False),
])
def test_names(pattern, matches):
    name = 'b/test_x.py::Ta\n_param_0_{a=[1]}'
    assert rule(tests=[pattern]).names(name) == matches


def test_every_expected_failure_has_a_reason():
    for each in expected.EXPECTED:
        assert each.whose in (expected.CHAINER, expected.OURS, expected.TEST)
        assert len(each.reason) > 15
        assert each.tests
        assert each.error

