"""What the benchmark for the CPU times, and what it makes of it."""
from __future__ import annotations

import csv
import gc
import importlib.util
import math
import pathlib

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.links as L
import numpy as np
import pytest

from tests.tools.benchmarks import (
    contenders,
    cpu,
    models,
    picture,
    settings,
    tried,
)

assert sn_function
MODEL_CONTENDERS = [
    cpu.BUILT_IN, 'hook', 'hook, cached', 'chain hook', 'chain hook, cached']
CASE_OF = cpu.case_of
RESULTS = pathlib.Path(__file__).parents[2] / 'docs' / 'benchmarks'


def distance(x, y):
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def settled(shape, n_power_iteration=1):
    """A case whose u, once near, is there: one singular value is large."""
    case = CASE_OF(shape, n_power_iteration=n_power_iteration)
    W = 0.1 * case.W
    return case._replace(W=W + case.u.reshape(-1, *[1] * (W.ndim - 1)))


def made(name, case):
    return contenders.CONTENDERS[name](case)


# Contenders for a weight

@pytest.mark.parametrize('K', [1, 2, 5])
@pytest.mark.parametrize('shape', [(6, 5), (6, 4, 3, 3)])
class TestContenders:

    @pytest.mark.parametrize(('name', 'other'), [
        ('exact', 'composition'), ('detached', cpu.BUILT_IN)])
    def test_the_gradient_is_that_of_another(self, shape, K, name, other):
        """In each step: u moves on in both."""
        case = cpu.case_of(shape, n_power_iteration=K)
        pair = [made(name, case), made(other, case)]
        for _ in range(3):
            x, y = (contender.step() for contender in pair)
            assert distance(x, y) < 1e-4

    def test_the_exact_gradient_is_another_one(self, shape, K):
        """So the test above can tell."""
        case = cpu.case_of(shape, n_power_iteration=K)
        x, y = (made(name, case).step() for name in ('exact', 'detached'))
        assert distance(x, y) > 1e-3

    def test_all_agree_in_the_end(self, shape, K):
        """Once u has converged there is one gradient, in PyTorch as well."""
        case = settled(shape, K)
        W = case.W.reshape(shape[0], -1).astype(np.float64)
        gY = case.gY.reshape(W.shape)
        U, s, Vt = np.linalg.svd(W)
        expected = gY / s[0] - (
            np.sum(gY * W) / s[0] ** 2 * np.outer(U[:, 0], Vt[0]))
        to_make = cpu.makers(case)
        for name in ('identity', 'copy'):
            del to_make[name]
        for name, make in to_make.items():
            contender = make()
            for _ in range(20):
                gW = contender.step()
            gW, = gW if isinstance(gW, list) else [gW]
            assert distance(gW.reshape(W.shape), expected) < 1e-3, name

    def test_the_floors(self, shape, K):
        case = cpu.case_of(shape, n_power_iteration=K)
        np.testing.assert_array_equal(made('identity', case).step(), case.gY)
        np.testing.assert_array_equal(made('copy', case).step(), case.W)


@pytest.mark.parametrize('name', list(contenders.CONTENDERS))
def test_a_step_can_be_repeated(name):
    """Gradients do not add up, and nothing writes into what is shared."""
    case = settled((6, 5), 20)
    before = [x.copy() for x in case[:3]]
    if name not in cpu.makers(case):
        pytest.skip(f'{name}: {cpu.why_not(name)}')
    contender = made(name, case)
    first = np.array(contender.step())
    assert distance(contender.step(), first) < 1e-4
    for x, y in zip(case[:3], before):
        np.testing.assert_array_equal(x, y)


def test_without_peers_it_says_so(monkeypatch):
    for module in (contenders, cpu):
        monkeypatch.setattr(module, 'why_not', lambda peer: 'E: absent')
    assert list(cpu.makers(cpu.case_of((2, 3)))) == [
        cpu.BUILT_IN, 'exact', 'detached', 'composition', 'identity', 'copy']
    assert cpu.missing([]) == [
        f'{peer}: E: absent' for peer in ('PyTorch', 'torch.compile', 'JAX')]


