"""What the benchmark for a device does with its numbers."""
from __future__ import annotations

import json
import math

import numpy as np
import pytest
from chainer import link_hooks
from chainer.backends import cuda

import sn_function
from sn_function._arithmetic import kernels
from tests.tools.benchmarks import gpu
from tests.tools.benchmarks import report as tables


class Clock:
    """Each look at it takes a second."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


class FakeTimer:
    """Says that a call takes what the call returns, half of it waiting."""

    def __init__(self):
        self.calls = 0

    def __call__(self, step, n):
        self.calls += n
        for _ in range(n):
            seconds = step()
        return seconds, seconds / 2


class FakeGraph:
    """One that has two kernels, and cannot be launched."""

    def __init__(self, step):
        step()
        self.types = [gpu.KERNEL, gpu.MEMSET, gpu.KERNEL]
        self.stream = self

    def launch(self):
        raise RuntimeError('no launch')

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_a_budget_ends():
    budget = tables.Budget(10, Clock())
    assert budget.left == 9
    assert tables.Budget(10, lambda: 5.0).share(0.5).left == 5
    assert tables.Budget(0).left <= 0


def test_shapes():
    assert tables.shape_of('64x3x3x3') == (64, 3, 3, 3)
    assert set(gpu.QUICK_SHAPES + gpu.COMPILED_SHAPES) <= set(gpu.SHAPES)
    assert len(set(gpu.SHAPES)) == len(gpu.SHAPES)


def test_summary():
    values = [x * 1e-6 for x in range(1, 102)]
    assert tables.summary(values) == pytest.approx(
        {'median': 51, 'p20': 21, 'p80': 81})


def test_floors():
    least = tables.floors(1000, 2e9)
    assert least == pytest.approx({
        'forward': 2, 'backward, detached': 2, 'backward, exact': 2.5})
    assert tables.floor_of('exact, fused', 'both', least) == pytest.approx(4.5)
    assert tables.floor_of('Chainer', 'backward', least) == pytest.approx(2)
    assert tables.floor_of('exact', 'forward', least) == pytest.approx(2)


class TestMeasure:

    def test_times(self):
        found = tables.measure(
            {'a': lambda: 2e-6, 'b': lambda: 4e-3}, FakeTimer(),
            tables.Budget(1e9), 5, 1e-4)
        assert found['a']['wall']['median'] == pytest.approx(2)
        assert found['a']['device']['p80'] == pytest.approx(1)
        assert found['b']['wall']['p20'] == pytest.approx(4000)
        assert [found[name]['rounds'] for name in 'ab'] == [5, 5]
        # As many calls as fit in a round, and one at least.
        assert [found[name]['calls'] for name in 'ab'] == [50, 1]

    def test_a_failure_is_of_one_contender(self):
        def fail():
            raise ValueError('so\nlong ' + 'x' * 1000)

        later = iter([1e-3] * 8)
        found = tables.measure(
            {'bad': fail, 'late': lambda: next(later), 'good': lambda: 1e-3},
            FakeTimer(), tables.Budget(1e9), 5, 1e-3)
        assert found['bad']['error'].startswith('ValueError: so long xxx')
        assert len(found['bad']['error']) == 300
        assert found['late']['error'].startswith('StopIteration')
        assert found['good']['wall']['median'] == pytest.approx(1000)

    def test_no_time_is_left(self):
        timer = FakeTimer()
        found = tables.measure({'a': lambda: 1}, timer, tables.Budget(0))
        assert 'time was up' in found['a']['error']
        assert timer.calls == 0

    def test_the_time_is_up_on_the_way(self):
        """What was begun has one round; what was not has an error."""
        found = tables.measure(
            {'a': lambda: 1, 'b': lambda: 1}, FakeTimer(),
            tables.Budget(1.5, Clock()))
        assert found['a']['rounds'] == 1
        assert 'time was up' in found['b']['error']


@pytest.mark.parametrize(('fused', 'separate', 'expected'), [
    ([1, 2, 3, 9], [4, 4, 4, 4], 4),
    ([1, 2, 3, 3], [4, 4, 4, 4], 8),
    ([9, 1, 1, 1], [4, 4, 4, 4], None),
    ([1, 9, 1, 1], [4, 4, 4, 4], 1),
])
def test_crossing(fused, separate, expected):
    assert tables.crossing([1, 2, 4, 8], fused, separate) == expected
    assert tables.crossing(
        [8, 4, 2, 1], fused[::-1], separate[::-1]) == expected


@pytest.mark.parametrize(('x', 'text'), [
    (1234.5, '1234'), (123.4, '123'), (12.34, '12.3'), (1.234, '1.23'),
    (0.01234, '0.0123'), (0, '0'), (None, 'n/a'), (math.nan, 'n/a')])
def test_number(x, text):
    assert tables.number(x) == text


def test_tables():
    header, rows = ('name', 'us'), [('a', '1'), ('long', '12.5')]
    assert tables.text_table(header, rows) == (
        'name    us\na        1\nlong  12.5')
    assert tables.markdown_table(header, rows) == (
        '| name | us |\n| --- | ---: |\n| a | 1 |\n| long | 12.5 |')


def report():
    def part(x, **more):
        return dict(
            {clock: {'median': x, 'p20': x - 1, 'p80': x + 1}
             for clock in ('wall', 'device')}, **more)

    return {
        'machine': {'device': 'Card', 'command': 'python -m it'},
        'bandwidth': 2e12, 'fused size': 65536,
        'weights': [{
            'shape': '8x8', 'dtype': 'float32', 'nbytes': 256,
            'floors': tables.floors(256, 2e8), 'copy': part(3.0),
            'contenders': {
                'exact': {
                    'forward': part(10.0, kernels=4,
                                    graph={'median': 5.0}),
                    'backward': part(20.0, kernels=3),
                    'both': part(30.0), 'extra bytes': 2 ** 19},
                'Chainer': {
                    'forward': part(10.0),
                    'backward': {'error': 'E: broke'},
                    'both': {'error': 'E: broke'},
                    'notes': {'graph of forward': 'X: y'}},
                'PyTorch': {'error': 'E: absent'}}}],
        'sweep': [
            {'size': 1 << n, 'dtype': 'float32', 'fused': part(x),
             'separate': part(10.0)} for n, x in ((10, 5.0), (11, 20.0))],
        'notes': ['PyTorch: no']}


def test_rows():
    exact, chainer, torch = tables.weight_rows(report()['weights'][0])
    # 4 + 5 times 256 bytes, over 200 MB/s, are 11.52 us.
    assert exact == (
        'exact', '10.0 / 10.0 / 5.00', '20.0 / 20.0 / n/a',
        '30.0 / 30.0 / n/a', '29.0 to 31.0', '4 + 3', '0.500', '38.4 %')
    assert chainer == (
        'Chainer', '10.0 / 10.0 / n/a', 'n/a', 'n/a', 'n/a', 'n/a + n/a',
        'n/a', 'n/a')
    assert set(torch[1:]) == {'n/a', 'n/a + n/a'}


def test_notes_say_each_reason_once():
    double = report()
    double['weights'].append(dict(double['weights'][0], dtype='float16'))
    places = '(8x8 float32, 8x8 float16)'
    assert tables.notes(double) == [
        f'Chainer, graph of forward: X: y {places}',
        f'Chainer, backward: E: broke {places}',
        f'Chainer, both: E: broke {places}',
        f'PyTorch, setup: E: absent {places}',
        'PyTorch: no']


@pytest.mark.parametrize('render', [tables.as_text, tables.as_markdown])
def test_the_report_has_it_all(render):
    text = render(report())
    for part in ('Card', 'python -m it', '2000 GB/s', '8x8, float32',
                 '38.4 %', '2^10', 'never slower up to 1024 entries',
                 'E: absent', '65536 entries'):
        assert part in text
    assert (text.splitlines()[0] ==
            {tables.as_text: '==', tables.as_markdown: '#'}[render]
            + ' Normalization of a weight on a CUDA device')


def test_json_is_strict():
    text = tables.as_json(dict(report(), bandwidth=math.nan))
    assert json.loads(text)['bandwidth'] is None


@pytest.mark.parametrize('argv', [[], ['--check'], ['--quick']])
def test_without_a_device_it_says_so(argv, monkeypatch):
    monkeypatch.setattr(cuda, 'available', False)
    monkeypatch.setattr(
        cuda, '_resolution_error', ImportError('no cupy'), raising=False)
    with pytest.raises(SystemExit, match=r'No CUDA device.*no cupy') as info:
        gpu.main(argv)
    assert info.value.code != 0


# On a device, or on its stand-in.

@pytest.mark.gpu
class TestContenders:

    @pytest.mark.parametrize('make_hook', [
        sn_function.SpectralNormalization,
        link_hooks.SpectralNormalization])
    def test_what_is_timed_is_the_normalization(self, make_hook, monkeypatch):
        monkeypatch.setattr(kernels, 'FUSED_SIZE', kernels.FUSED_SIZE)
        W, gY = (cuda.to_gpu(np.random.normal(size=(6, 5)).astype('f'))
                 for _ in range(2))
        contender = gpu.chainer_contender(make_hook(), W, gY, 0)
        assert kernels.FUSED_SIZE == 0
        for _ in range(30):
            Y = contender.forward()
        norm = np.linalg.norm(cuda.to_cpu(Y.array), 2)
        np.testing.assert_allclose(norm, 1, rtol=1e-2)
        # Backward can be repeated, and does not add up.
        contender.forward()
        gW = [cuda.to_cpu(contender.backward()) for _ in range(2)]
        np.testing.assert_array_equal(*gW)
        assert np.isfinite(cuda.to_cpu(contender.both())).all()

    @pytest.fixture
    def fake_run(self, monkeypatch):
        """A whole run, but for what only a device has."""
        def timer(step, n):
            step()
            return 1e-3, 1e-3

        def copy(run, nbytes):
            return tables.measure(
                {'': lambda: None}, timer, run.budget, run.n_rounds)['']

        monkeypatch.setattr(gpu, 'why_no_device', lambda: None)
        monkeypatch.setattr(gpu, 'why_no_torch', lambda: 'not here')
        monkeypatch.setattr(gpu, 'machine', lambda: {'device': 'Fake'})
        monkeypatch.setattr(gpu, 'time_on_device', timer)
        monkeypatch.setattr(gpu, 'Captured', FakeGraph)
        monkeypatch.setattr(gpu, 'peak_memory', lambda step: 1 << 20)
        monkeypatch.setattr(gpu.Run, 'time_copy', copy)
        monkeypatch.setattr(gpu, 'QUICK_SHAPES', ('8x3x3x3',))
        monkeypatch.setattr(gpu, 'SWEEP', range(4, 7))
        monkeypatch.setattr(
            gpu.Run, 'measure_bandwidth',
            lambda run: run.report.update(bandwidth=1e12))

    @pytest.mark.slow
    @pytest.mark.usefixtures('fake_run')
    def test_a_run(self, tmp_path, capsys):
        default = kernels.FUSED_SIZE
        out, markdown = tmp_path / 'a' / 'x.json', tmp_path / 'x.md'
        gpu.main(['--quick', '--out', str(out), '--markdown', str(markdown)])
        assert default == kernels.FUSED_SIZE
        found = json.loads(out.read_text())
        assert found['machine']['command'].startswith(
            'python -m tests.tools.benchmarks.gpu --quick')
        assert [(weight['shape'], weight['dtype'])
                for weight in found['weights']] == [
                    ('8x3x3x3', 'float32'), ('8x3x3x3', 'float16')]
        for weight in found['weights']:
            assert list(weight['contenders']) == [
                'detached, fused', 'detached', 'exact, fused', 'exact',
                'Chainer']
            for contender in weight['contenders'].values():
                assert contender['extra bytes'] == 1 << 20
                for part in tables.PARTS:
                    assert contender[part]['kernels'] == 2
                    assert contender[part]['wall']['median'] == (
                        pytest.approx(1000))
        assert len(found['sweep']) == 4
        text = capsys.readouterr().out
        assert '1000 / 1000 / n/a' in text
        assert '1000 / 1000 / n/a' in markdown.read_text()

    @pytest.mark.usefixtures('fake_run')
    def test_a_run_without_time(self, tmp_path, capsys):
        out = tmp_path / 'x.json'
        gpu.main(['--quick', '--seconds', '0', '--out', str(out)])
        assert 'the time was up' in capsys.readouterr().out
        assert json.loads(out.read_text())['weights'] == []

    @pytest.mark.slow
    @pytest.mark.usefixtures('fake_run')
    def test_a_run_whose_sweep_takes_too_long(self, monkeypatch, capsys):
        monkeypatch.setattr(
            tables.Budget, 'share', lambda budget, _: tables.Budget(0))
        gpu.main(['--quick'])
        text = capsys.readouterr().out
        assert '* sweep from 2^4 float32: the time was up' in text
        assert '1000 / 1000 / n/a' in text

    @pytest.mark.slow
    @pytest.mark.usefixtures('fake_run')
    def test_a_run_with_a_contender_that_fails(self, monkeypatch, capsys):
        def fail():
            raise RuntimeError('cannot be made')

        monkeypatch.setattr(link_hooks, 'SpectralNormalization', fail)
        gpu.main(['--quick'])
        text = capsys.readouterr().out
        assert 'Chainer, setup: RuntimeError: cannot be made' in text
        assert '1000 / 1000 / n/a' in text
