"""One weight of one link, normalized by the settings of a hook."""
import warnings

import sn_function  # isort: skip  # before chainer, which it repairs

import chainer
import chainer.links as L
import numpy as np
import pytest

from sn_function import SpectralNormalization, errors
from sn_function._links import gamma, hooked_weight
from sn_function._links.hooked_weight import HookedWeight
from sn_function._links.state import LinkState
from tests import reference
from tests.links.hooks import Hook


def test_the_real_hook_has_these_settings():
    """As mypy cannot tell: its base class is Chainer's, which has no types."""
    settings = hooked_weight.Hook.__annotations__
    assert settings.keys() <= vars(SpectralNormalization()).keys()
    assert settings.keys() <= vars(Hook()).keys()


def hooked(link, **settings):
    hook = Hook(**settings)
    link.add_hook(hook)
    return HookedWeight(hook, link, link.W)


@pytest.mark.parametrize(('make', 'axis'), [
    (lambda: L.Linear(5, 6), 0), (lambda: L.Deconvolution2D(3, 4, 2), 1)])
@pytest.mark.parametrize('update_u', [False, True])
def test_normalize(make, axis, update_u):
    weight = hooked(make(), n_power_iteration=2, factor=3.)
    u, _ = weight.vector_and_gamma()
    before, W = u.astype('d'), weight.W.array.astype('d')
    Y, iteration = weight.normalize(update_u)
    expected, _ = reference.spectral_normalize(
        W, before, 2, factor=3., axis=axis)
    after, v, _ = reference.power_iteration(W, before, 2, axis)
    np.testing.assert_allclose(Y.array, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(iteration.v, v, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        u, after if update_u else before, rtol=1e-4, atol=1e-6)


def test_settings_count_from_the_next_time_on():
    weight = hooked(L.Linear(5, 6))
    Y, _ = weight.normalize(update_u=False)
    weight.hook.factor = 2.
    doubled, _ = weight.normalize(update_u=False)
    np.testing.assert_allclose(doubled.array, 2 * Y.array, rtol=1e-6)
    weight.hook.eps = -1
    with pytest.raises(errors.EpsError):
        weight.normalize(update_u=False)


def test_gamma():
    link = L.Linear(5, 6)
    hook = Hook(n_warmup=100)
    link.add_hook(hook)
    LinkState('W', 'gamma').put(link)
    gamma.register(link, 'gamma', link.W, 0)
    Y, _ = HookedWeight(hook, link, link.W).normalize(update_u=False)
    np.testing.assert_allclose(Y.array, link.W.array, rtol=1e-3)
    link.cleargrads()
    chainer.functions.sum(Y).backward()
    assert link.gamma.grad is not None


def test_a_second_run_starts_where_the_first_did():
    weight = hooked(L.Linear(5, 6))
    Y, iterations = weight.normalize(update_u=True)
    weight.state.keep(iterations, is_second_run=False)
    after = weight.link.W_u.copy()
    again, _ = weight.normalize(update_u=False, is_second_run=True)
    np.testing.assert_array_equal(again.array, Y.array)
    np.testing.assert_array_equal(weight.link.W_u, after)


def test_a_copy_whose_weight_is_initialized_again():
    weight = hooked(L.Linear(5, 6), n_warmup=500)
    weight.vector_and_gamma()
    link = weight.link.copy('init')
    copy = HookedWeight(weight.hook, link, link.W)
    copy.normalize(update_u=True)
    expected = np.linalg.svd(link.W.array.astype('d'))[0][:, 0]
    assert abs(expected @ link.W_u) == pytest.approx(1, abs=2e-2)


def test_a_link_without_the_hook():
    link = L.Linear(5, 6)
    with pytest.raises(errors.HookNotAddedError):
        HookedWeight(Hook(), link, link.W)


@pytest.mark.parametrize('n_vectors', [1, 3])
@pytest.mark.parametrize('is_train', [True, False])
def test_tolerance(is_train, n_vectors):
    link = L.Linear(30, 20)
    hook = Hook(rtol=1e-4, n_vectors=n_vectors)
    link.add_hook(hook)
    with chainer.using_config('train', is_train), warnings.catch_warnings():
        warnings.simplefilter('error')
        Y, _ = HookedWeight(hook, link, link.W).normalize(is_train)
    np.testing.assert_allclose(reference.true_norm(Y.array), 1, rtol=1e-5)


def test_a_tolerance_that_is_not_reached_is_named_once():
    link = L.Linear(30, 20)
    hook = Hook(rtol=1e-6, max_iterations=2)
    link.add_hook(hook)
    own = HookedWeight(hook, link, link.W)
    with pytest.warns(errors.ToleranceWarning, match=r'^Linear: .*1e-06'):
        own.normalize(True)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        own.normalize(True)


def test_a_tolerance_that_is_not_reached_may_be_an_error_in_a_scope():
    """Warnings are errors here; nothing has moved then."""
    link = L.Linear(30, 20)
    link.add_hook(SpectralNormalization(rtol=1e-6, max_iterations=2))
    before = link.W_u.copy()
    with sn_function.cached(link), pytest.raises(errors.ToleranceWarning):
        link(np.ones((1, 30), 'f'))
    assert (link.W_u == before).all()


def test_tolerance_of_a_new_vector():
    """It ends the iterations that a vector starts with, too."""
    link = L.Linear(30, 20)
    hook = Hook(rtol=1e-3, n_warmup=500)
    link.add_hook(hook)
    u, _ = HookedWeight(hook, link, link.W).vector_and_gamma()
    A = link.W.array.astype('d')
    v = A.T @ u / np.linalg.norm(A.T @ u)
    residual = np.linalg.norm(A @ v / (u @ A @ v) - u)
    assert 1e-5 < residual < 1e-3
