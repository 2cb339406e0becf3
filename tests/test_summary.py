"""What of a model is normalized."""
import copy
import pickle
import random
import threading

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks
from chainer.backends import cuda

from sn_function import (
    ChainSpectralNormalization,
    SpectralNormalization,
    errors,
)


class Model(chainer.Chain):
    """Calls some of its links, and uses the weights of others."""

    def __init__(self, **links):
        super().__init__()
        with self.init_scope():
            for name, link in links.items():
                setattr(self, name, link)

    def forward(self, x):
        h = F.relu(self.conv(x))
        h = self.called(h)
        h += self.by_forward.forward(h)
        return h + F.linear(h, self.by_weight.W)


def make():
    return Model(
        conv=L.Convolution2D(3, 4, 3), called=L.Linear(None, 5),
        by_forward=L.Linear(5, 5), by_weight=L.Linear(5, 5))


X = np.ones((2, 3, 5, 5), 'f')


def rows(model, *args):
    return {row.path: (row.status, row.note)
            for row in sn_function.summary(model, *args).rows}


def statuses(model, *args):
    return {path: status for path, (status, _) in rows(model, *args).items()}


def test_every_parameter_has_a_row():
    model = make()
    found = sn_function.summary(model).rows
    assert {row.path: row.shape for row in found} == {
        path: None if x.array is None else x.shape
        for path, x in model.namedparams()}
    assert [row.path for row in found if row.shape is None] == ['/called/W']


def test_status_without_a_run():
    model = make()
    model.add_hook(ChainSpectralNormalization(['/by_*', '/conv']))
    assert statuses(model) == {
        '/conv/W': 'normalized', '/conv/b': 'no matrix',
        '/called/W': 'filtered out', '/called/b': 'no matrix',
        '/by_forward/W': 'normalized', '/by_forward/b': 'no matrix',
        '/by_weight/W': 'normalized', '/by_weight/b': 'no matrix'}
    model.delete_hook('ChainSpectralNormalization')
    assert set(statuses(model).values()) == {'no hook', 'no matrix'}


class TestAllNormalized:

    def test_hooks_on_all(self):
        model = make()
        assert not sn_function.summary(model).all_normalized
        model.add_hook(ChainSpectralNormalization())
        found = sn_function.summary(model)
        assert found.all_normalized is True
        # What a run finds counts, too.
        found = sn_function.summary(model, lambda model: model(X))
        assert 'never' in str(found)
        assert not found.all_normalized

    def test_what_is_left_out_is_meant(self):
        model = make()
        model.add_hook(ChainSpectralNormalization(exclude='/conv'))
        assert sn_function.summary(model).all_normalized

    @pytest.mark.parametrize(('other', 'expected'), [
        (L.BatchNormalization(3), True), (L.Linear(3, 3), False),
        (L.Bilinear(2, 3, 4), False)])
    def test_other_links(self, other, expected):
        """Those without a matrix, and those that a chain does not take."""
        model = chainer.Sequential(
            L.Linear(3, 3).add_hook(SpectralNormalization()), other)
        assert sn_function.summary(model).all_normalized is expected

    def test_not_initialized(self):
        """What it will be, only a run can tell."""
        class Lazy(chainer.Link):

            def __init__(self, *shape):
                super().__init__()
                self.shape = shape
                with self.init_scope():
                    self.V = chainer.Parameter(0)

            def forward(self, x):
                if not self.V.is_initialized:
                    self.V.initialize(self.shape)
                return x * F.sum(self.V)

        for ndim, expected in (1, True), (2, False):
            model = chainer.Sequential(
                L.Linear(3).add_hook(SpectralNormalization()),
                Lazy(*[3] * ndim))
            assert not sn_function.summary(model).all_normalized
            found = sn_function.summary(
                model, lambda model: model(np.ones((1, 3), 'f')))
            assert found.all_normalized is expected, found
            assert found.rows[-1].shape is None

    def test_nothing_to_normalize(self):
        assert not sn_function.summary(L.BatchNormalization(3)).all_normalized

    def test_raw_as_well(self):
        model = L.Linear(5, 5).add_hook(SpectralNormalization())
        for penalty in 0, 1:
            found = sn_function.summary(model, lambda model, penalty=penalty: (
                model(np.ones((1, 5), 'f')),
                penalty and F.sum(model.W ** 2)))
            assert found.all_normalized is not bool(penalty)

    def test_a_link_that_is_not_registered(self):
        """It has no row, and no optimizer finds it."""
        model = Aliases().add_hook(ChainSpectralNormalization())
        assert sn_function.summary(model).all_normalized
        assert not sn_function.summary(
            model, lambda model: model(np.ones((2, 4), 'f'))).all_normalized


@pytest.mark.parametrize('hook', [
    SpectralNormalization, link_hooks.SpectralNormalization])
