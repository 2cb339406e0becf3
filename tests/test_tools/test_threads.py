"""The table of threads: every case is right."""
import pytest

from tests.tools import threads


@pytest.mark.parametrize('case', threads.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize('n_calls', [
    20, pytest.param(1000, marks=pytest.mark.slow)])
def test_case(case, n_calls):
    row = threads.run(case, 4, n_calls)
    assert row.is_right, row


def test_an_output_that_is_wrong_is_counted():
    case = threads.CASES[0]
    outputs = iter(range(100))

    def run(model, x):
        y = case.run(model, x)[0]
        return [y + (next(outputs) == 25)]

    row = threads.run(case._replace(run=run), 2, 10)
    assert row.wrong == 1
    assert not row.is_right


def test_command(capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['', '--calls', '10', '--only', 'cached'])
    assert threads.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].split()[-4:-1] == ['40', '0', '0']
