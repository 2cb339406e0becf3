"""What the trainer extension reports, by a float64 SVD and NumPy."""
import sn_function  # isort: skip  # before chainer, which it repairs

import builtins
import copy
import functools
import io
import json
import os
import sys
import warnings

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks, optimizers, serializers, training
from chainer.backends import cuda
from chainer.training import extensions as chainer_extensions

from sn_function import SpectralNormalization, errors, extensions
from sn_function._monitoring import plot
from sn_function.extensions import SpectralNormReport
from sn_function.optimizer_hooks import (
    SpectralNormPenalty,
    SpectralNormProjection,
)
from tests import reference
from tests.cuda_on_host import array as on_host

assert sn_function  # it is imported for what it does


def measure(link, **kwargs):
    return SpectralNormReport(link, true_sigma=True, **kwargs).measure()


SEVERAL = functools.partial(SpectralNormalization, n_vectors=3)


class Model(chainer.Chain):

    def __init__(self, n_in=6, make_hook=SpectralNormalization):
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(n_in, 5).add_hook(make_hook())
            self.l2 = L.Linear(5, 1).add_hook(make_hook())

    def forward(self, x):
        loss = F.mean(self.l2(F.relu(self.l1(x))) ** 2)
        chainer.report({'loss': loss}, self)
        return loss


def make_trainer(out, model=None, n=6, hook=None):
    model = Model() if model is None else model
    x = np.random.RandomState(1).normal(size=(20, 6)).astype('f')
    optimizer = optimizers.Adam(alpha=0.05).setup(model)
    if hook is not None:
        optimizer.add_hook(hook)
    iterator = chainer.iterators.SerialIterator(x, 5, shuffle=False)
    updater = training.updaters.StandardUpdater(iterator, optimizer)
    return training.Trainer(updater, (n, 'iteration'), out=str(out)), model


def arrays_of(model):
    return {**{path: param.array for path, param in model.namedparams()},
            'u1': model.l1.W_u, 'u2': model.l2.W_u,
            'us1': getattr(model.l1, 'W_us', np.empty(0))}


def run_undisturbed(tmp_path, make_hook, **settings):
    """Runs a trainer with a report, and returns it.

    It ends with the same numbers as one without, and draws the same at random.
    """
    ends = []
    first = Model(make_hook=make_hook)
    for with_report in (False, True):
        trainer, model = make_trainer(tmp_path, copy.deepcopy(first))
        if with_report:
            trainer.extend(SpectralNormReport(model, **settings),
                           trigger=(1, 'iteration'))
        np.random.seed(7)
        trainer.run()
        ends.append((model, np.random.random()))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    return trainer


def assert_same(model, other):
    a, b = arrays_of(model), arrays_of(other)
    for key, value in a.items():
        np.testing.assert_array_equal(b[key], value, key)


