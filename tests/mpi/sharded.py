"""Checks of a weight whose rows are spread over ranks, run by mpiexec.

    mpiexec -n 4 python -m tests.mpi.sharded             # every check
    mpiexec -n 4 python -m tests.mpi.sharded --measure   # 4096 x 4096

Rank 0 prints the name of each check that has passed.  An exception on one rank
ends all of them.  tests/graph/test_sharded.py starts it.
"""
import argparse
import inspect
import itertools
import json
import re
import sys
import time
import traceback
import warnings

import sn_function  # isort: skip  # before chainer, which it repairs

import chainer
import numpy as np
import pytest
from chainer import functions as F
from chainer.backends import cuda
from mpi4py import MPI

from sn_function import errors
from sn_function import functions as SF
from sn_function._graph.sharded import sharded_spectral_normalize
from tests import reference

assert sn_function  # it is imported for what it does

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size
# Of each rank, by case.
ROWS = {'equal': [3] * SIZE, 'unequal': [1, 5, 2, 4][-SIZE:],
        'single': [1] * SIZE}
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


class Counting(MPI.Intracomm):
    """Keeps a list of the bytes that each collective was given."""

    def __new__(cls, comm):
        return super().__new__(cls, comm)

    def __init__(self, comm):
        self.sent = []

    def Allreduce(self, sendbuf, recvbuf, op=MPI.SUM):
        self.sent.append(recvbuf.nbytes)
        super().Allreduce(sendbuf, recvbuf, op)

    def Bcast(self, buf, root=0):
        self.sent.append(buf.nbytes)
        super().Bcast(buf, root)

    def allgather(self, sendobj):
        self.sent.append(len(MPI.pickle.dumps(sendobj)))
        return super().allgather(sendobj)

    def pop(self):
        sent = self.sent[:]
        del self.sent[:]
        return sent


class Case:
    """A weight: all of it, on every rank, and the rows of this rank."""

    def __init__(
            self, rows='unequal', columns=(7,), dtype='d', seed=0,
            vectors=()):
        rng = np.random.RandomState(seed)
        self.counts = ROWS[rows]
        m = sum(self.counts)
        start = sum(self.counts[:RANK])
        self.part = slice(start, start + self.counts[RANK])
        self.W = rng.randn(m, *columns).astype(dtype)
        self.u = rng.randn(*vectors, m).astype(dtype)
        self.gY = rng.randn(m, *columns).astype(dtype)
        self.gsigmas = rng.randn(SIZE).astype('f' if dtype == 'e' else dtype)

    def run(self, comm=COMM, **settings):
        """Y and gradient of this rank's rows, its u, and sigma."""
        W = chainer.Variable(self.W[self.part])
        u = self.part_of_u().copy()
        outputs = sharded_spectral_normalize(
            comm, W, u, update_u=True, **settings)
        backward(outputs, self.gY[self.part], self.gsigmas[RANK])
        return result(outputs, W, u)

    def part_of_u(self):
        return self.u[..., self.part]

    def run_whole(self, **settings):
        W, u = chainer.Variable(self.W), self.u.copy()
        outputs = SF.spectral_normalize(W, u, update_u=True, **settings)
        backward(outputs, self.gY, self.gsigmas.sum())
        return result(outputs, W, u)

    def compare(self, tolerance, comm=COMM, **settings):
        """Asserts that the parts are those of one process."""
        actual, whole = self.run(comm, **settings), self.run_whole(**settings)
        for name, x in actual.items():
            expected = whole[name]
            assert x.dtype == expected.dtype
            if x.shape:
                x = np.concatenate(
                    COMM.allgather(x), axis=-1 if name == 'u' else 0)
            # Relative to the largest: the small ones are differences.
            x, expected = x.astype('d'), expected.astype('d')
            if name == 'u' and x.ndim == 2:  # signs are those of LAPACK
                x *= np.sign((x * expected).sum(1, keepdims=True))
            np.testing.assert_allclose(
                x, expected, rtol=0, atol=tolerance * abs(expected).max(),
                err_msg=f'{name}, {settings}')


def backward(outputs, gY, gsigma):
    # In float64: half precision would round the loss to Inf.
    Y, *sigma = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = F.sum(F.cast(Y, 'd') * gY.astype('d'))
    for x in sigma:
        loss += F.cast(x, 'd') * float(gsigma)
    loss.backward()


