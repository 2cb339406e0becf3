"""Spectral normalization and the spectral norm, as differentiable functions.

.. math::

    Y = \\gamma f W / \\max(\\sigma, \\epsilon)

where :math:`\\sigma` is the estimate of the largest singular value of ``W``
that ``K`` power iterations give.  The nodes of the graph are in
:mod:`sn_function._graph.normalize`.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence, overload

import chainer
import numpy
from chainer.backends import cuda

from sn_function import _checks, errors
from sn_function._arithmetic import matrix, singular
from sn_function._arithmetic.groups import Groups
from sn_function._graph import normalize
from sn_function._graph.normalize import ArrayOrVariable, Number

if TYPE_CHECKING:
    from typing import Literal  # from Python 3.8 on, but not needed to run

__all__ = [
    'conv_spectral_normalize',
    'spectral_norm',
    'spectral_normalize',
    'spectral_normalize_all',
]


@overload
def spectral_normalize(
        W: ArrayOrVariable,
        u: ArrayOrVariable,
        n_power_iteration: int = ...,
        gamma: Number | ArrayOrVariable | None = ...,
        factor: Number = ...,
        eps: Number = ...,
        axis: int = ...,
        *,
        detach_uv: bool = ...,
        update_u: bool = ...,
        return_sigma: Literal[False] = ...,
        cap: Number | None = ...,
        groups: int = ...,
        rtol: Number | None = ...,
        max_iterations: int = ...,
) -> chainer.Variable: ...


@overload
def spectral_normalize(
        W: ArrayOrVariable,
        u: ArrayOrVariable,
        n_power_iteration: int = ...,
        gamma: Number | ArrayOrVariable | None = ...,
        factor: Number = ...,
        eps: Number = ...,
        axis: int = ...,
        *,
        detach_uv: bool = ...,
        update_u: bool = ...,
        return_sigma: Literal[True],
        cap: Number | None = ...,
        groups: int = ...,
        rtol: Number | None = ...,
        max_iterations: int = ...,
) -> tuple[chainer.Variable, chainer.Variable]: ...


@overload
def spectral_normalize(
        W: ArrayOrVariable,
        u: ArrayOrVariable,
        n_power_iteration: int = ...,
        gamma: Number | ArrayOrVariable | None = ...,
        factor: Number = ...,
        eps: Number = ...,
        axis: int = ...,
        *,
        detach_uv: bool = ...,
        update_u: bool = ...,
        return_sigma: bool = ...,
        cap: Number | None = ...,
        groups: int = ...,
        rtol: Number | None = ...,
        max_iterations: int = ...,
) -> chainer.Variable | tuple[chainer.Variable, chainer.Variable]: ...


def spectral_normalize(
        W: ArrayOrVariable,
        u: ArrayOrVariable,
        n_power_iteration: int = 1,
        gamma: Number | ArrayOrVariable | None = None,
        factor: Number = 1.0,
        eps: Number = 1e-6,
        axis: int = 0,
        *,
        detach_uv: bool = False,
        update_u: bool = False,
        return_sigma: bool = False,
        cap: Number | None = None,
        groups: int = 1,
        rtol: Number | None = None,
        max_iterations: int = 200,
) -> chainer.Variable | tuple[chainer.Variable, chainer.Variable]:
    """Divides a weight by an estimate of its largest singular value.

    ``W`` is seen as a matrix with ``m = W.shape[axis]`` rows and all other
    axes, in their order, as its ``n`` columns.  From ``u``,
    ``K = n_power_iteration`` iterations

    .. math::

        v \\leftarrow W^T u / \\|W^T u\\|_2, \\quad
        u \\leftarrow W v / \\|W v\\|_2

    give :math:`\\sigma = u^T W v`, and

    .. math::

        Y = \\gamma f W / \\max(\\sigma, \\epsilon).

    The gradient is that of what was computed, through every iteration, for
    any ``u``.  With ``detach_uv=True``, ``u`` and ``v`` are constants in it,
    as in the paper.  Gradients of any order are available in both modes.

    With **several vectors**, the rows of a ``u`` of shape ``(b, m)``, sigma
    is the largest :math:`\\|W^T q\\|_2` of any unit vector ``q`` in their
    span (subspace iteration with Rayleigh-Ritz).  This takes as many passes
    over ``W`` as one vector, and follows a weight whose leading singular
    values are close, as they are in training: see :doc:`accuracy`.  The span
    is a constant of the gradient, which is exact and of rank 1; so
    ``detach_uv`` makes a difference to gradients of higher order only.

    With a **tolerance** ``rtol``, iterations are run first, outside of the
    graph, as many as it needs.

    Args:
        W (:class:`~chainer.Variable` or :ref:`ndarray`): Weight with 2 or
            more dimensions, of dtype float16, float32 or float64.  Sums over
            float16 are made in float32.
        u (:class:`~chainer.Variable` or :ref:`ndarray`): Start vector of
            shape ``(m,)``, of the dtype of ``W`` (or float32 for a float16
            weight).  Any finite non-zero vector; it need not have norm 1.  Or
            several, of shape ``(b, m)``, with ``b`` from 1 to ``min(m, n)``:
            any that are linearly independent.  The first one is the leading
            one.  From random ones a single iteration is not enough, and with
            several less so: begin with 2, or with some calls that update them.
        n_power_iteration (int): Number ``K`` of iterations, 1 or more.  With
            several vectors all but the last are outside of the graph.
        gamma (:class:`~chainer.Variable`, :ref:`ndarray`, float or None):
            Scale of shape ``()``; ``None`` means 1.
        factor (float): A constant factor :math:`f` above 0: the norm of
            ``Y``, once u has converged, when gamma is 1.
        eps (float): Floor :math:`\\epsilon` on sigma, in units of sigma.
            Below it ``Y`` is ``W`` times a constant, and so tends to zero
            as ``W`` does.  Where ``W`` is zero, the gradient is that of
            ``gamma factor W``, without the floor, so that it can learn.
        axis (int): Output axis of ``W``; may be negative.
        detach_uv (bool): Take ``u`` and ``v`` as constants in the gradient.
        update_u (bool): Overwrite the array ``u`` with the last ``u``,
            unless that is zero or not finite.  ``False`` leaves it alone.
        return_sigma (bool): Return sigma, too.
        cap (float or None): Instead of ``factor`` and ``eps``: the largest
            norm :math:`c` above 0 that ``W`` may keep, :math:`Y = \\gamma W /
            \\max(1, \\sigma / c)`.  A weight below it is left alone, and its
            gradient is that of ``gamma * W`` (H. Gouk et al.,
            `arXiv:1804.04368 <https://arxiv.org/abs/1804.04368>`_).  The
            gradient of one above it is orthogonal to ``W``, so no step along
            it leads back below; see
            :class:`~sn_function.optimizer_hooks.SpectralNormProjection`.
        groups (int): Number ``G`` of maps that ``W`` holds, one after
            another along its first axis, as in a grouped convolution.  Each
            has iterations of its own, and :math:`\\sigma` is the largest of
            their norms.  ``u`` is their vectors, one after another: of shape
            ``(m,)`` with ``axis=0``, else ``(G m,)``.  Several vectors of each
            are ``b`` such rows, with ``b`` up to the smaller side of a group.
        rtol (float or None): Iterate until the residual :math:`\\|W^T u -
            \\sigma v\\|_2 / \\sigma` (with several vectors :math:`\\|W v -
            \\sigma u\\|_2 / \\sigma`) is at most this.  The gradient is that
            of the last ``n_power_iteration`` iterations, and ``u`` gets none.
            Some singular value is then within a relative ``rtol`` of sigma.
        max_iterations (int): The most iterations with ``rtol``.  Where they
            do not suffice there is a
            :class:`~sn_function.errors.ToleranceWarning`, but not on a device,
            where nothing waits for the outcome.

    Returns:
        ~chainer.Variable: ``Y``, of the shape and dtype of ``W``.  With
        ``return_sigma=True`` a tuple of ``Y`` and sigma, the latter of shape
        ``()`` and of the dtype of ``W`` (float32 for a float16 weight), not
        multiplied by ``gamma`` or ``factor``, and without the floor.

    Raises:
        SpectralNormalizationError: One of :mod:`sn_function.errors`, for
            arguments that do not fit together or have no spectral norm.

    Except for rounding, sigma is never above the true norm of ``W``, so the
    norm of ``Y`` comes down to :math:`\\gamma f` as ``u`` converges.  A weight
    that holds NaN or Inf gives a ``Y`` of NaN, and does not change ``u``.

    See: T. Miyato et al., `Spectral Normalization for Generative Adversarial
    Networks <https://arxiv.org/abs/1802.05957>`_

    .. admonition:: Example

        >>> import numpy as np
        >>> from sn_function import functions as F
        >>> W = np.diag([3., 2., 1.])
        >>> u = np.ones(3)
        >>> Y, sigma = F.spectral_normalize(
        ...     W, u, n_power_iteration=20, return_sigma=True)
        >>> print('%.4f' % sigma.array)
        3.0000
        >>> print('%.4f' % np.linalg.norm(Y.array, 2))
        1.0000

    """
    settings = normalize.make_settings(
        n_power_iteration, axis, detach_uv, factor, eps, cap,
        _checks.check_groups(groups))
    outputs, = normalize.normalize([normalize.make_weight(
        W, u, gamma, settings, ('Y', 'sigma') if return_sigma else ('Y',),
        update_u, normalize.until(rtol, max_iterations, n_power_iteration))])
    return (outputs[0], outputs[1]) if return_sigma else outputs[0]


@overload
def conv_spectral_normalize(
        W: ArrayOrVariable,
        u: ArrayOrVariable,
        stride: int | Sequence[int] = ...,
        pad: int | Sequence[int] = ...,
        dilate: int | Sequence[int] = ...,
        groups: int = ...,
        *,
        transposed: bool = ...,
        outsize: Sequence[int] | None = ...,
        cover_all: bool = ...,
        n_power_iteration: int = ...,
        gamma: Number | ArrayOrVariable | None = ...,
        factor: Number = ...,
        eps: Number = ...,
        detach_uv: bool = ...,
        update_u: bool = ...,
        return_sigma: Literal[False] = ...,
        cap: Number | None = ...,
        rtol: Number | None = ...,
        max_iterations: int = ...,
) -> chainer.Variable: ...


@overload
def conv_spectral_normalize(
        W: ArrayOrVariable,
        u: ArrayOrVariable,
        stride: int | Sequence[int] = ...,
        pad: int | Sequence[int] = ...,
        dilate: int | Sequence[int] = ...,
        groups: int = ...,
        *,
        transposed: bool = ...,
        outsize: Sequence[int] | None = ...,
        cover_all: bool = ...,
        n_power_iteration: int = ...,
        gamma: Number | ArrayOrVariable | None = ...,
        factor: Number = ...,
        eps: Number = ...,
        detach_uv: bool = ...,
        update_u: bool = ...,
        return_sigma: Literal[True],
        cap: Number | None = ...,
        rtol: Number | None = ...,
        max_iterations: int = ...,
) -> tuple[chainer.Variable, chainer.Variable]: ...


@overload
def conv_spectral_normalize(
        W: ArrayOrVariable,
        u: ArrayOrVariable,
        stride: int | Sequence[int] = ...,
        pad: int | Sequence[int] = ...,
        dilate: int | Sequence[int] = ...,
        groups: int = ...,
        *,
        transposed: bool = ...,
        outsize: Sequence[int] | None = ...,
        cover_all: bool = ...,
        n_power_iteration: int = ...,
        gamma: Number | ArrayOrVariable | None = ...,
        factor: Number = ...,
        eps: Number = ...,
        detach_uv: bool = ...,
        update_u: bool = ...,
        return_sigma: bool = ...,
        cap: Number | None = ...,
        rtol: Number | None = ...,
        max_iterations: int = ...,
) -> chainer.Variable | tuple[chainer.Variable, chainer.Variable]: ...


def conv_spectral_normalize(
        W: ArrayOrVariable,
        u: ArrayOrVariable,
        stride: int | Sequence[int] = 1,
        pad: int | Sequence[int] = 0,
        dilate: int | Sequence[int] = 1,
        groups: int = 1,
        *,
        transposed: bool = False,
        outsize: Sequence[int] | None = None,
        cover_all: bool = False,
        n_power_iteration: int = 1,
        gamma: Number | ArrayOrVariable | None = None,
        factor: Number = 1.0,
        eps: Number = 1e-6,
        detach_uv: bool = False,
        update_u: bool = False,
        return_sigma: bool = False,
        cap: Number | None = None,
        rtol: Number | None = None,
        max_iterations: int = 200,
) -> chainer.Variable | tuple[chainer.Variable, chainer.Variable]:
    """Divides the weight of a convolution by an estimate of its map's norm.

    Sigma is the largest :math:`\\|\\mathrm{conv}(x, W)\\|_2` of any input
    ``x`` of norm 1: what bounds the layer.  The norm of ``W`` as a matrix, as
    of :func:`spectral_normalize`, is usually below that, and may be above it.
    With ``A`` for the map and ``A*`` for its adjoint, a deconvolution,
    ``K = n_power_iteration`` iterations

    .. math::

        v \\leftarrow A u / \\|A u\\|_2, \\quad
        u \\leftarrow A^* v / \\|A^* v\\|_2

    from an input ``u`` give :math:`\\sigma = \\|A^* v\\|_2`.  The shape of
    ``u`` tells the size of inputs, on which the norm depends: larger ones have
    a larger norm, up to a limit that :func:`sn_function.certify` finds.  Each
    iteration takes as long as the layer for two images.  All else is as in
    :func:`spectral_normalize`: gradients of any order, several vectors,
    tolerance.

    On a device Chainer's own convolutions are used, and the host waits for
    two numbers in each iteration.

    Args:
        W (:class:`~chainer.Variable` or :ref:`ndarray`): Weight of a
            convolution of ``d`` dimensions, of shape ``(c_out, c_in / groups,
            *k)``, or of a deconvolution, ``(c_in, c_out / groups, *k)``.
        u (:class:`~chainer.Variable` or :ref:`ndarray`): An input to start
            from, of shape ``(c_in, *size)``, of the dtype of ``W`` (or float32
            for a float16 weight): any that is finite and not mapped to zero.
            Or several of them, of shape ``(b, c_in, *size)``, linearly
            independent.
        stride (int or tuple): Stride of the convolution, one for all axes or
            one for each of ``d``; as in :func:`~chainer.functions.\
convolution_nd`, and so are the next three.
        pad (int or tuple): Width of the zeros around inputs.
        dilate (int or tuple): Dilation of the kernel.
        groups (int): Number of groups of channels.  Each is a map by itself,
            with iterations of its own, and sigma is the largest one; of
            several vectors, each group has ``b``.
        transposed (bool): Whether it is a deconvolution.
        outsize (tuple or None): Size of the outputs of a deconvolution, as in
            :func:`~chainer.functions.deconvolution_nd`.
        cover_all (bool): Whether a convolution covers all of its input.
        n_power_iteration (int): Number ``K`` of iterations, 1 or more.
        gamma (:class:`~chainer.Variable`, :ref:`ndarray`, float or None):
            Scale of shape ``()``; ``None`` means 1.
        factor (float): A constant factor above 0.
        eps (float): Floor on sigma.
        detach_uv (bool): Take ``u`` and ``v`` as constants in the gradient.
        update_u (bool): Overwrite the array ``u`` with the last ``u``.
        return_sigma (bool): Return sigma, too.
        cap (float or None): Largest norm that the map may keep, instead of
            ``factor`` and ``eps``.
        rtol (float or None): Tolerance, as in :func:`spectral_normalize`, with
            ``A*`` in the place of ``W``.
        max_iterations (int): The most iterations with ``rtol``.

    Returns:
        ~chainer.Variable: ``Y``, of the shape and dtype of ``W``.  With
        ``return_sigma=True`` a tuple of ``Y`` and sigma.

    Raises:
        SpectralNormalizationError: One of :mod:`sn_function.errors`.

    See: H. Gouk et al., `Regularisation of Neural Networks by Enforcing
    Lipschitz Continuity <https://arxiv.org/abs/1804.04368>`_

    .. admonition:: Example

        A kernel of ones has the norm 3 as a matrix, and nearly 9 as a map.

        >>> import numpy as np
        >>> from sn_function import functions as F
        >>> W = np.ones((1, 1, 3, 3))
        >>> u = np.ones((1, 32, 32))
        >>> Y, sigma = F.conv_spectral_normalize(
        ...     W, u, pad=1, n_power_iteration=50, return_sigma=True)
        >>> print('%.2f' % sigma.array)
        8.95

    """
    settings = normalize.make_settings(
        n_power_iteration, 0, detach_uv, factor, eps, cap)
    convolution = _checks.check_convolution(
        W, stride, pad, dilate, groups, transposed, outsize, cover_all,
        u.shape)
    outputs, = normalize.normalize([normalize.make_map(
        W, u, gamma, settings._replace(
            convolution=convolution, groups=convolution.split),
        ('Y', 'sigma') if return_sigma else ('Y',), update_u,
        normalize.until(rtol, max_iterations, n_power_iteration))])
    return (outputs[0], outputs[1]) if return_sigma else outputs[0]


def spectral_norm(
        W: ArrayOrVariable,
        u: ArrayOrVariable | None = None,
        n_power_iteration: int = 1,
        axis: int = 0,
        *,
        detach_uv: bool = False,
        update_u: bool = False,
        groups: int = 1,
        rtol: Number | None = None,
        max_iterations: int = 200,
) -> chainer.Variable:
    """Returns the largest singular value of a weight, differentiably.

    **Without u** it is the value itself, up to rounding, and so is its
    gradient, :math:`u v^T`: for a question that is asked once.  The iterations
    begin at the left singular vector of the largest singular value, which is
    found in float64 on the host, and is a constant of the gradient.  For a
    small matrix that takes as long as a singular value decomposition, for a
    large one less.  A weight of float32 or float64, other than zero, is
    normalized once by ``W / spectral_norm(W)``.

    **With u** it is an estimate, for penalties and for logging: each step of
    training goes on from the ``u`` of the one before.  Except for rounding,
    the estimate is never above the true value.  Its gradient is that of the
    iterations, and :math:`u v^T` once they have converged.

    Args:
        W (:class:`~chainer.Variable` or :ref:`ndarray`): Weight, as in
            :func:`spectral_normalize`.
        u (:class:`~chainer.Variable`, :ref:`ndarray` or None): Start vector
            of shape ``(W.shape[axis],)``, or several of them, as in
            :func:`spectral_normalize`; or none.
        n_power_iteration (int): Number of iterations, 1 or more.  Without
            ``u`` one is enough, but for gradients of higher order, which are
            those of the iterations.
        axis (int): Output axis of ``W``; may be negative.
        detach_uv (bool): Take ``u`` and ``v`` as constants in the gradient.
        update_u (bool): Overwrite the array ``u``, which must be given,
            with the last ``u``, unless that is zero or not finite.
        groups (int): Number of maps along the first axis of ``W``, as in
            :func:`spectral_normalize`; sigma is the largest of theirs.
        rtol (float or None): Tolerance, as in :func:`spectral_normalize`.
        max_iterations (int): The most iterations with ``rtol``.

    Returns:
        ~chainer.Variable: Sigma, of shape ``()`` and of the dtype of ``W``
        (float32 for a float16 weight).

    Raises:
        SpectralNormalizationError: One of :mod:`sn_function.errors`.

    See: Y. Yoshida and T. Miyato, `Spectral Norm Regularization for Improving
    the Generalizability of Deep Learning <https://arxiv.org/abs/1705.10941>`_

    .. admonition:: Example

        >>> import chainer
        >>> import numpy as np
        >>> from sn_function import functions as F
        >>> W = chainer.Parameter(np.diag([3., 1.]))
        >>> sigma = F.spectral_norm(W)
        >>> print('%.4f' % sigma.array)
        3.0000
        >>> sigma.backward()
        >>> print(np.round(W.grad, 4) + 0)
        [[1. 0.]
         [0. 0.]]
        >>> print('%.4f' % F.spectral_norm(W, np.ones(2)).array)  # 1 iteration
        2.8636

    """
    split = _checks.check_groups(groups)
    if u is None:
        if update_u:
            raise errors.VectorUpdateError(u)
        u = _leading(W, axis, split)
    settings = normalize.make_settings(
        n_power_iteration, axis, detach_uv, 1.0, 0.0, None,
        split)
    outputs, = normalize.normalize([normalize.make_weight(
        W, u, None, settings, ('sigma',), update_u,
        normalize.until(rtol, max_iterations, n_power_iteration))])
    return outputs[0]


def _leading(W: ArrayOrVariable, axis: int, groups: Groups | None) -> Any:
    """Returns the left singular vector of the largest singular value."""
    array = _checks.array_of_weight(W)
    axis = matrix.normalize_axis(axis, array.ndim)
    host = cuda.to_cpu(array)
    if not numpy.isfinite(host).all():  # sigma is NaN, whatever u is
        host = numpy.ones_like(host)
    _, u = singular.leading_of_weight(host, axis, groups, 1)
    return chainer.backend.get_device_from_array(array).send(
        u.astype(matrix.accumulator_dtype(array.dtype)))


@overload
def spectral_normalize_all(
        Ws: Sequence[ArrayOrVariable],
        us: Sequence[ArrayOrVariable],
        n_power_iteration: int = ...,
        gammas: Sequence[Number | ArrayOrVariable | None] | None = ...,
        factor: Number = ...,
        eps: Number = ...,
        axis: int | Sequence[int] = ...,
        *,
        detach_uv: bool = ...,
        update_u: bool = ...,
        return_sigma: Literal[False] = ...,
        cap: Number | None = ...,
        groups: int | Sequence[int] = ...,
        rtol: Number | None = ...,
        max_iterations: int = ...,
) -> tuple[chainer.Variable, ...]: ...


@overload
def spectral_normalize_all(
        Ws: Sequence[ArrayOrVariable],
        us: Sequence[ArrayOrVariable],
        n_power_iteration: int = ...,
        gammas: Sequence[Number | ArrayOrVariable | None] | None = ...,
        factor: Number = ...,
        eps: Number = ...,
        axis: int | Sequence[int] = ...,
        *,
        detach_uv: bool = ...,
        update_u: bool = ...,
        return_sigma: Literal[True],
        cap: Number | None = ...,
        groups: int | Sequence[int] = ...,
        rtol: Number | None = ...,
        max_iterations: int = ...,
) -> tuple[tuple[chainer.Variable, ...], tuple[chainer.Variable, ...]]: ...


@overload
def spectral_normalize_all(
        Ws: Sequence[ArrayOrVariable],
        us: Sequence[ArrayOrVariable],
        n_power_iteration: int = ...,
        gammas: Sequence[Number | ArrayOrVariable | None] | None = ...,
        factor: Number = ...,
        eps: Number = ...,
        axis: int | Sequence[int] = ...,
        *,
        detach_uv: bool = ...,
        update_u: bool = ...,
        return_sigma: bool = ...,
        cap: Number | None = ...,
        groups: int | Sequence[int] = ...,
        rtol: Number | None = ...,
        max_iterations: int = ...,
) -> (tuple[chainer.Variable, ...]
      | tuple[tuple[chainer.Variable, ...], tuple[chainer.Variable, ...]]): ...


def spectral_normalize_all(
        Ws: Sequence[ArrayOrVariable],
        us: Sequence[ArrayOrVariable],
        n_power_iteration: int = 1,
        gammas: Sequence[Number | ArrayOrVariable | None] | None = None,
        factor: Number = 1.0,
        eps: Number = 1e-6,
        axis: int | Sequence[int] = 0,
        *,
        detach_uv: bool = False,
        update_u: bool = False,
        return_sigma: bool = False,
        cap: Number | None = None,
        groups: int | Sequence[int] = 1,
        rtol: Number | None = None,
        max_iterations: int = 200,
) -> tuple[chainer.Variable, ...] | tuple[tuple[chainer.Variable, ...], ...]:
    """Normalizes many weights, such as all of a model, in one node.

    The results are those of :func:`spectral_normalize` for each weight.  Most
    of the time that a small weight takes is that of a node of the graph; here
    all weights share one.  Backward passes through it once the gradients of
    all ``Y`` are known, so these are in memory together.

    Args:
        Ws (list of :class:`~chainer.Variable` or :ref:`ndarray`): Weights, on
            one device.  Shapes and dtypes may differ.
        us (list of :class:`~chainer.Variable` or :ref:`ndarray`): Start
            vector of each, of shape ``(W.shape[axis],)``, or several.  With
            ``update_u`` no array may be there twice.
        n_power_iteration (int): Number of iterations, 1 or more.
        gammas (list or None): Scale of each, of shape ``()``; ``None`` is 1.
        factor (float): A constant factor above 0.
        eps (float): Floor on sigma.
        axis (int or list of int): Output axis, one for all or one for each.
        detach_uv (bool): Take ``u`` and ``v`` as constants in the gradient.
        update_u (bool): Overwrite the arrays ``us`` with the last vectors.
            If a start vector is not valid, none is changed.
        return_sigma (bool): Return the sigmas, too.
        cap (float or None): Largest norm that a weight may keep, instead of
            ``factor`` and ``eps``; gradients do not bring one back below it.
        groups (int or list of int): Number of maps in a weight, one for all
            or one for each; with several, a vector has their length.
        rtol (float or None): Tolerance, as in :func:`spectral_normalize`.
        max_iterations (int): The most iterations with ``rtol``.

    Returns:
        tuple of ~chainer.Variable: The normalized weights.  With
        ``return_sigma=True``, these and a tuple of the sigmas.

    Raises:
        SpectralNormalizationError: One of :mod:`sn_function.errors`.

    .. admonition:: Example

        >>> import numpy as np
        >>> from sn_function import functions as F
        >>> Ws = [np.diag([3., 1.]), np.full((2, 4), .5)]
        >>> us = [np.ones(2), np.ones(2)]
        >>> Ys = F.spectral_normalize_all(Ws, us, n_power_iteration=20)
        >>> print(' '.join('%.4f' % np.linalg.norm(Y.array, 2) for Y in Ys))
        1.0000 1.0000

    """
    n = len(Ws)
    axes, counts = ([x] * n if not isinstance(x, (list, tuple)) else x
                    for x in (axis, groups))
    gammas = [None] * n if gammas is None else gammas
    for name, given in (('us', us), ('gammas', gammas), ('axis', axes),
                        ('groups', counts)):
        if len(given) != n:
            raise errors.CountError(name, len(given), n)
    names = ('Y', 'sigma') if return_sigma else ('Y',)
    settings = normalize.make_settings(
        n_power_iteration, 0, detach_uv, factor, eps, cap)
    renewal = normalize.until(rtol, max_iterations, n_power_iteration)
    outputs = normalize.normalize([
        normalize.make_weight(
            W, u, gamma, settings._replace(
                axis=axis, groups=_checks.check_groups(count)),
            names, update_u, renewal)
        for W, u, gamma, axis, count in zip(Ws, us, gammas, axes, counts)])
    columns = tuple([
        tuple([of_weight[i] for of_weight in outputs])
        for i in range(len(names))])
    return columns if return_sigma else columns[0]