class TestInTraining:

    def test_what_others_find(self, tmp_path):
        """Whatever reads the observation, and in whatever order."""
        written = []
        printed = io.StringIO()

        class Writer:  # as of tensorboardX

            def add_scalar(self, tag, value, step):
                assert type(value) is float
                written.append((tag, step))

        @training.make_extension(trigger=(2, 'iteration'))
        def write(trainer):
            for key, value in trainer.observation.items():
                if '/loss' not in key:
                    Writer().add_scalar(key, value, trainer.updater.iteration)

        trainer, model = make_trainer(tmp_path)
        every = 2, 'iteration'
        trainer.extend(chainer_extensions.LogReport(trigger=every))
        trainer.extend(chainer_extensions.PrintReport(
            ['iteration', 'sigma/l1', 'residual/l2'], out=printed),
            trigger=every)
        trainer.extend(chainer_extensions.PlotReport(
            ['sigma/l1', 'norm/l1'], trigger=every))
        trainer.extend(write)
        trainer.extend(
            SpectralNormReport(model, true_sigma=True), trigger=every)
        trainer.run()
        keys = {f'{kind}/{name}' for name in ('l1', 'l2') for kind in (
            'sigma', 'residual', 'true_sigma', 'norm')}
        log = json.loads((tmp_path / 'log').read_text())
        assert [entry['iteration'] for entry in log] == [2, 4, 6]
        assert all(keys <= set(entry) for entry in log)
        last = {layer.name: layer for layer in measure(model)}
        assert log[-1]['sigma/l1'] == last['l1'].sigma
        assert {tag for tag, _ in written} == keys
        assert f'{last["l1"].sigma:.6}' in printed.getvalue()
        assert (tmp_path / 'plot.png').exists()

    def test_its_own_trigger_is_an_epoch(self, tmp_path):
        trainer, model = make_trainer(tmp_path, n=9)
        trainer.extend(SpectralNormReport(model))
        trainer.extend(chainer_extensions.LogReport())
        trainer.run()
        log = json.loads((tmp_path / 'log').read_text())
        assert [entry['iteration'] for entry in log] == [4, 8]
        assert 'sigma/l1' in log[0]
        assert 'true_sigma/l1' not in log[0]
        assert 'lipschitz_bound' not in log[0]
        assert os.listdir(tmp_path) == ['log']  # no picture is asked for

    def test_prefix(self, tmp_path):
        trainer, model = make_trainer(tmp_path, n=1)
        for prefix in (None, 'dis'):
            trainer.extend(SpectralNormReport(model, prefix=prefix),
                           trigger=(1, 'iteration'))
        trainer.run()
        observation = trainer.observation
        assert observation['dis/sigma/l1'] == observation['sigma/l1']

    def test_several_vectors(self, tmp_path):
        trainer, model = make_trainer(
            tmp_path, Model(make_hook=SEVERAL), n=2)
        trainer.extend(SpectralNormReport(model), trigger=(1, 'iteration'))
        trainer.run()
        last = {layer.name: layer for layer in measure(model)}
        assert len(last['l1'].singular_values) == 3
        assert last['l2'].singular_values is None  # it has one row
        found = trainer.observation
        assert found['sigma/l1'] == last['l1'].sigma
        assert found['sigma2/l1'] == last['l1'].singular_values[1]
        assert 0 < found['sigma2/l1'] < found['sigma/l1']
        assert {'sigma/l2', 'residual/l1'} <= found.keys()
        assert 'sigma2/l2' not in found

    @pytest.mark.parametrize('make_hook', [
        SpectralNormalization, SEVERAL, pytest.param(
            link_hooks.SpectralNormalization, marks=pytest.mark.slow)])
    def test_training_is_not_disturbed(self, tmp_path, make_hook):
        run_undisturbed(
            tmp_path, make_hook, true_sigma=True, filename='sigma.png')

    def test_lazy_layers_are_left_out_until_they_are_there(self, tmp_path):
        trainer, model = make_trainer(tmp_path, Model(None), n=1)
        report = SpectralNormReport(model, true_sigma=True, certify=1e-2)
        assert [layer.name for layer in report.measure()] == ['l2']
        with pytest.raises(errors.UninitializedWeightError):
            report.lipschitz_bound()
        trainer.extend(report, trigger=(1, 'iteration'),
                       call_before_training=True)
        found = []
        trainer.extend(
            lambda trainer: found.append(dict(trainer.observation)),
            name='look', trigger=(1, 'iteration'), call_before_training=True)
        trainer.run()
        assert 'sigma/l2' in found[0]
        assert not {'sigma/l1', 'lipschitz_bound'} & set(found[0])
        assert 'certified_norm/l2' in found[0]
        assert {'sigma/l1', 'lipschitz_bound'} <= set(found[1])

    def test_nothing_to_report(self, tmp_path):
        model = L.Linear(6, 1)
        trainer, _ = make_trainer(tmp_path, model, n=1)
        trainer.extend(SpectralNormReport(model))
        with pytest.raises(errors.NothingToReportError, match='Linear has'):
            trainer.run()

    def test_without_hooks(self, tmp_path):
        model = L.Linear(6, 1)
        layer, = measure(model)
        assert layer[2:4] == (None, None)
        assert layer.norm == layer.true_sigma == pytest.approx(
            reference.true_norm(model.W.array), rel=1e-6)

    def test_nothing_to_measure(self):
        model = L.Linear(6, 1)
        report = SpectralNormReport(model)
        with pytest.raises(errors.NothingToReportError, match='true_sigma'):
            report.measure()
        model.add_hook(SpectralNormalization())  # then it works
        layer, = report.measure()
        assert layer.sigma == pytest.approx(
            reference.true_norm(model.W.array), rel=1e-3)

    def test_nothing_to_measure_without_an_estimate(self):
        model = chainer.Sequential(L.BatchNormalization(3))
        with pytest.raises(
                errors.NothingToReportError,
                match=r'links: / \(Sequential\), /0 \(BatchNormalization\)'):
            SpectralNormReport(model, true_sigma=True).measure()

    def test_its_text(self):
        assert repr(SpectralNormReport(Model(), prefix='dis')) == (
            "SpectralNormReport(Model, true_sigma=False, filename=None, "
            "prefix='dis', tolerance=0.2, certify=None)")

    @pytest.mark.parametrize('tolerance', [0, -1, float('nan'), None])
    def test_bad_tolerance(self, tolerance):
        with pytest.raises(errors.ToleranceError, match='above 0'):
            SpectralNormReport(Model(), tolerance=tolerance)

    @pytest.mark.parametrize('certify', [0, -1, float('nan'), 'yes'])
    def test_bad_tolerance_of_certificates(self, certify):
        with pytest.raises(errors.CertifyArgumentError, match='above 0'):
            SpectralNormReport(Model(), certify=certify)
        with pytest.raises(errors.CertifyArgumentError, match='seconds'):
            SpectralNormReport(Model(), time_limit=-1)


