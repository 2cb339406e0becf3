"""The vector of a weight: made where there is none, and moved to it."""
import chainer.links as L
import numpy as np
import pytest
from chainer.backends import cuda

from sn_function import errors
from sn_function._links import vector
from tests import reference
from tests.links.hooks import Hook

LINKS = {
    'linear': lambda: L.Linear(5, 6),
    'deconvolution': lambda: L.Deconvolution2D(3, 4, 2)}


@pytest.fixture(params=LINKS)
def link(request):
    link = LINKS[request.param]()
    link.W_u = None
    return link


def axis_of(link):
    return int(isinstance(link, L.Deconvolution2D))


def test_a_new_one(link):
    W = link.W.array
    u = vector.find(link, Hook(n_warmup=0), W)
    assert link.W_u is u
    assert u.shape == (W.shape[axis_of(link)],)
    assert u.dtype == W.dtype


def test_a_new_one_is_warmed_up(link):
    W = link.W.array
    u = vector.find(link, Hook(n_warmup=500), W)
    A = reference.as_matrix(W.astype('d'), axis_of(link))
    expected = np.linalg.svd(A)[0][:, 0]
    assert abs(expected @ u) == pytest.approx(1, abs=1e-5)


def test_one_that_is_there(link):
    W = link.W.array
    u = link.W_u = np.ones(W.shape[axis_of(link)], 'f')
    assert vector.find(link, Hook(n_warmup=10), W) is u
    np.testing.assert_array_equal(u, 1)


def test_one_of_another_dtype(link):
    W = link.W.array.astype('d')
    link.W_u = np.ones(W.shape[axis_of(link)], 'f')
    u = vector.find(link, Hook(n_warmup=10), W)
    assert link.W_u is u
    assert u.dtype == 'd'
    np.testing.assert_array_equal(u, 1)


@pytest.mark.gpu
def test_one_on_another_device(link):
    """Such as that of a snapshot that was loaded before the move."""
    link.to_device('@cupy:0')
    W = link.W.array
    link.W_u = np.ones(W.shape[axis_of(link)], 'f')
    u = vector.find(link, Hook(n_warmup=10), W)
    assert link.W_u is u
    assert isinstance(u, cuda.ndarray)
    np.testing.assert_array_equal(cuda.to_cpu(u), 1)


