"""A scope normalizes each weight once, and all of them in one node."""
import chainer
import chainer.links as L
import numpy as np
import pytest

from sn_function._links import scope as scopes
from sn_function._links.hooked_weight import HookedWeight
from tests.links.hooks import Hook


@pytest.fixture
def model():
    return chainer.Sequential(
        *[L.Linear(4, 4).add_hook(Hook()) for _ in range(3)])


def weight_of(link):
    hook = link.local_link_hooks['Hook']
    return HookedWeight(hook, link, link.W)


def test_covering(model):
    outer, inner = [scopes.Scope([x], Hook) for x in (model, model[0])]
    assert scopes.covering(model[0]) is None
    scopes.begin(outer)
    scopes.begin(inner)
    assert scopes.covering(model[0]) is outer
    scopes.end(outer)
    assert scopes.covering(model[0]) is inner
    assert scopes.covering(model[1]) is None
    for _ in range(2):
        scopes.end(inner)
    assert scopes.covering(model[0]) is None


def test_once(model):
    scope = scopes.Scope([model], Hook)
    Y, *_ = scope.normalize(weight_of(model[0]))
    u = model[0].W_u.copy()
    again, *_ = scope.normalize(weight_of(model[0]))
    assert again is Y
    np.testing.assert_array_equal(model[0].W_u, u)


def test_in_one_node(model):
    scope = scopes.Scope([model], Hook)
    before = {link: None if link.W_u is None else link.W_u.copy()
              for link in model}
    nodes = {scope.normalize(weight_of(link))[0].creator_node
             for link in model}
    assert len(nodes) == 1
    assert all(not np.array_equal(link.W_u, before[link]) for link in model)


def test_u_of_what_is_not_called(model):
    scope = scopes.Scope([model], Hook)
    for link in model:
        weight_of(link).vector_and_gamma()
    before = model[1].W_u.copy()
    scope.normalize(weight_of(model[0]))
    np.testing.assert_array_equal(model[1].W_u, before)


def test_in_test_mode(model):
    scope = scopes.Scope([model], Hook)
    u, _ = weight_of(model[0]).vector_and_gamma()
    before = u.copy()
    with chainer.using_config('train', False):
        Y, *_ = scope.normalize(weight_of(model[0]))
    np.testing.assert_array_equal(u, before)
    again, *_ = scope.normalize(weight_of(model[0]))
    assert again is Y
    assert not np.array_equal(u, before)


def test_after_an_update(model):
    scope = scopes.Scope([model], Hook)
    optimizer = chainer.optimizers.SGD(0.1).setup(model)
    Ys = [scope.normalize(weight_of(link))[0] for link in model]
    model.cleargrads()
    chainer.functions.sum(Ys[0]).backward()
    optimizer.update()
    assert scope.normalize(weight_of(model[0]))[0] is not Ys[0]


def test_after_an_array_is_replaced(model):
    scope = scopes.Scope([model], Hook)
    Y, *_ = scope.normalize(weight_of(model[0]))
    model[0].W.array = model[0].W.array.copy()
    assert scope.normalize(weight_of(model[0]))[0] is not Y


def test_hooks_of_another_kind(model):
    class Other(Hook):
        pass

    scope = scopes.Scope([model], Other)
    scope.normalize(weight_of(model[0]))
    assert model[1].W_u is None


def test_of_a_call(model):
    scope = scopes.ScopeOfCall(model, Hook)
    scope.start()
    assert scopes.covering(model[0]) is scope
    assert 'forward' in vars(model)
    scope.restore_unless_called()
    assert scopes.covering(model[0]) is None
    assert 'forward' not in vars(model)


@pytest.mark.cuda
def test_on_a_device_that_is_not_current(model):
    runtime = chainer.backends.cuda.cupy.cuda.runtime
    if runtime.getDeviceCount() < 2:
        pytest.skip('one device')
    model.to_device('@cupy:1')
    scope = scopes.Scope([model], Hook)
    with chainer.using_device('@cupy:0'):
        for link in model:
            Y, iterations, _ = scope.normalize(weight_of(link))
            assert runtime.getDevice() == 0
            assert {x.device.id for x in (
                Y.array, iterations.u, link.W_u)} == {1}