def test_hooks_of_links(hook):
    model = make()
    # Chainer's takes the size of a lazy one from the wrong axis.
    model.called = L.Linear(36, 5)
    model.conv.add_hook(hook())
    model.called.add_hook(hook())
    assert rows(model)['/conv/W'] == ('normalized', 'SpectralNormalization')
    assert rows(model)['/by_weight/W'] == ('no hook', '')
    for _ in range(2):
        found = rows(model, lambda model: model(X))
        assert found['/conv/W'] == ('normalized', 'SpectralNormalization')
        assert found['/called/W'][0] == 'normalized'
        model(X)


def test_what_a_run_shows():
    model = make()
    model.add_hook(ChainSpectralNormalization())
    found = rows(model, lambda model: model(X))
    assert found['/conv/W'] == ('normalized', 'SpectralNormalization')
    assert found['/called/W'] == ('normalized', 'SpectralNormalization')
    for path in '/by_forward/W', '/by_weight/W':
        assert found[path] == (
            'never', 'LinearFunction uses it without calling the link')
    found = rows(model, lambda model: model.conv(X))
    assert found['/conv/W'] == ('normalized', 'SpectralNormalization')
    assert found['/called/W'] == (
        'normalized', 'SpectralNormalization; not called in this run')


def penalized(model):
    return F.sum(model(np.ones((1, 5), 'f'))) + F.sum(model[0].W ** 2)


def test_a_weight_that_is_used_both_ways():
    model = chainer.Sequential(*(
        L.Linear(5, 5).add_hook(SpectralNormalization()) for _ in range(2)))
    found = sn_function.summary(model, penalized)
    assert {row.path: (row.status, row.note) for row in found.rows
            if row.status != 'no matrix'} == {
        '/0/W': ('partly', '_ ** 2 uses it without calling the link'),
        '/1/W': ('normalized', 'SpectralNormalization')}
    remark, = found.remarks
    assert 'are used as well: /0/W. Within' in remark
    assert 'sn_function.normalized(model)' in remark
    assert str(found).endswith('1 of 2 weights are normalized\n' + remark)


def test_a_hook_before_ours_uses_the_weight():
    """That is in a call of the link, so its weight is not used raw."""
    model = chainer.Sequential(L.Linear(5, 5))
    for hook in link_hooks.WeightStandardization(), SpectralNormalization():
        model[0].add_hook(hook)
    x = np.ones((1, 5), 'f')
    assert rows(model, lambda model: model(x))['/0/W'] == (
        'normalized', 'SpectralNormalization')
    assert rows(model, penalized)['/0/W'] == (
        'partly', '_ ** 2 uses it without calling the link')


@pytest.mark.parametrize('settings', [{}, {'cap': 100.}])
def test_a_penalty_on_the_normalized_weight(settings):
    model = chainer.Sequential(
        L.Linear(5, 5).add_hook(SpectralNormalization(**settings)))
    for is_around in True, False:
        def run(model, is_around=is_around):
            y = model(np.ones((1, 5), 'f'))
            with sn_function.normalized(model):
                penalized(model) if is_around else F.sum(model[0].W ** 2)
            return y

        found = sn_function.summary(model, run)
        assert found.rows[0][2:] == ('normalized', 'SpectralNormalization')
        assert found.remarks == ()


def test_a_call_within_a_call():
    """The weight of the outer call is the normalized one, in its link."""
    class Twice(L.Linear):
        def forward(self, x, again=True):
            return super().forward(self(x, False) if again else x)

    link = Twice(5, 5).add_hook(SpectralNormalization())
    assert rows(link, lambda link: link(np.ones((1, 5), 'f')))['/W'] == (
        'normalized', 'SpectralNormalization')


def test_the_model_is_left_alone():
    model = make()
    model.add_hook(ChainSpectralNormalization())
    model(X)
    model.lstm = L.LSTM(5, 5)
    before = pickle.dumps(model)
    with pytest.raises(ZeroDivisionError):
        sn_function.summary(model, lambda model: [model(X), 1 / 0])
    sn_function.summary(model, lambda model: model(X))
    assert pickle.dumps(model) == before
    assert not chainer._get_link_hooks()
    assert not chainer.get_function_hooks()


class Aliases(chainer.ChainList):
    """Has second names for its links, and links that are not registered."""

    def __init__(self):
        super().__init__(L.Linear(4, 4), L.Linear(None, 4))
        self.first, self.all = self[0], list(self)
        self.unregistered = [L.Linear(None, 2)]

    def forward(self, x):
        h = self.all[1](self.first(x))
        return self.unregistered[0](h)