def result(outputs, W, u):
    if not isinstance(outputs, tuple):
        return {'Y': outputs.array, 'gW': W.grad, 'u': u}
    Y, sigma = outputs
    return {'Y': Y.array, 'sigma': sigma.array, 'gW': W.grad, 'u': u}


def raises(expected, call, *args, **kwargs):
    """Returns the message of what was raised, on every rank."""
    with pytest.raises(expected) as caught:
        call(*args, **kwargs)
    assert caught.type is expected
    return str(caught.value)


def are_identical(x):
    return len(set(COMM.allgather(np.asarray(x).tobytes()))) == 1


# Equal to one process

@check
def equals_single_process():
    for (dtype, tolerance), rows, columns, K, detach_uv in itertools.product(
            [('d', 1e-13), ('f', 3e-6), ('e', 2e-3)], ROWS,
            [(1,), (2,), (7,), (2, 3, 2)], [1, 2, 3], [False, True]):
        Case(rows, columns, dtype).compare(
            tolerance, n_power_iteration=K, detach_uv=detach_uv, factor=1.3,
            return_sigma=K != 2)


@check
def equals_complex_step():
    for K, return_sigma in itertools.product([1, 2, 3], [False, True]):
        case = Case(columns=(2, 3))
        actual = case.run(
            n_power_iteration=K, factor=1.3, return_sigma=return_sigma)

        def loss(W, case=case, K=K, gsigma=return_sigma):
            Y, sigma = reference.spectral_normalize(W, case.u, K, 1.0, 1.3)
            return np.sum(Y * case.gY) + gsigma * case.gsigmas.sum() * sigma

        expected = reference.complex_step(loss, case.W)[case.part]
        np.testing.assert_allclose(
            actual['gW'], expected, rtol=1e-9, atol=1e-9)


@check
def detached_equals_complex_step():
    for K in 1, 3:
        case = Case()
        uv = reference.power_iteration(case.W, case.u, K)[:2]
        actual = case.run(n_power_iteration=K, detach_uv=True)

        def loss(W, case=case, uv=uv):
            return np.sum(reference.spectral_normalize(
                W, None, uv=uv)[0] * case.gY)

        expected = reference.complex_step(loss, case.W)[case.part]
        np.testing.assert_allclose(
            actual['gW'], expected, rtol=1e-9, atol=1e-9)


@check
def cap_and_floor():
    for detach_uv in True, False:
        for cap in 0.1, 100:  # above it, and below
            for dtype, tolerance in ('d', 1e-13), ('f', 3e-6):
                Case(dtype=dtype).compare(
                    tolerance, cap=cap, detach_uv=detach_uv)
                Case(dtype=dtype).compare(
                    tolerance, cap=cap, detach_uv=detach_uv,
                    return_sigma=True)
        Case().compare(1e-13, eps=100, factor=3, detach_uv=detach_uv)


@check
def converges():
    case = Case(columns=(3, 2))
    u = case.u[case.part].copy()
    for _ in range(300):
        Y, sigma = sharded_spectral_normalize(
            COMM, case.W[case.part], u, update_u=True, return_sigma=True)
    np.testing.assert_allclose(
        sigma.array, reference.true_norm(case.W), rtol=1e-12)
    whole = np.concatenate(COMM.allgather(Y.array))
    np.testing.assert_allclose(reference.true_norm(whole), 1, rtol=1e-12)


@check
def long_training_stays_with_single_process():
    case = Case(dtype='f')
    W, u = case.W[case.part].copy(), case.u[case.part].copy()
    whole_W, whole_u = case.W.copy(), case.u.copy()
    for _ in range(50):
        for normalize, part, W_, u_ in (
                (lambda *x: sharded_spectral_normalize(
                    COMM, *x, update_u=True), case.part, W, u),
                (lambda *x: SF.spectral_normalize(*x, update_u=True),
                 slice(None), whole_W, whole_u)):
            x = chainer.Variable(W_)
            F.sum(normalize(x, u_) * case.gY[part]).backward()
            W_ -= 0.02 * x.grad
    np.testing.assert_allclose(W, whole_W[case.part], atol=1e-4)
    np.testing.assert_allclose(u, whole_u[case.part], atol=1e-4)


