"""What the benchmark for a device does with its numbers."""
from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from chainer import link_hooks
from chainer.backends import cuda

import sn_function
from sn_function._arithmetic import kernels
from tests.tools.benchmarks import device, gpu, gpu_torch, models
from tests.tools.benchmarks import gpu_report as tables
from tests.tools.benchmarks.report import (
    BUILT_IN,
    Budget,
    markdown_table,
    measure,
    number,
    shape_of,
    summary,
    text_table,
)
from tests.tools.gpu import both_ways, kernel_times


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
        self.types = [gpu.KERNEL, device.MEMSET, gpu.KERNEL]
        self.stream = self

    def launch(self):
        raise RuntimeError('no launch')

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_a_budget_ends():
    budget = Budget(10, Clock())
    assert budget.left == 9
    assert Budget(10, lambda: 5.0).share(0.5).left == 5
    assert Budget(0).left <= 0


def test_shapes():
    assert shape_of('64x3x3x3') == (64, 3, 3, 3)
    assert set(gpu_torch.COMPILED_SHAPES) <= set(gpu.GOAL_SHAPES)
    assert {*tables.BUILT_IN_GOALS, *tables.FLOOR_GOALS} <= set(
        gpu.GOAL_SHAPES)
    shapes = gpu.GOAL_SHAPES + gpu.OTHER_SHAPES
    assert len(set(shapes)) == len(shapes)


def test_summary():
    values = [x * 1e-6 for x in range(1, 102)]
    assert summary(values) == pytest.approx(
        {'median': 51, 'p20': 21, 'p80': 81})


def test_floor():
    # 4 passes over 1000 bytes, at 2 GB/s.
    least = tables.floor(1000, 2e9)
    assert least == pytest.approx(2)
    both = {'both': {'device': {'median': 6.0}}}
    assert tables.over_floor({'floor': least}, both) == pytest.approx(1.5)
    assert math.isnan(tables.over_floor({'floor': least}, {}))
    assert math.isnan(tables.floor(1000, None))


class TestMeasure:

    def test_times(self):
        found = measure(
            {'a': lambda: 2e-6, 'b': lambda: 4e-3}, FakeTimer(),
            Budget(1e9), 5, 1e-4)
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
        found = measure(
            {'bad': fail, 'late': lambda: next(later), 'good': lambda: 1e-3},
            FakeTimer(), Budget(1e9), 5, 1e-3)
        assert found['bad']['error'].startswith('ValueError: so long xxx')
        assert len(found['bad']['error']) == 300
        assert found['late']['error'].startswith('StopIteration')
        assert found['good']['wall']['median'] == pytest.approx(1000)

    def test_no_time_is_left(self):
        timer = FakeTimer()
        found = measure({'a': lambda: 1}, timer, Budget(0))
        assert 'time was up' in found['a']['error']
        assert timer.calls == 0

    def test_the_time_is_up_on_the_way(self):
        """What was begun has one round; what was not has an error."""
        found = measure(
            {'a': lambda: 1, 'b': lambda: 1}, FakeTimer(),
            Budget(1.5, Clock()))
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
    assert number(x) == text


def test_tables():
    header, rows = ('name', 'us'), [('a', '1'), ('long', '12.5')]
    assert text_table(header, rows) == (
        'name    us\na        1\nlong  12.5')
    assert markdown_table(header, rows) == (
        '| name | us |\n| --- | ---: |\n| a | 1 |\n| long | 12.5 |')


def numbers(x, **more):
    return dict(
        {clock: {'median': x, 'p20': x - 1, 'p80': x + 1}
         for clock in ('wall', 'device')}, **more)


def report():
    return dict(
        tables.new_report(),
        machine={'device': 'Card', 'command': 'python -m it'},
        bandwidth=2e12,
        weights=[{
            'shape': '256x128x4x4', 'dtype': 'float32', 'nbytes': 2 << 20,
            'floor': 5.0, 'copy': numbers(3.0),
            'contenders': {
                'exact': {
                    'forward': numbers(10.0, kernels=4,
                                       graph={'median': 5.0}),
                    'backward': numbers(20.0, kernels=3),
                    'both': numbers(30.0), 'extra bytes': 2 ** 19},
                BUILT_IN: {
                    'forward': numbers(10.0, **{'no graph': 'X: y'}),
                    'backward': {'error': 'E: broke'},
                    'both': numbers(240.0)},
                'PyTorch': {'both': numbers(59.0)},
                'torch.compile': {'error': 'E: absent'}}}],
        models=[{
            'kind': 'A training step', 'name': 'the demo', 'contenders': {
                'no hook': numbers(1000.0, kernels=7),
                BUILT_IN: {'error': 'E: broke'},
                'chain hook': numbers(3000.0)}}],
        sweep=[
            {'size': 1 << n, 'dtype': 'float32', 'fused': numbers(x),
             'separate': numbers(10.0)} for n, x in ((10, 5.0), (11, 20.0))],
        notes=['sweep: no'], **{'fused size': 65536})


