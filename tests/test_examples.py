import argparse
import errno
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import types
import urllib.error

import chainer
import numpy as np
import pytest
from chainer import training
from rich.console import Console

EXAMPLES = os.path.join(os.path.dirname(__file__), '..', 'examples')
sys.path.insert(0, os.path.abspath(EXAMPLES))

import digits_data  # noqa: E402
import digits_score  # noqa: E402
import iresnet_models  # noqa: E402
import sample_grid  # noqa: E402
import sigma_report  # noqa: E402
import sngan_extensions  # noqa: E402
import sngan_models  # noqa: E402
import train_iresnet_digits as invertible  # noqa: E402
import train_sngan_digits as example  # noqa: E402

from sn_function.extensions import Layer, SpectralNormReport  # noqa: E402
from tests import maps  # noqa: E402

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]
SHORT = ['--display-interval', '2', '--snapshot-interval', '2',
         '--batchsize', '8']


def make_images(shape, n=20):
    x = np.random.uniform(-1, 1, (n, *shape)).astype('f')
    t = (np.arange(n) % 10).astype('i')
    return digits_data.Images(x, t, x, t)


def load(path):
    with np.load(path, allow_pickle=True) as f:
        return {key: f[key] for key in f.files}


class TestFrechetDistance:

    def test_commuting_gaussians(self):
        # Equal eigenvectors: the distance is that of the axes, one by one.
        V = np.linalg.qr(np.random.normal(size=(5, 5)))[0]
        a, b = np.random.uniform(0, 3, (2, 5))
        a[0] = b[1] = 0  # singular
        m1, m2 = np.random.normal(size=(2, 5))
        actual = digits_score.frechet_distance(
            (m1, (V * a) @ V.T), (m2, (V * b) @ V.T))
        expected = ((m1 - m2) ** 2).sum() + ((a ** .5 - b ** .5) ** 2).sum()
        np.testing.assert_allclose(actual, expected, rtol=1e-6)

    def test_general_gaussians(self):
        A, B = np.random.normal(size=(2, 6, 6))
        C1, C2 = A @ A.T, B @ B.T
        # The eigenvalues of C1 C2 are real and positive.
        root = np.sqrt(np.linalg.eigvals(C1 @ C2).real).sum()
        zero = np.zeros(6)
        np.testing.assert_allclose(
            digits_score.frechet_distance((zero, C1), (zero, C2)),
            np.trace(C1) + np.trace(C2) - 2 * root, rtol=1e-6)

    def test_of_itself_is_zero(self):
        A = np.random.normal(size=(6, 3))  # rank 3
        p = np.ones(6), A @ A.T
        assert abs(digits_score.frechet_distance(p, p)) < 1e-6


class TestLosses:

    def test_hinge_loss_of_the_discriminator(self):
        real, fake = np.random.normal(scale=2, size=(2, 50, 1)).astype('f')
        expected = np.where(real < 1, 1 - real, 0).mean()
        expected += np.where(fake > -1, 1 + fake, 0).mean()
        np.testing.assert_allclose(
            sngan_models.loss_dis(real, fake).array, expected, rtol=1e-6)

    def test_loss_of_the_generator(self):
        fake = np.random.normal(size=(50, 1)).astype('f')
        np.testing.assert_allclose(
            sngan_models.loss_gen(fake).array, -fake.mean(), rtol=1e-5)