@check
def ranks_have_the_same_bits():
    for dtype, n in itertools.product('efd', [1, 5, 64, 1001, 30000]):
        case = Case(columns=(n,), dtype=dtype)
        for detach_uv in True, False:
            W = chainer.Variable(case.W[case.part])
            Y, sigma = sharded_spectral_normalize(
                COMM, W, case.u[case.part], 2, detach_uv=detach_uv,
                return_sigma=True)
            assert are_identical(sigma.array)
            for v in Y.creator.iterations.vs:
                assert are_identical(v)
            backward((Y, sigma), case.gY[case.part], case.gsigmas[RANK])
            again = case.run(
                n_power_iteration=2, detach_uv=detach_uv, return_sigma=True)
            assert again['gW'].tobytes() == W.grad.tobytes()


@check
def what_mpi_promises():
    """A sum has the same bits on all ranks, and each time."""
    for dtype, n in itertools.product('fd', [1, 2, 7, 4096, 4097, 300000]):
        x = np.random.RandomState(RANK).randn(n).astype(dtype)
        sums = set()
        for _ in range(5):
            y = x.copy()
            COMM.Allreduce(MPI.IN_PLACE, y, MPI.SUM)
            assert are_identical(y)
            sums.add(y.tobytes())
        assert len(sums) == 1


@check
def of_chainermn():
    import chainermn
    comm = chainermn.create_communicator('naive')
    Case().compare(1e-13, comm)


@check
def ranks_that_use_one_output_only():
    case = Case()
    W = chainer.Variable(case.W[case.part])
    for detach_uv in True, False:
        for with_Y in 0, SIZE - 1:
            W.cleargrad()
            Y, sigma = sharded_spectral_normalize(
                COMM, W, case.u[case.part], detach_uv=detach_uv,
                return_sigma=True)
            if with_Y == RANK:
                F.sum(Y * case.gY[case.part]).backward()
            else:
                (sigma * case.gsigmas[RANK]).backward()
            whole = chainer.Variable(case.W)
            Y, sigma = SF.spectral_normalize(
                whole, case.u, detach_uv=detach_uv, return_sigma=True)
            gY = np.zeros_like(case.gY)
            counts = case.counts
            part = slice(sum(counts[:with_Y]), sum(counts[:with_Y + 1]))
            gY[part] = case.gY[part]
            others = case.gsigmas.sum() - case.gsigmas[with_Y]
            (F.sum(Y * gY) + sigma * others).backward()
            np.testing.assert_allclose(
                W.grad, whole.grad[case.part], rtol=1e-11, atol=1e-12)


@check
def without_a_graph():
    case = Case()
    with chainer.no_backprop_mode():
        Y = sharded_spectral_normalize(
            COMM, chainer.Variable(case.W[case.part]), case.u[case.part])
    assert Y.creator is None
    expected = SF.spectral_normalize(case.W, case.u).array
    np.testing.assert_allclose(Y.array, expected[case.part], rtol=1e-12)


@check
def a_layer_of_a_model():
    """Each rank computes its outputs, and all get all of them."""
    if SIZE == 1:
        return  # ChainerMN gathers no tuple there
    import chainermn
    comm = chainermn.create_communicator('naive')
    case = Case('equal', dtype='f')
    x = np.random.RandomState(1).randn(4, 7).astype('f')
    gy = np.random.RandomState(2).randn(4, len(case.W)).astype('f')
    W = chainer.Variable(case.W[case.part])
    Y = sharded_spectral_normalize(comm, W, case.u[case.part])
    with warnings.catch_warnings():
        # ChainerMN calls this an experiment.
        warnings.simplefilter('ignore', FutureWarning)
        ys = chainermn.functions.allgather(comm, F.linear(x, Y))
        y = F.concat(ys, axis=1)
        # All ranks have this loss; the sum of them all is differentiated.
        (F.sum(y * gy) / comm.size).backward()
    whole = chainer.Variable(case.W)
    expected = F.linear(x, SF.spectral_normalize(whole, case.u))
    F.sum(expected * gy).backward()
    np.testing.assert_allclose(y.array, expected.array, atol=1e-5)
    np.testing.assert_allclose(W.grad, whole.grad[case.part], atol=1e-5)


