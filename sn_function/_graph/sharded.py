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

``<gY, W>`` goes with the first of these.  That tbar_{k-1} is orthogonal to
u_{k-1} needs no sum: with ubar = W sbar_k, and as s_k = W^T u_{k-1},

    u_{k-1} . ubar = s_k . sbar_k = |s_k| (v_k . sbar_k) = 0.

No rank may take a branch, or raise, alone: the others would wait for it for
ever.  So each decision is made from what ``MPI_Allreduce`` has returned, which
MPI requires to be identical on all ranks.
"""
from __future__ import annotations

import math
import sys
from typing import Any, Sequence

import chainer
import numpy

from sn_function import _checks, errors
from sn_function._arithmetic import matrix, power_iteration
from sn_function._arithmetic.power_iteration import (
    ORDINARY,
    PowerIteration,
    Settings,
)
from sn_function._graph import node
from sn_function.functions import ArrayOrVariable, Number

# Norms, as those of ORDINARY.
ANY = (-1.0, math.inf)

# What all ranks have to call with: else they would send different things.
FACTS = (
    'the number of columns of W', 'the bytes of an entry of W',
    'n_power_iteration', 'factor (or cap)', 'eps (or cap)', 'detach_uv',
    'update_u', 'return_sigma', 'whether W needs a gradient')


class Ranks:
    """What the ranks of a communicator find out together.

    Args:
        comm: An intracommunicator of mpi4py, or a communicator of ChainerMN.

    Raises:
        CommunicatorError: It is neither.

    """

    def __init__(self, comm: Any) -> None:
        # Who has a communicator has imported it; nobody else needs MPI.
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

    def has_largest(self, number: float) -> bool:
        """Whether this rank is the first of those with the largest number."""
        numbers = self._comm.allgather(number)
        return numbers.index(max(numbers)) == self._comm.rank

    def agree(
            self, problem: errors.SpectralNormalizationError | None,
            facts: Sequence[float], u_max: float) -> float:
        """Raises on all ranks or on none.

        Args:
            problem: What this rank has to object, or ``None``.
            facts: Numbers that have to be equal, see ``FACTS``.
            u_max: The largest entry of this rank's part of u.

        Returns:
            The largest entry of u.

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
        return u_max


class _ExtremeNorm(ArithmeticError):
    """Raised on all ranks together."""


def _size(x: Any) -> float:
    """The largest magnitude; Inf for NaN."""
    with numpy.errstate(all='ignore'):
        size = float(abs(x).max())
    return size if size < math.inf else math.inf


def _iterate(
        ranks: Ranks, A: matrix.Matrix, u: Any, n: int,
        norms: tuple[float, float]) -> PowerIteration:
    """Runs ``n`` iterations.

    Raises:
        _ExtremeNorm: A norm is not between these two.

    """
    low, high = norms
    us, vs, s_norms, t_norms = [u], [], [], []
    sigma = 0.0
    for _ in range(n):
        s = ranks.sum(A.tdot(u))
        s_norm = math.sqrt(s.dot(s))
        v = s / (s_norm or 1.0)
        t = A.dot(v)
        # A rank that would stop at |s| tells the others by a NaN: its BLAS
        # may add in another order than theirs.
        square = float(t.dot(t)) if low < s_norm < high else math.nan
        sigma = math.sqrt(ranks.sum(numpy.array([square]))[0])
        if not low < sigma < high:
            raise _ExtremeNorm
        u = t / (sigma or 1.0)
        us.append(u)
        vs.append(v)
        s_norms.append(s_norm or 1.0)
        t_norms.append(sigma or 1.0)
    return PowerIteration(us, vs, s_norms, t_norms, sigma)


def _power_iterations(
        ranks: Ranks, A: matrix.Matrix, u: Any, n: int, u_max: float,
) -> PowerIteration:
    """As :func:`sn_function._arithmetic.power_iteration.power_iteration`."""
    try:
        return _iterate(ranks, A, u, n, ORDINARY[u.dtype.char])
    except _ExtremeNorm:
        return _rescaled(ranks, A, u, n, u_max)