# Contenders for a list

@pytest.mark.parametrize('name', [
    'hook on each', 'at once', 'at once, detached'])
def test_the_gradients_of_a_list(name, monkeypatch):
    """Converged, those of Chainer's hook."""
    monkeypatch.setattr(models, 'case_of', lambda shape: settled(shape, 1))
    makers = models.list_makers([(6, 5)] * 4 + [(4, 6, 3, 3)])
    ours, built_in = (makers[key]() for key in (name, cpu.BUILT_IN))
    for _ in range(20):
        found, expected = ours.step(), built_in.step()
    assert len(found) == 5
    for gW, expected_gW in zip(found, expected):
        assert distance(gW, expected_gW) < 1e-4


# Training steps

@pytest.mark.parametrize('way', [
    cpu.NO_HOOK, cpu.BUILT_IN, 'hook', 'chain hook, cached'])
def test_a_training_step(way, monkeypatch):
    """A small network; it learns, and the hooks see it."""
    def make():
        return chainer.Sequential(
            models.Block(3, 4), models.Block(4, 4), L.Linear(64, 1))

    built = []

    def keeping():
        built.append(make())
        return built[0]

    contender = models.gan_contender(keeping, 8, models.WAYS[way])
    first = contender.step().copy()
    model, = built
    assert first.shape == (models.BATCH_SIZE, 3, 8, 8)
    vectors = [link.W_u.copy() for link in model.links()
               if hasattr(link, 'W_u')]
    assert len(vectors) == (0 if way == cpu.NO_HOOK else 6)
    assert np.isfinite(contender.step()).all()
    assert not np.array_equal(contender.step(), first)


@pytest.mark.slow
def test_the_networks_have_the_weights_of_the_lists():
    for make, name in ((models.Plain, 'SNGAN 32x32'),
                       (models.ResNet, 'SNGAN ResNet 64x64')):
        shapes = [link.W.shape for link in make().links()
                  if getattr(link, 'W', None) is not None]
        assert sorted(shapes) == sorted(models.MODELS[name])
    for make, size in ((models.Plain, 32), (models.ResNet, 64)):
        y = make()(np.zeros((1, 3, size, size), 'f'))
        assert y.shape == (1, 1)


def test_a_step_of_the_demo():
    pytest.importorskip('sklearn', reason='the demo needs it')
    for name, make in models.demo_makers().items():
        gW = make().step()
        assert np.isfinite(gW).all(), name


# Contenders for a model

@pytest.mark.parametrize('name', MODEL_CONTENDERS)
def test_the_gradient_of_a_model_is_the_sum_of_three(name, monkeypatch):
    """Converged, each call of a layer has the same gradient."""
    monkeypatch.setattr(models, 'case_of', settled)
    shapes = [(6, 5), (4, 6, 3, 3), (6, 5)]
    nothing, contender = (
        cpu.model_makers(shapes)[key]() for key in (cpu.NO_HOOK, name))
    for _ in range(20):
        gradients = contender.step()
    for shape, gW, plain in zip(shapes, gradients, nothing.step()):
        case = settled(shape, 20)
        np.testing.assert_allclose(plain, 3 * case.gY, rtol=1e-6)
        assert distance(gW, 3 * made('detached', case).step()) < 1e-3


def test_the_models():
    """What goes in is what came out."""
    assert models.residual(64, 128) == [
        (128, 64, 3, 3), (128, 128, 3, 3), (128, 64, 1, 1)]
    assert {name: len(shapes) for name, shapes in cpu.MODELS.items()} == {
        'SNGAN 32x32': 8, 'SNGAN ResNet 64x64': 18, 'BigGAN 128x128': 17}
    for name, width in (('SNGAN ResNet 64x64', 64), ('BigGAN 128x128', 96)):
        assert cpu.MODELS[name][:3] == [
            (width, 3, 3, 3), (width, width, 3, 3), (width, 3, 1, 1)]
        assert (16 * width, 16 * width, 3, 3) in cpu.MODELS[name]
    convolutions = cpu.MODELS['SNGAN 32x32'][:-1]
    assert all(before[0] == after[1] for before, after in zip(
        convolutions, convolutions[1:]))


