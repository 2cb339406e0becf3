"""Training runs that are stopped, broken, spread out or rounded to float16.

What a run ends with is compared, bit by bit where that is defined, with what
a run ends with that went through, or with Chainer's own hook.
"""
import collections
import contextlib
import copy
import functools
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks, optimizer_hooks, optimizers, serializers
from chainer import training as chainer_training
from chainer.training import extensions, triggers

import sn_function
from sn_function import SpectralNormalization
from sn_function._links import turn
from tests import reference, training
from tests.training import Classifier, make_trainer, model_of, run, state

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGE = os.path.dirname(os.path.abspath(sn_function.__file__))
SETTINGS = {
    'plain': {},
    'gamma': {'use_gamma': True},
    'detached': {'detach_uv': True, 'n_power_iteration': 2},
    'factor': {'factor': 2.0, 'n_warmup': 0},
    'lazy': {'lazy': True, 'use_gamma': True},
    'several': {'n_vectors': 4},
    'several, lazy': {'n_vectors': 8, 'lazy': True, 'n_power_iteration': 2},
}
each_setting = pytest.mark.parametrize(
    'settings', SETTINGS.values(), ids=list(SETTINGS))


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def batch(i=0, n=training.BATCHSIZE, dtype='f'):
    images, labels = training.digits()
    return images[i * n:(i + 1) * n].astype(dtype), labels[i * n:(i + 1) * n]


def links_of(model):
    return [link for link in model.links() if link.local_link_hooks]


def quiet():
    """For runs that meet NaN, of which NumPy 1.17 warns when it compares."""
    return np.errstate(invalid='ignore')


def norm(link):
    """The norm of what the link computes with, in test mode."""
    hook, = link.local_link_hooks.values()
    with chainer.using_config('train', False):
        return reference.true_norm(
            hook.normalize_weight(link).array,
            sn_function.link_hooks.output_axis(link))


def assert_sound(model):
    """Nothing of a call is left, and u follows the weight, which moves."""
    for link in links_of(model):
        assert isinstance(link.W, chainer.Parameter)
        assert 'forward' not in vars(link)
        np.testing.assert_allclose(np.linalg.norm(link.W_u), 1, rtol=2e-3)
        hook, = link.local_link_hooks.values()
        expected = hook.factor or 1
        if hook.use_gamma:
            expected *= abs(float(link.gamma.array))
        np.testing.assert_allclose(norm(link), expected, rtol=0.2)


def assert_learned(trainer, factor=0.5):
    losses = [entry['main/loss'] for entry in training.log(trainer)]
    assert losses[-1] < factor * losses[0]


def numbers_of(model):
    """Parameters and vectors, by name."""
    return {**training.vectors(model), **{
        name: param.array for name, param in model.namedparams()}}


def assert_close(actual, expected, rtol=1e-9, atol=1e-12):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(
            actual[key], value, rtol=rtol, atol=atol, err_msg=key)


class Every(chainer_training.Extension):
    """Calls a function after each iteration, and keeps what it returns."""

    priority = -200

    def __init__(self, function):
        self.function = function
        self.found = []

    def __call__(self, trainer):
        self.found.append(self.function(trainer))


def test_the_classifier_learns():
    """Else nothing here would tell a good run from a bad one."""
    trainer = run(make_trainer(iterations=60))
    assert_learned(trainer, 0.1)
    assert training.log(trainer)[-1]['main/accuracy'] > 0.9
    assert_sound(model_of(trainer))


def test_the_comparison_sees_one_bit():
    trainer = run(make_trainer(iterations=1))
    numbers = state(trainer)
    training.assert_same(numbers, state(trainer))
    for array in (model_of(trainer).conv.W_u, model_of(trainer).out.b.array):
        before = array[0]
        array[0] = np.nextafter(before, np.float32(2))
        with pytest.raises(AssertionError):
            training.assert_same(state(trainer), numbers)
        array[0] = before
    training.assert_same(state(trainer), numbers)


# Half precision

def adam(**kwargs):
    return optimizers.Adam(0.01, **kwargs)


class Step(collections.namedtuple('Step', 'scale is_skipped numbers')):
    """What is there after an iteration."""

    @classmethod
    def of(cls, trainer):
        optimizer = trainer.updater.get_optimizer('main')
        numbers = state(trainer)
        for name, param in optimizer.target.namedparams():
            if param.update_rule._fp32_param is not None:
                numbers['fp32' + name] = (
                    param.update_rule._fp32_param.array.copy())
        return cls(optimizer._loss_scale, not optimizer.is_safe_to_update(),
                   numbers)