def _rescaled(
        ranks: Ranks, A: matrix.Matrix, u: Any, n: int, u_max: float,
) -> PowerIteration:
    """The same for a weight or a u of extreme size, or a zero product."""
    scale, = ranks.max([_size(A.array)])
    if scale == math.inf:
        us, vs = ([numpy.full(length, numpy.nan, u.dtype)] * n
                  for length in (A.m, A.n))
        ones = [1.0] * n
        return PowerIteration([u, *us], vs, ones, ones, math.nan)
    if scale == 0:
        return _iterate(ranks, A, u, n, ANY)
    # Powers of two: dividing by them loses no digit.
    scale = 2.0 ** (math.frexp(scale)[1] - 1)
    u_scale = 2.0 ** (math.frexp(u_max)[1] - 1)
    A = A.scaled(scale)
    it = _iterate(ranks, A, u / u_scale, n, ANY)
    if not it.sigma:
        # W^T u_0 is zero and W is not.  The largest row is never orthogonal
        # to itself.
        e = numpy.zeros_like(u)
        i = A.largest_row()
        if ranks.has_largest(float(numpy.linalg.norm(A.array[i]))):
            e[i] = 1
        it = _iterate(ranks, A, e, n, ANY)._replace(restarted=True)
    return it._replace(scale=scale, u_scale=u_scale)


def _adjoint(
        ranks: Ranks, A: matrix.Matrix, it: PowerIteration, vbar: Any,
) -> tuple[Any, Any]:
    """Returns P, of this rank, and Q: ``d sigma / d W_r = P^T Q``.

    Args:
        ranks: The ranks.
        A: The rows that ``it`` was computed from.
        it: The iterations.
        vbar: ``W^T u_K``, summed over the ranks.

    """
    K = len(it.vs)
    P = numpy.empty((2 * K, A.m), it.u.dtype)
    Q = numpy.empty((2 * K, A.n), it.u.dtype)
    tbar = it.u
    for k in range(K - 1, -1, -1):
        if k < K - 1:
            vbar = ranks.sum(A.tdot(tbar))
        v = it.vs[k]
        sbar = (vbar - v * v.dot(vbar)) / it.s_norms[k]
        P[2 * k], Q[2 * k] = tbar, v
        P[2 * k + 1], Q[2 * k + 1] = it.us[k], sbar
        if k > 0:
            tbar = A.dot(sbar) / it.t_norms[k - 1]
    return P, Q