@pytest.mark.parametrize('shape', SHAPES)
class TestEachImageShape:

    @pytest.mark.parametrize('hook', ['sn_function', 'chainer', 'none'])
    def test_one_step_of_training(self, shape, hook):
        images = make_images(shape)
        args = argparse.Namespace(
            hook=hook, n_power_iteration=1, n_vectors=3)
        gen = sngan_models.Generator(shape, ch=2)
        dis = sngan_models.Discriminator(shape, ch=4)
        example.normalize(args, dis)
        iterator = chainer.iterators.SerialIterator(
            chainer.datasets.TupleDataset(images.train, images.train_labels),
            4)
        updater = example.SNGANUpdater(iterator, {
            'gen': chainer.optimizers.Adam().setup(gen),
            'dis': chainer.optimizers.Adam().setup(dis)}, n_dis=2)
        before = [(model, model.copy('copy')) for model in (gen, dis)]
        trainer = training.Trainer(updater)
        with trainer.reporter.scope({}):
            updater.update()
        for model, old in before:
            for p, q in zip(model.params(), old.params()):
                assert np.isfinite(p.array).all()
                # The gradient of the last bias is 0: real minus fake.
                assert p.size == 1 or (p.array != q.array).any()
        assert iterator.epoch_detail == 0.4  # n_dis batches

        x = gen.sample(gen.make_noise(5), images.train_labels[:5], 2)
        assert x.shape == (5, *shape)
        assert x.dtype == np.float32
        assert abs(x).max() <= 1
        layers = SpectralNormReport(dis, true_sigma=True).measure()
        assert len(layers) == len(dis.convs) + 2
        assert all((layer.sigma is None) == (hook == 'none')
                   for layer in layers)

    def test_classifier(self, shape):
        images = make_images(shape)
        model = digits_score.train_classifier(
            images, chainer.get_device('@numpy'), iterations=2, batchsize=4)
        mean, covariance = digits_score.fit_gaussian(model, images.test)
        assert mean.dtype == np.float64
        assert covariance.shape == (digits_score.N_FEATURES,) * 2


@pytest.mark.parametrize(('norms', 'expected'), [
    ((1.001, 0.999), 'The norms of all 2 normalized weights are within'),
    ((1.001, 1.02), 'Warning: the norm of l1 is off'),
    ((float('nan'), 1.), 'Warning: the norm of l0 is off'),
])
def test_verdict(norms, expected):
    layers = [Layer(f'l{i}', (1, 1), 1., 0., 1., norm)
              for i, norm in enumerate(norms)]
    assert sigma_report.verdict(layers).startswith(expected)


@pytest.fixture
def quick_classifier(monkeypatch):
    train = digits_score.train_classifier
    monkeypatch.setattr(
        digits_score, 'train_classifier',
        lambda images, device: train(images, device, iterations=20))


def trainer_at(iteration, out='out'):
    updater = types.SimpleNamespace(iteration=iteration)
    return types.SimpleNamespace(updater=updater, out=out, observation={})


class TestSnapshots:

    @pytest.fixture(autouse=True)
    def _interrupts_raise(self, monkeypatch):
        # In the background Python may have started with them ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    @pytest.fixture
    def saved(self):
        return []

    @pytest.fixture
    def snapshots(self, saved):
        result = sngan_extensions.Snapshots(
            lambda trainer: trainer.updater.iteration == 2)
        filename = result.save.filename
        result.save = lambda trainer: saved.append(trainer.updater.iteration)
        result.save.filename = filename
        result.initialize(trainer_at(0))
        return result

    def test_after_an_interrupt_at_the_end_of_the_iteration(
            self, snapshots, saved):
        for i in 1, 2, 3:
            snapshots(trainer_at(i))
        assert saved == [2]
        assert snapshots.newest == os.path.join('out', 'snapshot_iter_2')
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            snapshots(trainer_at(4))
        assert saved == [2, 4]
        assert snapshots.newest == os.path.join('out', 'snapshot_iter_4')

    def test_second_interrupt_is_heard_at_once(self, snapshots):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    def test_interrupts_raise_after_training(self, snapshots):
        snapshots.finalize()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    def test_ignored_interrupts_stay_ignored(self, saved):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        snapshots = sngan_extensions.Snapshots(lambda trainer: False)
        snapshots.initialize(trainer_at(0))
        signal.raise_signal(signal.SIGINT)
        snapshots(trainer_at(1))
        snapshots.finalize()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