@check
def a_step_of_zero():
    """Rows are gathered normalized; gradients of all batches are scattered."""
    case = Case(columns=(2, 3))
    W, u = chainer.Parameter(case.W[case.part]), case.u[case.part]
    batch = np.random.RandomState(RANK).randn(*case.W.shape)
    Y = sharded_spectral_normalize(COMM, W, u)
    whole = np.concatenate(COMM.allgather(Y.array))
    gY = whole * batch  # of the loss of this rank, sum(Y * Y * batch) / 2
    Y.grad = np.empty_like(Y.array)
    COMM.Reduce_scatter(
        gY, Y.grad, [count * gY[0].size for count in case.counts])
    Y.backward()

    expected = chainer.Parameter(case.W)
    Y = SF.spectral_normalize(expected, case.u)
    (F.sum(Y * Y * sum(COMM.allgather(batch))) / 2).backward()
    np.testing.assert_allclose(
        W.grad, expected.grad[case.part], rtol=1e-11, atol=1e-12)


@check
def columns_are_rows_of_the_transpose():
    case = Case('equal')
    columns = chainer.Variable(np.ascontiguousarray(case.W[case.part].T))
    Y = F.transpose(sharded_spectral_normalize(
        COMM, F.transpose(columns), case.u[case.part], 100))
    whole = np.concatenate(COMM.allgather(Y.array), axis=1)
    np.testing.assert_allclose(reference.true_norm(whole), 1, rtol=1e-6)


# Extreme values

@check
def extreme_scales():
    for dtype, scales, tolerance in (
            ('d', [1e-300, 1e-160, 1e160, 1e300], 1e-12),
            ('f', [1e-35, 1e-20, 1e20, 1e35], 1e-5)):
        for scale, K, detach_uv in itertools.product(
                scales, [1, 3], [False, True]):
            settings = {'n_power_iteration': K, 'detach_uv': detach_uv,
                        'eps': 0, 'return_sigma': True}
            case = Case(dtype=dtype)
            expected = case.run_whole(**settings)
            case.W = case.W * np.asarray(scale, dtype)
            # Or the gradient of Y is lost beside that of sigma.
            case.gsigmas = case.gsigmas / np.asarray(scale, dtype)
            actual = case.run(**settings)
            np.testing.assert_allclose(
                actual['Y'], expected['Y'][case.part], rtol=tolerance)
            np.testing.assert_allclose(
                actual['sigma'] / scale, expected['sigma'], rtol=tolerance)
            if 1e-30 < scale < 1e30 or dtype == 'd':  # gW is in the range
                np.testing.assert_allclose(
                    actual['gW'].astype('d') * scale,
                    expected['gW'][case.part], rtol=100 * tolerance,
                    atol=100 * tolerance)
            case.compare(tolerance, **dict(settings, return_sigma=False))


@check
def extreme_rows_of_one_rank():
    for scale in 1e-200, 1e200:
        case = Case()
        case.W[-1] *= scale  # of the last rank
        case.compare(1e-12, n_power_iteration=2)


@check
def extreme_u():
    for dtype, scale in itertools.chain(
            itertools.product('d', [1e-200, 1e-158, 1e200]),
            itertools.product('f', [1e-30, 1e-21, 1e30])):
        case = Case(dtype=dtype)
        case.u = case.u * np.asarray(scale, dtype)
        case.compare(1e-12 if dtype == 'd' else 1e-5)


@check
def zero_weight():
    for detach_uv in True, False:
        case = Case()
        case.W[...] = 0
        actual = case.run(
            return_sigma=True, detach_uv=detach_uv, eps=0.5)
        assert not actual['Y'].any()
        assert actual['sigma'] == 0
        assert (actual['u'] == case.u[case.part]).all()
        # Below the floor the divisor is a constant.
        part = actual['gW'] - case.gY[case.part] / 0.5
        whole = case.run_whole(
            return_sigma=True, detach_uv=detach_uv, eps=0.5)
        np.testing.assert_allclose(
            part, (whole['gW'] - case.gY / 0.5)[case.part], atol=1e-12)


@check
def zero_rows_on_one_rank():
    case = Case()
    case.W[:case.counts[0]] = 0
    if SIZE > 1:
        case.compare(1e-13, n_power_iteration=2)
    case = Case()
    case.u[:case.counts[0]] = 0
    if SIZE > 1:
        case.compare(1e-13, n_power_iteration=2)