def half_precision_trainer(
        dtype, optimizer, *, fp32=True, gain=1, **settings):
    """Trains with a loss scale that goes up until the gradients overflow."""
    images, labels = training.digits()
    trainer = make_trainer(
        optimizer=optimizer, dtype=dtype,
        data=training.Digits((gain * images).astype('e'), labels), **settings)
    if fp32:
        optimizer.use_fp32_update()
    optimizer.loss_scaling(interval=4)
    trainer.extend(training.MixedPrecisionState(optimizer))
    return trainer


def run_in_half_precision(trainer, dtype=chainer.mixed16):
    """Overflow is what these runs are about."""
    with chainer.using_config('dtype', dtype), \
            np.errstate(over='ignore', invalid='ignore'), \
            warnings.catch_warnings():
        # Of each gradient that overflows: GradientMethod.check_nan_in_grads.
        warnings.filterwarnings(
            'ignore', 'Non finite number found in param.grad', UserWarning)
        return run(trainer)


class TestHalfPrecision:

    @pytest.mark.parametrize(('dtype', 'make', 'fp32', 'gain', 'settings'), [
        (chainer.mixed16, training.momentum, True, 1, {}),
        pytest.param(
            chainer.mixed16, training.momentum, False, 1, {'detach_uv': True},
            marks=pytest.mark.slow),
        pytest.param(
            chainer.mixed16, adam, True, 64, {'use_gamma': True},
            marks=pytest.mark.slow),
        (chainer.mixed16, adam, True, 64, {'lazy': True}),
        pytest.param(
            np.float16, training.momentum, False, 1, {},
            marks=pytest.mark.slow),
        (np.float16, training.momentum, True, 1, {'n_power_iteration': 2}),
    ])
    def test_overflow_heals(self, dtype, make, fp32, gain, settings):
        trainer = half_precision_trainer(
            dtype, make(), fp32=fp32, gain=gain, iterations=60, **settings)
        every = Every(Step.of)
        trainer.extend(every)
        run_in_half_precision(trainer, dtype)
        model, steps = model_of(trainer), every.found
        for name, param in model.namedparams():
            is_gamma = name.endswith('gamma')  # a norm need not fit in float16
            assert param.dtype == (np.float32 if is_gamma else np.float16)

        # It did overflow, and went on each time.
        skipped = [i for i, step in enumerate(steps) if step.is_skipped]
        assert 2 <= len(skipped) < len(steps) / 2
        for i in skipped:
            assert steps[i].scale == steps[i - 1].scale / 2

        # A step that is skipped leaves the numbers alone, and no other does.
        for before, after in zip(steps, steps[1:]):
            same = {
                key: np.array_equal(value, after.numbers[key])
                for key, value in before.numbers.items()
                if key.startswith(('model', 'fp32', 'optimizer/'))
                and not key.endswith(('/W_u', 'optimizer/t', '/epoch'))}
            assert all(same.values()) == after.is_skipped, same
        assert any(key.startswith('fp32') for key in steps[-1].numbers) == fp32

        # Each u is one power iteration or more from the one before.
        for before, after in zip(steps, steps[1:]):
            for name in ('conv', 'hidden', 'out'):
                W, u = (before.numbers[f'model/{name}/{key}'].astype('d')
                        for key in ('W', 'W_u'))
                expected = reference.power_iteration(
                    W, u, settings.get('n_power_iteration', 1))[0]
                np.testing.assert_allclose(
                    after.numbers[f'/{name}/W_u'], expected, atol=2e-3)

        assert_sound(model)
        assert_learned(trainer)
        for value in state(trainer).values():
            assert value.dtype.kind == 'O' or np.isfinite(value).all()

    @pytest.mark.parametrize('make', [training.momentum, adam])
    def test_resumes_bit_for_bit(self, make):
        def trainer(iterations, seed):
            made = half_precision_trainer(
                chainer.mixed16, make(), iterations=iterations, seed=seed,
                gain=8 if make is training.momentum else 64)
            training.take_snapshots(made, 20, autoload=True)
            return made

        whole, every = trainer(40, 0), Every(Step.of)
        whole.out = 'whole'
        whole.extend(every)
        run_in_half_precision(whole)
        assert any(step.is_skipped for step in every.found[:20])
        assert any(step.is_skipped for step in every.found[20:])
        run_in_half_precision(trainer(20, 0))
        resumed = run_in_half_precision(trainer(40, 1))
        training.assert_same(
            Step.of(resumed).numbers, Step.of(whole).numbers)
        assert Step.of(resumed).scale == Step.of(whole).scale

    def test_a_loss_scale_changes_nothing_without_overflow(self):
        """A power of two is exact in float32."""
        runs = [run(make_trainer(iterations=10, use_gamma=True))]
        optimizer = training.momentum()
        trainer = make_trainer(
            iterations=10, use_gamma=True, optimizer=optimizer)
        optimizer.loss_scaling(scale=2. ** 10)
        runs.append(run(trainer))
        training.assert_same(*map(state, runs))