class TestCertify:

    def make(self):
        """Two linear layers that share a singular vector, and are reached."""
        Q = np.linalg.qr(np.random.normal(size=(4, 4)))[0].astype('f')
        diagonals = [np.diag([x, 1, 1, 1]).astype('f') for x in (3, 5)]
        return chainer.Sequential(
            L.Linear(4, 4, initialW=Q @ diagonals[0]),
            L.Linear(4, 4, initialW=diagonals[1] @ Q.T))

    def report(self, model, tmp_path, n=1, **kwargs):
        """What is reported ``n`` times, and the warnings."""
        trainer, _ = make_trainer(tmp_path, L.Linear(6, 1))
        report = SpectralNormReport(model, **kwargs)
        values, caught = zip(*[call(report, trainer) for _ in range(n)])
        return values[-1], [warning for each in caught for warning in each]

    def test_network(self, tmp_path):
        model = self.make()
        values, caught = self.report(model, tmp_path, certify=1e-3)
        assert caught == []
        assert set(values) == {
            'certified_norm/0', 'certified_norm/1', 'lipschitz_bound'}
        norm = reference.true_norm(model[1].W.array.astype('d')
                                   @ model[0].W.array.astype('d'))
        assert norm == pytest.approx(15, rel=1e-5)
        assert values['lipschitz_bound'] == pytest.approx(15, rel=1e-5)
        assert type(values['lipschitz_bound']) is float
        report = SpectralNormReport(model, certify=1e-3)
        assert report.lipschitz_bound() == values['lipschitz_bound']
        assert [layer.interval.hi for layer in report.measure()] == [
            values['certified_norm/0'], values['certified_norm/1']]

    def test_a_tolerance_is_not_needed_for_the_bound(self):
        model = self.make()
        report = SpectralNormReport(model, true_sigma=True)
        assert report.lipschitz_bound() == pytest.approx(15, rel=1e-5)
        assert [layer.interval for layer in report.measure()] == [None, None]

    @pytest.mark.parametrize('hook', [
        SpectralNormalization, link_hooks.SpectralNormalization, SEVERAL])
    def test_the_norm_is_that_of_the_weight_as_it_is_used(self, hook):
        model = chainer.Sequential(
            L.Convolution2D(2, 3, 3, nobias=True).add_hook(hook()),
            L.Linear(12, 2, nobias=True))
        model[0].W_u[...] = np.random.normal(size=3)  # not converged
        before = model[0].W_u.copy()
        first, second = SpectralNormReport(model, certify=1e-2).measure()
        with chainer.using_config('train', False):
            conv = model[0].copy('copy')
            rows = conv(np.eye(32, dtype='f').reshape(-1, 2, 4, 4)).array
            Y = conv(np.eye(72, dtype='f').reshape(-1, 2, 6, 6)).array
        norms = [np.linalg.norm(x.reshape(len(x), -1).astype('d'), 2)
                 for x in (rows, Y)]
        assert 1.01 < norms[0] < norms[1] <= first.interval.hi * (1 + 1e-6)
        assert first.interval.hi < 2 * norms[1]
        assert second.interval.hi == pytest.approx(
            reference.true_norm(model[1].W.array), rel=1e-6)
        np.testing.assert_array_equal(model[0].W_u, before)

    def test_training_is_not_disturbed(self, tmp_path):
        trainer = run_undisturbed(tmp_path, SEVERAL, certify=1e-2)
        assert trainer.observation['lipschitz_bound'] == pytest.approx(
            1, rel=0.1)

    def test_a_layer_that_does_not_know_the_size_of_images(self, tmp_path):
        """It is left out until its first call, and the bound is, too."""
        model = chainer.Sequential(L.Convolution2D(1, 2, 3).add_hook(
            SpectralNormalization(norm='operator', n_warmup=50)))
        assert self.report(model, tmp_path, certify=1e-3) == ({}, [])
        with pytest.raises(errors.UnknownInputSizeError):
            SpectralNormReport(model).lipschitz_bound()
        model(np.zeros((1, 1, 12, 12), 'f'))
        before = model[0].W_map.copy()
        values, _ = self.report(model, tmp_path, certify=1e-3)
        assert 1 < values['lipschitz_bound'] < 1.1  # for every size
        np.testing.assert_array_equal(model[0].W_map, before)

    def test_residual(self, tmp_path):
        model = self.make()
        values, _ = self.report(
            model, tmp_path, certify=1e-3, residual=chainer.Sequential)
        assert values['lipschitz_bound'] == pytest.approx(16, rel=1e-5)

    def test_what_is_not_understood_is_named_once(self, tmp_path):
        model = self.make()
        model.append(L.LayerNormalization(4))
        values, (warning,) = self.report(
            model, tmp_path, n=2, certify=1e-3, prefix='dis')
        assert str(warning.message).startswith('dis/lipschitz_bound: ')
        assert 'LayerNormalization /' in str(warning.message)
        assert set(values) == {
            f'dis/certified_norm/{link.name}' for link in model[:2]}
        with pytest.raises(errors.LipschitzError, match='LayerNorm'):
            SpectralNormReport(model).lipschitz_bound()

    def test_weights_of_links_of_other_kinds(self, tmp_path):
        """The norm of what they do with the weight is not known."""
        link = L.Bilinear(3, 3, 3).add_hook(SpectralNormalization())
        values, (warning,) = self.report(link, tmp_path, certify=1e-3)
        assert 'Bilinear' in str(warning.message)
        assert set(values) == {'sigma/W', 'residual/W'}

    def test_n_step_rnn(self, tmp_path):
        """Their product with inputs is a part of what such a link does."""
        link = L.NStepGRU(1, 3, 4, 0.).add_hook(SpectralNormalization())
        values, (warning,) = self.report(link, tmp_path, certify=1e-3)
        assert 'NStepGRU /.' in str(warning.message)
        assert 'lipschitz_bound' not in values
        assert not [key for key in values if key.startswith('certified')]