def test_rows():
    exact, built_in, _, compiled = tables.weight_rows(report()['weights'][0])
    assert exact == (
        'exact', '10.0 / 10.0 / 5.00', '20.0 / 20.0 / n/a',
        '30.0 / 30.0 / n/a', '29.0 to 31.0', '4 + 3', '0.500', '3.00')
    assert built_in == (
        BUILT_IN, '10.0 / 10.0 / n/a', 'n/a', '240 / 240 / n/a',
        '239 to 241', 'n/a + n/a', 'n/a', '24.0')
    assert set(compiled[1:]) == {'n/a', 'n/a + n/a'}


def test_goals_are_met_or_missed():
    weight = report()['weights'][0]
    assert tables.goal_rows([weight]) == [(
        '256x128x4x4', '2.00', 'exact', '30.0', '8.00 (at least 8: met)',
        '1.97 (at least 2: missed)', '30.0', '3.00')]
    # One that has a limit, and others were not measured.
    weight = dict(weight, shape='1024x1024x3x3', contenders={
        'detached': {'both': numbers(14.0)}})
    assert tables.goal_rows([weight])[0][4:] == (
        'n/a (at least 2.4)', 'n/a (at least 2)', '14.0',
        '1.40 (at most 1.5: met)')
    assert tables.goal_rows([dict(weight, dtype='float16')]) == []
    assert tables.goals_text(report()) == 'goals: 1 met, 1 missed'


def test_what_a_hook_adds_to_a_model():
    nothing, built_in, ours = tables.model_rows(
        report()['models'][0]['contenders'])
    assert nothing == (
        'no hook', '1.00', '0.999 to 1.00', '1.00', 'n/a', '7')
    assert built_in == (BUILT_IN, *['n/a'] * 5)
    assert ours[-2:] == ('2.00', 'n/a')


def test_notes_say_each_reason_once():
    double = report()
    double['weights'].append(dict(double['weights'][0], dtype='float16'))
    places = '(256x128x4x4 float32, 256x128x4x4 float16)'
    assert tables.notes(double) == [
        f'{BUILT_IN}, graph of forward: X: y {places}',
        f'{BUILT_IN}, backward: E: broke {places}',
        f'torch.compile, all: E: absent {places}',
        f'{BUILT_IN}, all: E: broke (A training step the demo)',
        'sweep: no']


@pytest.mark.parametrize('render', [tables.as_text, tables.as_markdown])
def test_the_report_has_it_all(render):
    text = render(report())
    for part in ('Card', 'python -m it', '2000 GB/s', '256x128x4x4, float32',
                 'at least 8: met', 'A training step: the demo', '2^10',
                 'never slower up to 1024 entries', 'E: absent',
                 '65536 entries'):
        assert part in text
    assert (text.splitlines()[0] ==
            {tables.as_text: '==', tables.as_markdown: '#'}[render]
            + ' Normalization of a weight on a CUDA device')


def test_json_is_strict_and_is_read_again(tmp_path):
    path = tmp_path / 'x.json'
    path.write_text(tables.as_json(dict(
        report(), bandwidth=None, more=math.nan)))
    assert json.loads(path.read_text())['more'] is None
    found = tables.load(path)
    assert found['weights'] == report()['weights']
    assert 'n/a GB/s' in tables.as_markdown(found)
    # What was measured before is measured anew in its place.
    entry = tables.entry(
        found, 'weights', shape='256x128x4x4', dtype='float32')
    assert entry is found['weights'][0]
    assert tables.entry(
        found, 'weights', shape='256x128x4x4', dtype='float16') == {
            'shape': '256x128x4x4', 'dtype': 'float16', 'contenders': {}}
    assert len(found['weights']) == 2
    assert tables.load(tmp_path / 'none.json') == tables.new_report()


@pytest.mark.parametrize('argv', [[], ['--check'], ['goals']])
def test_without_a_device_it_says_so(argv, monkeypatch, capsys):
    monkeypatch.setattr(cuda, 'available', False)
    monkeypatch.setattr(
        cuda, '_resolution_error', ImportError('no cupy'), raising=False)
    with pytest.raises(SystemExit) as info:
        gpu.main(argv)
    assert info.value.code == 77
    out = capsys.readouterr().out
    assert out.startswith('No CUDA device.')
    assert 'no cupy' in out


