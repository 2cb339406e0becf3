"""Small weights done together give what each gives by itself."""
import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import numpy as np
import pytest
from chainer import gradient_check

from sn_function import errors
from sn_function import functions as F
from sn_function._arithmetic import host, stacks
from sn_function._arithmetic.interface import Backward, Forward, Settings

N = 6


@pytest.fixture
def together(monkeypatch):
    """How many weights are done together, at each call that succeeds."""
    found = {'normalize': [], 'gradients': []}

    def watch(name):
        original = getattr(stacks, name)

        def watching(calls):
            results = original(calls)
            found[name].append(len(calls))
            return results

        monkeypatch.setattr(stacks, name, watching)

    for name in found:
        watch(name)
    return found


def random(*shape, dtype='f'):
    return np.asarray(np.random.normal(size=shape), dtype)


def run(at_once, Ws, us, gYs=None, gsigmas=None, gammas=None, axis=0,
        **settings):
    """Outputs, vectors and gradients, as a flat list of arrays."""
    Ws = [chainer.Parameter(W) for W in Ws]
    us = [u.copy() for u in us]
    gammas = [None] * len(Ws) if gammas is None else [
        chainer.Parameter(gamma) if isinstance(gamma, np.ndarray) else gamma
        for gamma in gammas]
    settings = dict(settings, axis=axis, return_sigma=True, update_u=True)
    if at_once:
        Ys, sigmas = F.spectral_normalize_all(
            Ws, us, gammas=gammas, **settings)
    else:
        Ys, sigmas = zip(*[
            F.spectral_normalize(W, u, gamma=gamma, **settings)
            for W, u, gamma in zip(Ws, us, gammas)])
    outputs = []
    for xs, gs in ((Ys, gYs), (sigmas, gsigmas)):
        for x, g in zip(xs, gs or ()):
            if g is not None:
                x.grad = g
                outputs.append(x)
    chainer.backward(outputs)
    grads = [x.grad for x in (*Ws, *gammas) if isinstance(x, chainer.Variable)]
    return [*us, *(x.array for x in (*Ys, *sigmas)), *grads]


def assert_equal(found, expected, ulps=0):
    """Up to a rounding of the largest entry."""
    assert len(found) == len(expected)
    for x, y in zip(found, expected):
        assert (x is None) == (y is None)
        if x is not None:
            assert type(x) is type(y)
            assert x.dtype == y.dtype
            largest = np.abs(y[np.isfinite(y)]).max(initial=0)
            np.testing.assert_allclose(
                x, y, rtol=0, atol=ulps * np.finfo(y.dtype).eps * largest)


def compare(*args, ulps=16, **kwargs):
    """BLAS may round the last digit of a matrix in a stack another way."""
    assert_equal(
        run(True, *args, **kwargs), run(False, *args, **kwargs), ulps)


def example(shape, dtype='f'):
    Ws = [random(*shape, dtype=dtype) for _ in range(N)]
    us = [random(shape[0], dtype=dtype) for _ in range(N)]
    gYs = [random(*shape, dtype=dtype) for _ in range(N)]
    return Ws, us, gYs


@pytest.mark.parametrize('detach_uv', [False, True])
@pytest.mark.parametrize('K', [1, 2, 5])
@pytest.mark.parametrize(('shape', 'dtype'), [
    ((4, 4), 'f'), ((16, 16, 3, 3), 'f'), ((3, 5), 'd'), ((5, 3, 2), 'f'),
    ((1, 7), 'f'), ((7, 1), 'd'), ((1, 1), 'f'), ((1024, 4), 'f'),
    ((4, 1024), 'f'), ((2, 3, 1, 2), 'd')])
def test_as_each_by_itself(shape, dtype, K, detach_uv, together):
    Ws, us, gYs = example(shape, dtype)
    gsigmas = [random(dtype=dtype) for _ in range(N)]
    for upstream in (dict(gYs=gYs), dict(gsigmas=gsigmas),
                     dict(gYs=gYs, gsigmas=gsigmas)):
        compare(Ws, us, n_power_iteration=K, detach_uv=detach_uv, factor=1.7,
                **upstream)
    assert together == {'normalize': [N] * 3, 'gradients': [N] * 3}