@check
def restarts_from_the_largest_row():
    for dtype in 'fd':
        case = Case('equal', dtype=dtype)
        case.W[:-1] = 0
        case.u[-1] = 0  # so W^T u is zero
        case.compare(1e-6, return_sigma=True)
        # Two ranks have a row as large: only one of them starts.
        case.W[0] = -case.W[-1]
        case.u[0] = 0
        case.compare(1e-6, n_power_iteration=2)


@check
def nan_in_the_rows_of_one_rank():
    for value, dtype in itertools.product([np.nan, np.inf, -np.inf], 'efd'):
        for detach_uv in True, False:
            case = Case(dtype=dtype)
            good = case.W[-1, -1]
            case.W[-1, -1] = value
            actual = case.run(
                n_power_iteration=2, detach_uv=detach_uv, return_sigma=True)
            for name in 'Y', 'sigma', 'gW':
                assert np.isnan(actual[name]).all(), name
            assert (actual['u'] == case.u[case.part]).all()
            case.W[-1, -1] = good
            case.compare(5e-3 if dtype == 'e' else 1e-5)


# All ranks raise, or none

@check
def zero_u():
    for value in 0, np.nan, np.inf:
        case = Case()
        if value == 0:
            case.u[:] = 0
        else:
            case.u[-1] = value
        before = case.u.copy()
        message = raises(errors.ShardedVectorValueError, case.run)
        assert ('all zero' if value == 0 else 'NaN or Inf') in message
        np.testing.assert_array_equal(case.u, before)


@check
def one_rank_is_wrong():
    last = RANK == SIZE - 1
    x = np.ones(3)
    W = np.ones((3, 2))
    read_only = np.ones(3)
    read_only.flags.writeable = False
    for wrong, error in [
            ({'W': 'no weight'}, errors.WeightTypeError),
            ({'W': np.ones((3, 0))}, errors.WeightShapeError),
            ({'W': np.ones((0, 2))}, errors.WeightShapeError),
            ({'W': chainer.Parameter()}, errors.UninitializedWeightError),
            ({'u': np.ones(4)}, errors.VectorShapeError),
            ({'u': np.ones(3, 'i')}, errors.VectorTypeError),
            ({'u': chainer.Variable(x)}, errors.ShardedVectorTypeError),
            ({'u': DeviceArray()}, errors.ShardedDeviceError),
            ({'W': DeviceArray()}, errors.ShardedDeviceError),
            ({'u': read_only, 'update_u': True}, errors.VectorUpdateError),
            ({'n_power_iteration': 0}, errors.IterationCountError),
            ({'factor': 0}, errors.FactorError),
            ({'eps': -1}, errors.EpsError),
            ({'cap': 0}, errors.CapError),
            ({'cap': 1, 'factor': 2}, errors.CapConflictError)]:
        arguments = dict({'W': W, 'u': x}, **(wrong if last else {}))
        message = raises(
            error if last else errors.OtherRankError,
            sharded_spectral_normalize, COMM, **arguments)
        if not last:
            assert f'Rank {SIZE - 1} ' in message
        messages = COMM.allgather(message)
        assert messages[-1] in message
    assert (x == 1).all()


class DeviceArray(cuda.ndarray):
    """Looks like an array of CuPy to the checks."""

    def __new__(cls):
        return object.__new__(cls)

    shape, dtype = (3,), np.dtype('d')


@check
def ranks_disagree():
    if SIZE == 1:
        return
    last = RANK == SIZE - 1
    x = chainer.Parameter(np.ones((3, 2)))
    for other, words in [
            ({'W': chainer.Parameter(np.ones((3, 4)))}, 'columns'),
            ({'W': chainer.Parameter(np.ones((3, 2), 'f')),
              'u': np.ones(3, 'f')}, 'bytes of an entry'),
            ({'W': x.array}, 'needs a gradient'),
            ({'u': np.ones((1, 3))}, 'number of vectors'),
            ({'n_power_iteration': 2}, 'n_power_iteration'),
            ({'factor': 2}, 'factor'), ({'eps': 0}, 'eps'),
            ({'cap': 1}, 'cap'),
            ({'detach_uv': True}, 'detach_uv'),
            ({'update_u': True}, 'update_u'),
            ({'return_sigma': True}, 'return_sigma')]:
        arguments = dict({'W': x, 'u': np.ones(3)}, **(other if last else {}))
        message = raises(
            errors.ShardMismatchError, sharded_spectral_normalize, COMM,
            **arguments)
        assert words in message