# Snapshots

class TestResume:

    @pytest.mark.parametrize(('make', 'autoload'), [
        (training.momentum, False),
        pytest.param(adam, True, marks=pytest.mark.slow)])
    @each_setting
    def test_bit_for_bit(self, settings, autoload, make):
        whole = run(make_trainer('whole', optimizer=make(), **settings))
        first = make_trainer(
            'first', 10, optimizer=make(), **settings)
        training.take_snapshots(first)
        run(first)
        # Nothing but the snapshot is common to the two.
        resumed = make_trainer(
            'first', optimizer=make(), seed=1, **settings)
        training.take_snapshots(resumed, autoload=autoload)
        if not autoload:
            serializers.load_npz('first/snapshot_iter_10', resumed)
        run(resumed)
        training.assert_same(state(resumed), state(whole))
        assert_sound(model_of(resumed))

    @pytest.mark.parametrize('name', ['lazy', 'gamma', 'several'])
    def test_into_a_model_that_is_lazy_or_not(self, name):
        """Shapes come from the snapshot."""
        settings = SETTINGS[name]
        whole = run(make_trainer('whole', **settings))
        first = make_trainer('first', 10, **settings)
        training.take_snapshots(first)
        run(first)
        other = {**settings, 'lazy': not settings.get('lazy', False)}
        resumed = make_trainer('first', seed=1, **other)
        training.take_snapshots(resumed, autoload=True)
        training.assert_same(state(run(resumed)), state(whole))

    def test_snapshot_object(self):
        """Of the model alone, into a model that has not run."""
        trainer = make_trainer(iterations=10, use_gamma=True)
        model = model_of(trainer)
        trainer.extend(
            extensions.snapshot_object(model, 'model_{.updater.iteration}'),
            trigger=(5, 'iteration'))
        every = Every(lambda _: copy.deepcopy(model))
        trainer.extend(every)
        run(trainer)
        for iteration in (5, 10):
            loaded = Classifier(lazy=True, use_gamma=True)
            serializers.load_npz(f'result/model_{iteration}', loaded)
            with chainer.using_config('train', False):
                np.testing.assert_array_equal(
                    loaded.logits(batch()[0]).array,
                    every.found[iteration - 1].logits(batch()[0]).array)


# Processes

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """The digits as a file: to load scikit-learn takes a second."""
    images, labels = training.digits()
    path = tmp_path_factory.mktemp('data') / 'digits.npz'
    np.savez(path, images=images, labels=labels)
    return str(path)


def start(**job):
    """Runs a job of :func:`tests.training.main`; returns its exit status.

    None of its processes is left, whatever happens.
    """
    process = subprocess.Popen(
        [sys.executable, '-W', 'error', '-m', 'tests.training',
         json.dumps(job)], cwd=ROOT, start_new_session=True,
        stderr=subprocess.PIPE, universal_newlines=True)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode


def result(out):
    with open(os.path.join(out, 'result.pickle'), 'rb') as file:
        return pickle.load(file)


@pytest.mark.parametrize('name', [
    'lazy', pytest.param('detached', marks=pytest.mark.slow)])
def test_a_process_that_is_killed(name, data, tmp_path):
    """Once between two snapshots, once while one is written."""
    settings = SETTINGS[name]
    job = {'out': str(tmp_path / 'out'), 'data': data}
    killed = -signal.SIGKILL
    assert start(**job, settings=settings, die_at=8) == killed
    assert os.path.exists(tmp_path / 'out' / 'snapshot_iter_5')
    settings = {**settings, 'seed': 1}
    assert start(**job, settings=settings, die_while_writing=14) == killed
    assert os.path.exists(tmp_path / 'out' / 'snapshot_iter_10')
    assert start(**job, settings=settings) == 0
    whole = run(make_trainer('whole', **SETTINGS[name]))
    training.assert_same(result(job['out'])['state'], state(whole))


# With spawn, all that a worker has is pickled.
@pytest.fixture(scope='module', params=[
    'spawn', pytest.param('forkserver', marks=pytest.mark.slow),
    pytest.param('fork', marks=pytest.mark.slow)])
def with_workers(request, data, tmp_path_factory):
    """A run, and its resumption, with workers started by this method."""
    out = str(tmp_path_factory.mktemp(request.param))
    assert start(out=out, data=data, start_method=request.param) == 0
    return result(out)