class TestResumeCommand:

    @pytest.mark.parametrize(('argv', 'others'), [
        ([], []),
        (['-i', '5', '--resume', 'old', '--out', 'a b'],
         ['-i', '5', '--out', 'a b']),
        (['-rold', '-b8'], ['-b8']),
        (['--resume=old', '--n-dis', '2'], ['--n-dis', '2']),
    ])
    def test_has_the_same_other_arguments(
            self, argv, others, tmp_path, monkeypatch):
        (tmp_path / 'old').touch()
        monkeypatch.chdir(tmp_path)
        python, script, *rest = shlex.split(example.resume_command(
            example.parse_args(argv), 'new'))
        assert os.path.samefile(python, sys.executable)
        assert os.path.samefile(script, example.__file__)
        assert rest == [*others, '--resume', 'new']

    def test_paths_below_the_directory_are_short(self, monkeypatch):
        monkeypatch.chdir(os.path.join(EXAMPLES, '..'))
        assert example.shortest(example.__file__) == os.path.join(
            'examples', 'train_sngan_digits.py')


class TestBar:

    def show(self, console):
        with sngan_extensions.Bar(40, console) as bar:
            print('a line')
            bar(trainer_at(30))

    def test_below_what_is_printed(self):
        file = io.StringIO()
        self.show(Console(file=file, force_terminal=True, width=80))
        text = file.getvalue()
        assert 'preparing' in text
        assert text.index('a line') < text.index('training')
        *_, last = text.rsplit('training', 1)
        assert '30/40' in last

    def test_not_in_a_pipe(self, capsys):
        file = io.StringIO()
        self.show(Console(file=file, width=80))
        assert file.getvalue() == ''
        assert capsys.readouterr().out == 'a line\n'


def test_samples_have_the_score_of_their_iteration(
        tmp_path, monkeypatch, quick_classifier):
    images = make_images((1, 8, 8), 40)
    gen = sngan_models.Generator((1, 8, 8), ch=2)
    noise = gen.make_noise(40)
    titles = []
    monkeypatch.setattr(
        sample_grid, 'draw', lambda *args: titles.append(args[3:]))
    samples = sngan_extensions.Samples(images, gen, noise)
    trainer = trainer_at(7, str(tmp_path))
    samples.initialize(trainer)
    samples(trainer)
    scores = samples.scorer.scores({
        'these': (gen.sample(noise, images.test_labels), images.test_labels)})
    expected = scores['images']['these']['frechet_distance']
    assert trainer.observation == {'distance': expected}
    assert titles == [(
        f'generated, iteration 7: Frechet distance {expected:.2f}',
        str(tmp_path / 'samples.png'))]


# Runs the example, which interrupts itself in the middle of an iteration.
INTERRUPTED = """
import os, signal, sys
sys.path.insert(0, {examples!r})
import train_sngan_digits as example
train = example.digits_score.train_classifier
example.digits_score.train_classifier = (
    lambda *args: train(*args, iterations=20))
step = example.SNGANUpdater.report
def report(*args):
    example.n_calls = getattr(example, 'n_calls', 0) + 1
    if example.n_calls == {call}:
        for _ in range({times}):
            os.kill(os.getpid(), signal.SIGINT)
    return step(*args)
example.SNGANUpdater.report = staticmethod(report)
sys.exit(example.main({argv!r}))
"""


def interrupted(argv, call, times=1):
    """Runs the example, and interrupts it in a call of a loss function."""
    def hear_interrupts():
        # What a shell starts in the background ignores them.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    done = subprocess.run(
        [sys.executable, '-c', INTERRUPTED.format(
            examples=os.path.abspath(EXAMPLES), call=call, times=times,
            argv=argv)], capture_output=True, text=True, timeout=300,
        preexec_fn=hear_interrupts, cwd=os.path.join(EXAMPLES, '..'))
    assert done.returncode == 130, done.stderr
    assert 'Traceback' not in done.stderr
    return done.stderr