# Measuring

def test_time_is_taken_without_the_collector_of_garbage():
    seen = []
    assert gc.isenabled()
    cpu.time_on_host(lambda: seen.append(gc.isenabled()), 3)
    assert seen == [False] * 3
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        cpu.time_on_host(lambda: 1 / 0, 3)
    assert gc.isenabled()


def test_memory():
    """A step that keeps one megabyte, and has three on the way."""
    mega = 1 << 20
    contender = cpu.Contender(
        lambda: np.zeros(mega, np.int8),
        lambda Y: np.zeros(2 * mega, np.int8)[:1], lambda: None)
    peak, kept = cpu.memory_of(contender)
    assert kept == pytest.approx(mega, rel=0.01)
    assert peak == pytest.approx(3 * mega, rel=0.01)
    assert all(map(math.isnan, cpu.memory_of(
        contender._replace(is_traced=False))))


def test_the_hook_keeps_less_than_the_composition():
    """One weight, the normalized one, and vectors."""
    case = cpu.case_of((256, 512))
    _, ours = cpu.memory_of(made('exact', case))
    _, composed = cpu.memory_of(made('composition', case))
    assert case.W.nbytes < ours < 1.2 * case.W.nbytes
    assert composed > ours


@pytest.mark.parametrize(('name', 'n_kept'), [
    (cpu.NO_HOOK, 0), (cpu.BUILT_IN, 3), ('hook', 3), ('hook, cached', 1),
    ('chain hook', 3), ('chain hook, cached', 1), ('the same, detached', 1)])
def test_a_model_keeps_a_normalized_weight_for_each_normalization(
        name, n_kept):
    shapes = [(128, 512), (256, 512)]
    makers = cpu.model_makers(shapes)
    makers[name]().step()  # what is imported on first use is no part of it
    contender = makers[name]()
    _, kept = cpu.memory_of(contender)
    assert kept / cpu.nbytes_of(shapes) == pytest.approx(n_kept, abs=0.15)


def fail():
    raise ValueError('cannot be made')


def test_a_contender_that_cannot_has_a_note():
    case = cpu.case_of((2, 3))
    found = cpu.measured({
        cpu.BUILT_IN: fail,
        'exact': lambda: made('exact', case._replace(gY=case.gY * np.nan)),
        'copy': lambda: contenders.copy(case)}, 0, 1, 1e-4)
    rows = cpu.rows_of('1', 'weight', '2x3', 'float32', 1, found)
    assert [row.contender for row in rows] == [cpu.BUILT_IN, 'exact', 'copy']
    assert [row.note for row in rows] == [
        'ValueError: cannot be made',
        'FloatingPointError: its gradient is not finite', '']
    # Nothing to compare with.
    assert math.isnan(rows[2].copies)
    assert math.isnan(rows[2].ratio)
    assert cpu.weight_cells(rows)[0] == (cpu.BUILT_IN, *['n/a'] * 8)
    assert f'{cpu.BUILT_IN}: ValueError: cannot be made (2x3 float32, K = 1)' \
        in cpu.missing(rows)


def numbers(median, **more):
    return dict({
        'wall': {'median': median, 'p20': median - 1, 'p80': median + 1},
        'walls': [median], 'peak': 96.0, 'kept': 48.0}, **more)


# Tables

def weight_rows():
    _, group = cpu.merged([
        ['side', '1', 'float32', 1, {}],
        ['weight', '2x3', 'float32', 1, {
            cpu.BUILT_IN: numbers(20.0), 'exact': numbers(5.0),
            'copy': numbers(2.0), 'PyTorch': {'error': 'E: absent'}}]])
    return cpu.rows_of('default', *group)