class TestWorkers:
    """The workers of an iterator change nothing."""

    @pytest.mark.slow
    def test_multiprocess_iterator(self, with_workers):
        training.assert_same(
            with_workers['state'], state(run(make_trainer())))

    def test_multithread_iterator(self):
        iterator = functools.partial(
            chainer.iterators.MultithreadIterator,
            training.Digits(*training.digits()), training.BATCHSIZE,
            n_threads=2, order_sampler=training.next_order)
        first = make_trainer('first', 10, iterator=iterator())
        training.take_snapshots(first)
        run(first)
        resumed = make_trainer('first', iterator=iterator(), seed=1)
        training.take_snapshots(resumed, autoload=True)
        training.assert_same(
            state(run(resumed)), state(run(make_trainer('whole'))))


# Many devices

class TestMultiprocessParallelUpdater:
    """What of it needs no NCCL.

    The updater itself cannot run here: its constructor asks for NCCL, and
    ``gather_grads`` and ``scatter_params`` are kernels that get pointers to
    the memory of a GPU.  What it does to a model can be: a worker gets it
    pickled, gradients are summed, and of the result the parameters alone are
    sent back.  Persistent values, u among them, are not; each process moves
    its own on.
    """

    def test_u_is_the_same_in_each_process(self, with_workers):
        training.assert_same(
            with_workers['replica'], with_workers['vectors'])
        assert with_workers['vectors'].keys() == {
            '/conv/W_u', '/hidden/W_u', '/out/W_u'}

    def test_the_parameters_are_those_of_one_process(self, with_workers):
        np.random.seed(0)
        model = Classifier(use_gamma=True)
        optimizer = optimizers.SGD(0.05).setup(model)
        for i in range(5):
            optimizer.update(model, *batch(i, 20))
        np.testing.assert_allclose(
            with_workers['array'], training.flatten(model, 'array'),
            rtol=1e-4, atol=1e-6)


def make_parallel(devices, iterations=20, **settings):
    """Its loss is a sum over the devices, so the step is smaller."""
    trainer = make_trainer(
        'parallel', iterations, **settings,
        optimizer=optimizers.MomentumSGD(0.05 / len(devices)))
    old = trainer.updater
    trainer.updater = chainer_training.updaters.ParallelUpdater(
        old.get_iterator('main'), old.get_optimizer('main'), devices=devices)
    trainer.updater.connect_trainer(trainer)
    return trainer


class TestParallelUpdater:
    """It deals out each batch to copies of the model."""

    @pytest.mark.parametrize('names', [
        pytest.param(('main', 'second'), marks=pytest.mark.slow),
        ('main', 'second', 'third')])
    @pytest.mark.parametrize('device', [-1, '@numpy'])
    def test_as_on_one_device(self, names, device):
        settings = {'dtype': 'd', 'use_gamma': True}
        expected = run(make_trainer(**settings))
        trainer = run(make_parallel(dict.fromkeys(names, device), **settings))
        models = trainer.updater._models
        assert models.keys() == set(names)
        for model in models.values():
            assert_close(numbers_of(model), numbers_of(model_of(expected)))
            training.assert_same(
                numbers_of(model), numbers_of(model_of(trainer)))

    @pytest.mark.gpu
    def test_on_a_device(self):
        expected = run(make_trainer(iterations=3, use_gamma=True))
        trainer = make_parallel(
            {'main': '@cupy:0', 'second': '@cupy:0'}, 3, use_gamma=True)
        run(trainer)
        for model in trainer.updater._models.values():
            model.to_device('@numpy')
            assert_close(numbers_of(model), numbers_of(model_of(expected)),
                         rtol=1e-3, atol=1e-4)


# Chains without a class of their own

def in_sequence(*links):
    """As :meth:`Classifier.logits`, of picklable parts."""
    conv, hidden, out = links
    return chainer.Sequential(
        conv, F.leaky_relu, hidden, F.leaky_relu, out, times_eight)


def times_eight(x):
    return 8 * x


def train_sequential(model, iterations=20):
    def loss_func(x, t):
        y = model(x)
        loss = F.softmax_cross_entropy(y, t)
        chainer.report({'loss': loss, 'accuracy': F.accuracy(y, t)}, model)
        return loss

    return run(make_trainer(
        'sequential', iterations, model=model, loss_func=loss_func))