@check
def no_communicator():
    for comm in None, 'world', MPI.GROUP_EMPTY, MPI.COMM_NULL:
        raises(errors.CommunicatorError, sharded_spectral_normalize, comm,
               np.ones((3, 2)), np.ones(3))


@check
def double_backward():
    case = Case()
    W = chainer.Variable(case.W[case.part])
    Y = sharded_spectral_normalize(COMM, W, case.u[case.part])
    gW, = chainer.grad([Y], [W], [chainer.Variable(case.gY[case.part])],
                       enable_double_backprop=True)
    expected = case.run_whole()['gW'][case.part]
    np.testing.assert_allclose(gW.array, expected, rtol=1e-11, atol=1e-12)
    raises(errors.ShardedDoubleBackwardError, F.sum(gW ** 2).backward)


# Several vectors

VECTORS = [(1,), (2,), (3,)]


def cases_of_several(dtypes='d', **settings):
    """There are more vectors than rows of some ranks, but not of them all."""
    for dtype, vectors, rows, columns in itertools.product(
            dtypes, VECTORS, ROWS, [(7,), (2, 3)]):
        if vectors[0] <= sum(ROWS[rows]):
            yield Case(rows, columns, dtype, vectors=vectors, **settings)


@check
def several_equal_single_process():
    for tolerance, case in itertools.chain(
            ((1e-12, case) for case in cases_of_several()),
            ((2e-5, case) for case in cases_of_several('f')),
            ((5e-3, case) for case in cases_of_several('e'))):
        for K, detach_uv in itertools.product([1, 3], [False, True]):
            case.compare(
                tolerance, n_power_iteration=K, detach_uv=detach_uv,
                factor=1.3, return_sigma=K == 1)


@check
def several_equal_reference():
    for case in cases_of_several(seed=1):
        Q = np.linalg.qr(case.u.T)[0]
        x, values, vt = np.linalg.svd(
            Q.T @ case.W.reshape(len(case.W), -1), full_matrices=False)
        u, v = Q @ x[:, 0], vt[0].reshape(case.W.shape[1:])
        sigma, gsigma = values[0], case.gsigmas.sum()
        actual = case.run(return_sigma=True)
        np.testing.assert_allclose(actual['sigma'], sigma, rtol=1e-12)
        np.testing.assert_allclose(
            actual['Y'], case.W[case.part] / sigma, rtol=1e-12)
        c = gsigma - np.sum(case.gY * case.W) / sigma ** 2
        expected = case.gY / sigma + c * np.multiply.outer(u, v)
        np.testing.assert_allclose(
            actual['gW'], expected[case.part], rtol=1e-9, atol=1e-11)


@check
def several_follow_close_singular_values():
    case = Case('equal', columns=(9,), vectors=(3,))
    if SIZE == 1:
        return  # as many vectors as rows
    x, _, y = np.linalg.svd(case.W, full_matrices=False)
    values = np.linspace(1, 0.2, len(y))
    values[1] = 1 - 1e-9
    case.W = x * values @ y
    u = case.part_of_u().copy()
    for _ in range(60):
        sigma = sharded_spectral_normalize(
            COMM, case.W[case.part], u, update_u=True, return_sigma=True)[1]
    np.testing.assert_allclose(sigma.array, 1, rtol=1e-12)


@check
def several_have_the_same_bits():
    for dtype, n in itertools.product('efd', [5, 64, 1001]):
        case = Case('equal', columns=(n,), dtype=dtype, vectors=(3,))
        W, u = chainer.Variable(case.W[case.part]), case.part_of_u()
        Y, sigma = sharded_spectral_normalize(
            COMM, W, u, 2, return_sigma=True)
        assert are_identical(sigma.array)
        assert are_identical(Y.creator.iterations.v)
        assert are_identical(Y.creator.iterations.singular_values)
        backward((Y, sigma), case.gY[case.part], case.gsigmas[RANK])
        again = case.run(n_power_iteration=2, return_sigma=True)
        assert again['gW'].tobytes() == W.grad.tobytes()