def state_of(model):
    """All arrays and names of a model, and of links outside of it."""
    links = [*model.links(), *vars(model).get('unregistered', ())]
    names = [(type(link), sorted(link._params), sorted(link._persistent),
              sorted(link.local_link_hooks)) for link in links]
    arrays = [copy.deepcopy(getattr(value, 'array', value)) for link in links
              for name, value in sorted(vars(link).items())
              if name in link._params | link._persistent]
    return names, arrays


def assert_same_state(a, b):
    assert a[0] == b[0]
    for x, y in zip(a[1], b[1]):
        np.testing.assert_array_equal(x, y)


def test_links_under_other_names_are_those_of_the_copy():
    model = Aliases()
    model.add_hook(ChainSpectralNormalization())
    before = state_of(model)
    found = sn_function.summary(
        model, lambda model: model(np.ones((1, 4), 'f')))
    assert {row.path: row.note for row in found.rows
            if row.status == 'normalized'} == dict.fromkeys(
                ['/0/W', '/1/W'], 'SpectralNormalization')
    assert_same_state(state_of(model), before)
    assert model[1].W.array is model.unregistered[0].W.array is None
    assert len(found.remarks) == 1
    assert found.remarks[0].startswith('Linear of the model was called')
    assert str(found).splitlines()[-1] == found.remarks[0]
    assert sn_function.summary(model).remarks == ()


def test_a_run_leaves_random_numbers_as_they_were():
    model = Aliases()
    x = np.ones((1, 4), 'f')

    def run(model):
        random.random()
        return model(x)

    np.random.seed(3)
    random.seed(4)
    expected = np.random.random(3).tolist(), random.random()
    np.random.seed(3)
    random.seed(4)
    sn_function.summary(model, run)
    assert (np.random.random(3).tolist(), random.random()) == expected


@pytest.mark.gpu
def test_a_run_leaves_random_numbers_of_the_device_as_they_were():
    cupy = cuda.cupy
    model = chainer.Sequential(L.Linear(None, 3), L.Linear(3, 2))
    model.to_device('@cupy:0')
    model.add_hook(ChainSpectralNormalization())
    x = cupy.ones((1, 4), 'f')
    cupy.random.seed(3)
    expected = cupy.random.normal(size=3).tolist()
    cupy.random.seed(3)
    found = sn_function.summary(model, lambda model: model(x))
    assert cupy.random.normal(size=3).tolist() == expected
    assert [row.status for row in found.rows if row.path[-1] == 'W'] == (
        ['normalized', 'normalized'])
    assert model[0].W.array is model[0].W_u is None


def test_a_sequential_with_a_lambda():
    model = chainer.Sequential(
        L.Linear(3, 3), lambda x: x,
        chainer.Sequential(L.Linear(3, 2), lambda x: x))
    model.add_hook(ChainSpectralNormalization('/0*'))
    found = rows(model, lambda model: model(np.ones((1, 3), 'f')))
    assert sorted(
        status for path, (status, _) in found.items() if path[-1] == 'W') == [
            'filtered out', 'normalized']
    assert not any(note.endswith('run') for _, note in found.values())


class Captured(chainer.Chain):
    """Calls a link of its own and one that it does not register."""

    def __init__(self, other):
        super().__init__()
        with self.init_scope():
            self.own = L.Linear(None, 3)
        self.hidden = [L.Linear(None, 3)]
        self.other = other

    def forward(self, x):
        return self.own(x)


@pytest.mark.parametrize('which', [
    lambda model: model, lambda model: model.own,
    lambda model: model.hidden[0]])
def test_a_run_of_the_model_itself_is_refused(which):
    model = Captured(None)
    model.own.add_hook(SpectralNormalization())
    x = np.ones((1, 3), 'f')
    with pytest.raises(errors.RunArgumentError, match='of the model itself'):
        sn_function.summary(model, lambda _: which(model)(x))
    assert model.own.W.array is model.hidden[0].W.array is None
    assert model.own.W_u is None
    with pytest.raises(errors.RunArgumentError, match='called no link of it'):
        sn_function.summary(model, lambda model: L.Linear(3, 3)(x))


def test_a_model_that_cannot_be_copied():
    model = Captured(threading.Lock())
    with pytest.raises(errors.ModelCopyError, match='TypeError: cannot '):
        sn_function.summary(model, lambda model: model(X))
    assert statuses(model)['/own/W'] == 'no hook'


N_STEP = [L.NStepLSTM, L.NStepBiLSTM, L.NStepGRU, L.NStepBiGRU,
          L.NStepRNNTanh, L.NStepBiRNNReLU]


def run_n_step(model):
    states = [None] * (2 if 'LSTM' in type(model.rnn).__name__ else 1)
    model.rnn(*states, [np.ones((2, 3), 'f')])