def damage(model, cause):
    if cause == 'NaN':
        model.l1.W.array[0, 0] = np.nan
    elif cause == 'Inf':
        model.l1.W.array[0, 0] = -np.inf
    elif cause == 'zero':
        model.l1.W.array[...] = 0
    elif cause == 'vector of zeros':
        model.l1.W_u[...] = 0
    elif cause == 'vector of NaN':
        model.l1.W_u[...] = np.nan
    else:
        if cause == 'estimate':
            hook, = model.l1.local_link_hooks.values()
            hook.n_warmup = 0
        u, s, vt = np.linalg.svd(model.l1.W.array, full_matrices=False)
        s[:2] = 10, 1
        model.l1.W.array[...] = (u * s) @ vt
        model.l1.W_u[...] = u[:, 1] + 0.05 * u[:, 0]


MESSAGES = {
    'NaN': 'l1: the weight holds NaN or Inf',
    'Inf': 'l1: the weight holds NaN or Inf',
    'zero': 'l1: the weight is all zero',
    'vector of zeros': 'l1: the stored vector W_u is zero or not finite',
    'vector of NaN': 'l1: the stored vector W_u is zero or not finite',
    'stale': r'l1: the stored vector W_u is of another weight',
    'estimate': r'l1: the estimate of sigma, [\d.]+, is off by .*\d+%',
}