class ShardedNormalize(node.Node):
    """``W_r -> (Y_r[, sigma])``, together with the nodes of other ranks.

    Attributes:
        ranks: The ranks.
        settings: What the caller chose.
        has_sigma: Whether sigma is an output.
        it: What forward computed; u is this rank's part of it.

    """

    def __init__(
            self, ranks: Ranks, settings: Settings, u: Any, u_max: float,
            update_u: bool, has_sigma: bool) -> None:
        super().__init__()
        self.ranks = ranks
        self.settings = settings
        self.has_sigma = has_sigma
        self._start: Any = u, u_max, update_u
        self.it: Any = None

    def compute(
            self, arithmetic: Any, inputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        W, = inputs
        u, u_max, update_u = self._start
        n = self.settings.n_power_iteration
        # NaN and overflow show in the outputs; they need no warning as well.
        with numpy.errstate(all='ignore'):
            A = power_iteration.unfold(W, 0)
            dtype = A.array.dtype
            # A copy: the owner of u is free to change it.
            it = _power_iterations(
                self.ranks, A, u.astype(dtype), n, u_max)
            divisor, scale, _ = it.floored(self.settings.eps)
            x = A.array if scale == 1.0 else A.array / scale
            Y = x * (self.settings.factor / divisor)
            outputs: tuple[Any, ...] = Y.astype(W.dtype, copy=False),
            if self.has_sigma:
                outputs += numpy.array(it.sigma * it.scale, dtype),
            if update_u:
                power_iteration.store(u, it)
        self._start, self.it = None, it
        return outputs

    def backward(
            self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        given = dict(zip(('gY', 'gsigma'), grad_outputs))
        given = {name: g for name, g in given.items() if g is not None}
        return ShardedNormalizeGrad(self, list(given)).apply(
            (*self.get_retained_inputs(), *given.values()))


class ShardedNormalizeGrad(node.Node):
    """``(W_r[, gY_r][, gsigma_r]) -> gW_r``"""

    def __init__(self, forward: ShardedNormalize, names: list[str]) -> None:
        super().__init__()
        self.of = forward
        self.names = names

    def compute(
            self, arithmetic: Any, inputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        W, *grads = inputs
        given = dict(zip(self.names, grads))
        with numpy.errstate(all='ignore'):
            gW = self._gradient(W, given.get('gY'), given.get('gsigma'))
        return gW.astype(W.dtype, copy=False),

    def _gradient(self, W: Any, gY: Any, gsigma: Any) -> Any:
        ranks, settings, it = self.of.ranks, self.of.settings, self.of.it
        A = power_iteration.unfold(W, 0)
        if gY is not None:
            gY = gY.astype(A.array.dtype, copy=False)
        divisor, scale, is_above = it.floored(settings.eps)
        a = settings.factor / divisor / scale
        if not (is_above or self.of.has_sigma):
            return gY * a  # the divisor is a constant: there is nothing to sum
        if it.scale != 1.0:
            A = A.scaled(it.scale)
        # On a rank that uses only one of its outputs the other adds nothing.
        numbers = [0.0, 0.0 if gsigma is None else gsigma.item()]
        numbers = numbers[:1 + self.of.has_sigma]
        if settings.detach_uv:
            if gY is not None:
                numbers[0] = A.inner(gY)
            sums = ranks.sum(numpy.array(numbers))
            P, Q = it.u[None], it.v[None]
        else:
            if gY is None:
                vbar = A.tdot(it.u)
            else:
                numbers[0], vbar = A.inner_and_tdot(gY, it.u)
            message = numpy.empty(A.n + len(numbers), vbar.dtype)
            message[:A.n], message[A.n:] = vbar, numbers
            ranks.sum(message)
            vbar, sums = message[:A.n], message[A.n:]
            P, Q = _adjoint(ranks, A, it, vbar)
        dot, *of_sigma = sums.tolist()
        c = sum(of_sigma)
        if is_above:
            # Twice divided: sigma ** 2 could overflow.
            c -= a * (dot / divisor)
        return A.combination(a, gY, c, P, Q)

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
            float16 weight).  It may be zero, but not on all ranks.
        n_power_iteration (int): Number ``K`` of iterations, 1 or more.
        factor (float): A constant factor above 0.
        eps (float): Floor on sigma.
        detach_uv (bool): Take ``u`` and ``v`` as constants in the gradient.
            Backward then sends one number instead of ``K`` vectors.
        update_u (bool): Overwrite ``u`` with this rank's part of the last
            one, unless that is zero or not finite on any rank.
        return_sigma (bool): Return sigma, too.  Its gradients on all ranks
            are added.
        cap (float or None): Largest norm that the weight may keep, instead of
            ``factor`` and ``eps``.

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
        factor, eps = _checks.check_settings(
            n_power_iteration, factor, eps, cap)
        _check_shard(W, u, update_u)
        needs_gradient = isinstance(W, chainer.Variable) and (
            W.requires_grad and chainer.config.enable_backprop)
        facts = [float(x) for x in (
            W.size // W.shape[0], W.dtype.itemsize, n_power_iteration, factor,
            eps, bool(detach_uv), bool(update_u), bool(return_sigma),
            needs_gradient)]
        u_max = _size(u)
    except errors.SpectralNormalizationError as error:
        problem = error
    u_max = ranks.agree(problem, facts, u_max)
    settings = Settings(
        int(n_power_iteration), 0, bool(detach_uv), factor, eps)
    outputs = ShardedNormalize(
        ranks, settings, u, u_max, update_u, bool(return_sigma)).apply((W,))
    return outputs if return_sigma else outputs[0]


def _check_shard(W: Any, u: Any, update_u: bool) -> None:
    array = W.array if isinstance(W, chainer.Variable) else W
    if _checks.is_on_device(array) or _checks.is_on_device(u):
        raise errors.ShardedDeviceError
    if isinstance(u, chainer.Variable):
        raise errors.ShardedVectorTypeError
    _checks.check_arrays(W, u, 0, update_u)
