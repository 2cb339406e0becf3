"""One weight whose rows are spread over the ranks of MPI.

Rank r holds the rows ``W_r`` of the weight and the entries ``u_r`` of u.  What
has n entries is whole on every rank.  A sum over the ranks is all that is
sent: of n numbers and of one number in each iteration,

    s_k = sum_r W_r^T u_{k-1,r}    v_k = s_k / |s_k|
    t_{k,r} = W_r v_k              |t_k|^2 = sum_r |t_{k,r}|^2
    u_{k,r} = t_{k,r} / |t_k|      sigma = |t_K|

and of n numbers in each step of the adjoint of
:mod:`sn_function._arithmetic.power_iteration`,

    vbar_k = sum_r W_r^T tbar_{k,r}
    sbar_k = (vbar_k - v_k (v_k . vbar_k)) / |s_k|
    G_r += tbar_{k,r} v_k^T + u_{k-1,r} sbar_k^T
    tbar_{k-1,r} = W_r sbar_k / |t_{k-1}|

``<gY, W>`` goes with the first of these.

With several vectors, the rows of ``U``, each pass of
:mod:`sn_function._arithmetic.subspace` has the sums of

    G = sum_r U_r U_r^T      S = sum_r U_r W_r      |T_1|^2 = sum_r |T_{1,r}|^2

and the largest entry of each row of ``W S^T``.  Rank 0 sends what LAPACK makes
of the small matrices G and ``S S^T``.  The gradient has rank 1, and needs
``<gY, W>`` alone.

No rank may take a branch or raise alone: the others would wait for it forever.
So each decision depends on a result of ``MPI_Allreduce``, which MPI requires
to be identical on all ranks, or on what rank 0 has sent.
"""
from __future__ import annotations

import math
import sys
from typing import Any, Sequence

import chainer
import numpy

from sn_function import _checks, errors
from sn_function._arithmetic import power_iteration, subspace
from sn_function._arithmetic.choose import is_on_device
from sn_function._arithmetic.interface import Arithmetic, Arrays, Settings
from sn_function._arithmetic.matrix import (
    ExtremeNormError,
    Matrix,
    accumulator_dtype,
    careful_norm,
    is_ordinary,
    ordinary_norm,
)
from sn_function._graph import node
from sn_function._graph.normalize import ArrayOrVariable, Number

# Settings that must be equal on all ranks, or they would send different data.
FACTS = (
    'the number of columns of W', 'the bytes of an entry of W',
    'the number of vectors (0 for a u of one axis)',
    'n_power_iteration', 'factor (or cap)', 'eps (or cap)', 'detach_uv',
    'update_u', 'return_sigma', 'whether W needs a gradient')


class Ranks:
    """Collective operations of the ranks of a communicator.

    Args:
        comm: An intracommunicator of mpi4py, or a communicator of ChainerMN.

    Raises:
        CommunicatorError: It is neither.

    """

    def __init__(self, comm: Any) -> None:
        # A communicator exists only where MPI has been imported.
        self._mpi: Any = sys.modules.get('mpi4py.MPI')
        self._comm = getattr(comm, 'mpi_comm', comm)
        if self._mpi is None or not isinstance(
                self._comm, self._mpi.Intracomm):
            raise errors.CommunicatorError(comm)

    def sum(self, x: Any) -> Any:
        """Overwrites an array with its sum over the ranks; returns it."""
        self._comm.Allreduce(self._mpi.IN_PLACE, x, self._mpi.SUM)
        return x

    def max(self, numbers: Sequence[float]) -> list[float]:
        """The largest of each number.  None may be NaN, which has no order."""
        x = numpy.array(numbers, numpy.float64)
        self._comm.Allreduce(self._mpi.IN_PLACE, x, self._mpi.MAX)
        return x.tolist()

    def of_first(self, x: Any) -> Any:
        """Overwrites an array with that of rank 0; returns it."""
        self._comm.Bcast(x, 0)
        return x

    def has_largest(self, number: float) -> bool:
        """Whether this rank is the first of those with the largest number."""
        numbers = self._comm.allgather(number)
        return numbers.index(max(numbers)) == self._comm.rank

    def agree(
            self, problem: errors.SpectralNormalizationError | None,
            facts: Sequence[float], u_max: float) -> None:
        """Raises on all ranks or on none.

        Args:
            problem: What this rank has to object, or ``None``.
            facts: Numbers that have to be equal, see ``FACTS``.
            u_max: The largest entry of this rank's part of u.

        """
        n = len(facts)
        is_refused, u_max, *limits = self.max([
            problem is not None, u_max, *facts, *[-x for x in facts]])
        if is_refused:
            messages = self._comm.allgather(problem and str(problem))
            if problem is not None:
                raise problem
            rank, message = next(
                (r, m) for r, m in enumerate(messages) if m is not None)
            raise errors.OtherRankError(rank, message)
        for i, name in enumerate(FACTS):
            if limits[i] != -limits[n + i]:
                raise errors.ShardMismatchError(
                    name, facts[i], -limits[n + i], limits[i])
        if not 0 < u_max < math.inf:
            raise errors.ShardedVectorValueError(u_max)