@check
def rank_0_decides():
    """The others take what its LAPACK gives, whatever theirs does."""
    case = Case('equal', vectors=(3,))
    expected = case.run(n_power_iteration=2)

    def other_eigh(H, eigh=np.linalg.eigh):
        values, vectors = eigh(H)
        return values, vectors * [-1, 1, -1]

    def other_cholesky(G):
        raise np.linalg.LinAlgError

    with pytest.MonkeyPatch.context() as patch:
        if RANK != 0:
            patch.setattr(np.linalg, 'eigh', other_eigh)
            patch.setattr(np.linalg, 'cholesky', other_cholesky)
        actual = case.run(n_power_iteration=2)
    for name, x in expected.items():
        assert actual[name].tobytes() == x.tobytes(), name


@check
def several_of_extreme_size():
    for dtype, scales, tolerance in (
            ('d', [1e-300, 1e-160, 1e160, 1e300], 1e-11),
            ('f', [1e-35, 1e-20, 1e20, 1e35], 1e-4)):
        for scale, K in itertools.product(scales, [1, 3]):
            case = Case('equal', dtype=dtype, vectors=(2,))
            expected = case.run_whole(n_power_iteration=K, eps=0)
            case.W = case.W * np.asarray(scale, dtype)
            actual = case.run(n_power_iteration=K, eps=0)
            np.testing.assert_allclose(
                actual['Y'], expected['Y'][case.part],
                rtol=tolerance, atol=tolerance)
            case.compare(tolerance, n_power_iteration=K, eps=0)
    for dtype, scale in ('d', 1e-200), ('d', 1e200), ('f', 1e-30), ('f', 1e30):
        case = Case('equal', dtype=dtype, vectors=(2,))
        expected = case.run_whole()
        case.u[-1] *= np.asarray(scale, dtype)
        actual = case.run()
        np.testing.assert_allclose(
            actual['Y'], expected['Y'][case.part], rtol=1e-4)


@check
def several_of_a_weight_without_direction():
    for value in 0, np.nan, np.inf:
        case = Case('equal', vectors=(2,))
        case.W[slice(None) if value == 0 else -1] = value
        actual = case.run(return_sigma=True)
        assert (actual['u'] == case.part_of_u()).all()
        if value == 0:
            assert actual['sigma'] == 0
            assert not actual['Y'].any()
        else:
            for name in 'Y', 'sigma', 'gW':
                assert np.isnan(actual[name]).all(), name


@check
def several_restart_from_the_largest_row():
    for dtype in 'fd':
        case = Case('equal', dtype=dtype, vectors=(2,))
        case.W[:-1] = 0
        case.u[:, -1] = 0  # so W^T u is zero
        case.compare(1e-6, return_sigma=True)


@check
def dependent_vectors():
    for value in 0, np.nan, 'double', 'too many':
        case = Case('single', columns=(9,), vectors=(
            SIZE + 1 if value == 'too many' else 2,))
        if value == 'double':
            case.u[1] = 2 * case.u[0]
        elif value == 0:
            case.u[1] = 0
        elif value != 'too many':
            case.u[1, -1] = value
        elif SIZE == 1:
            continue
        before = case.u.copy()
        is_nan = isinstance(value, float)
        message = raises(
            errors.ShardedVectorValueError if is_nan
            else errors.VectorValueError, case.run)
        assert ('NaN' if is_nan else 'depends on others') in message
        np.testing.assert_array_equal(case.u, before)


@check
def too_many_vectors_for_the_columns():
    case = Case('equal', columns=(2,), vectors=(3,))
    assert '(b, 3) with b from 1 to 2' in raises(
        errors.VectorShapeError, case.run)


# What is sent

@check
def bytes_sent():
    n, facts = 7, 8 * (2 + 2 * 10)
    for K, detach_uv, dtype in itertools.product(
            [1, 3], [False, True], 'efd'):
        itemsize = 8 if dtype == 'd' else 4
        comm = Counting(COMM)
        case = Case(columns=(n,), dtype=dtype)
        W = chainer.Variable(case.W[case.part])
        Y = sharded_spectral_normalize(
            comm, W, case.u[case.part], K, detach_uv=detach_uv)
        assert comm.pop() == [facts] + K * [n * itemsize, 8]
        F.sum(F.cast(Y, 'd') * 2).backward()
        assert comm.pop() == (
            [8] if detach_uv
            else [(n + 1) * itemsize] + (K - 1) * [n * itemsize])
        # Below the cap only gY matters.
        Y = sharded_spectral_normalize(
            comm, W, case.u[case.part], K, detach_uv=detach_uv, cap=1e3)
        comm.pop()
        F.sum(F.cast(Y, 'd') * 2).backward()
        assert comm.pop() == []