@pytest.mark.parametrize('kind', N_STEP)
def test_n_step_links(kind):
    model = Model(rnn=kind(2, 3, 4, 0.), unused=kind(1, 3, 4, 0.))
    weights = {path for path, x in model.namedparams() if x.ndim == 2}
    assert len(weights) >= 6
    found = rows(model, run_n_step)
    assert {path for path, x in found.items() if x == ('no hook', '')} == (
        weights)
    assert {x for path, x in found.items() if path not in weights} == {
        ('no matrix', '')}
    for link in model.children():
        link.add_hook(SpectralNormalization())
    found = rows(model, run_n_step)
    for path in weights:
        note = f'SpectralNormalization_{path[-2:]}'  # of the layer
        if path.startswith('/unused'):
            note += '; not called in this run'
        assert found[path] == ('normalized', note)


@pytest.mark.parametrize('kind', N_STEP)
@pytest.mark.parametrize('hook', [
    SpectralNormalization, link_hooks.SpectralNormalization])
def test_a_hook_on_a_layer_of_an_n_step_link_never_acts(kind, hook):
    model = Model(rnn=kind(2, 3, 4, 0.))
    model.rnn[1].add_hook(hook(weight_name='w1'))
    for args in (), (run_n_step,):
        found = rows(model, *args)
        assert found['/rnn/1/w1'] == (
            'never', f'{kind.__name__} does not call this link: it needs a '
                     f'hook itself')
        assert found['/rnn/1/w0'] == found['/rnn/0/w1'] == ('no hook', '')


def test_an_n_step_link_that_is_not_registered():
    model = Model()
    model.hidden = [L.NStepGRU(1, 3, 4, 0.)]
    found = sn_function.summary(
        model, lambda model: model.hidden[0](None, [np.ones((2, 3), 'f')]))
    remark, = found.remarks
    assert remark.startswith('NStepGRU of the model was called')


def test_the_weights_of_an_n_step_link_that_others_use():
    model = Model(rnn=L.NStepRNNTanh(1, 3, 4, 0.))
    model.rnn.add_hook(SpectralNormalization())
    assert rows(model, lambda model: F.linear(
        model.rnn[0].w0, model.rnn.ws[0][0]))['/rnn/0/w0'] == (
            'never', 'LinearFunction uses it without calling the link')


class OldLinear(L.Linear):
    """As before Chainer 5."""

    def __call__(self, x):
        return F.linear(x, self.W)


class OldRNN(L.NStepRNNTanh):

    def __call__(self, *args):
        return self.forward(*args)


def test_calls_that_call_no_hooks():
    """Hooks on such links are from old pickles: now they are refused."""
    model = Model(old=L.Linear(5, 5), new=L.Linear(5, 5),
                  rnn=L.NStepRNNTanh(1, 3, 4, 0.))
    for link in model.children():
        link.add_hook(SpectralNormalization())
    model.old.__class__, model.rnn.__class__ = OldLinear, OldRNN
    for args in (), (lambda model: (
            model.old(np.ones((1, 5), 'f')), run_n_step(model)),):
        found = rows(model, *args)
        assert found['/old/W'] == (
            'never', 'OldLinear.__call__ calls no hooks')
        assert found['/rnn/0/w1'] == (
            'never', 'OldRNN.__call__ calls no hooks')
        assert found['/new/W'][0] == 'normalized'
    for link in model.children():
        link.delete_hook('SpectralNormalization')
    assert statuses(model)['/old/W'] == 'no hook'


def test_links_of_other_kinds():
    model = Model(
        bilinear=L.Bilinear(2, 3, 4), bn=L.BatchNormalization(4),
        lazy_bn=L.BatchNormalization(axis=(0, 2)), linear=L.Linear(None, 3))
    assert rows(model)['/bilinear/V1'] == ('unsupported', 'Bilinear')
    assert rows(model)['/bn/gamma'] == ('no matrix', '')
    assert rows(model)['/lazy_bn/gamma'] == ('unknown', 'BatchNormalization')
    assert rows(model)['/linear/W'] == ('no hook', '')
    model.bilinear.add_hook(SpectralNormalization(weight_name='V1', name='V1'))
    assert rows(model)['/bilinear/V1'] == ('normalized', 'V1')
    assert rows(model)['/bilinear/V2'] == ('unsupported', 'Bilinear')


def test_gamma_is_no_matrix():
    for in_size in 3, None:
        link = L.Linear(in_size, 2).add_hook(
            SpectralNormalization(use_gamma=True))
        assert rows(link)['/gamma'] == ('no matrix', '')
        assert sn_function.summary(link).all_normalized


def test_text():
    model = make()
    model.add_hook(ChainSpectralNormalization('/c*'))
    lines = str(sn_function.summary(model)).splitlines()
    assert lines[0].split() == ['parameter', 'shape', 'status', 'note']
    assert '/called/W      lazy     normalized    SpectralNormalization' in (
        lines)
    assert '/conv/b        4        no matrix' in lines
    assert lines[-1] == '2 of 4 weights are normalized'