@pytest.mark.usefixtures('quick_classifier')
class TestMain:

    @pytest.mark.slow
    def test_writes_its_files_and_resumes_exactly(self, tmp_path, capsys):
        whole, resumed = str(tmp_path / 'whole'), str(tmp_path / 'resumed')
        assert example.main(['-i', '5', '--out', whole, *SHORT]) == 0
        assert set(os.listdir(whole)) == {
            'samples.png', 'sigma.png', 'scores.json', 'log', 'gen.npz',
            'dis.npz', 'dis_plain.npz', 'snapshot_iter_2', 'snapshot_iter_4',
            'snapshot_iter_5'}
        for name in ('samples.png', 'sigma.png'):
            assert os.path.getsize(os.path.join(whole, name)) > 10000
        with open(os.path.join(whole, 'scores.json')) as f:
            scores = json.load(f)
        assert scores['images']['trained generator']['n'] == 599
        assert scores['images']['real, for training'][
            'frechet_distance'] > 0
        out = capsys.readouterr().out
        for text in ('convs/0', '(128, 64, 4, 4)', 'relative error',
                     'untrained generator', '1%'):
            assert text in out
        assert '\033' not in out

        # The third of five iterations calls the losses a fifth time.
        err = interrupted(['-i', '5', '--out', resumed, *SHORT], call=5)
        _, script, *argv = shlex.split(err.split(':', 1)[1])
        assert script.endswith('train_sngan_digits.py')
        assert argv[-2:] == [
            '--resume', os.path.join(resumed, 'snapshot_iter_3')]
        assert not os.path.exists(os.path.join(resumed, 'gen.npz'))
        np.random.normal(size=3)  # the state is that of the snapshot
        assert example.main(argv) == 0
        for name in ('gen.npz', 'dis.npz'):
            a = load(os.path.join(whole, name))
            b = load(os.path.join(resumed, name))
            assert a.keys() == b.keys()
            for key in a:
                np.testing.assert_array_equal(a[key], b[key], key)
        logs = []
        for directory in (whole, resumed):
            with open(os.path.join(directory, 'log')) as f:
                logs.append([
                    {key: value for key, value in entry.items()
                     if key != 'elapsed_time'} for entry in json.load(f)])
        assert logs[0] == logs[1]
        assert [entry['iteration'] for entry in logs[0]] == [2, 4, 5]
        assert logs[0][-1]['distance'] == scores['images'][
            'trained generator']['frechet_distance']

    @pytest.mark.slow
    @pytest.mark.parametrize(('call', 'text'), [
        (1, 'Nothing has been trained yet'), (3, 'without a snapshot')])
    def test_second_interrupt_ends_it_at_once(self, call, text, tmp_path):
        err = interrupted(
            ['-i', '5', '--out', str(tmp_path), *SHORT], call, times=2)
        assert text in err
        assert os.listdir(tmp_path) == []

    def test_interrupt_before_training(self, tmp_path, monkeypatch, capsys):
        def load(name):
            raise KeyboardInterrupt

        monkeypatch.setattr(digits_data, 'load', load)
        assert example.main(['--out', str(tmp_path)]) == 130
        assert 'Nothing has been trained yet' in capsys.readouterr().err

    @pytest.mark.parametrize('make', [
        lambda path: path.write_bytes(b'not a snapshot'),
        lambda path: np.savez(path, x=1),
    ])
    def test_resume_from_what_is_no_snapshot(self, make, tmp_path, capsys):
        make(tmp_path / 'x.npz')
        assert example.main(
            ['-i', '1', '--out', str(tmp_path / 'out'),
             '--resume', str(tmp_path / 'x.npz')]) == 1
        assert 'x.npz: ' in capsys.readouterr().err

    def test_output_that_is_no_directory(self, tmp_path, capsys):
        path = tmp_path / 'file'
        path.touch()
        assert example.main(['--out', str(path)]) == 1
        out, err = capsys.readouterr()
        assert out == ''
        assert err.startswith(f'Cannot write to {path}: ')

    def test_full_disk(self, tmp_path, monkeypatch, capsys):
        def full(*args):
            raise OSError(errno.ENOSPC, 'No space left on device')

        monkeypatch.setattr(chainer.serializers, 'save_npz', full)
        monkeypatch.setattr(training.Trainer, 'run', lambda trainer: None)
        monkeypatch.setattr(example, 'finish', full)
        assert example.main(['-i', '1', '--out', str(tmp_path)]) == 1
        assert capsys.readouterr().err.endswith(
            f'Cannot write to {tmp_path}: [Errno {errno.ENOSPC}] No space '
            f'left on device\n')

    @pytest.mark.slow
    def test_runs_without_a_hook(self, tmp_path, capsys):
        assert example.main(['--epoch', '1', '--batchsize', '300', '--hook',
                             'none', '--out', str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert 'No layer is normalized.' in out
        with open(tmp_path / 'log') as f:
            entry, = json.load(f)
        assert entry['iteration'] == 4
        assert 'true_sigma/convs/0' in entry
        assert 'norm/convs/0' not in entry

    @pytest.mark.parametrize('name', ['mnist', 'cifar10'])
    @pytest.mark.parametrize('cause', [
        urllib.error.URLError('Name or service not known'),
        TimeoutError('timed out'),
        RuntimeError('cannot create dataset directory'),
    ])
    def test_offline(self, name, cause, tmp_path, monkeypatch, capsys):
        def get(**kwargs):
            raise cause

        monkeypatch.setattr(chainer.datasets, f'get_{name}', get)
        out = tmp_path / 'out'
        assert example.main(['--dataset', name, '--out', str(out)]) == 1
        err = capsys.readouterr().err
        for text in (name, str(cause), chainer.dataset.get_dataset_root(),
                     'CHAINER_DATASET_ROOT', '--dataset digits'):
            assert text in err
        assert not out.exists()

    @pytest.mark.parametrize(('name', 'shape'), [
        ('mnist', (1, 28, 28)), ('cifar10', (3, 32, 32))])
    def test_downloaded_dataset(self, name, shape, monkeypatch):
        def get(ndim=1, withlabel=True, scale=1.):
            x = np.full((3, *shape), scale, 'f')
            dataset = chainer.datasets.TupleDataset(x, np.arange(3, dtype='i'))
            return dataset, dataset

        monkeypatch.setattr(chainer.datasets, f'get_{name}', get)
        images = digits_data.load(name)
        assert images.train.shape == (3, *shape)
        assert images.train.max() == 1
        assert images.test_labels.tolist() == [0, 1, 2]

    @pytest.mark.parametrize(('argv', 'message'), [
        (['-i', '0'], 'argument --iteration/-i: 0 is not 1 or more'),
        (['-i', '2', '-e', '2'], 'not allowed with argument'),
        (['--seed', '-1'], 'argument --seed'),
        (['--resume', 'no/such/file'], 'there is no file no/such/file'),
        (['--hook', 'sn'], 'argument --hook'),
        (['--alpha', '0'], 'argument --alpha'),
        (['--beta1', '1'], 'argument --beta1: 1.0 is not in [0, 1)'),
    ])
    def test_bad_argument(self, argv, message, capsys):
        with pytest.raises(SystemExit) as e:
            example.main(argv)
        assert e.value.code == 2
        assert message in capsys.readouterr().err

    def test_no_gpu(self, monkeypatch, capsys):
        monkeypatch.setattr(chainer.backends.cuda, 'available', False)
        with pytest.raises(SystemExit):
            example.main(['--gpu', '0'])
        assert 'cannot use GPU 0' in capsys.readouterr().err


class TestFixedPoint:

    def test_linear_map(self):
        A = np.linalg.qr(np.random.normal(size=(6, 6)))[0] / 2
        y = np.random.normal(size=(3, 6))
        x, n = iresnet_models.fixed_point(
            lambda x: chainer.Variable(x @ A), y, tolerance=1e-12)
        np.testing.assert_allclose(
            x, np.linalg.solve((np.eye(6) + A).T, y.T).T, atol=1e-11)
        assert 35 < n < 45      # 2^-40 is 1e-12

    @pytest.mark.parametrize(('factor', 'expected'), [(2, 30), (np.nan, 1)])
    def test_no_convergence(self, factor, expected):
        n = iresnet_models.fixed_point(
            lambda x: chainer.Variable(factor * x), np.ones((1, 1)), 30)[1]
        assert n == expected


class TestInvertibleNetwork:

    @staticmethod
    def random_images():
        return np.random.uniform(-1, 1, (4, 1, 8, 8)).astype('f')

    @pytest.mark.parametrize(('norm', 'inverts'), [
        ('operator', True), ('matrix', False)])
    def test_inverse_where_the_weights_are_positive(self, norm, inverts):
        model = iresnet_models.IResNet(norm, 0.9)
        for conv in convolutions(model):
            conv.W.array = abs(conv.W.array)
        error, n = invertible.invert(model, self.random_images())
        assert error <= 1e-5 if inverts else error > 1
        assert (n < 100) == inverts

    def test_each_convolution_is_a_contraction_after_training(self):
        images = make_images((1, 8, 8))
        args = invertible.parse_args(['-i', '3', '-b', '10'])
        run = invertible.train('operator', images, args)
        for step in run.steps:
            assert step.error <= 1e-5
        for conv in convolutions(run.model):
            hook, = conv.local_link_hooks.values()
            with chainer.using_config('train', False):
                W = hook.normalize_weight(conv).array
            c_out, c_in, k, _ = W.shape
            plain = chainer.links.Convolution2D(
                c_in, c_out, k, pad=conv.pad, nobias=True)
            norm = np.linalg.norm(
                maps.dense(plain, (c_in, 4, 4), W.astype(float)), 2)
            assert 0.89 < norm < 0.95

    @pytest.mark.parametrize(('norm', 'inverts'), [
        ('operator', True), ('matrix', False)])
    def test_positive_kernel(self, norm, inverts):
        error = invertible.invert_positive_kernel(norm, 0.9)[0]
        assert error <= 1e-5 if inverts else error > 1e20

    def test_main(self, tmp_path, capsys):
        assert invertible.main(['-i', '2', '--out', str(tmp_path)]) == 0
        assert set(os.listdir(tmp_path)) == {
            'inversion.png', 'inversion.json', 'operator.npz', 'matrix.npz'}
        assert os.path.getsize(tmp_path / 'inversion.png') > 10000
        with open(tmp_path / 'inversion.json') as f:
            runs = json.load(f)
        assert runs.keys() == {'operator', 'matrix'}
        assert len(runs['operator']) == 2
        assert all(step['error'] <= 1e-5 for step in runs['operator'])
        arrays = load(tmp_path / 'operator.npz')
        assert arrays['blocks/0/conv1/W_map'].shape == (8, 4, 4)
        out = capsys.readouterr().out
        for text in ('positive kernel', '3/conv3', 'at most 0.7', '0 of 2'):
            assert text in out


def convolutions(model):
    return [conv for block in model.blocks for conv in block.children()]


def test_held_out_digits_are_not_trained_on():
    images = digits_data.load('digits')
    assert (len(images.train), len(images.test)) == (1198, 599)
    assert images.train.min() == -1
    assert images.train.max() == 1
    share = np.bincount(images.test_labels) / 599
    np.testing.assert_allclose(
        share, np.bincount(images.train_labels) / 1198, atol=2e-3)
    train = {x.tobytes() for x in images.train}
    assert not any(x.tobytes() in train for x in images.test)