class TestSequential:

    @pytest.mark.parametrize('make_copy', [
        lambda model: model, copy.deepcopy,
        lambda model: model.copy('copy'), lambda model: model.copy('share'),
        lambda model: pickle.loads(pickle.dumps(model))],
        ids=['itself', 'deepcopy', 'copy', 'share', 'pickle'])
    @pytest.mark.parametrize('name', [
        pytest.param('detached', marks=pytest.mark.slow), 'lazy'])
    def test_as_a_chain(self, name, make_copy):
        settings = SETTINGS[name]
        chain = run(make_trainer(**settings))
        np.random.seed(0)
        model = Classifier(**settings)
        model = make_copy(in_sequence(model.conv, model.hidden, model.out))
        trainer = train_sequential(model)
        assert training.log(trainer) == training.log(chain)
        # By position: Sequential lists its links in another order.
        for i, link in enumerate(('conv', 'hidden', 'out')):
            training.assert_same(
                numbers_of(model[2 * i]),
                numbers_of(getattr(model_of(chain), link)))

    @pytest.mark.parametrize('use_gamma', [False, True])
    def test_repeated(self, use_gamma):
        """Each repetition has a weight, a u and a gamma of its own."""
        def block():
            return chainer.Sequential(L.Linear(20, 20).add_hook(
                SpectralNormalization(use_gamma=use_gamma)), F.leaky_relu)

        model = Classifier(use_gamma=use_gamma)
        model = chainer.Sequential(
            model.conv, F.leaky_relu, model.hidden,
            *block().repeat(3, mode='init').flatten(), model.out, times_eight)
        trainer = train_sequential(model, 60)
        assert len(links_of(model)) == 6
        assert len({link.W_u.tobytes() for link in links_of(model)}) == 6
        assert_sound(model)
        assert_learned(trainer, 0.8)


# Optimizers and their hooks

OPTIMIZERS = {
    'SGD': lambda: optimizers.SGD(0.05),
    'MomentumSGD': training.momentum,
    'NesterovAG': lambda: optimizers.NesterovAG(0.02),
    'CorrectedMomentumSGD': lambda: optimizers.CorrectedMomentumSGD(0.05),
    'Adam': adam,
    'AdamW': lambda: adam(weight_decay_rate=0.1),
    'AMSGrad': lambda: adam(amsgrad=True),
    'AdaBound': lambda: adam(adabound=True),
    'RMSprop': lambda: optimizers.RMSprop(0.003),
    'RMSpropGraves': lambda: optimizers.RMSpropGraves(0.003),
    'AdaGrad': lambda: optimizers.AdaGrad(0.02),
    'AdaDelta': optimizers.AdaDelta,
    'SMORMS3': lambda: optimizers.SMORMS3(0.01),
    'MSVAG': lambda: optimizers.MSVAG(0.05),
}
HOOKS = {
    'WeightDecay': lambda: optimizer_hooks.WeightDecay(0.1),
    'Lasso': lambda: optimizer_hooks.Lasso(0.01),
    'GradientClipping': lambda: optimizer_hooks.GradientClipping(0.3),
    'GradientHardClipping': lambda: optimizer_hooks.GradientHardClipping(
        -0.01, 0.02),
    'GradientNoise': lambda: optimizer_hooks.GradientNoise(0.1),
    'GradientLARS': lambda: optimizer_hooks.GradientLARS(0.1),
}


def like_the_built_in_hook(**settings):
    return SpectralNormalization(detach_uv=True, n_warmup=0, **settings)


def run_in_float64(make_hook, make_optimizer, add=None, **settings):
    """Rounding and the two meanings of eps do not show there."""
    optimizer = make_optimizer()
    np.random.seed(0)
    with chainer.using_config('dtype', np.float64):
        model = Classifier(make_hook=make_hook, eps=1e-13, **settings)
    optimizer.setup(model)
    if add is not None:
        add(optimizer)
    np.random.seed(1)  # of GradientNoise
    return run(make_trainer(
        model=model, optimizer=optimizer, dtype='d', iterations=15))


def compare_with_the_built_in_hook(*args, **settings):
    theirs, mine = (
        run_in_float64(make_hook, *args, **settings) for make_hook in (
            link_hooks.SpectralNormalization, like_the_built_in_hook))
    assert_close(numbers_of(model_of(mine)), numbers_of(model_of(theirs)),
                 rtol=1e-6, atol=1e-8)
    return mine