def call(report, trainer):
    """Calls the extension; returns what it reports, and its warnings."""
    observation = {}
    with chainer.Reporter().scope(observation), \
            warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        report(trainer)
    return observation, caught


class TestWarnings:

    @pytest.mark.parametrize('true_sigma', [False, True])
    @pytest.mark.parametrize('cause', MESSAGES)
    def test_once_for_each_layer_and_cause(self, cause, true_sigma, tmp_path):
        trainer, model = make_trainer(tmp_path)
        report = SpectralNormReport(model, true_sigma)
        assert call(report, trainer)[1] == []
        damage(model, cause)
        values, (warning,) = call(report, trainer)
        assert issubclass(
            warning.category, errors.SpectralNormalizationWarning)
        with pytest.warns(warning.category, match=MESSAGES[cause]):
            warnings.warn(warning.message, stacklevel=1)
        assert call(report, trainer)[1] == []
        if cause in ('NaN', 'Inf'):
            assert np.isnan(values['sigma/l1'])
        if cause == 'zero':
            assert values['sigma/l1'] == 0
            assert 'residual/l1' not in values
            assert values.get('norm/l1', 0) == 0
        assert np.isfinite(values['sigma/l2'])
        # Of another cause it is told, too.
        damage(model, 'zero' if cause != 'zero' else 'NaN')
        assert len(call(report, trainer)[1]) == 1

    @pytest.mark.parametrize(('value', 'row'), [
        (0, 1), (np.nan, 0), ('dependent', 1)])
    def test_one_of_several_vectors(self, value, row, tmp_path):
        trainer, model = make_trainer(tmp_path)
        hook, = model.l1.local_link_hooks.values()
        hook.n_vectors = 3
        trainer.run()
        report = SpectralNormReport(model)
        assert call(report, trainer)[1] == []
        model.l1.W_us[row] = (
            model.l1.W_u if value == 'dependent' else value)
        values, (warning,) = call(report, trainer)
        assert 'W_u or W_us is zero or not finite' in str(warning.message)
        assert np.isnan(values['sigma/l1'])
        assert np.isnan(values['sigma2/l1'])

    def test_at_least_what_the_residual_tells(self, tmp_path):
        trainer, model = make_trainer(tmp_path)
        damage(model, 'estimate')
        errors_of = []
        for true_sigma in (False, True):
            _, (warning,) = call(
                SpectralNormReport(model, true_sigma), trainer)
            text = str(warning.message)
            assert ('at least' in text) is not true_sigma
            errors_of.append(int(text.split('%')[0].split()[-1]))
        layer = {x.name: x for x in measure(model)}['l1']
        assert errors_of[1] == round(
            100 * (1 - layer.sigma / layer.true_sigma))
        assert 20 <= errors_of[0] <= errors_of[1]

    def test_tolerance(self, tmp_path):
        trainer, model = make_trainer(tmp_path)
        damage(model, 'estimate')
        report = SpectralNormReport(model, True, tolerance=0.99)
        assert call(report, trainer)[1] == []

    def test_a_layer_without_a_hook(self, tmp_path):
        trainer, _ = make_trainer(tmp_path)
        link = L.Linear(3, 2)
        link.W.array[...] = 0
        report = SpectralNormReport(link, True, prefix='gen')
        _, (warning,) = call(report, trainer)
        assert str(warning.message).startswith('gen/W: the weight is all zero')