def model_rows():
    return cpu.rows_of('default', 'model', 'SNGAN 32x32', 'float32', 1, {
        cpu.NO_HOOK: numbers(2000.0), cpu.BUILT_IN: numbers(10000.0),
        'hook': numbers(4000.0), 'hook, cached': numbers(1500.0)})


def growth_rows():
    return [row for n in (1, 2) for row in cpu.rows_of(
        'default', 'layers', str(n), 'float32', 1, {
            cpu.NO_HOOK: numbers(10.0 * n), 'hook': {'error': 'E: absent'}})]


def test_cells():
    assert cpu.weight_cells(weight_rows())[1] == (
        'exact', '5.00', '4.00 to 6.00', '4.00', '2.50',
        '0.0000916', '4.00', '0.0000458', '2.00')
    nothing, _, hook, cached = cpu.model_cells(model_rows())
    assert nothing[:5] == (
        cpu.NO_HOOK, '2.00', '2.00 to 2.00', 'n/a', 'n/a')
    assert hook[:5] == ('hook', '4.00', '4.00 to 4.00', '2.00', '4.00')
    # Noise, when it costs nothing: no ratio.
    assert cached[4] == 'n/a'
    assert cpu.growth_cells(growth_rows()) == [
        (cpu.NO_HOOK, '10.0', '20.0'), ('hook', 'n/a', 'n/a')]


def test_markdown():
    text = cpu.as_markdown(
        weight_rows() + model_rows() + growth_rows(), 'python -m it')
    titles = [line for line in text.splitlines() if line.startswith('#')]
    assert titles == [
        '# The normalization on a CPU', '## Threads as by default',
        '### 2x3, float32, K = 1',
        '### SNGAN 32x32: a step of 8 weights, 11.2 MiB',
        '### ' + cpu.GROWTH['layers'], '## Not measured']
    assert '`python -m it`' in text
    assert '| exact | 5.00 | 4.00 to 6.00 | 4.00 |' in text
    assert '* hook: E: absent (layers 1; layers 2)' in text


# The run

@pytest.fixture
def names_only(monkeypatch):
    """Nothing is made or measured."""
    monkeypatch.setattr(cpu, 'measured', lambda to_make, *_: list(to_make))
    for module in (cpu, models):
        monkeypatch.setattr(module, 'case_of', lambda *_: None)


@pytest.mark.usefixtures('names_only')
def test_what_is_measured_with_what():
    args = cpu.parse([])
    groups = list(cpu.measurements(args, cpu.OURS))
    for i, shape in enumerate(cpu.SHAPES):
        more = [('float32', 2), ('float32', 5), ('float16', 1)]
        assert [group[2:4] for group in groups
                if group[:2] == ('weight', shape)] == [
            ('float32', 1), *(more if i in (0, 2, 4) else [])]
    for kind, names in (
            ('list', models.LISTS), ('model', models.MODELS),
            ('step', models.STEPS), ('layers', map(str, (1, 2, 4, 8, 16, 32))),
            ('side', [str(1 << n) for n in range(6, 13)])):
        assert [group[1] for group in groups if group[0] == kind] == list(
            names)
    assert groups[0][4] == [
        cpu.BUILT_IN, 'exact', 'detached', 'composition', 'identity', 'copy']
    # In processes it is the same.
    assert groups == [group for part, package in cpu.parts(args, [])
                      for group in cpu.measurements(part, package)]


@pytest.mark.usefixtures('names_only')
def test_what_peers_are_measured_with(monkeypatch):
    for module in (contenders, models):
        monkeypatch.setattr(module, 'why_not', lambda peer: None)
    for package, peers in (
            ('torch', ['PyTorch', 'torch.compile']), ('jax', ['JAX'])):
        parts = [part for part, of_package in cpu.parts(
            cpu.parse([]), ['torch', 'jax']) if of_package == package]
        groups = [group for part in parts
                  for group in cpu.measurements(part, package)]
        assert [group[:4] for group in groups] == [
            *(('weight', shape, 'float32', 1) for shape in cpu.SHAPES),
            *(('list', name, 'float32', 1) for name in models.LISTS)]
        assert groups[0][4] == ['copy', *peers]
        assert groups[-1][4] == peers


