"""``spectral_normalize`` and ``spectral_norm`` against the oracle."""
import itertools
import math
import pickle

import chainer
import numpy as np
import pytest
from chainer import gradient_check, testing
from chainer.backends import cuda

from sn_function import SpectralNormalization, _checks, errors
from sn_function import functions as F
from sn_function._arithmetic import matrix, power_iteration
from tests import reference

# (shape, axis): matrices of every proportion, and the output axis in front,
# in the middle, at the end, and counted from the end.
WEIGHTS = [
    ((4, 3), 0), ((3, 7), 1), ((1, 5), 0), ((5, 1), 0), ((5, 1), 1),
    ((4, 3, 2, 2), 0), ((3, 4, 2, 2), 1), ((3, 2, 4), -1), ((2, 3, 2, 3), -2),
    ((2, 3, 2, 2, 2), 2),
]


def random(*shape):
    return np.random.normal(size=shape)


def grad(outputs, inputs, grad_outputs):
    return [g if g is None else g.array for g in chainer.grad(
        outputs, inputs, [chainer.as_variable(np.asarray(g))
                          for g in grad_outputs])]


@testing.parameterize(*testing.product_dict(
    [{'shape': s, 'axis': a} for s, a in WEIGHTS],
    [{'dtype': np.float16, 'forward': 3e-3, 'backward': 3e-2},
     {'dtype': np.float32, 'forward': 1e-5, 'backward': 1e-3},
     {'dtype': np.float64, 'forward': 1e-12, 'backward': 1e-5}],
    # gamma comes after the iterations: not each number with it and without.
    # More numbers are in test_exact_gradient_equals_complex_step.
    [{'n_power_iteration': 1, 'use_gamma': True},
     {'n_power_iteration': 3, 'use_gamma': False}],
))
@testing.inject_backend_tests(
    None, [{}, {'use_cuda': True, 'cuda_device': 0}])
class TestSpectralNormalizeExact(testing.FunctionTestCase):
    """The exact gradient is that of the forward, at an unconverged u."""

    dodge_nondifferentiable = True

    def setUp(self):
        self.check_forward_options = {
            'atol': self.forward, 'rtol': self.forward}
        self.check_backward_options = {
            'atol': self.backward, 'rtol': self.backward, 'eps': 1e-5}
        self.check_double_backward_options = {
            'atol': self.backward, 'rtol': self.backward, 'eps': 1e-5}
        self.forward = self.run_function
        self.u = random(self.shape[self.axis])

    def generate_inputs(self):
        W = random(*self.shape).astype(self.dtype)
        if not self.use_gamma:
            return W,
        return W, np.array(1.7, dtype=self.dtype)

    def run_function(self, inputs, device):
        W, *gamma = inputs
        # u is in the dtype that a float64 numerical check runs in, too.
        u = device.send(self.u.astype(W.dtype))
        Y, sigma = F.spectral_normalize(
            W, u, self.n_power_iteration, gamma[0] if gamma else None,
            factor=1.3, axis=self.axis, return_sigma=True)
        return Y, chainer.functions.cast(sigma, W.dtype)

    def forward_expected(self, inputs):
        W, *gamma = inputs
        u = self.u.astype(W.dtype).astype(np.float64)
        Y, sigma = reference.spectral_normalize(
            W, u, self.n_power_iteration, float(gamma[0]) if gamma else 1.0,
            1.3, axis=self.axis)
        return Y.astype(self.dtype), np.asarray(sigma).astype(self.dtype)


@pytest.mark.parametrize('n_power_iteration', [1, 2, 3, 5])
@pytest.mark.parametrize(('shape', 'axis'), WEIGHTS)
def test_exact_gradient_equals_complex_step(shape, axis, n_power_iteration):
    W, u, gamma = random(*shape), random(shape[axis]), np.array(0.7)
    gY, gsigma = random(*shape), 0.3
    variables = [chainer.Variable(x) for x in (W, u, gamma)]
    outputs = F.spectral_normalize(
        variables[0], variables[1], n_power_iteration, variables[2], 1.3,
        axis=axis, return_sigma=True)
    actual = grad(outputs, variables, (gY, gsigma))

    def scalar(W, u, gamma):
        Y, sigma = reference.spectral_normalize(
            W, u, n_power_iteration, gamma, 1.3, axis=axis)
        return np.sum(Y * gY) + gsigma * sigma

    for g, expected in zip(actual, (
            reference.complex_step(lambda z: scalar(z, u, gamma), W),
            reference.complex_step(lambda z: scalar(W, z, gamma), u),
            reference.complex_step(lambda z: scalar(W, u, z), gamma))):
        np.testing.assert_allclose(g, expected, rtol=1e-9, atol=1e-9)