class TestPicture:

    def run(self, out, n=4, model=None, before=lambda trainer: None,
            **kwargs):
        trainer, model = make_trainer(out, model, n)
        report = SpectralNormReport(model, filename='sigma.png', **kwargs)
        trainer.extend(report, trigger=(1, 'iteration'))
        trainer.extend(chainer_extensions.snapshot(), trigger=(2, 'iteration'))
        before(trainer)
        trainer.run()
        return report, trainer

    @pytest.fixture
    def drawn(self, monkeypatch):
        """What is drawn, instead of drawing it."""
        found = []
        monkeypatch.setattr(
            plot, 'draw', lambda history, path: found.append(list(history)))
        return found

    @pytest.mark.parametrize('true_sigma', [False, True])
    def test_it_is_a_png(self, true_sigma, tmp_path):
        self.run(tmp_path, true_sigma=true_sigma)
        data = (tmp_path / 'sigma.png').read_bytes()
        assert data.startswith(b'\x89PNG')
        assert len(data) > 10000
        assert not [name for name in os.listdir(tmp_path)
                    if name.startswith('sigma') and name != 'sigma.png']

    def test_the_last_picture_has_everything(self, tmp_path, drawn):
        """And none is drawn while the one before has just been."""
        report, _ = self.run(tmp_path, n=5)
        report._picture._rest_until = float('inf')
        assert [entry['iteration'] for entry in drawn[-1]] == [1, 2, 3, 4, 5]
        report.finalize()
        n = len(drawn)
        trainer, _ = make_trainer(tmp_path)
        call(report, trainer)
        assert len(drawn) == n
        report.finalize()
        assert len(drawn) == n + 1

    def test_it_goes_on_after_a_resume(self, tmp_path, drawn):
        self.run(tmp_path)
        whole = drawn[-1]
        self.run(tmp_path, before=lambda trainer: serializers.load_npz(
            str(tmp_path / 'snapshot_iter_2'), trainer))
        assert drawn[-1] == whole
        assert [entry['iteration'] for entry in whole] == [1, 2, 3, 4]

    @pytest.mark.parametrize('strict', [True, False])
    def test_a_snapshot_of_a_run_without_it(self, tmp_path, strict):
        trainer, model = make_trainer(tmp_path)
        file = io.BytesIO()
        trainer.extend(chainer_extensions.snapshot())
        trainer._start_at = 0
        serializers.save_npz(file, trainer)
        file.seek(0)
        report = SpectralNormReport(model)
        trainer.extend(report, trigger=(1, 'iteration'))
        with np.load(file, allow_pickle=True) as f:
            deserializer = serializers.NpzDeserializer(f, strict=strict)
            report.serialize(deserializer['extensions']['report'])
        assert report._picture.history == []

    def test_without_matplotlib(self, tmp_path, monkeypatch):
        """One warning, and training goes on."""
        monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
        model = Model()
        with pytest.warns(errors.SpectralNormalizationWarning,
                          match='pip install matplotlib'):
            report = SpectralNormReport(model, filename='sigma.png')
        trainer, _ = make_trainer(tmp_path, model)
        trainer.extend(report, trigger=(1, 'iteration'))
        trainer.run()
        assert 'sigma/l1' in trainer.observation
        assert os.listdir(tmp_path) == []

    def test_matplotlib_is_imported_for_a_picture_only(self, monkeypatch):
        imported = builtins.__import__

        def refuse(name, *args, **kwargs):
            assert not name.startswith('matplotlib')
            return imported(name, *args, **kwargs)

        monkeypatch.setattr(builtins, '__import__', refuse)
        SpectralNormReport(Model()).measure()