@pytest.mark.parametrize('detach_uv', [False, True])
def test_gammas(detach_uv, together):
    Ws, us, gYs = example((4, 3))
    for gammas in ([0.5, 2, None, 0, -1, 3e8],
                   [np.array(x, 'f') for x in range(N)],
                   [np.array(x, 'd') for x in range(N)]):
        compare(Ws, us, gYs, gammas=gammas, detach_uv=detach_uv)
    assert together['gradients'] == [N] * 3
    # Some are parameters: these want another gradient.
    compare(Ws, us, gYs, gammas=[*gammas[:3], 1, 2, 3], detach_uv=detach_uv)
    assert together == {'normalize': [N] * 4, 'gradients': [N] * 3}


@pytest.mark.parametrize('settings', [
    {'cap': 1.0}, {'eps': 2.0}, {'eps': 0}, {'eps': 1e9}])
@pytest.mark.parametrize('detach_uv', [False, True])
def test_floors(settings, detach_uv, together):
    """Some sigmas are above, some below."""
    Ws, us, gYs = example((4, 3))
    Ws = [W * 3 ** (i - 3) for i, W in enumerate(Ws)]
    gYs[0][0] = -0.0
    compare(Ws, us, gYs, [random() for _ in range(N)],
            detach_uv=detach_uv, **settings)
    compare(Ws, us, gYs, detach_uv=detach_uv, **settings)
    assert together == {'normalize': [N] * 2, 'gradients': [N] * 2}


@pytest.mark.parametrize('bad', [
    0, np.nan, np.inf, 1e-30, 1e30, 'u is orthogonal', 'u is large'])
def test_what_is_not_ordinary_is_done_one_by_one(bad, together):
    Ws, us, gYs = example((4, 3))
    if bad == 'u is orthogonal':
        Ws[2][0] = 0
        us[2][...] = [1, 0, 0, 0]
    elif bad == 'u is large':
        us[2] *= np.float32(1e30)
    else:
        Ws[2][...] *= np.float32(bad)
    with np.errstate(all='raise'):
        found, expected = (run(at_once, Ws, us, gYs)
                           for at_once in (True, False))
    for x, y in zip(found, expected):
        np.testing.assert_array_equal(x, y)
    assert together == {'normalize': [], 'gradients': []}


def test_a_bad_u_changes_nothing():
    Ws, us, _ = example((4, 3))
    us[4][...] = 0
    before = [u.copy() for u in us]
    with pytest.raises(errors.VectorValueError):
        F.spectral_normalize_all(Ws, us, update_u=True)
    assert_equal(us, before)


@pytest.mark.parametrize('missing', [[0], [5], [1, 2, 3]])
def test_a_missing_gradient(missing, together):
    Ws, us, gYs = example((4, 3))
    for i in missing:
        gYs[i] = None
    compare(Ws, us, gYs)
    assert together == {'normalize': [N], 'gradients': []}


def test_different_kinds(monkeypatch, together):
    """Each kind by itself; few, large and other ones one by one."""
    monkeypatch.setattr(stacks, 'MAX_SIZE', 12)
    shapes = [(4, 3)] * 5 + [(3, 4)] * 4 + [(2, 2)] * 3 + [(13, 1)] * 5
    random_order = np.random.permutation(len(shapes))
    shapes = [shapes[i] for i in random_order]
    dtypes = ['d' if shape == (3, 4) else 'f' for shape in shapes]
    Ws = [random(*shape, dtype=x) for shape, x in zip(shapes, dtypes)]
    us = [random(shape[0], dtype=x) for shape, x in zip(shapes, dtypes)]
    gYs = [random(*shape, dtype=x) for shape, x in zip(shapes, dtypes)]
    compare(Ws, us, gYs)
    assert {name: sorted(n) for name, n in together.items()} == {
        'normalize': [4, 5], 'gradients': [4, 5]}


@pytest.mark.parametrize('dtype', ['e', '>f4'])
def test_other_dtypes_are_done_one_by_one(dtype, together):
    compare(*example((4, 3), dtype))
    assert together == {'normalize': [], 'gradients': []}