def test_without_pytorch_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(SystemExit) as info:
        gpu_torch.main([])
    assert info.value.code == 77
    assert capsys.readouterr().out.startswith('PyTorch: ModuleNotFoundError')
    assert kernel_times.main(tmp_path / 'x.md') == 77
    assert not (tmp_path / 'x.md').exists()


def test_pytorch_adds_to_the_report(monkeypatch, tmp_path, capsys):
    """What a device has is not here, nor is PyTorch."""
    def make(W, gY, is_compiled):
        if is_compiled:
            raise RuntimeError('no compiler')
        return gpu_torch.Contender(*[lambda: 59e-6] * 3)

    monkeypatch.setattr(gpu_torch, 'why_not', lambda: None)
    monkeypatch.setattr(gpu_torch, 'make_contender', make)
    monkeypatch.setattr(gpu_torch, 'time_on_device', FakeTimer())
    monkeypatch.setattr(gpu_torch, 'extra_bytes', lambda _: 1 << 20)
    monkeypatch.setattr(gpu_torch, 'GOAL_SHAPES', ('256x128x4x4',))
    monkeypatch.setattr(gpu_torch, 'COMPILED_SHAPES', ('256x128x4x4',))
    monkeypatch.setattr(
        gpu_torch.TorchRun, 'machine', lambda _: {'PyTorch': '2'})
    monkeypatch.setattr(gpu_torch.TorchRun, 'clean', lambda _: None)
    path = tmp_path / 'x.json'
    before = report()
    del before['weights'][0]['contenders']['PyTorch']
    path.write_text(tables.as_json(before))
    gpu_torch.main(['--out', str(path)])
    text = capsys.readouterr().out
    assert '1.97 (at least 2: missed)' in text
    assert 'torch.compile, all: RuntimeError: no compiler' in text
    found = json.loads(path.read_text())
    assert found['machine']['device'] == 'Card'
    assert found['machine']['PyTorch'] == '2'
    assert [(weight['dtype'], list(weight['contenders']))
            for weight in found['weights']] == [
                ('float32', ['exact', BUILT_IN, 'torch.compile', 'PyTorch']),
                ('float16', ['PyTorch'])]


def test_a_part_that_there_is_not():
    with pytest.raises(SystemExit):
        gpu.main(['goal'])


def test_pytorch_is_measured_without_cupy():
    """Each brings libraries of CUDA of its own."""
    code = ('import sys; from tests.tools.benchmarks import gpu_torch; '
            'sys.exit(bool({"chainer", "cupy"} & set(sys.modules)))')
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_rows_of_kernels():
    events = [('void at::native::norm<float>(float*)', 2.0), ('sn_fwd', 5.0),
              ('sn_fwd', 7.0), ('Memcpy DtoD', 4.0)]
    assert kernel_times.rows_of('forward', events, 2) == [
        ('forward', 'norm<float>(float*)', '0.500', '2.00', '1.00'),
        ('forward', 'sn_fwd', '1.00', '6.00', '6.00'),
        ('forward', 'Memcpy DtoD', '0.500', '4.00', '2.00'),
        ('forward', 'all', '2.00', '', '9.00')]