def _size(x: Any) -> float:
    """The largest magnitude; Inf for NaN."""
    with numpy.errstate(all='ignore'):
        size = float(abs(x).max())
    return size if size < math.inf else math.inf


class ShardedMatrix(Matrix):
    """The rows of a matrix that this rank holds, and what all ranks sum.

    :func:`.power_iteration.power_iteration`, its adjoint, and
    :func:`.subspace.subspace_iteration` run on it as on a whole matrix.  A
    vector of m entries is this rank's part of it; one of n entries is whole.
    """

    __slots__ = ('_is_ordinary', 'ranks')
    ranks: Ranks

    @classmethod
    def of(cls, ranks: Ranks, W: Any, dtype: Any) -> ShardedMatrix:
        rows = cls(W.astype(dtype, copy=False), 0)
        rows.ranks = ranks
        rows._is_ordinary = True
        return rows

    def astype(self, dtype: Any) -> ShardedMatrix:
        return self.of(self.ranks, self.array, dtype)

    def tdot(self, u: Any) -> Any:
        return self.ranks.sum(super().tdot(u))

    def tdot_all(self, U: Any) -> Any:
        return self.ranks.sum(super().tdot_all(U))

    def gram(self, U: Any) -> Any:
        return self.ranks.sum(super().gram(U))

    def peaks(self, U: Any) -> Any:
        return numpy.array(self.ranks.max([_size(u) for u in U]))

    def agreed(self, *arrays: Any) -> Sequence[Any]:
        # LAPACK need not give the same on all kinds of machines.
        message = self.ranks.of_first(
            numpy.concatenate([x.ravel() for x in arrays]))
        ends = numpy.cumsum([x.size for x in arrays])[:-1]
        return [part.reshape(x.shape) for part, x in zip(
            numpy.split(message, ends), arrays)]

    def norm_of_s(self, s: Any, careful: bool) -> float:
        if careful:
            return careful_norm(s)
        # A rank that would stop here tells the others in norm_of_t: its BLAS
        # may add in another order than theirs.
        self._is_ordinary = True
        try:
            return ordinary_norm(s)
        except ExtremeNormError:
            self._is_ordinary = False
            return 1.0

    def norm_of_t(self, t: Any, careful: bool) -> float:
        if careful:
            largest, = self.ranks.max([_size(t)])
            if largest in (0, math.inf):
                return 0 * largest
            return largest * self._norm(t / largest)
        norm = self._norm(t if self._is_ordinary else numpy.array([math.nan]))
        if not is_ordinary(norm, t.dtype):
            raise ExtremeNormError  # on all ranks together
        return norm

    def _norm(self, t: Any) -> float:
        square = numpy.array([float(t.dot(t))])
        return math.sqrt(self.ranks.sum(square)[0])

    def is_zero(self) -> bool:
        return self.ranks.max([_size(self.array)]) == [0]

    def start_at_largest_row(self, dtype: Any) -> Any:
        u = super().start_at_largest_row(dtype)
        if not self.ranks.has_largest(float(self.row_norms().max())):
            u[...] = 0
        return u