HOOKS = {
    'penalty': [lambda: SpectralNormPenalty(0.1)],
    'projection': [lambda: SpectralNormProjection(0.5)],
    'both': [lambda: SpectralNormPenalty(0.1),
             lambda: SpectralNormProjection(0.5)],
}


class TestPenaltyState:

    def run(self, out, n, snapshot=None, with_state=True, hooks='penalty'):
        np.random.seed(0)
        trainer, model = make_trainer(out, Plain(), n)
        optimizer = trainer.updater.get_optimizer('main')
        for hook in HOOKS[hooks]:
            optimizer.add_hook(hook())
        if with_state:
            trainer.extend(extensions.SpectralNormPenaltyState(optimizer))
        trainer.extend(chainer_extensions.snapshot(), trigger=(3, 'iteration'))
        if snapshot is not None:
            serializers.load_npz(str(snapshot), trainer)
        trainer.run()
        return [param.array for _, param in sorted(model.namedparams())]

    @pytest.mark.parametrize('hooks', HOOKS)
    def test_a_resumed_run_ends_with_the_same_numbers(self, tmp_path, hooks):
        whole = self.run(tmp_path, 8, hooks=hooks)
        for with_state in (True, False):
            self.run(tmp_path, 3, None, with_state, hooks)
            resumed = self.run(
                tmp_path, 8, tmp_path / 'snapshot_iter_3', with_state, hooks)
            same = [np.array_equal(a, b) for a, b in zip(whole, resumed)]
            assert all(same) is with_state
            for a, b in zip(whole, resumed):
                assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(a)

    def test_keys(self, tmp_path):
        """Those of the penalty are as in earlier snapshots."""
        self.run(tmp_path, 3, hooks='both')
        prefix = 'extensions/SpectralNormPenaltyState/'
        with np.load(tmp_path / 'snapshot_iter_3') as npz:
            shapes = {key[len(prefix):]: npz[key].shape
                      for key in npz if key.startswith(prefix)
                      and not key.startswith(prefix + '_trigger')}
        assert shapes == {
            'l1/W': (5,), 'l1/W_sn_projection_u': (5,),
            'l2/W': (1,), 'l2/W_sn_projection_u': (1,)}

    def test_a_projection_resumes_from_a_snapshot_of_a_penalty(
            self, tmp_path):
        self.run(tmp_path, 3)
        W, *_ = self.run(
            tmp_path, 4, tmp_path / 'snapshot_iter_3', hooks='both')
        assert reference.true_norm(W) == pytest.approx(0.5, rel=1e-3)

    def test_a_snapshot_of_a_run_without_it(self, tmp_path):
        self.run(tmp_path, 3, None, with_state=False)
        with warnings.catch_warnings():
            # By the trigger, of any extension that was not there.
            warnings.filterwarnings('ignore', '.* is not saved')
            self.run(tmp_path, 4, tmp_path / 'snapshot_iter_3')

    def make(self):
        optimizer = chainer.optimizers.SGD().setup(Plain())
        optimizer.add_hook(SpectralNormPenalty(0.1))
        return optimizer, extensions.SpectralNormPenaltyState(optimizer)

    def test_back_to_a_snapshot_of_before_the_first_step(self):
        optimizer, state = self.make()
        target = {}
        serializers.DictionarySerializer(target).save(state)
        numbers = []
        weights = [x.array.copy() for x in optimizer.target.params()]
        for _ in range(2):
            for x, array in zip(optimizer.target.params(), weights):
                x.array[...] = array
            serializers.NpzDeserializer(target).load(state)
            for _ in range(3):
                for x in optimizer.target.params():
                    x.grad = np.zeros_like(x.array)
                optimizer.update()
            numbers.append(optimizer.target.l1.W.array.copy())
        np.testing.assert_array_equal(*numbers)

    def test_a_parameter_without_an_update_rule(self):
        optimizer, state = self.make()
        for x in optimizer.target.params():
            x.grad = np.zeros_like(x.array)
        optimizer.update()
        serializer = serializers.DictionarySerializer()
        serializer.save(state)
        optimizer.target.l1.W.update_rule = None
        serializers.NpzDeserializer(
            {k: np.asarray(x) for k, x in serializer.target.items()}).load(
                state)