def test_what_packages_found_of_one_weight_is_one_table():
    """And each is compared with the copy of its own process."""
    weight, at_once = cpu.merged([
        ['weight', '2x3', 'float32', 1, {
            'exact': numbers(6.0), 'copy': numbers(2.0)}],
        ['list', 'x', 'float32', 1, {'at once': numbers(3.0)}],
        ['weight', '2x3', 'float32', 1, {
            'copy': numbers(4.0), 'JAX': numbers(8.0)}]])
    assert weight[:4] == ('weight', '2x3', 'float32', 1)
    assert {row.contender: row.copies for row in cpu.rows_of(
        '1', *weight)} == {'exact': 3, 'copy': 1, 'JAX': 2}
    assert at_once[:2] == ('list', 'x')


def test_what_a_hook_adds_is_the_median_over_rounds():
    rows = cpu.rows_of('1', 'step', 'x', 'float32', 1, {
        cpu.NO_HOOK: numbers(20.0, walls=[10.0, 20.0, 90.0]),
        cpu.BUILT_IN: numbers(24.0, walls=[14.0, 24.0, 93.0]),
        'hook': numbers(22.0, walls=[12.0, 22.0, 99.0])})
    assert [row.added for row in rows[1:]] == [4, 2]
    assert [row.ratio for row in rows[1:]] == [1, 2]


@pytest.fixture
def in_this_process(monkeypatch):
    """Numbers of threads that were asked for."""
    asked = []

    def measure_here(args, threads, package):
        asked.append((threads, package))
        return list(cpu.measurements(args, package))

    monkeypatch.setattr(cpu, 'in_a_process', measure_here)
    monkeypatch.setitem(models.MODELS, 'SNGAN 32x32', [(8, 3, 3, 3), (1, 8)])
    return asked


@pytest.mark.slow
def test_a_run(tmp_path, capsys, in_this_process, monkeypatch):
    monkeypatch.setattr(cpu, 'why_not', lambda peer: 'E: absent')
    out = tmp_path / 'a' / 'b'
    cpu.main([
        '--quick', '--shapes', '8x3x3x3', '--models', 'SNGAN 32x32',
        '--iterations', '1', '2', '--rounds', '1', '--steps',
        '--layers', '1', '2', '--sides', '4', '8', '--out', str(out)])
    text, complaint = capsys.readouterr()
    assert in_this_process == [('default', cpu.OURS)] * 3 + [
        ('1', cpu.OURS)] * 3
    for part in ('Threads as by default', 'One thread',
                 '== 8x3x3x3, float32, K = 1', '== 8x3x3x3, float32, K = 2',
                 '== 8x3x3x3, float16, K = 1', '== At once: 18 of 16x16x3x3',
                 '== SNGAN 32x32: a step of 2 weights', '== Square weights'):
        assert part in text
    with (out / 'cpu.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        'threads', 'kind', 'name', 'dtype', 'K', 'contender', 'p20', 'median',
        'p80', 'added', 'ratio', 'copies', 'peak bytes', 'retained bytes',
        'note']
    assert {row['kind'] for row in rows} == {
        'weight', 'list', 'model', 'layers', 'side'}
    assert {row['threads'] for row in rows} == {'default', '1'}
    assert [row['note'] for row in rows if row['note']] == []
    assert all(float(row['median']) > 0 for row in rows)
    assert '--rounds 1' in (out / 'cpu.md').read_text()
    if importlib.util.find_spec('matplotlib') is None:
        assert 'cpu.png is not drawn' in complaint
    else:
        assert (out / 'cpu.png').read_bytes().startswith(b'\x89PNG')