def test_another_axis_is_done_one_by_one(together):
    Ws, us, gYs = example((3, 3))
    compare(Ws, us, gYs, axis=1)
    assert together == {'normalize': [], 'gradients': []}


@pytest.mark.parametrize('length', [2, 4, 5])
def test_stacks_of_a_limited_size(length, monkeypatch, together):
    monkeypatch.setattr(stacks, 'MAX_STACK_SIZE', 12 * length + 11)
    compare(*example((4, 3)))
    assert together['normalize'] == [N]
    assert together['gradients'] == {
        2: [2, 2, 2], 4: [4, 2], 5: [5, 1]}[length]


@pytest.mark.parametrize('shape', [(4, 3), (16, 16), (64, 64)])
def test_views_and_strides(shape, together):
    """Of any layout; nothing that is given is written to, but u."""
    Ws, us, gYs = example(shape)
    us = [np.repeat(u, 2)[::2] for u in us]
    gYs = [np.asfortranarray(gY) for gY in gYs[:3]] + [
        np.repeat(gY, 2, axis=1)[:, ::2] for gY in gYs[3:]]
    before = [x.copy() for x in (*Ws, *gYs)]
    compare(Ws, us, gYs)
    assert together == {'normalize': [N], 'gradients': [N]}
    assert_equal([*Ws, *gYs], before)
    # BLAS takes them another way round.
    Ws[2] = np.asfortranarray(Ws[2])
    compare(Ws, us, gYs, n_power_iteration=2)
    assert together['gradients'] == [N, N - 1]


@pytest.mark.parametrize('n', [1, 2, N])
def test_without_outputs(n):
    Ws, us, _ = example((4, 3))
    settings = Settings(1, 0, False)
    results = host.normalize_all([
        Forward(settings, W, u, 1., (), update_u=True)
        for W, u in zip(Ws[:n], us)])
    for (outputs, iterations), u in zip(results, us):
        assert outputs == ()
        np.testing.assert_array_equal(u, iterations.u)


def test_a_gradient_in_another_dtype():
    Ws, us, gYs = example((4, 3))
    settings = Settings(1, 0, False)
    results = host.normalize_all([
        Forward(settings, W, u, 1., ('Y',)) for W, u in zip(Ws, us)])
    calls = [
        Backward(settings, iterations, ['W'], W, None, 1., gY.astype('d'))
        for W, gY, (_, iterations) in zip(Ws, gYs, results)]
    together = host.gradients_all(calls)
    apart = [host.gradients_all([call])[0] for call in calls]
    assert_equal([x for x, in together], [x for x, in apart], 16)


def test_gradients_of_any_order():
    Ws, us, _ = example((3, 2), 'd')

    def f(*inputs):
        Ys = F.spectral_normalize_all(inputs, us, 2)
        return tuple([Y * Y for Y in Ys])

    gYs, ggs = ([random(3, 2, dtype='d') for _ in range(N)] for _ in range(2))
    gradient_check.check_backward(f, tuple(Ws), tuple(gYs), dtype='d')
    gradient_check.check_double_backward(
        f, tuple(Ws), tuple(gYs), tuple(ggs), dtype='d')


def test_a_chain_does_its_links_together(together):
    model = chainer.Sequential(*[chainer.links.Linear(4, 4) for _ in range(N)])
    other = model.copy('copy')
    model.add_hook(sn_function.ChainSpectralNormalization(n_warmup=0))
    for link in other:
        link.add_hook(sn_function.SpectralNormalization(n_warmup=0))
    for link, twin in zip(model, other):
        twin.W_u[...] = link.W_u
    x = random(2, 4)
    for _ in range(3):
        found = []
        for x_of in (model, other):
            x_of.cleargrads()
            y = x_of(x)
            chainer.functions.sum(y * y).backward()
            found.append([y.array, *(link.W_u for link in x_of),
                          *(link.W.grad for link in x_of)])
        assert_equal(*found, ulps=64)
    assert together == {'normalize': [N] * 3, 'gradients': [N] * 3}
    for link in model:
        assert link.local_link_hooks['SpectralNormalization'].v.shape == (4,)