def test_a_kernel_table_that_cannot_be_made_says_why():
    def fail():
        raise RuntimeError('no kernels')

    assert kernel_times.rows_or_reason(None, fail) == (
        'RuntimeError: no kernels')


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

        def copy(nbytes, budget):
            return measure({'': lambda: None}, timer, budget, 3)['']

        monkeypatch.setattr(gpu, 'why_no_device', lambda: None)
        monkeypatch.setattr(gpu, 'machine', lambda: {'device': 'Fake'})
        monkeypatch.setattr(gpu, 'time_on_device', timer)
        monkeypatch.setattr(gpu, 'Captured', FakeGraph)
        monkeypatch.setattr(gpu, 'peak_memory', lambda step: 1 << 20)
        monkeypatch.setattr(gpu, 'time_copy', copy)
        monkeypatch.setattr(gpu, 'GOAL_SHAPES', ('8x3x3x3',))
        monkeypatch.setattr(gpu, 'OTHER_SHAPES', ('1x5',))
        monkeypatch.setattr(gpu, 'SWEEP', range(4, 6))
        monkeypatch.setattr(gpu, 'N_ROUNDS', 2)
        monkeypatch.setattr(gpu.DeviceRun, 'measure_bandwidth', lambda run: (
            run.report.update(bandwidth=1e12)))
        small = [(8, 3, 3, 3), (1, 8)]
        monkeypatch.setattr(
            models, 'MODELS', dict.fromkeys(models.MODELS, small))

    @pytest.mark.usefixtures('fake_run')
    def test_a_run(self, tmp_path, capsys, monkeypatch):
        default = kernels.FUSED_SIZE
        sizes, makers = [], gpu.makers

        def watched(W, gY, fused_size=None):
            if fused_size is None:
                sizes.append(kernels.FUSED_SIZE)
            return makers(W, gY, fused_size)

        monkeypatch.setattr(gpu, 'makers', watched)
        out, markdown = tmp_path / 'a' / 'x.json', tmp_path / 'x.md'
        options = ['--out', str(out), '--markdown', str(markdown)]
        gpu.main(['goals', *options])
        # Another process adds to it.
        gpu.main(['sweep', 'float16', 'others', *options, '--command', 'it'])
        assert {default, *sizes} == {kernels.FUSED_SIZE}
        found = json.loads(out.read_text())
        assert found['machine'] == {'device': 'Fake', 'command': 'it'}
        assert [(weight['shape'], weight['dtype'])
                for weight in found['weights']] == [
                    ('8x3x3x3', 'float32'), ('8x3x3x3', 'float16'),
                    ('1x5', 'float32')]
        for weight in found['weights']:
            assert list(weight['contenders']) == [
                'detached', 'exact', BUILT_IN]
            for contender in weight['contenders'].values():
                assert contender['extra bytes'] == 1 << 20
                for part in tables.PARTS:
                    assert contender[part]['kernels'] == 2
                    assert contender[part]['wall']['median'] == (
                        pytest.approx(1000))
        assert [(point['size'], point['dtype']) for point in found['sweep']
                ] == [(16, 'float32'), (32, 'float32'), (16, 'float16'),
                      (32, 'float16')]
        assert '1000 / 1000 / n/a' in markdown.read_text()
        assert '8x3x3x3 float32: ' in capsys.readouterr().out

    @pytest.mark.slow
    @pytest.mark.usefixtures('fake_run')
    def test_models(self, tmp_path, monkeypatch):
        """All weights with each hook; the steps' networks are not here."""
        for name in ('demo_makers', 'gan_makers'):
            monkeypatch.setattr(models, name, lambda *_: {})
        out = tmp_path / 'x.json'
        gpu.main(['models', '--out', str(out)])
        found = json.loads(out.read_text())
        assert found['notes'] == []
        whole, demo, *_ = found['models']
        assert (whole['kind'], demo['name']) == (gpu.WEIGHTS, 'the demo')
        assert list(whole['contenders']) == [
            'no hook', BUILT_IN, 'chain hook', 'chain hook, cached',
            'the same, detached']
        for numbers in whole['contenders'].values():
            assert numbers['wall']['median'] == pytest.approx(1000)
            assert numbers['kernels'] == 2

    @pytest.mark.usefixtures('fake_run')
    def test_a_run_without_time(self, tmp_path, capsys):
        out = tmp_path / 'x.json'
        gpu.main(['--seconds', '0', '--out', str(out)])
        assert 'goals: the time was up' in capsys.readouterr().out
        assert json.loads(out.read_text())['weights'] == []

    @pytest.mark.usefixtures('fake_run')
    def test_what_fails_is_said_once(
            self, monkeypatch, capsys, tmp_path):
        def fail():
            raise RuntimeError('cannot be made')

        out = tmp_path / 'x.json'
        with monkeypatch.context() as patch:
            patch.setattr(link_hooks, 'SpectralNormalization', fail)
            patch.setattr(gpu.DeviceRun, 'measure_size', lambda *_: fail())
            gpu.main(['goals', 'sweep', '--out', str(out)])
        text = capsys.readouterr().out
        assert f'{BUILT_IN}, all: RuntimeError: cannot be made' in text
        assert 'sweep at 2^4, float32: RuntimeError: cannot be made' in text
        assert '1000 / 1000 / n/a' in text
        # Once it works, no trace is left of it.
        gpu.main(['goals', 'sweep', '--out', str(out)])
        assert 'cannot be made' not in capsys.readouterr().out

    def test_the_script_for_the_sanitizer(self, monkeypatch, capsys):
        monkeypatch.setattr(kernels, 'FUSED_SIZE', kernels.FUSED_SIZE)
        monkeypatch.setattr(both_ways, 'SHAPES', ((8, 3, 2), (9, 6), (4, 5)))
        both_ways.call_all(is_strict=False)
        assert kernels.FUSED_SIZE == 0  # both ways
        assert 'all gradients are finite' in capsys.readouterr().out