def test_committed_picture_is_that_of_the_numbers(tmp_path):
    pytest.importorskip('matplotlib')
    csv_file = RESULTS / 'cpu.csv'
    rows = cpu.read_csv(csv_file)
    with csv_file.open() as file:
        for row, fields in zip(rows, csv.DictReader(file)):
            for name in 'threads', 'kind', 'name', 'contender', 'note':
                assert getattr(row, name) == fields[name]
            for name in 'K', 'p20', 'median', 'added', 'ratio':
                assert getattr(row, name) == pytest.approx(
                    float(fields[name] or 'nan'), nan_ok=True)
            assert row.kept == pytest.approx(
                float(fields['retained bytes'] or 'nan'), nan_ok=True)
    drawn = {
        picture.LABELS.get(row.contender, row.contender)
        for row in rows if row.kind in picture.PANELS}
    assert drawn == set(picture.STYLES)
    colors = [color for color, _ in picture.STYLES.values()]
    assert len(set(colors)) == len(colors)
    (tmp_path / 'cpu.csv').write_bytes(csv_file.read_bytes())
    cpu.main(['--draw', str(tmp_path)])
    assert (tmp_path / 'cpu.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_a_process_has_the_threads_that_are_asked_for(monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '7')
    asked = []

    def run(command, env, **_):
        asked.append({name: env.get(name) for name in cpu.THREADS})
        cpu.measure_package(
            *command[command.index('--of-package') + 1:][:2], cpu.DEFAULT,
            command[-1])

    monkeypatch.setattr(cpu.subprocess, 'run', run)
    args = cpu.parse(['--quick', '--shapes', '3x4', '--lists', '--models',
                      '--steps', '--layers', '--sides', '--rounds', '1',
                      '--iterations', '1', '--out', 'a'])
    for threads in ('default', '1'):
        groups = cpu.in_a_process(args, threads, cpu.OURS)
        assert [group[:4] for group in groups] == [
            ['weight', '3x4', 'float32', 1], ['weight', '3x4', 'float16', 1]]
    assert asked == [dict.fromkeys(cpu.THREADS), dict.fromkeys(
        cpu.THREADS, '1')]


@pytest.mark.parametrize('rank', [1, 2])
def test_what_was_tried_computes_the_same(rank):
    example = tried.Example((128, 1024))
    P, Q = example.P[:rank], example.Q[:rank]
    expected = 1.5 * example.gY + 0.5 * P.T @ Q
    for way, run in tried.correction(example, rank).items():
        out = (example.unaligned if way == 'between cache lines'
               else example.out)
        out[...] = np.nan
        run()
        if not way.startswith('at once'):
            np.testing.assert_allclose(
                out, expected, rtol=1e-4, atol=1e-4, err_msg=way)


def test_what_was_tried_is_told(capsys):
    tried.main(['--rounds', '1', '--largest', '200000'])
    out = capsys.readouterr().out
    assert all(question in out for question in tried.QUESTIONS)
    assert out.count('128x1024') == len(tried.QUESTIONS)


def test_what_settings_cost_is_told(capsys, monkeypatch):
    monkeypatch.setattr(cpu, 'SHAPES', cpu.SHAPES[:2])
    monkeypatch.setattr(settings, 'LAYERS', {'small layer': (4, 6)})
    settings.main(['--rounds', '1'])
    rows = capsys.readouterr().out.splitlines()
    for name in (*settings.LINKS, 'small layer'):
        row, = [row for row in rows if row.startswith(name)]
        assert 0 < float(row.split()[-1]) < 100


def test_what_certificates_cost_is_told(capsys, monkeypatch):
    monkeypatch.setattr(settings, 'CERTIFIED', {'small': ((3, 4, 2, 2), 2)})
    settings.main(['--rounds', '1', '--certify'])
    name, *seconds = capsys.readouterr().out.splitlines()[-1].split()
    assert name == 'small'
    assert all(0 <= float(x) < 10 for x in seconds)
    assert len(seconds) == len(settings.RTOLS)