class ShardedNormalize(node.Node):
    """``W_r -> (Y_r[, sigma])``, together with the nodes of other ranks.

    Attributes:
        ranks: The ranks.
        settings: What the caller chose.
        has_sigma: Whether sigma is an output.
        iterations: What forward computed; u is this rank's part of it.

    """

    def __init__(
            self, ranks: Ranks, settings: Settings, u: Any, update_u: bool,
            has_sigma: bool) -> None:
        super().__init__()
        self.ranks = ranks
        self.settings = settings
        self.has_sigma = has_sigma
        self._start: Any = u, update_u
        self.iterations: Any = None

    def compute(
            self, arithmetic: Arithmetic, inputs: Arrays) -> Arrays:
        W, = inputs
        u, update_u = self._start
        dtype = accumulator_dtype(W.dtype)
        # NaN and overflow show in the outputs; they need no warning as well.
        with numpy.errstate(all='ignore'):
            # A copy: the owner of u is free to change it.
            iterations = _iterations(
                ShardedMatrix.of(self.ranks, W, dtype), u.copy(),
                self.settings.n_power_iteration, update_u)
            divisor, _ = iterations.floored(self.settings)
            Y = iterations.matrix.array * (self.settings.factor / divisor)
            outputs: Arrays = Y.astype(W.dtype, copy=False),
            if self.has_sigma:
                outputs += numpy.array(iterations.sigma, dtype),
            if update_u:
                power_iteration.store(u, iterations)
        self.iterations = iterations._replace(matrix=None)
        self._start = None
        return outputs

    def backward(
            self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        given = dict(zip(('gY', 'gsigma'), grad_outputs))
        given = {name: g for name, g in given.items() if g is not None}
        return ShardedNormalizeGrad(self, list(given)).apply(
            (*self.get_retained_inputs(), *given.values()))


def _iterations(A: ShardedMatrix, u: Any, n: int, moves: bool) -> Any:
    if u.ndim == 1:
        return power_iteration.power_iteration(A, u, n)
    return subspace.subspace_iteration(A, u, n, moves)


class ShardedNormalizeGrad(node.Node):
    """``(W_r[, gY_r][, gsigma_r]) -> gW_r``"""

    def __init__(self, forward: ShardedNormalize, names: list[str]) -> None:
        super().__init__()
        self.of = forward
        self.names = names

    def compute(
            self, arithmetic: Arithmetic, inputs: Arrays) -> Arrays:
        W, *grads = inputs
        given = dict(zip(self.names, grads))
        with numpy.errstate(all='ignore'):
            gW = self._gradient(W, given.get('gY'), given.get('gsigma'))
            return gW.astype(W.dtype, copy=False),

    def _gradient(self, W: Any, gY: Any, gsigma: Any) -> Any:
        settings, iterations = self.of.settings, self.of.iterations
        dtype = iterations.u.dtype
        A = ShardedMatrix.of(self.of.ranks, W, dtype)
        if gY is not None:
            gY = gY.astype(dtype, copy=False)
        _, is_above = iterations.floored(settings)
        if not (is_above or self.of.has_sigma):
            # The divisor is a constant: there is nothing to sum.
            return gY * power_iteration.coefficients(
                settings, iterations, 1.0, 0.0)[0]
        dot, of_sigma, vbar = self._sums(A, gY, gsigma)
        a, c, _ = power_iteration.coefficients(settings, iterations, 1.0, dot)
        P, Q, _ = power_iteration.adjoint(
            A, iterations, settings.detach_uv, False, vbar)
        return A.combination(a, gY, c + of_sigma, P, Q)

    def _sums(
            self, A: ShardedMatrix, gY: Any, gsigma: Any,
    ) -> tuple[float, float, Any]:
        """``<gY, W>`` and gsigma of all ranks, and ``W^T u_K``; sent at once.

        On a rank that uses only one of its outputs the other adds nothing.
        ``W^T u_K`` is not needed where u and v are constants.
        """
        of = self.of
        rows = Matrix(A.array, 0)  # of this rank alone
        numbers = [0.0, 0.0 if gsigma is None else gsigma.item()]
        vbar: Any = numpy.empty(0)
        if of.settings.detach_uv:
            if gY is not None:
                numbers[0] = rows.inner(gY)
        elif gY is None:
            vbar = rows.tdot(of.iterations.u)
        else:
            numbers[0], vbar = rows.inner_and_tdot(gY, of.iterations.u)
        message = numpy.concatenate([
            vbar, numpy.array(numbers[:1 + of.has_sigma], vbar.dtype)])
        of.ranks.sum(message)
        vbar, sums = message[:vbar.size], message[vbar.size:].tolist()
        return sums[0], sum(sums[1:]), vbar

    def backward(
            self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        raise errors.ShardedDoubleBackwardError


def sharded_spectral_normalize(
        comm: Any,
        W: ArrayOrVariable,
        u: Any,
        n_power_iteration: int = 1,
        factor: Number = 1.0,
        eps: Number = 1e-6,
        *,
        detach_uv: bool = False,
        update_u: bool = False,
        return_sigma: bool = False,
        cap: Number | None = None,
) -> chainer.Variable | tuple[chainer.Variable, ...]:
    """Normalizes a weight of which each MPI rank holds some rows.

    What :func:`~sn_function.functions.spectral_normalize` makes of all rows
    together, in the order of the ranks; each rank gets ``Y`` and the gradient
    of its own rows.  The weight is never gathered.

    Every rank of ``comm`` has to call it, and to run backward through it, in
    the same order among its other calls, as for any collective operation of
    MPI.  The loss that is differentiated is the sum of the losses of all
    ranks.  A rank that has no use for its rows adds ``0 * F.sum(Y)`` to its
    loss.  NumPy only; gradients of first order only.

    Args:
        comm: An intracommunicator of mpi4py, or a communicator of ChainerMN.
        W (:class:`~chainer.Variable` or numpy.ndarray): The rows of this
            rank, 1 or more, with the output axis in front; of dtype float16,
            float32 or float64.  Ranks may have different numbers of rows.
            Sums over float16 are made and sent in float32.
        u (numpy.ndarray): This rank's part of the start vector, of shape
            ``(W.shape[0],)`` and of the dtype of ``W`` (or float32 for a
            float16 weight).  It may be zero, but not on all ranks.  Or its
            parts of ``b`` vectors, of shape ``(b, W.shape[0])``, as in
            :func:`~sn_function.functions.spectral_normalize`; there may be
            more of them than rows on one rank, but not than on all.
        n_power_iteration (int): Number ``K`` of iterations, 1 or more.
        factor (float): A constant factor above 0.
        eps (float): Floor on sigma.
        detach_uv (bool): Take ``u`` and ``v`` as constants in the gradient.
            Backward then sends one number instead of ``K`` vectors, as it
            always does with several vectors.
        update_u (bool): Overwrite ``u`` with this rank's part of the last
            one, unless that is zero or not finite on any rank.
        return_sigma (bool): Return sigma, too.  Its gradients on all ranks
            are added.
        cap (float or None): Largest norm that the weight may keep, instead of
            ``factor`` and ``eps``; gradients do not bring one back below it.

    Returns:
        ~chainer.Variable: ``Y``, of the shape and dtype of ``W``.  With
        ``return_sigma=True`` a tuple of ``Y`` and sigma, the latter of shape
        ``()``, of the dtype of ``W`` (float32 for a float16 weight), and the
        same on all ranks.

    Raises:
        CommunicatorError: ``comm`` is no communicator.  This is the only one
            that a rank raises alone.
        OtherRankError: Another rank has raised one of those below.
        SpectralNormalizationError: One of :mod:`sn_function.errors`.

    NaN or Inf in the rows of one rank gives a ``Y`` of NaN on all of them, and
    does not change ``u``.

    .. admonition:: Example

        To be run by ``mpiexec -n 2 python``::

            import sn_function  # before chainer
            import chainer
            import numpy as np
            from mpi4py import MPI
            from sn_function import distributed

            comm = MPI.COMM_WORLD
            rng = np.random.RandomState(comm.rank)
            W = chainer.Parameter(rng.randn(3 + comm.rank, 5))
            u = rng.randn(3 + comm.rank)
            Y = distributed.sharded_spectral_normalize(
                comm, W, u, n_power_iteration=100)
            whole = np.concatenate(comm.allgather(Y.array))
            print('%.4f' % np.linalg.norm(whole, 2))  # 1.0000

    """
    ranks = Ranks(comm)
    problem, facts, u_max = None, [0.0] * len(FACTS), 0.0
    try:
        factor, eps, _ = numbers = _checks.check_settings(
            n_power_iteration, factor, eps, cap)
        _check_shard(W, u, update_u)
        needs_gradient = isinstance(W, chainer.Variable) and (
            W.requires_grad and chainer.config.enable_backprop)
        n_vectors = len(u) if u.ndim == 2 else 0
        facts = [float(x) for x in (
            W.size // W.shape[0], W.dtype.itemsize, n_vectors,
            n_power_iteration, factor, eps, bool(detach_uv), bool(update_u),
            bool(return_sigma), needs_gradient)]
        u_max = _size(u)
    except errors.SpectralNormalizationError as error:
        problem = error
    ranks.agree(problem, facts, u_max)
    # The gradient of several vectors is that of constant ones.
    settings = Settings(
        int(n_power_iteration), 0, bool(detach_uv) or u.ndim == 2, *numbers)
    outputs = ShardedNormalize(
        ranks, settings, u, update_u, bool(return_sigma)).apply((W,))
    return outputs if return_sigma else outputs[0]


def _check_shard(W: Any, u: Any, update_u: bool) -> None:
    array = W.array if isinstance(W, chainer.Variable) else W
    if is_on_device(array) or is_on_device(u):
        raise errors.ShardedDeviceError
    if isinstance(u, chainer.Variable):
        raise errors.ShardedVectorTypeError
    _checks.check_arrays(W, u, 0, update_u, is_part=True)