class Plain(chainer.Chain):

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(6, 5)
            self.l2 = L.Linear(5, 1)

    forward = Model.forward


@pytest.mark.gpu
class TestOnDevice:

    def make(self):
        model = chainer.ChainList(
            L.Linear(7, 5).add_hook(SpectralNormalization(use_gamma=True)),
            L.Convolution2D(3, 4, 3).add_hook(
                link_hooks.SpectralNormalization(2)),
            L.Deconvolution2D(3, 4, 3).add_hook(SpectralNormalization(cap=1)),
            L.Linear(4, 3))
        for link in list(model)[:3]:
            link.W_u[...] = np.random.normal(size=link.W_u.shape)
        return model

    def test_as_on_the_host_and_waiting_once(self, monkeypatch):
        model = self.make()
        expected = measure(model)
        model.to_device('@cupy:0')
        before = [cuda.to_cpu(link.W_u) for link in list(model)[:3]]
        waited = []
        if cuda.ndarray is on_host.DeviceArray:
            monkeypatch.setattr(on_host, '_synchronize', waited.append)
        layers = measure(model)
        if cuda.ndarray is on_host.DeviceArray:
            assert len(waited) == 1
        monkeypatch.undo()
        for a, b in zip(layers, expected):
            assert a[:2] == b[:2]
            for x, y in zip(a[2:], b[2:]):
                assert x == y or x == pytest.approx(y, rel=1e-4)
        for link, u in zip(model, before):
            np.testing.assert_array_equal(cuda.to_cpu(link.W_u), u)

    def test_certify(self):
        model = chainer.Sequential(
            L.Convolution2D(2, 3, 3).add_hook(SpectralNormalization()),
            L.BatchNormalization(3), L.Linear(12, 2))
        model[1].gamma.array[...] = 1, 2, -3
        report = SpectralNormReport(model, certify=1e-2)
        expected, layers = report.lipschitz_bound(), report.measure()
        model.to_device('@cupy:0')
        assert report.lipschitz_bound() == pytest.approx(expected, rel=1e-4)
        assert [layer.interval.hi for layer in report.measure()] == [
            pytest.approx(layer.interval.hi, rel=1e-4) for layer in layers]

    @pytest.mark.parametrize('cause', MESSAGES)
    def test_it_warns_as_on_the_host(self, cause, tmp_path):
        trainer, model = make_trainer(tmp_path)
        damage(model, cause)
        model.to_device('@cupy:0')
        _, (warning,) = call(SpectralNormReport(model, True), trainer)
        with pytest.warns(warning.category, match=MESSAGES[cause]):
            warnings.warn(warning.message, stacklevel=1)