class TestOptimizers:

    @pytest.mark.parametrize('use_gamma', [
        pytest.param(False, marks=pytest.mark.slow), True])
    @pytest.mark.parametrize('name', OPTIMIZERS)
    def test_as_with_the_built_in_hook(self, name, use_gamma):
        trainer = compare_with_the_built_in_hook(
            OPTIMIZERS[name], use_gamma=use_gamma)
        assert_learned(trainer, 0.95 if name == 'AdaDelta' else 0.8)

    @pytest.mark.parametrize('name', HOOKS)
    def test_hooks_as_with_the_built_in_hook(self, name):
        plain = run_in_float64(
            like_the_built_in_hook, training.momentum, use_gamma=True)
        trainer = compare_with_the_built_in_hook(
            training.momentum, lambda optimizer: optimizer.add_hook(
                HOOKS[name]()), use_gamma=True)
        # The hook makes a difference, so this is no comparison of nothing.
        assert not np.allclose(
            model_of(trainer).out.W.array, model_of(plain).out.W.array)

    def one_update(self, optimizer, add):
        """Returns the last weight before, its gradient, and the model."""
        np.random.seed(0)
        with chainer.using_config('dtype', np.float64):
            model = Classifier(use_gamma=True)
        model.out.gamma.array[...] = -2  # the other sign, another size
        other = copy.deepcopy(model)
        loss = other(*batch(dtype='d'))
        other.cleargrads()
        loss.backward()
        add(optimizer.setup(model))
        optimizer.update(model, *batch(dtype='d'))
        return other.out.W.array, other.out.W.grad, model

    @pytest.mark.parametrize(('optimizer', 'add', 'change'), [
        (optimizers.SGD(0.5),
         lambda opt: opt.add_hook(optimizer_hooks.WeightDecay(0.1)),
         lambda p, g: -0.5 * (g + 0.1 * p)),
        (optimizers.SGD(0.5),
         lambda opt: opt.target.out.W.update_rule.add_hook(
             optimizer_hooks.WeightDecay(0.1)),
         lambda p, g: -0.5 * (g + 0.1 * p)),
        (optimizers.SGD(0.5),
         lambda opt: opt.add_hook(optimizer_hooks.Lasso(0.1)),
         lambda p, g: -0.5 * (g + 0.1 * np.sign(p))),
        (optimizers.Adam(0.01, weight_decay_rate=0.1), lambda opt: None,
         lambda p, g: -0.01 * g / (abs(g) + 1e-8 / 0.001 ** 0.5) - 0.1 * p),
    ], ids=['WeightDecay', 'of one parameter', 'Lasso', 'AdamW'])
    def test_the_weight_that_decays_is_the_raw_one(
            self, optimizer, add, change):
        W, g, model = self.one_update(optimizer, add)
        np.testing.assert_allclose(
            model.out.W.array, W + change(W, g), rtol=1e-9, atol=1e-12)
        normalized = -2 * W / reference.true_norm(W)
        wrong = W + change(normalized, g)
        assert abs(wrong - model.out.W.array).max() > 1e-2

    @pytest.mark.parametrize('timing', ['pre', 'post'])
    def test_a_hook_before_and_after_the_update(self, timing):
        seen = []

        def bound(optimizer):
            param = optimizer.target.out.W
            seen.append((param, param.array.copy()))
            np.clip(param.array, -0.1, 0.1, out=param.array)

        W, g, model = self.one_update(
            optimizers.SGD(0.5),
            lambda opt: opt.add_hook(bound, 'bound', timing))
        (param, before), = seen
        assert param is model.out.W
        if timing == 'pre':
            expected = np.clip(W, -0.1, 0.1) - 0.5 * g
            np.testing.assert_array_equal(before, W)
        else:
            expected = np.clip(W - 0.5 * g, -0.1, 0.1)
        np.testing.assert_allclose(
            model.out.W.array, expected, rtol=1e-9, atol=1e-12)
        for _ in range(50):  # u follows the weight that was cut
            model(*batch(dtype='d'))
        assert_sound(model)


# Extensions

class TestExtensions:

    def test_early_stopping(self):
        """It sees what it would see, and stops no sooner than it should."""
        losses = Every(lambda trainer: float(
            trainer.observation['main/loss'].array))
        trainer = make_trainer('stopped')
        trainer.extend(losses)
        trainer.stop_trigger = triggers.EarlyStoppingTrigger(
            (2, 'iteration'), 'main/loss', patience=4,
            max_trigger=(100, 'iteration'))
        run(trainer)
        n = trainer.updater.iteration
        assert 20 < n < 100
        means = np.mean(np.reshape(losses.found, (-1, 2)), axis=1)
        assert np.argmin(means) == len(means) - 1 - 4
        training.assert_same(state(trainer), state(run(make_trainer(
            'whole', n))))

    @each_setting
    def test_an_evaluator_changes_nothing(self, settings):
        plain = run(make_trainer('plain', **settings))
        trainer = make_trainer('evaluated', **settings)
        held_out = chainer.iterators.SerialIterator(
            training.Digits(*batch(0, 100)), 50, repeat=False, shuffle=False)
        trainer.extend(extensions.Evaluator(held_out, model_of(trainer)),
                       trigger=(1, 'iteration'))
        losses = Every(lambda trainer: float(
            trainer.observation['validation/main/loss']))
        trainer.extend(losses)
        run(trainer)
        numbers = state(trainer)
        numbers['log'] = np.array([
            {key: value for key, value in entry.items()
             if not key.startswith('validation/')}
            for entry in training.log(trainer)])
        training.assert_same(numbers, state(plain))
        assert len(set(losses.found)) == 20

    def test_fail_on_non_number(self):
        """It stops before a snapshot; the one before that is sound."""
        whole = run(make_trainer('whole'))
        trainer = make_trainer('broken')
        trainer.extend(extensions.FailOnNonNumber())
        training.take_snapshots(trainer, 6)
        trainer.updater.converter = spoil_batch(14)
        with pytest.raises(RuntimeError, match='diverge'), quiet():
            run(trainer)
        model = model_of(trainer)
        assert np.isnan(model.hidden.W.array).all()
        for link in model.children():
            np.testing.assert_allclose(
                np.linalg.norm(link.W_u), 1, rtol=1e-3)
        # As who has the parameters only: u is that of the broken run.
        model.copyparams(model_of(whole), copy_persistent=False)
        for _ in range(20):
            model(*batch())
        assert_sound(model)

        resumed = make_trainer('broken', seed=1)
        resumed.extend(extensions.FailOnNonNumber())
        training.take_snapshots(resumed, 6, autoload=True)
        training.assert_same(state(run(resumed)), state(whole))