def test_warm_up(link):
    W, axis = link.W.array, axis_of(link)
    u = np.random.normal(size=W.shape[axis]).astype('f')
    expected, _, _ = reference.power_iteration(
        W.astype('d'), u.astype('d'), 3, axis)
    vector.warm_up(link, Hook(n_warmup=3), W, u)
    np.testing.assert_allclose(u, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('value', [0, np.nan])
def test_warm_up_of_a_bad_vector(link, value):
    W = link.W.array
    u = np.full(W.shape[axis_of(link)], value, 'f')
    with pytest.raises(errors.VectorValueError):
        vector.warm_up(link, Hook(n_warmup=1), W, u)
    vector.warm_up(link, Hook(), W, u)


def test_an_empty_weight():
    link = L.Linear(5, 0)
    link.W_u = None
    with pytest.raises(errors.WeightShapeError):
        vector.find(link, Hook(), link.W.array)
    assert link.W_u is None


# Several

def several(make=lambda: L.Linear(7, 6), n=3, **settings):
    hook = Hook(n_vectors=n, **settings)
    link = make().add_hook(hook)
    return link, hook


def drawn(*shape):
    return np.random.normal(size=shape).astype('f')


class TestSeveral:

    @pytest.mark.parametrize(('make', 'n', 'expected'), [
        (lambda: L.Linear(7, 6), 4, 4),
        (lambda: L.Linear(7, 6), 20, 6),
        (lambda: L.Linear(3, 6), 20, 3),
        (lambda: L.Linear(7, 1), 20, 1),
        (lambda: L.Deconvolution2D(3, 4, 2), 20, 4),
        (lambda: L.Deconvolution2D(3, 40, 2), 20, 12),
        (lambda: L.Convolution2D(4, 6, 3, groups=2), 20, 6)])
    def test_how_many(self, make, n, expected):
        link, hook = several(make, n)
        W = link.W.array
        m = W.shape[axis_of(link)]
        assert vector.count(link, hook, W.shape) == expected
        u = vector.find(link, hook, W)
        assert u.shape == ((expected, m) if expected > 1 else (m,))
        assert u.dtype == W.dtype
        assert link.W_u.shape == (m,)
        assert link.W_us.shape == (expected - 1, m)

    def test_those_of_each_group(self):
        link, hook = several(
            lambda: L.Convolution2D(4, 6, 3, groups=2), groups='each')
        assert vector.find(link, hook, link.W.array).shape == (3, 6)
        assert link.W_us.shape == (2, 6)

    def test_what_is_written_is_what_the_link_has(self):
        link, hook = several()
        u = vector.find(link, hook, link.W.array)
        u[...] = drawn(3, 6)
        np.testing.assert_array_equal(link.W_u, u[0])
        np.testing.assert_array_equal(link.W_us, u[1:])
        parts = link.W_u, link.W_us
        assert vector.find(link, hook, link.W.array) is u
        assert link.W_u is parts[0]
        assert link.W_us is parts[1]

    def test_new_ones_are_warmed_up(self):
        link, hook = several(n_warmup=300)
        u = vector.find(link, hook, link.W.array)
        expected = np.linalg.svd(link.W.array.astype('d'))[0][:, :3]
        np.testing.assert_allclose(
            np.linalg.svd(u @ expected)[1] / np.linalg.svd(u)[1], 1,
            atol=1e-3)

    def change_u(link):
        link.W_u = drawn(6)

    def change_us(link):
        link.W_us = drawn(2, 6)

    def change_dtype(link):
        link.W_us = link.W_us.astype('d')

    def take_a_row_of_the_others(link):
        link.W_u = link.W_us[0]

    def change_places(link):
        both = np.array([*link.W_us, link.W_u])
        link.W_u, link.W_us = both[2], both[:2]

    def repeat(link):
        both = drawn(3, 6)
        link.W_u, link.W_us = both[0], np.broadcast_to(both[1], (2, 6))

    def transpose(link):
        both = np.asfortranarray(drawn(3, 6))
        link.W_u, link.W_us = both[0], both[1:]

    @pytest.mark.parametrize('change', [
        change_u, change_us, change_dtype, take_a_row_of_the_others,
        change_places, repeat, transpose])
    def test_one_that_is_replaced(self, change):
        link, hook = several()
        vector.find(link, hook, link.W.array)
        change(link)
        expected = np.array([link.W_u, *link.W_us], 'f')
        u = vector.find(link, hook, link.W.array)
        assert u.dtype == link.W_us.dtype == 'f'
        np.testing.assert_array_equal(u, expected)
        u[...] = drawn(3, 6)
        np.testing.assert_array_equal([link.W_u, *link.W_us], u)
        assert vector.find(link, hook, link.W.array) is u

    def test_a_column(self):
        link, hook = several(n=6)
        both = drawn(6, 6)
        link.W_u, link.W_us = both[:, 0], both[1:]
        expected = [*both[:, :1].T, *both[1:]]
        np.testing.assert_array_equal(
            vector.find(link, hook, link.W.array), expected)

    def test_too_few(self):
        link, hook = several(n=5)
        link.W_u, link.W_us = drawn(6), drawn(2, 6)
        expected = [link.W_u, *link.W_us]
        u = vector.find(link, hook, link.W.array)
        np.testing.assert_array_equal(u[:3], expected)
        assert np.linalg.matrix_rank(u) == 5

    def test_too_many(self):
        link, hook = several(n=3)
        link.W_u, link.W_us = drawn(6), drawn(4, 6)
        expected = [link.W_u, *link.W_us[:2]]
        np.testing.assert_array_equal(
            vector.find(link, hook, link.W.array), expected)
        assert link.W_us.shape == (2, 6)

    def test_all_where_the_leading_one_is_taken_away(self):
        link, hook = several()
        before = vector.find(link, hook, link.W.array).copy()
        link.W_u = None
        after = vector.find(link, hook, link.W.array)
        assert (before != after).all()

    def test_a_hook_that_gets_more(self):
        link, hook = several(n=1)
        u = vector.find(link, hook, link.W.array).copy()
        assert not hasattr(link, 'W_us')
        hook.n_vectors = 3
        np.testing.assert_array_equal(
            vector.find(link, hook, link.W.array)[0], u)
        assert {'W_u', 'W_us'} <= link._persistent

    def test_at_hand(self):
        link, hook = several(n=4)
        W = link.W.array
        assert vector.at_hand(link, hook, W) is None
        link.W_u = drawn(6)
        np.testing.assert_array_equal(
            vector.at_hand(link, hook, W), link.W_u[None])
        link.W_us = drawn(2, 7)
        assert len(vector.at_hand(link, hook, W)) == 1
        link.W_us = drawn(2, 6).astype('d')
        before = link.W_us
        np.testing.assert_array_equal(
            vector.at_hand(link, hook, W), [link.W_u, *link.W_us])
        assert link.W_us is before
        hook.n_vectors = 1
        assert vector.at_hand(link, hook, W) is link.W_u

    def test_store(self):
        link, hook = several()
        arrays = vector.find(link, hook, link.W.array), link.W_u, link.W_us
        new = drawn(3, 6)
        vector.store(link, hook, new)
        np.testing.assert_array_equal(arrays[0], new)
        assert (link.W_u, link.W_us) == arrays[1:]
        link.W_us = None
        vector.store(link, hook, new + 1)
        np.testing.assert_array_equal(
            vector.find(link, hook, link.W.array), new + 1)

    @pytest.mark.parametrize(('change', 'expected'), [
        (lambda u: None, []), (lambda u: u.fill(0), ['W_u', 'W_us']),
        (lambda u: u[0].fill(0), ['W_u']), (lambda u: u[2].fill(0), ['W_us']),
        (lambda u: u[1, :1].fill(np.inf), ['W_us'])])
    def test_unsound_names(self, change, expected):
        link, hook = several()
        change(vector.find(link, hook, link.W.array))
        assert vector.unsound_names(hook, link) == expected
        link.W_u = None
        assert vector.unsound_names(hook, link) == [
            name for name in expected if name != 'W_u']

    @pytest.mark.gpu
    def test_on_a_device(self):
        link, hook = several()
        before = vector.find(link, hook, link.W.array).copy()
        link.to_device('@cupy:0')
        u = vector.find(link, hook, link.W.array)
        assert isinstance(u, cuda.ndarray)
        np.testing.assert_array_equal(cuda.to_cpu(u), before)
        u *= 2
        np.testing.assert_array_equal(cuda.to_cpu(link.W_u), 2 * before[0])
        np.testing.assert_array_equal(cuda.to_cpu(link.W_us), 2 * before[1:])
        again = vector.find(link, hook, link.W.array)
        assert again.data.ptr == u.data.ptr
        link.to_device('@numpy')
        np.testing.assert_array_equal(
            vector.find(link, hook, link.W.array), 2 * before)