class TestCap:
    """W / max(1, sigma / c)"""

    CAP = 1.0

    def make(self, is_above, shape=(4, 3, 2), axis=1):
        W, u = random(*shape), random(shape[axis])
        sigma = reference.power_iteration(W, u, axis=axis)[2]
        return W * ((2.0 if is_above else 0.6) * self.CAP / sigma), u

    def expected(self, W, u, gamma, axis, uv=None):
        _, sigma = reference.spectral_normalize(W, u, axis=axis, uv=uv)
        ratio = sigma / self.CAP
        return gamma * W / (ratio if ratio.real > 1 else 1)

    @pytest.mark.parametrize('is_above', [True, False])
    @pytest.mark.parametrize('detach_uv', [True, False])
    @pytest.mark.parametrize(('shape', 'axis'), WEIGHTS)
    def test_gradient_equals_complex_step(
            self, shape, axis, detach_uv, is_above):
        W, u = self.make(is_above, shape, axis)
        gamma, gY = np.array(0.7), random(*shape)
        variables = [chainer.Variable(x) for x in (W, gamma)]
        Y = F.spectral_normalize(
            variables[0], u, gamma=variables[1], axis=axis, cap=self.CAP,
            detach_uv=detach_uv)
        uv = (reference.power_iteration(W, u, axis=axis)[:2]
              if detach_uv else None)
        np.testing.assert_allclose(
            Y.array, self.expected(W, u, gamma, axis, uv), rtol=1e-12)

        def scalar(W, gamma):
            return np.sum(self.expected(W, u, gamma, axis, uv) * gY)

        for actual, expected in zip(grad([Y], variables, [gY]), (
                reference.complex_step(lambda z: scalar(z, gamma), W),
                reference.complex_step(lambda z: scalar(W, z), gamma))):
            np.testing.assert_allclose(
                actual, expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(('dtype', 'cap'), [
        *itertools.product('efd', [2, 0.1]),
        *itertools.product('fd', [1e-30, 3e30]), ('d', 1e-200)])
    def test_below_it_nothing_is_changed(self, dtype, cap):
        W = random(5, 4)
        W = np.asarray(W * (cap / 2 / np.linalg.norm(W)), dtype)
        variable, u, gY = chainer.Variable(W), random(5).astype(dtype), W + 1
        Y, sigma = F.spectral_normalize(
            variable, u, 5, cap=cap, update_u=True, return_sigma=True)
        assert sigma.array < cap
        assert Y.array.tobytes() == W.tobytes()
        Y.grad = gY
        Y.backward()
        assert variable.grad.tobytes() == gY.tobytes()
        # The estimate goes on to converge, for the time when it is above.
        np.testing.assert_allclose(
            abs(u @ np.linalg.svd(W.astype('d'))[0][:, 0]), 1, rtol=0.1)

    # Above the cap that of constant u and v is not this function's.
    @pytest.mark.parametrize(('is_above', 'detach_uv'), [
        (True, False), (False, False), (False, True)])
    def test_higher_orders(self, is_above, detach_uv):
        W, u = self.make(is_above)
        gradient_check.check_double_backward(
            lambda W: F.spectral_normalize(
                W, u, axis=1, cap=self.CAP, detach_uv=detach_uv) ** 2,
            (W,), (random(*W.shape),), (random(*W.shape),),
            **check_options())

    def test_at_the_cap_both_sides_agree(self):
        W, u = self.make(True)
        W /= 2 / (1 + 1e-13)
        for Y in (F.spectral_normalize(W * s, u, axis=1, cap=self.CAP).array
                  for s in (1, 1 - 1e-12)):
            np.testing.assert_allclose(Y, W, rtol=1e-11)

    def test_all_of_them(self):
        Ws, us = zip(*(self.make(k) for k in (True, False)))
        Ys = F.spectral_normalize_all(Ws, us, axis=1, cap=self.CAP)
        for Y, W, u in zip(Ys, Ws, us):
            np.testing.assert_allclose(
                Y.array, self.expected(W, u, 1.0, 1), rtol=1e-12)

    @pytest.mark.parametrize('cap', [0, -1, np.nan, np.inf, '1', True, [1]])
    def test_not_a_cap(self, cap):
        with pytest.raises(errors.CapError, match='above 0'):
            F.spectral_normalize(*self.make(True), axis=1, cap=cap)

    def test_not_with_a_factor(self):
        with pytest.raises(errors.CapConflictError, match='factor=2'):
            F.spectral_normalize(*self.make(True), axis=1, cap=1, factor=2)


@pytest.mark.parametrize('n_power_iteration', [1, 2, 3])
@pytest.mark.parametrize(('shape', 'axis'), WEIGHTS)
def test_detached_gradient_equals_its_definition(
        shape, axis, n_power_iteration):
    W, u, gamma = random(*shape), random(shape[axis]), np.array(0.7)
    gY, gsigma = random(*shape), 0.3
    variables = [chainer.Variable(x) for x in (W, u, gamma)]
    outputs = F.spectral_normalize(
        variables[0], variables[1], n_power_iteration, variables[2], 1.3,
        axis=axis, detach_uv=True, return_sigma=True)
    gW, gu, ggamma = grad(outputs, variables, (gY, gsigma))
    uv = reference.power_iteration(W, u, n_power_iteration, axis)[:2]

    def scalar(W, gamma):
        Y, sigma = reference.spectral_normalize(
            W, u, n_power_iteration, gamma, 1.3, axis=axis, uv=uv)
        return np.sum(Y * gY) + gsigma * sigma

    assert gu is None
    np.testing.assert_allclose(
        gW, reference.complex_step(lambda z: scalar(z, gamma), W),
        rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        ggamma, reference.complex_step(lambda z: scalar(W, z), gamma),
        rtol=1e-9)


def check_options(**options):
    return dict({'dtype': np.float64, 'eps': 1e-5, 'atol': 1e-5,
                 'rtol': 1e-5}, **options)


def composed(W, gamma, u, n_power_iteration=1, axis=0, uv=None):
    """Y out of Chainer's functions; with ``uv`` given, those are constants."""
    def unit(x):
        norm = chainer.functions.sqrt(chainer.functions.sum(x ** 2))
        return x / chainer.functions.broadcast_to(norm, x.shape)

    matmul = chainer.functions.matmul
    A = chainer.functions.moveaxis(W, axis, 0).reshape(W.shape[axis], -1)
    v = None
    if uv is None:
        for _ in range(n_power_iteration):
            v = unit(matmul(A, u, transa=True))
            u = unit(matmul(A, v))
    else:
        u, v = uv
    sigma = chainer.functions.sum(u * matmul(A, v))
    return gamma * W / chainer.functions.broadcast_to(sigma, W.shape)


@pytest.mark.parametrize('n_power_iteration', [
    1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(('shape', 'axis'), WEIGHTS[::2])
def test_double_backward_exact(shape, axis, n_power_iteration):
    inputs = random(*shape), random(shape[axis]), np.array(0.7)

    def f(W, u, gamma):
        return F.spectral_normalize(
            W, u, n_power_iteration, gamma, axis=axis, return_sigma=True)

    gradient_check.check_double_backward(
        f, inputs, (random(*shape), np.array(0.3)),
        (random(*shape), random(shape[axis]), np.array(0.4)),
        **check_options())


@pytest.mark.parametrize('n_power_iteration', [1, 3])
@pytest.mark.parametrize(('shape', 'axis'), WEIGHTS[::2])
def test_double_backward_detached(shape, axis, n_power_iteration):
    W0, u = random(*shape), random(shape[axis])
    uv = reference.power_iteration(W0, u, n_power_iteration, axis)[:2]
    gY, ggW, ggamma2 = random(*shape), random(*shape), np.array(0.4)
    results = []
    for f in (lambda W, gamma: composed(W, gamma, u, axis=axis, uv=uv),
              lambda W, gamma: F.spectral_normalize(
                  W, u, n_power_iteration, gamma, axis=axis, detach_uv=True)):
        W, gamma = chainer.Variable(W0), chainer.Variable(np.array(0.7))
        gy = chainer.Variable(gY)
        first = chainer.grad(
            [f(W, gamma)], [W, gamma], [gy], enable_double_backprop=True)
        results.append(grad(first, [W, gamma, gy], (ggW, ggamma2)))
    for expected, actual in zip(*results):
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('detach_uv', [False, True])
def test_third_order(detach_uv):
    shape = (4, 3)
    W0, u = random(*shape), random(4)
    uv = reference.power_iteration(W0, u)[:2] if detach_uv else None
    directions = [random(*shape) for _ in range(3)]
    results = []
    for f in (lambda W, gamma: composed(W, gamma, u, uv=uv),
              lambda W, gamma: F.spectral_normalize(
                  W, u, 1, gamma, detach_uv=detach_uv)):
        W, gamma = chainer.Variable(W0), chainer.Variable(np.array(0.7))
        y = f(W, gamma)
        for d in directions:
            y, = chainer.grad([y], [W], [chainer.Variable(d)],
                              enable_double_backprop=True)
        results.append(y.array)
    np.testing.assert_allclose(results[1], results[0], rtol=1e-8, atol=1e-8)


def test_double_backward_when_gy_depends_on_W():
    """Each path is counted once."""
    shape = (4, 3)
    W0, u = random(*shape), random(4)

    def second(normalize):
        W = chainer.Variable(W0)
        Y = normalize(W)
        g, = chainer.grad([chainer.functions.sum(Y ** 3)], [W],
                          enable_double_backprop=True)
        chainer.functions.sum(g ** 2).backward()
        return W.grad

    np.testing.assert_allclose(
        second(lambda W: F.spectral_normalize(W, u)),
        second(lambda W: composed(W, 1.0, u)), rtol=1e-9)


@pytest.mark.parametrize('sign', ['none', 't', 's', 'G', 'gY', 'gamma'])
def test_a_flipped_sign_in_the_backward_is_found(sign, monkeypatch):
    """The gradient check is able to fail, for each term."""
    adjoint = power_iteration.adjoint
    gradients = power_iteration.gradients

    def flipped_adjoint(*args):
        P, Q, ubar = adjoint(*args)
        P[{'t': slice(0, 1), 's': slice(1, 2), 'G': slice(0, 2)}.get(
            sign, slice(0, 0))] *= -1
        return P, Q, ubar

    def flipped_gradients(call):
        grads = dict(zip(call.wanted, gradients(call)))
        if sign == 'gamma':
            grads['gamma'] = np.asarray(-grads['gamma'])
        elif sign == 'gY':
            grads['W'] -= 2 * call.gamma * call.gY / call.iterations.sigma
        return tuple(grads[name] for name in call.wanted)

    monkeypatch.setattr(power_iteration, 'adjoint', flipped_adjoint)
    monkeypatch.setattr(
        power_iteration, 'gradients', flipped_gradients)
    u, inputs = random(4), (random(4, 3), np.array(0.7))

    def check():
        gradient_check.check_backward(
            lambda W, gamma: F.spectral_normalize(W, u, gamma=gamma),
            inputs, random(4, 3), **check_options())

    if sign == 'none':
        check()
    else:
        with pytest.raises(AssertionError):
            check()


@pytest.mark.parametrize('wanted', ['Y', 'sigma'])
def test_only_one_of_two_outputs_is_used(wanted):
    W, u = chainer.Variable(random(4, 3)), random(4)
    Y, sigma = F.spectral_normalize(W, u, return_sigma=True)
    if wanted == 'Y':
        other = F.spectral_normalize(W, u)
        g = random(4, 3)
        pair = grad([Y], [W], [g]), grad([other], [W], [g])
    else:
        pair = grad([sigma], [W], [1.0]), grad(
            [F.spectral_norm(W, u)], [W], [1.0])
    np.testing.assert_array_equal(*[g for g, in pair])


@pytest.mark.parametrize(('shape', 'axis'), WEIGHTS)
@pytest.mark.parametrize('detach_uv', [False, True])
def test_spectral_norm(shape, axis, detach_uv):
    W, u = random(*shape), random(shape[axis])
    variable = chainer.Variable(W)
    sigma = F.spectral_norm(variable, u, 200, axis, detach_uv=detach_uv)
    np.testing.assert_allclose(
        sigma.array, reference.true_norm(W, axis), rtol=1e-6)
    assert sigma.shape == ()
    # At convergence the gradient is u v^T, in either mode.
    sigma.backward()
    u, v, _ = reference.power_iteration(W, u, 2000, axis)
    np.testing.assert_allclose(
        reference.as_matrix(variable.grad, axis), np.outer(u, v), atol=1e-4)


def clustered(m, n):
    """All singular values are within 2e-3 of the largest one."""
    U, _, V = np.linalg.svd(random(m, n), full_matrices=False)
    return (U * (1 - 1e-5 * np.arange(min(m, n)))) @ V


MATRICES = {
    'square': lambda: random(300, 300),
    'tall': lambda: random(1000, 40),
    'wide': lambda: random(40, 1000),
    'rank 1': lambda: np.outer(random(30), random(20)),
    'clustered': lambda: clustered(150, 200),
    'large and clustered': lambda: clustered(270, 260),
    'orthogonal': lambda: np.linalg.qr(random(50, 50))[0],
    # The largest row is a singular vector, but not the leading one.
    'blocks': lambda: np.array([[3., 0, 0], [0, 2, 2], [0, 2, 2]]),
    'zero': lambda: np.zeros((4, 5)),
    'small': lambda: 1e-30 * random(5, 4),
    'one': lambda: np.full((1, 1), -2.),
}


class TestNormWithoutU:
    """A question that is asked once."""

    @pytest.mark.parametrize(('dtype', 'rtol'), [
        ('e', 3e-7), ('f', 3e-7), ('d', 1e-14)])
    @pytest.mark.parametrize('case', MATRICES)
    def test_is_the_true_one(self, case, dtype, rtol):
        W = MATRICES[case]().astype(dtype)
        sigma = F.spectral_norm(W)
        assert sigma.dtype == ('d' if dtype == 'd' else 'f')
        np.testing.assert_allclose(
            sigma.array, reference.true_norm(W), rtol=rtol)

    @pytest.mark.parametrize(('shape', 'axis'), WEIGHTS[1::6])
    def test_gradients(self, shape, axis):
        W, gW = random(*shape), random(*shape)

        def f(W):  # of second order through the iterations
            return F.spectral_norm(W, n_power_iteration=100, axis=axis) ** 2

        np.testing.assert_allclose(
            F.spectral_norm(W, axis=axis).array,
            reference.true_norm(W, axis), rtol=1e-14)
        gradient_check.check_backward(
            lambda W: F.spectral_norm(W, axis=axis), W, None,
            **check_options())
        gradient_check.check_double_backward(
            f, W, np.array(0.7), gW, **check_options())

    @pytest.mark.parametrize(('shape', 'axis'), [
        ((6, 2, 3), 0), ((6, 2, 3), 1)])
    def test_groups(self, shape, axis):
        W = random(*shape)
        np.testing.assert_allclose(
            F.spectral_norm(W, axis=axis, groups=3).array,
            max(reference.true_norm(x, axis) for x in np.split(W, 3)),
            rtol=1e-14)

    @pytest.mark.gpu
    @pytest.mark.parametrize('groups', [1, 2])
    def test_on_a_device(self, groups):
        W = random(4, 6).astype('f')
        sigma = F.spectral_norm(cuda.to_gpu(W), groups=groups)
        assert isinstance(sigma.array, cuda.ndarray)
        np.testing.assert_allclose(
            cuda.to_cpu(sigma.array),
            F.spectral_norm(W, groups=groups).array, rtol=1e-6)

    def test_no_random_number_is_drawn(self):
        W = clustered(260, 260)
        before = np.random.get_state()
        F.spectral_norm(W)
        after = np.random.get_state()
        assert before[2:] == after[2:]
        np.testing.assert_array_equal(before[1], after[1])

    @pytest.mark.parametrize('bad', [np.nan, np.inf])
    def test_not_finite(self, bad):
        W = random(4, 3)
        W[1, 1] = bad
        assert np.isnan(F.spectral_norm(W).array)

    def test_wrong_arguments(self):
        for W, error in (
                (np.ones((2, 3), int), errors.WeightTypeError),
                (np.ones(3), errors.WeightShapeError),
                (np.ones((0, 3)), errors.WeightShapeError),
                (chainer.Parameter(), errors.UninitializedWeightError),
                ([[1.]], errors.WeightTypeError)):
            with pytest.raises(error):
                F.spectral_norm(W)
        with pytest.raises(errors.AxisError):
            F.spectral_norm(random(4, 3), axis=2)
        with pytest.raises(errors.GroupCountError):
            F.spectral_norm(random(4, 3), groups=3)
        with pytest.raises(errors.VectorUpdateError, match='is a NoneType'):
            F.spectral_norm(random(4, 3), update_u=True)


class TestArguments:

    @pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
    def test_dtypes_of_outputs_and_gradients(self, dtype):
        W = chainer.Variable(random(4, 3).astype(dtype))
        gamma = chainer.Variable(np.array(0.5, dtype))
        Y, sigma = F.spectral_normalize(
            W, random(4).astype(dtype), gamma=gamma, return_sigma=True)
        chainer.functions.sum(Y).backward()
        assert Y.dtype == W.grad.dtype == gamma.grad.dtype == dtype
        assert sigma.dtype == (np.float32 if dtype == np.float16 else dtype)

    @pytest.mark.parametrize('kind', [
        chainer.Variable, chainer.Parameter, lambda x: x])
    def test_kinds_of_W(self, kind):
        W, u = random(4, 3), random(4)
        Y = F.spectral_normalize(kind(W), u)
        assert isinstance(Y, chainer.Variable)
        np.testing.assert_allclose(
            Y.array, reference.spectral_normalize(W, u)[0])

    @pytest.mark.parametrize('gamma', [
        2, 2.0, np.float32(2), np.array(2.0), chainer.Variable(np.array(2.))])
    def test_kinds_of_gamma(self, gamma):
        W, u = random(4, 3), random(4)
        np.testing.assert_allclose(
            F.spectral_normalize(W, u, gamma=gamma).array,
            2 * F.spectral_normalize(W, u).array)

    @pytest.mark.parametrize('factor', [2, np.float64(2)])
    def test_numpy_scalars_do_not_widen(self, factor):
        W = chainer.Variable(random(4, 3).astype('f'))
        Y = F.spectral_normalize(
            W, random(4).astype('f'), factor=factor, eps=np.float64(1e-6))
        chainer.functions.sum(Y).backward()
        assert Y.dtype == W.grad.dtype == np.float32

    @pytest.mark.parametrize('layout', [
        lambda W: W[:, ::2], lambda W: W[::-1], lambda W: W.T.copy().T,
        lambda W: np.broadcast_to(W[:1], W.shape),
        lambda W: W.transpose(1, 0)])
    @pytest.mark.parametrize('axis', [0, 1])
    def test_non_contiguous(self, layout, axis):
        W, u = layout(random(6, 6)), random(6)
        u = u[:W.shape[axis]]
        variable = chainer.Variable(W)
        gY = layout(random(6, 6))
        Y = F.spectral_normalize(variable, u, axis=axis)
        expected = chainer.Variable(np.ascontiguousarray(W))
        Y2 = F.spectral_normalize(expected, u, axis=axis)
        np.testing.assert_allclose(Y.array, Y2.array, rtol=1e-12)
        np.testing.assert_allclose(
            grad([Y], [variable], [gY])[0], grad([Y2], [expected], [gY])[0],
            rtol=1e-10, atol=1e-12)

    def test_no_backprop_mode(self):
        W = chainer.Parameter(random(4, 3))
        with chainer.no_backprop_mode():
            Y = F.spectral_normalize(W, random(4))
        assert Y.creator is None

    def test_u_need_not_be_a_unit_vector(self):
        W, u = random(4, 3), random(4)
        np.testing.assert_allclose(
            F.spectral_normalize(W, u).array,
            F.spectral_normalize(W, 1e3 * u).array)

    def test_the_gradient_variable_can_be_differentiated(self):
        W = chainer.Parameter(random(4, 3))
        chainer.functions.sum(F.spectral_normalize(W, random(4))).backward()
        assert W.grad_var.requires_grad


@pytest.mark.parametrize('dtype', ['>f2', '>f4', '>f8'])
def test_foreign_byte_order(dtype):
    W, u = random(4, 3), random(4)
    Y = F.spectral_normalize(W.astype(dtype), u.astype(dtype))
    expected = F.spectral_normalize(W, u)
    np.testing.assert_allclose(Y.array, expected.array, rtol=1e-2)


def test_no_copy_of_the_weight_in_the_graph():
    """Beside W and Y the graph retains vectors only."""
    W = chainer.Variable(random(3, 40, 5, 5))
    Y = F.spectral_normalize(W, random(40), axis=1)
    node = Y.creator_node
    iterations = node.weights[0].iterations
    vectors = (*iterations.us, *iterations.vs)
    assert sum(x.size for x in vectors) == 2 * 40 + 75
    assert iterations.matrix.array is W.array
    retained, = node.get_retained_inputs()
    assert retained.array is W.array


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('K', [1, 2])
@pytest.mark.parametrize('detach_uv', [False, True])
@pytest.mark.parametrize(('shape', 'axis'), [
    ((40, 30), 0), ((40, 3, 4), 0), ((30, 40), 1), ((5, 6, 7), 1),
    ((3, 40, 50), 1)])
def test_blocks_change_nothing(shape, axis, detach_uv, K, dtype, monkeypatch):
    """A large weight is gone through in blocks; here it is each entry."""
    W, u = random(*shape).astype(dtype), random(shape[axis]).astype(dtype)
    gY, gsigma = random(*shape).astype(dtype), np.array(0.7, dtype)
    found = []
    for size in (10 ** 9, 64, 1):
        monkeypatch.setattr(matrix, 'SMALL_SIZE', size)
        monkeypatch.setattr(matrix, 'LARGE_SIZE', size)
        monkeypatch.setattr(matrix, 'BLOCK_SIZE', size)
        inputs = [chainer.Variable(x) for x in (W, u)]
        outputs = F.spectral_normalize(
            *inputs, K, axis=axis, detach_uv=detach_uv, gamma=1.3,
            return_sigma=True)
        grads = grad(outputs, inputs, (gY, gsigma))
        found.append([*(y.array for y in outputs), *grads])
    rtol = 1e-4 if dtype is np.float32 else 1e-11
    for blocked in found[1:]:
        for a, b in zip(blocked, found[0]):
            if b is None:
                assert a is None
            else:
                np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 10)


class TestAll:
    """Many weights in one node."""

    CASES = (((4, 3), 0, 'f'), ((3, 5, 2, 2), 1, 'd'), ((6, 2, 3), 0, 'e'),
             ((2, 3, 4), 2, 'f'), ((200, 300), 0, 'f'))

    def make(self):
        state = np.random.RandomState(0)
        Ws = [chainer.Parameter(state.normal(size=shape).astype(dtype))
              for shape, _, dtype in self.CASES]
        us = [state.normal(size=shape[axis]).astype(dtype)
              for shape, axis, dtype in self.CASES]
        gammas = [None, 2.0, None, chainer.Parameter(np.array(3, 'f')), 0.5]
        gYs = [state.normal(size=W.shape).astype(W.dtype) for W in Ws]
        return Ws, us, gammas, gYs

    @pytest.mark.parametrize('detach_uv', [False, True])
    @pytest.mark.parametrize('sends_none', [False, True])
    def test_equals_one_by_one(self, detach_uv, sends_none):
        found = []
        axes = [axis for _, axis, _ in self.CASES]
        for at_once in (True, False):
            Ws, us, gammas, gYs = self.make()
            settings = dict(n_power_iteration=2, factor=1.5, update_u=True,
                            detach_uv=detach_uv, return_sigma=True)
            if at_once:
                Ys, sigmas = F.spectral_normalize_all(
                    Ws, us, gammas=gammas, axis=axes, **settings)
                assert len({Y.creator_node for Y in Ys + sigmas}) == 1
            else:
                Ys, sigmas = zip(*[
                    F.spectral_normalize(
                        W, u, gamma=gamma, axis=axis, **settings)
                    for W, u, gamma, axis in zip(Ws, us, gammas, axes)])
            terms = [chainer.functions.sum(chainer.functions.cast(
                Y * gY, 'd')) for Y, gY in zip(Ys, gYs)]
            if sends_none:  # nothing comes back to the first weight
                del terms[0]
            else:
                terms.append(chainer.functions.cast(sigmas[0], 'd') * 3)
            chainer.functions.add(*terms).backward()
            found.append([*us, gammas[3].grad, *(Y.array for Y in Ys),
                          *(s.array for s in sigmas)])
            found[-1] += [W.grad for W in Ws if W.grad is not None]
            assert (Ws[0].grad is None) == sends_none
        assert len(found[0]) == len(found[1])
        for a, b in zip(*found):
            np.testing.assert_array_equal(a, b)

    def test_gradients_of_any_order(self):
        Ws = [random(4, 3), random(3, 2, 2)]
        us = [random(4), random(2)]

        def f(*inputs):
            Ys = F.spectral_normalize_all(
                inputs[:2], inputs[2:], 2, axis=(0, 1))
            return tuple([Y * Y for Y in Ys])

        inputs = (*Ws, *us)
        gradient_check.check_backward(
            f, inputs, tuple(map(np.copy, Ws)), dtype='d')
        gradient_check.check_double_backward(
            f, inputs, tuple(map(np.copy, Ws)), tuple(map(np.copy, inputs)),
            dtype='d')

    def test_one_bad_u(self):
        """None is changed."""
        us = [random(4), np.zeros(4)]
        before = us[0].copy()
        with pytest.raises(errors.VectorValueError):
            F.spectral_normalize_all(
                [random(4, 3)] * 2, us, update_u=True)
        np.testing.assert_array_equal(us[0], before)

    def test_counts(self):
        W, u = random(4, 3), random(4)
        for arguments in ({'us': [u]}, {'us': [u] * 3},
                          {'us': [u] * 2, 'gammas': [1]},
                          {'us': [u] * 2, 'axis': (0,)}):
            with pytest.raises(errors.CountError, match='2 weights'):
                F.spectral_normalize_all([W, W], **arguments)

    @pytest.mark.parametrize('axis', [False, [0, False], 0.5, [0, None]])
    def test_axes(self, axis):
        with pytest.raises(errors.AxisError):
            F.spectral_normalize_all(
                [random(4, 3)] * 2, [random(4)] * 2, axis=axis)

    def test_none(self):
        assert F.spectral_normalize_all([], []) == ()
        assert F.spectral_normalize_all([], [], return_sigma=True) == ((), ())


class TestUpdate:

    def test_u_is_left_alone(self):
        u = random(4)
        before = u.copy()
        F.spectral_normalize(random(4, 3), u)
        F.spectral_norm(random(4, 3), u)
        np.testing.assert_array_equal(u, before)

    @pytest.mark.parametrize('f', ['spectral_normalize', 'spectral_norm'])
    def test_u_becomes_u_K(self, f):
        W, u = random(4, 3), random(4)
        expected = reference.power_iteration(W, u, 3)[0]
        getattr(F, f)(W, u, 3, update_u=True)
        np.testing.assert_allclose(u, expected, rtol=1e-12)

    @pytest.mark.parametrize('n', [1, 5])
    def test_no_warning_when_u_is_rounded(self, n):
        """An entry that is below the range of float16."""
        W = np.diag([1, 1e-3]).astype('e')
        us = [np.ones(2, 'e') for _ in range(n)]
        with np.errstate(all='raise'):
            F.spectral_normalize_all([W] * n, us, 3, update_u=True)
        for u in us:
            np.testing.assert_array_equal(u, np.array([1, 1e-9], 'e'))

    @pytest.mark.parametrize('detach_uv', [False, True])
    def test_a_live_graph_is_not_changed(self, detach_uv):
        """As with a hook: u moves on between forward and backward."""
        W, u, gY = chainer.Variable(random(4, 3)), random(4), random(4, 3)
        alone = F.spectral_normalize(W, u.copy(), 2, detach_uv=detach_uv)
        Y = F.spectral_normalize(W, u, 2, detach_uv=detach_uv, update_u=True)
        F.spectral_normalize(W, u, 2, update_u=True)
        np.testing.assert_array_equal(
            grad([Y], [W], [gY])[0], grad([alone], [W], [gY])[0])

    @pytest.mark.parametrize('value', [0, np.nan, np.inf])
    @pytest.mark.parametrize('where', [slice(None), (0, 0)])
    def test_a_bad_weight_does_not_reach_u(self, value, where):
        W, u = random(4, 3), random(4)
        W[where] = value
        before = u.copy()
        Y = F.spectral_normalize(W, u, update_u=True)
        if np.isfinite(value) and where == (0, 0):
            assert not np.array_equal(u, before)
        else:
            np.testing.assert_array_equal(u, before)
        assert np.isnan(Y.array).any() == (not np.isfinite(value))


class TestExtremes:

    @pytest.mark.parametrize('dtype', [
        'e', 'f', pytest.param('d', marks=pytest.mark.slow)])
    def test_the_norm_is_one_at_any_scale(self, dtype):
        limits = np.finfo(dtype)
        base = random(20, 30)
        base /= abs(base).max()
        least, most = int(np.log10(limits.tiny)) + 2, np.log10(limits.max)
        if dtype == 'd':
            least, most = -300, 300
        exponents = range(least, int(most), 1 + int(most - least) // 50)
        scales = [10.0 ** n for n in exponents] + [
            1e300 if dtype == 'd' else float(limits.max)]
        for scale in scales:
            W = (base * scale).astype(dtype)
            Y, sigma = F.spectral_normalize(
                W, random(20).astype(dtype), 200, eps=0, return_sigma=True)
            np.testing.assert_allclose(
                reference.true_norm(Y.array), 1,
                rtol=2e-2 if dtype == 'e' else 1e-3, err_msg=str(scale))
            if scale < limits.max / 100:
                np.testing.assert_allclose(
                    sigma.array, reference.true_norm(W), rtol=1e-3)

    @pytest.mark.parametrize(('dtype', 'scale', 'u_scale'), [
        ('f', 1e-35, 1), ('f', 1e-30, 1), ('f', 1e-18, 1), ('f', 1e18, 1),
        ('f', 1e30, 1), ('f', 1e33, 1), ('f', 1, 1e-35), ('f', 1, 1e33),
        ('f', 1e-20, 1e20), ('f', 1e-9, 1e18), ('f', 1e-30, 1e-30),
        ('f', 1e30, 1e30),
        ('d', 1e-300, 1), ('d', 1e-160, 1), ('d', 1e160, 1), ('d', 1e300, 1),
        ('d', 1, 1e-300), ('d', 1, 1e300), ('d', 1e-200, 1e200),
        ('d', 1e-200, 1e-200), ('d', 1e200, 1e200)])
    @pytest.mark.parametrize('n_power_iteration', [1, 3])
    @pytest.mark.parametrize('detach_uv', [False, True])
    def test_gradients_at_the_ends_of_the_range(
            self, dtype, scale, u_scale, n_power_iteration, detach_uv):
        """Y depends neither on the scale of W nor on that of u."""
        W, u, gY = random(4, 3), random(4), random(4, 3).astype(dtype)

        def gradients(scale, u_scale):
            x = chainer.Variable((W * scale).astype(dtype))
            v = chainer.Variable((u * u_scale).astype(dtype))
            gamma = chainer.Variable(np.array(0.7, dtype))
            Y, sigma = F.spectral_normalize(
                x, v, n_power_iteration, gamma, eps=0, detach_uv=detach_uv,
                return_sigma=True)
            found = [Y.array, sigma.array / scale,
                     *grad([Y], [x, gamma], [gY]),
                     *grad([sigma], [x], [np.array(0.3, dtype)])]
            if not detach_uv:
                found += grad([Y], [v], [gY])
            return found

        units = 1, 1, scale, 1, 1, u_scale
        for a, b, unit in zip(
                gradients(scale, u_scale), gradients(1, 1), units):
            np.testing.assert_allclose(
                a.astype('d') * unit, b,
                **dict(rtol=1e-4, atol=1e-5) if dtype == 'f' else
                dict(rtol=1e-9, atol=1e-12))

    def test_double_backward_at_an_extreme_scale(self):
        W, u = random(4, 3), random(4)
        gY, ggW = random(4, 3), random(4, 3)

        def second(scale):
            x, gy = chainer.Variable(W * scale), chainer.Variable(gY)
            Y = F.spectral_normalize(x, u, eps=0)
            g, = chainer.grad([Y], [x], [gy], enable_double_backprop=True)
            return grad([g], [x, gy], [ggW])

        for a, b, unit in zip(second(1e150), second(1.0), (1e300, 1e150)):
            np.testing.assert_allclose(a * unit, b, rtol=1e-9)

    @pytest.mark.parametrize('dtype', ['f', 'd'])
    @pytest.mark.parametrize('value', ['largest', 'tiny'])
    def test_at_the_limits_of_a_dtype(self, dtype, value):
        limit = {
            'f': getattr(np.finfo('f'), {'largest': 'max'}.get(value, value)),
            'd': {'largest': 1e300, 'tiny': 1e-300}[value]}[dtype]
        W = chainer.Variable(np.full((4, 3), limit, dtype))
        Y, sigma = F.spectral_normalize(
            W, np.ones(4, dtype), eps=0, return_sigma=True)
        np.testing.assert_allclose(Y.array, 12 ** -0.5, rtol=1e-6)
        assert sigma.dtype == dtype
        gW, = grad([Y], [W], [random(4, 3).astype(dtype)])
        assert gW.dtype == dtype
        Y = F.spectral_normalize(W, np.ones(4, dtype))
        if value == 'tiny':
            np.testing.assert_allclose(
                Y.array, W.array * W.dtype.type(1e6), rtol=1e-6)
            gW, = grad([Y], [W], [np.ones((4, 3), dtype)])
            np.testing.assert_allclose(gW, 1e6, rtol=1e-6)

    @pytest.mark.parametrize(('W_scale', 'u_scale'), [
        (1e-39, 1), (1, 1e-39), (1e-20, 1), (1e30, 1e-30)])
    def test_second_order_of_a_tiny_weight_or_vector(self, W_scale, u_scale):
        W = chainer.Variable((W_scale * random(4, 3)).astype('f'))
        u = (u_scale * random(4)).astype('f')
        Y = F.spectral_normalize(W, u)
        g, = chainer.grad([Y], [W], [chainer.Variable(
            random(4, 3).astype('f'))], enable_double_backprop=True)
        gg, = grad([g], [W], [random(4, 3).astype('f')])
        if W_scale < 1e-6:
            assert gg is None or not gg.any()  # linear, below the floor
        else:
            assert np.isfinite(gg).all()

    @pytest.mark.parametrize(('W_scale', 'u_scale'), [
        (0, 1), (1e-20, 1), (1e20, 1), (1, 1e-20)])
    @pytest.mark.parametrize('dtype', ['e', 'f'])
    def test_second_order_of_sigma(self, dtype, W_scale, u_scale):
        """It has one dtype, however it was computed."""
        if dtype == 'e' and W_scale:
            W_scale, u_scale = 1e-3, 1
        W = chainer.Variable((W_scale * random(4, 3)).astype(dtype))
        u = (u_scale * random(4)).astype('f')
        _, sigma = F.spectral_normalize(W, u, return_sigma=True)
        g, = chainer.grad([sigma], [W], enable_double_backprop=True)
        gg, = grad([g], [W], [random(4, 3).astype(dtype)])
        assert gg.dtype == dtype
        assert np.isfinite(gg).all()

    def test_second_run_of_an_extreme_weight_is_the_same(self):
        link = chainer.links.Linear(3, 4).add_hook(
            SpectralNormalization())
        for scale in (1e-30, 1e30):
            link.W.array[...] = scale * random(4, 3)
            for _ in range(10):
                u, grads = link.W_u.copy(), []
                x = random(2, 3).astype('f')
                for f in (link, lambda x: chainer.functions.forget(link, x)):
                    link.W_u[...] = u
                    link.cleargrads()
                    y = f(chainer.Variable(x))
                    y.grad = np.ones_like(y.array)
                    y.backward()
                    grads.append(link.W.grad)
                np.testing.assert_array_equal(*grads)

    def test_below_the_floor_Y_is_W_over_eps(self):
        W, u = chainer.Variable(1e-9 * random(4, 3)), random(4)
        gamma = chainer.Variable(np.array(0.7))
        gY = random(4, 3)
        Y = F.spectral_normalize(W, u, gamma=gamma, factor=2, eps=1e-6)
        np.testing.assert_allclose(Y.array, 1.4e6 * W.array)
        gW, ggamma = grad([Y], [W, gamma], [gY])
        np.testing.assert_allclose(gW, 1.4e6 * gY)
        np.testing.assert_allclose(ggamma, 2e6 * np.sum(gY * W.array))
        gradient_check.check_double_backward(
            lambda W: F.spectral_normalize(W, u, gamma=0.7, eps=1e3),
            random(4, 3), gY, random(4, 3), **check_options())

    @pytest.mark.parametrize('eps', [0, 1e-6])
    @pytest.mark.parametrize('n_power_iteration', [1, 2])
    def test_zero_weight(self, eps, n_power_iteration):
        W, u = chainer.Variable(np.zeros((4, 3))), chainer.Variable(random(4))
        Y, sigma = F.spectral_normalize(
            W, u, n_power_iteration, eps=eps, return_sigma=True)
        assert not Y.array.any()
        assert sigma.array == 0
        for g in grad([Y, sigma], [W, u], [random(4, 3), 1.0]):
            assert np.isfinite(g).all()

    @pytest.mark.parametrize(('settings', 'expected'), [
        ({}, 1), ({'eps': 0}, 1), ({'factor': 3, 'gamma': .5}, 1.5),
        ({'cap': 5}, 1)])
    def test_gradient_of_a_zero_weight(self, settings, expected):
        """That without a division, as 1 / eps would make any step huge."""
        W, gY = chainer.Variable(np.zeros((4, 3))), random(4, 3)
        Y = F.spectral_normalize(W, random(4), **settings)
        gW, = grad([Y], [W], [gY])
        np.testing.assert_array_equal(gW, expected * gY)
        Y = F.spectral_normalize(W, random(4), **settings)
        with_graph, = chainer.grad(
            [Y], [W], [chainer.Variable(gY)], enable_double_backprop=True)
        np.testing.assert_array_equal(with_graph.array, expected * gY)

    def test_u_in_the_left_null_space_is_no_trap(self):
        """W^T u = 0: W / eps would be 1e6 times too large."""
        W = np.diag([0.0, 2.0, 1.0])
        u = np.array([1.0, 0.0, 0.0])
        Y, sigma = F.spectral_normalize(
            W, u, update_u=True, return_sigma=True)
        assert sigma.array == 2
        np.testing.assert_array_equal(u, [0, 1, 0])
        np.testing.assert_array_equal(Y.array, W / 2)

    def test_the_norm_is_never_hidden_nan(self):
        W = random(4, 3)
        W[1, 2] = np.nan
        x = chainer.Variable(W)
        Y = F.spectral_normalize(x, random(4))
        assert np.isnan(Y.array).all()

    @pytest.mark.parametrize('n_power_iteration', [1, 2, 5, 20])
    def test_the_estimate_is_never_above_the_norm(self, n_power_iteration):
        for _ in range(50):
            W, u = random(6, 5), random(6)
            sigma = F.spectral_norm(W, u, n_power_iteration).array
            assert sigma <= reference.true_norm(W) * (1 + 1e-12)


def test_the_smallest_number():
    """Of float32; the smallest numbers of float64 have too few digits."""
    limit = np.nextafter(*np.array([0, 1], 'f'))
    W = chainer.Variable(np.full((4, 3), limit, 'f'))
    Y = F.spectral_normalize(W, np.ones(4, 'f'), eps=0)
    np.testing.assert_allclose(Y.array, 12 ** -0.5, rtol=1e-6)
    Y = F.spectral_normalize(W, np.ones(4, 'f'))
    np.testing.assert_allclose(
        Y.array, W.array * W.dtype.type(1e6), rtol=1e-6)


@pytest.mark.parametrize('scale', [1e305, 1e-315])
def test_out_of_the_range_nothing_is_hidden(scale):
    """Y is right, or what is wrong with it shows; and u can go on."""
    W, u = scale * random(40, 30), random(40)
    Y = F.spectral_normalize(W, u, 200, eps=0, update_u=True)
    if np.isfinite(Y.array).all():
        np.testing.assert_allclose(
            reference.true_norm(Y.array), 1, rtol=1e-3)
    assert np.isfinite(u).all()


BAD_ARGUMENTS = {
    'u of the wrong length': (
        dict(u=np.ones(3)), errors.VectorShapeError, r'needs shape \(4,\)'),
    'u of two dimensions': (
        dict(u=np.ones((4, 1))), errors.VectorShapeError, 'Make u anew'),
    'u of an integer dtype': (
        dict(u=np.ones(4, int)), errors.VectorTypeError, 'astype'),
    'u of another dtype': (
        dict(u=np.ones(4, 'f')), errors.VectorTypeError, 'float64'),
    'u is a list': (dict(u=[1.0] * 4), errors.VectorTypeError, 'list'),
    'u is None': (dict(u=None), errors.VectorTypeError, 'None'),
    'u all zero': (
        dict(u=np.zeros(4)), errors.VectorValueError, 'all zero'),
    'u holds NaN': (
        dict(u=np.array([1, np.nan, 1, 1])), errors.VectorValueError, 'NaN'),
    'W with one dimension': (
        dict(W=np.ones(4)), errors.WeightShapeError, 'fewer than 2'),
    'W without dimensions': (
        dict(W=np.array(1.0)), errors.WeightShapeError, 'fewer than 2'),
    'W with an empty dimension': (
        dict(W=np.ones((4, 0))), errors.WeightShapeError, 'empty'),
    'W of an integer dtype': (
        dict(W=np.ones((4, 3), int)), errors.WeightTypeError, 'int64'),
    'W is a list': (dict(W=[[1.0]]), errors.WeightTypeError, 'list'),
    'W is not initialized': (
        dict(W=chainer.Parameter(name='W')),
        errors.UninitializedWeightError, 'no array yet'),
    'axis too large': (dict(axis=2), errors.AxisError, 'from -2 to 1'),
    'axis too small': (dict(axis=-3), errors.AxisError, 'from -2 to 1'),
    'axis not an integer': (dict(axis=0.5), errors.AxisError, '0.5'),
    'no iteration': (
        dict(n_power_iteration=0), errors.IterationCountError, 'least 1'),
    'a negative number of iterations': (
        dict(n_power_iteration=-1), errors.IterationCountError, '-1'),
    'iterations not an integer': (
        dict(n_power_iteration=1.5), errors.IterationCountError, '1.5'),
    'iterations a bool': (
        dict(n_power_iteration=True), errors.IterationCountError, 'True'),
    'eps negative': (dict(eps=-1e-6), errors.EpsError, '-1e-06'),
    'eps NaN': (dict(eps=math.nan), errors.EpsError, 'nan'),
    'factor zero': (dict(factor=0), errors.FactorError, 'above 0'),
    'factor infinite': (dict(factor=math.inf), errors.FactorError, 'inf'),
    'gamma of the wrong shape': (
        dict(gamma=np.ones(4)), errors.GammaError, r'shape \(\)'),
    'gamma too large': (
        dict(gamma=10 ** 400), errors.GammaError, 'a number'),
    'factor too large': (dict(factor=10 ** 400), errors.FactorError, '1000'),
    'gamma a string': (dict(gamma='1'), errors.GammaError, 'str'),
    'update of a read-only u': (
        dict(u=np.broadcast_to(np.ones(1), 4), update_u=True),
        errors.VectorUpdateError, 'read-only'),
    'update of a Variable': (
        dict(u=chainer.Variable(np.ones(4)), update_u=True),
        errors.VectorUpdateError, 'Variable'),
}


@pytest.mark.parametrize('name', BAD_ARGUMENTS)
def test_bad_argument(name):
    changes, error, message = BAD_ARGUMENTS[name]
    arguments = dict({'W': random(4, 3), 'u': np.ones(4), 'update_u': True},
                     **changes)
    u = arguments['u']
    before = None if not isinstance(u, np.ndarray) else u.copy()
    if 'update_u' not in changes and not isinstance(u, np.ndarray):
        arguments['update_u'] = False
    with pytest.raises(error, match=message) as info:
        F.spectral_normalize(**arguments)
    assert isinstance(info.value, errors.SpectralNormalizationError)
    # As it comes from a worker process.
    copied = pickle.loads(pickle.dumps(info.value))
    assert type(copied) is error
    assert str(copied) == str(info.value)
    if before is not None:
        np.testing.assert_array_equal(u, before)


def test_u_on_another_device(monkeypatch):
    """With a stand-in for an array of a device, which is not here."""
    class DeviceArray:
        dtype, shape, ndim = np.dtype('d'), (4,), 1
        flags = None

    monkeypatch.setattr(_checks.cuda, 'ndarray', DeviceArray)
    monkeypatch.setattr(
        _checks.backend, 'get_device_from_array',
        lambda x: '@cupy:0' if isinstance(x, DeviceArray) else '@numpy')
    with pytest.raises(errors.VectorDeviceError, match=r"'@numpy'\)\.send"):
        F.spectral_normalize(np.ones((4, 3)), DeviceArray())


def test_all_axes_give_the_same_as_a_transposed_copy():
    for shape in itertools.permutations((2, 3, 4)):
        for axis in range(-3, 3):
            W, u = random(*shape), random(shape[axis])
            Y = F.spectral_normalize(W, u, 2, axis=axis).array
            expected = F.spectral_normalize(
                reference.as_matrix(W, axis).copy(), u, 2).array
            np.testing.assert_allclose(
                reference.as_matrix(Y, axis), expected, rtol=1e-12)