@check
def bytes_of_several():
    b, n, facts = 3, 7, 8 * (2 + 2 * 10)
    for K, update_u in itertools.product([1, 2], [False, True]):
        comm = Counting(COMM)
        case = Case('equal', columns=(n,), vectors=(b,))
        W = chainer.Variable(case.W[case.part])
        Y = sharded_spectral_normalize(
            comm, W, case.part_of_u(), K, update_u=update_u)
        gram, small, number = 8 * b * b, 8 * b * (b + 1), 8
        one = [gram, gram, 8 * b * n, small]
        moved = [8 * b, number]
        assert comm.pop() == [facts] + (K - 1) * [*one, *moved] + one + (
            moved if update_u else [])
        F.sum(Y * 2).backward()
        assert comm.pop() == [number]


@check
def example():
    text = inspect.getdoc(sharded_spectral_normalize)
    block = re.search(r'::\n\n((?: {8}.*\n|\n)+)', text + '\n')[1]
    printed = []
    exec(inspect.cleandoc(block), {'print': printed.append})
    assert printed == ['1.0000']


def measure(side, rounds):
    """Returns errors, bytes and times for a large weight, on rank 0."""
    rng = np.random.default_rng(0)
    W, gY = (rng.standard_normal((side, side), 'f') for _ in range(2))
    u = rng.standard_normal(side, 'f')
    part = slice(side * RANK // SIZE, side * (RANK + 1) // SIZE)
    part_W, part_u, part_gY = (x[part].copy() for x in (W, u, gY))
    if RANK != 0:
        del W, gY  # the memory is that of one machine
    comm = Counting(COMM)
    found = {}
    for detach_uv in False, True:

        def step(normalize, W, u, gY, sent=None, detach_uv=detach_uv):
            x = chainer.Variable(W)
            Y = normalize(x, u, detach_uv=detach_uv)
            if sent is not None:
                sent.append(comm.pop())
            Y.grad = gY
            Y.backward()
            if sent is not None:
                sent.append(comm.pop())
            creator = Y.creator.weights[0] if sent is None else Y.creator
            it = creator.iterations
            return Y.array, x.grad, it.sigma

        def sharded(*args, **settings):
            return sharded_spectral_normalize(comm, *args, **settings)

        row = found['detached' if detach_uv else 'exact'] = {}
        sent = []
        parts = [COMM.gather(x) for x in step(
            sharded, part_W, part_u, part_gY, sent)]
        row['bytes'] = sent
        if RANK == 0:
            Ys, gWs, sigmas = parts
            row['errors'] = [
                float(np.max(abs(x - y)) / np.max(abs(y))) for x, y in zip(
                    (np.concatenate(Ys), np.concatenate(gWs),
                     np.array(sigmas)),
                    step(SF.spectral_normalize, W, u, gY))]
        del parts
        calls = {'ms': lambda: step(sharded, part_W, part_u, part_gY, [])}
        if SIZE == 1:
            calls['ms without MPI'] = (
                lambda: step(SF.spectral_normalize, W, u, gY))
        row.update(time_of(calls, rounds))
    x = np.zeros(side, 'f')
    found['allreduce'] = time_of(
        {'ms': lambda: COMM.Allreduce(MPI.IN_PLACE, x, MPI.SUM)}, 20 * rounds)
    return found


def time_of(calls, rounds):
    """Quartiles, in milliseconds, of the slowest rank, of calls in turn."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            COMM.Barrier()
            start = time.perf_counter()
            call()
            times[name].append(
                COMM.allreduce(time.perf_counter() - start, MPI.MAX))
    return {name: [round(1e3 * x, 3) for x in np.percentile(t, [25, 50, 75])]
            for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--measure', action='store_true')
    parser.add_argument('--side', type=int, default=4096)
    parser.add_argument('--rounds', type=int, default=9)
    args = parser.parse_args()
    if args.measure:
        found = measure(args.side, args.rounds)
        if RANK == 0:
            print(json.dumps(found), flush=True)
        return
    for name, function in CHECKS.items():
        function()
        COMM.Barrier()
        if RANK == 0:
            print(name, flush=True)


if __name__ == '__main__':
    try:
        main()
    except BaseException:
        # The other ranks may wait for this one.
        traceback.print_exc()
        sys.stderr.flush()
        COMM.Abort(1)