def spoil_batch(number):
    """A converter that makes an image of one batch NaN."""
    batches = iter(range(1, 1000))

    def convert(examples, device):
        x, t = chainer.dataset.concat_examples(examples, device)
        if next(batches) == number:
            x[0] = np.nan
        return x, t

    return convert


# Faults

N_FAULT = 13  # within an epoch


class Fault:
    """Raises an error the n-th time that it is asked, and then no more."""

    def __init__(self, error, n=N_FAULT):
        self.error = error
        self.n = n
        self.count = 0

    def __call__(self, *args):
        self.count += 1
        if self.count == self.n:
            raise self.error


def in_extension(trainer, fault):
    trainer.extend(fault, name='fault', priority=-300)


def in_dataset(trainer, fault):
    fault.n = (N_FAULT - 1) * training.BATCHSIZE + 7
    dataset = trainer.updater.get_iterator('main').dataset
    get_example = dataset.get_example
    dataset.get_example = lambda i: fault() or get_example(i)


def in_converter(trainer, fault):
    trainer.updater.converter = lambda *args: (
        fault() or chainer.dataset.concat_examples(*args))


def in_layer(trainer, fault):
    link = model_of(trainer).hidden
    forward = link.forward
    link.forward = lambda x: fault() or forward(x)


def in_hook_before(trainer, fault):
    hook = chainer.LinkHook()
    hook.forward_preprocess = fault
    model_of(trainer).hidden.add_hook(hook, 'fault')


def in_hook_after(trainer, fault):
    hook = chainer.LinkHook()
    hook.forward_postprocess = fault
    model_of(trainer).hidden.add_hook(hook, 'fault')


def in_loss(trainer, fault):
    model = model_of(trainer)
    trainer.updater.loss_func = lambda *args: (
        lambda loss: fault() or loss)(model(*args))


def in_backward(trainer, fault):
    model = model_of(trainer)

    class Identity(chainer.FunctionNode):

        def forward(self, inputs):
            return inputs

        def backward(self, indexes, grad_outputs):
            fault()
            return grad_outputs

    conv = model.conv.forward
    model.conv.forward = lambda x: Identity().apply((conv(x),))[0]


def in_optimizer(trainer, fault):
    trainer.updater.get_optimizer('main').add_hook(fault, 'fault')


FAULTS = {  # how far the step has gone: the number of layers that were called
    in_extension: None,
    in_dataset: 0,
    in_converter: 0,
    in_layer: 2,
    in_hook_before: 2,
    in_hook_after: 2,
    in_loss: 3,
    in_backward: 3,
    in_optimizer: 3,
}


def lose_a_batch(n_layers):
    """An extension: what is left of a step that was not finished."""
    def lose(trainer):
        examples = trainer.updater.get_iterator('main').next()
        h, _ = chainer.dataset.concat_examples(examples)
        model = model_of(trainer)
        for link in (model.conv, model.hidden, model.out)[:n_layers]:
            h = F.leaky_relu(link(h))
    return lose


