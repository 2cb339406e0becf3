"""What Chainer's own tests of its hook ask for, asked of both hooks.

That file is ``tests/chainer_tests/link_hooks_tests/
test_spectral_normalization.py`` of Chainer's repository.  Chainer's hook
takes part to show that the same is asked here.
"""
import copy
import functools

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks, serializers
from chainer.backends import cuda

import sn_function
from tests.test_link_hooks import save
from tests.test_parity import LINKS, inputs_of

OURS, THEIRS = (
    sn_function.SpectralNormalization, link_hooks.SpectralNormalization)
# Those of LINKS that Chainer's tests have.
NAMES = ['EmbedID', 'Linear', 'Convolution1D', 'Deconvolution1D',
         'Convolution2D', 'Deconvolution2D', 'Convolution3D',
         'Deconvolution3D']


class Case:
    """A link, a hook that it does not have yet, and an input."""

    def __init__(self, hook, device, name, lazy, use_gamma):
        make_link, shape = LINKS[name]
        self.device = chainer.get_device(device)
        self.lazy = lazy
        self.link = make_link(None if lazy else 3)
        if hook is OURS:
            # After the warm-up there might be nothing left to move on.
            hook = functools.partial(hook, n_warmup=0)
        self.hook = hook(use_gamma=use_gamma)
        x, = inputs_of(shape, np.random.RandomState(0))
        self.x = self.device.send(x)

    def add_hook(self):
        self.link.add_hook(self.hook)
        self.link.to_device(self.device)
        if self.lazy:
            self(train=False)
        return self

    def __call__(self, train=True, in_recomputing=False):
        with chainer.using_config('train', train), \
                chainer.using_config('in_recomputing', in_recomputing):
            return cuda.to_cpu(self.link(self.x).array)

    def has(self, name):
        # On a lazy link ours registers what it will need, still empty, so
        # that a snapshot can be loaded (chainer#8453).
        value = getattr(self.link, name, None)
        return value is not None and getattr(value, 'array', value) is not None

    @property
    def vectors(self):
        """Copies of u and v."""
        return [np.array(cuda.to_cpu(a)) for a in (
            getattr(self.link, self.hook.vector_name), self.hook.v)]


@pytest.fixture(params=[
    pytest.param((OURS, '@numpy'), id='ours'),
    pytest.param((OURS, '@cupy:0'), id='ours-device', marks=pytest.mark.gpu),
    pytest.param((THEIRS, '@numpy'), id='theirs')])
def hook_and_device(request, _cuda_on_host):
    return request.param


@pytest.fixture(params=[True, False], ids=['gamma', 'no gamma'])
def use_gamma(request):
    return request.param


@pytest.fixture(params=NAMES)
def case(request, hook_and_device, use_gamma):
    return Case(*hook_and_device, request.param, False, use_gamma)


@pytest.fixture(params=[name for name in NAMES if name != 'EmbedID'])
def lazy_case(request, hook_and_device, use_gamma):
    return Case(*hook_and_device, request.param, True, use_gamma)


@pytest.mark.parametrize('hook', [OURS, THEIRS])
class TestExceptions:

    def test_wrong_weight_name(self, hook):
        with pytest.raises(ValueError, match='w'):
            L.Linear(5, 20).add_hook(hook(weight_name='w'))

    def test_with_statement(self, hook):
        with pytest.raises(NotImplementedError), hook():
            pass

    def test_empty_weight(self, hook):
        with pytest.raises(ValueError, match=r'shape|empty'):
            L.Linear(10, 0).add_hook(hook())


def check_attributes(case):
    n_out = case.link.W.shape[case.hook.axis]
    assert getattr(case.link, case.hook.vector_name).shape == (n_out,)
    assert case.has('gamma') == case.hook.use_gamma
    if case.hook.use_gamma:
        assert case.link.gamma.shape == ()


def test_add_hook(case):
    check_attributes(case.add_hook())


def test_add_hook_to_a_lazy_link(lazy_case):
    case = lazy_case
    case.link.add_hook(case.hook)
    assert not case.has(case.hook.vector_name)
    assert not case.has('gamma')
    case.link.to_device(case.device)
    case(train=False)
    check_attributes(case)


def test_weight_is_the_parameter_again(case):
    case.add_hook()
    weight = case.link.W
    case()
    assert case.link.W is weight
    assert isinstance(weight, chainer.Parameter)


def test_in_recomputing(case):
    case.add_hook()
    y = case()
    u, v = case.vectors
    y_again = case(in_recomputing=True)
    np.testing.assert_array_equal(case.vectors[0], u)
    np.testing.assert_array_equal(case.vectors[1], v)
    np.testing.assert_allclose(y_again, y, rtol=1e-5, atol=1e-6)


def check_deleted(case):
    case.add_hook()
    y, y_test = case(), case(train=False)
    case.link.delete_hook(case.hook.name)
    assert not case.has(case.hook.vector_name)
    y_plain = case()
    assert not np.array_equal(y, y_plain)
    assert not np.array_equal(y_test, y_plain)


def test_deleted(case):
    check_deleted(case)


def test_deleted_from_a_lazy_link(lazy_case):
    check_deleted(lazy_case)


def test_u_updated_in_train(case):
    case.add_hook()
    y, (u, _) = case(), case.vectors
    y_next, (u_next, _) = case(), case.vectors
    assert not np.array_equal(u, u_next)
    assert not np.array_equal(y, y_next)


def test_u_not_updated_in_test(case):
    case.add_hook()
    y, (u, v) = case(train=False), case.vectors
    y_next, (u_next, v_next) = case(train=False), case.vectors
    np.testing.assert_array_equal(u_next, u)
    np.testing.assert_array_equal(v_next, v)
    np.testing.assert_array_equal(y_next, y)


def test_serialization(case):
    # A link that was copied, with a hook that was, saved on its device and
    # loaded on the host.
    other = copy.copy(case)
    other.link = case.link.copy('copy')
    other.hook = copy.deepcopy(case.hook)
    other.link.add_hook(other.hook)
    case.add_hook()
    case()
    y = case(train=False)
    serializers.load_npz(save(case.link), other.link)
    np.testing.assert_array_equal(
        other.link.W.array, cuda.to_cpu(case.link.W.array))
    np.testing.assert_array_equal(
        getattr(other.link, case.hook.vector_name), case.vectors[0])
    other.x = cuda.to_cpu(case.x)
    np.testing.assert_allclose(other(train=False), y, rtol=1e-4, atol=1e-5)
