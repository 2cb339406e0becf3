"""What of a model is normalized."""
import pickle

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks

from sn_function import ChainSpectralNormalization, SpectralNormalization


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


def test_a_weight_that_is_used_both_ways():
    link = L.Linear(5, 5).add_hook(SpectralNormalization())
    x = np.ones((1, 5), 'f')
    assert rows(link, lambda link: F.linear(link(x), link.W))['/W'][0] == (
        'never')


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


@pytest.mark.parametrize('kind', [
    L.NStepLSTM, L.NStepBiLSTM, L.NStepGRU, L.NStepBiGRU, L.NStepRNNTanh,
    L.NStepBiRNNReLU])
def test_weights_of_n_step_links_never_are(kind):
    model = chainer.Sequential(kind(2, 3, 4, 0.))
    found = rows(model)
    matrices = [x for x in found.values() if x[0] != 'no matrix']
    assert len(matrices) >= 4
    assert set(matrices) == {
        ('never', f'{kind.__name__} does not call this link')}
    with pytest.raises(sn_function.errors.NoLinkError):
        model.add_hook(ChainSpectralNormalization())


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
    link = L.Linear(3, 2).add_hook(SpectralNormalization(use_gamma=True))
    assert rows(link)['/gamma'] == ('no matrix', '')


def test_text():
    model = make()
    model.add_hook(ChainSpectralNormalization('/c*'))
    lines = str(sn_function.summary(model)).splitlines()
    assert lines[0].split() == ['parameter', 'shape', 'status', 'note']
    assert '/called/W      lazy     normalized    SpectralNormalization' in (
        lines)
    assert '/conv/b        4        no matrix' in lines
    assert lines[-1] == '2 of 4 weights are normalized'