class TestFaults:

    @pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize('put', FAULTS, ids=lambda put: put.__name__)
    @pytest.mark.parametrize('name', [
        pytest.param('detached', marks=pytest.mark.slow), 'lazy'])
    def test_caught_and_continued(self, name, put, error):
        settings = SETTINGS[name]
        trainer = make_trainer('broken', 15, **settings)
        fault = Fault(error)
        put(trainer, fault)
        with pytest.raises(error):
            run(trainer)
        assert fault.count == fault.n
        if put is in_hook_before:
            gc.collect()  # Trainer.run keeps the call in a cycle
        for link in model_of(trainer).children():
            assert isinstance(link.W, chainer.Parameter)
        run(trainer)
        assert fault.count > fault.n

        whole = make_trainer('whole', 15, **settings)
        if FAULTS[put] is not None:
            whole.extend(lose_a_batch(FAULTS[put]), name='lose',
                         trigger=training.at(N_FAULT - 1), priority=-300)
        training.assert_same(state(trainer), state(run(whole)))

    def test_a_snapshot_on_an_error(self):
        """It is taken while the exception is on its way, and holds W."""
        whole = make_trainer('whole')
        whole.extend(lose_a_batch(2), name='lose',
                     trigger=training.at(N_FAULT - 1), priority=-300)
        run(whole)
        trainer = make_trainer('broken')
        in_layer(trainer, Fault(RuntimeError))
        training.take_snapshots(trainer, 100, snapshot_on_error=True)
        with pytest.raises(RuntimeError):
            run(trainer)
        resumed = make_trainer('broken', seed=1)
        training.take_snapshots(resumed, 100, autoload=True)
        training.assert_same(state(run(resumed)), state(whole))

    @pytest.mark.parametrize('use_gamma', [False, True])
    def test_a_batch_of_nan_is_skipped(self, use_gamma):
        """By the loss scale, a power of two, which else changes nothing."""
        optimizer = training.momentum()
        trainer = make_trainer('broken', 40, optimizer=optimizer,
                               use_gamma=use_gamma)
        optimizer.loss_scaling(interval=1)
        optimizer._loss_scale_max = 2. ** 12  # Chainer's is 65504
        trainer.updater.converter = spoil_batch(N_FAULT)
        with pytest.warns(UserWarning, match='Non finite number found'), \
                quiet():
            run(trainer)

        whole = make_trainer('whole', 39, use_gamma=use_gamma)
        whole.extend(lose_a_batch(3), name='lose',
                     trigger=training.at(N_FAULT - 1), priority=-300)
        run(whole)
        training.assert_same(numbers_of(model_of(trainer)),
                             numbers_of(model_of(whole)))
        assert_sound(model_of(trainer))
        assert optimizer.t == 40

    def test_a_weight_of_nan_that_is_put_right(self):
        """u is as it was before; Chainer's hook stays NaN for ever."""
        for make_hook in (link_hooks.SpectralNormalization,
                          like_the_built_in_hook):
            trainer = run(make_trainer(iterations=10, make_hook=make_hook))
            model = model_of(trainer)
            good = copy.deepcopy(model)
            model.hidden.W.array[...] = np.nan
            with quiet():
                model(*batch())
                model.copyparams(good, copy_persistent=False)
                model(*batch())
            is_good = np.isfinite(model.hidden.W_u).all()
            assert is_good == (make_hook is like_the_built_in_hook)
        assert_sound(model)


class Interrupt:
    """A trace function: an interrupt at the n-th line of the package."""

    def __init__(self, n):
        self.n = n
        self.count = 0

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename.startswith(PACKAGE):
            return self.trace_line
        return None

    def trace_line(self, frame, event, arg):
        if event == 'line':
            self.count += 1
            if self.count == self.n:
                raise KeyboardInterrupt
        return self.trace_line

    @contextlib.contextmanager
    def installed(self):
        before = sys.gettrace()
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before)


@pytest.mark.parametrize('n_in', [
    5, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize('use_gamma', [
    pytest.param(False, marks=pytest.mark.slow), True])
def test_an_interrupt_at_any_line(n_in, use_gamma, monkeypatch):
    """As Ctrl-C comes: the weight is put back, and u is one or the other."""
    x = np.random.normal(size=(3, 5)).astype('f')
    lost = []
    monkeypatch.setattr(sys, 'unraisablehook', lost.append)

    def make():
        np.random.seed(0)
        return L.Linear(n_in, 6).add_hook(
            SpectralNormalization(use_gamma=use_gamma))

    def step(link):
        loss = F.sum(link(x) ** 2)
        link.cleargrads()
        loss.backward()

    new, made = make(), make()  # a lazy weight is drawn at the first call
    with chainer.using_config('train', False):
        made(x)
    moved = make()
    step(moved)
    n = 0
    while True:
        n += 1
        link, interrupt = make(), Interrupt(n)
        W = link.W
        with contextlib.suppress(KeyboardInterrupt), interrupt.installed():
            step(link)
        if interrupt.count < n:
            break
        assert link.W is W, n
        assert not {'forward', '_sn_replacements'} & set(vars(link)), n
        assert not turn.queue_of(link), n
        assert any(np.array_equal(link.W_u, other.W_u)
                   for other in (new, made, moved)), n
        step(link)
        assert link.W is W, n
        assert_sound(chainer.ChainList(link))
    assert n > 300
    # Python reports an interrupt in __del__, or of an __init__ before it, and
    # that is all: the next one, a moment later, is heard.
    assert {type(report.exc_value) for report in lost} <= {
        KeyboardInterrupt, AttributeError}
