"""Spectral normalization and the spectral norm, as differentiable functions.

.. math::

    Y = \\gamma f W / \\max(\\sigma, \\epsilon)

where :math:`\\sigma` is the estimate of the largest singular value of ``W``
that ``K`` power iterations give.  Here are the nodes of the graph; their
arithmetic is in :mod:`sn_function._power_iteration` for NumPy, and in
:mod:`sn_function._device` for CuPy.
"""
from __future__ import annotations

from typing import Any, Sequence, Union

import chainer
import numpy
from chainer import function_node
from chainer import functions as F

from sn_function import _checks, _composition, _device, _power_iteration
from sn_function._power_iteration import Settings

Array = Any  # numpy.ndarray or cupy.ndarray
ArrayOrVariable = Any  # Array or chainer.Variable
Number = Union[int, float]


def arithmetic_of(array: Array) -> Any:
    """Returns the module that computes on this kind of array."""
    return _device if _checks.is_on_device(array) else _power_iteration


class _Node(function_node.FunctionNode):
    """What the nodes share: the arguments, by name, among the inputs.

    ``constants`` holds those that no gradient is wanted for: leaving them
    out of the graph is what makes it cheap.
    """

    def __init__(
            self, settings: Settings, names: Sequence[str],
            constants: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        self.names = names
        self.constants = constants

    def arguments(self, inputs: tuple[Array, ...]) -> dict[str, Any]:
        self.retain_inputs(tuple(range(len(inputs))))
        return dict(zip(self.names, inputs), **self.constants)


class SpectralNormalize(_Node):
    """``(W[, u][, gamma]) -> Y[, sigma]``, or ``-> sigma`` alone."""

    def __init__(
            self, settings: Settings, names: Sequence[str],
            constants: dict[str, Any], outputs: Sequence[str],
            update_u: bool) -> None:
        super().__init__(settings, names, constants)
        self.output_names = outputs
        self.update_u = update_u

    def forward_cpu(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        return self._forward(_power_iteration, inputs)

    def forward_gpu(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        return self._forward(_device, inputs)

    def _forward(
            self, arithmetic: Any, inputs: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        outputs, self.it = arithmetic.normalize(
            self.settings, **self.arguments(inputs),
            output_names=self.output_names, update_u=self.update_u)
        # The owners of arrays are free to change them.
        if 'u' in self.constants:
            self.constants['u'] = None
        if not isinstance(self.constants.get('gamma', 1.0), float):
            self.constants['gamma'] = self.constants['gamma'].copy()
        return outputs

    def backward(
            self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        names = self.names
        wanted = [
            names[i] for i in indexes
            if not (names[i] == 'u' and self.settings.detach_uv)]
        if not wanted:
            return tuple(None for _ in indexes)
        inputs = dict(zip(names, self.get_retained_inputs()))
        for name, g in zip(self.output_names, grad_outputs):
            if g is not None:
                inputs['g' + name] = g
        if chainer.config.enable_backprop:
            grads = SpectralNormalizeGrad(
                self.settings, list(inputs), self.constants, self.it, wanted
            ).apply(tuple(inputs.values()))
        else:
            # No graph is wanted: spare a small weight the cost of a node.
            arrays = {name: x.array for name, x in inputs.items()}
            grads = tuple([chainer.Variable(g) for g in arithmetic_of(
                arrays['W']).gradients(
                    self.settings, self.it, wanted,
                    **arrays, **self.constants)])
        if len(wanted) == len(indexes):
            return grads
        found = dict(zip(wanted, grads))
        return tuple(found.get(names[i]) for i in indexes)


class SpectralNormalizeGrad(_Node):
    """``(W[, u][, gamma][, gY][, gsigma]) -> (gW, gu, ggamma)``, as wanted."""

    def __init__(
            self, settings: Settings, names: Sequence[str],
            constants: dict[str, Any], it: Any,
            wanted: Sequence[str]) -> None:
        super().__init__(settings, names, constants)
        self.it = it
        self.wanted = wanted

    def forward_cpu(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        return _power_iteration.gradients(
            self.settings, self.it, self.wanted, **self.arguments(inputs))

    def forward_gpu(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        return _device.gradients(
            self.settings, self.it, self.wanted, **self.arguments(inputs))

    def backward(
            self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        # The gradients are written once more, as a graph of Chainer's
        # functions, and differentiated.  The inputs go through an identity:
        # chainer.grad must stop there, for gY may itself depend on W.
        with chainer.force_backprop_mode(), numpy.errstate(all='ignore'):
            inputs = {name: F.identity(x) for name, x in
                      zip(self.names, self.get_retained_inputs())}
            x = dict(self.constants, **inputs)
            outputs = dict(zip(('gY', 'gsigma'), _composition.compose(
                self.settings, self.it, x['W'], x['u'], x['gamma'])))
            given = [name for name in outputs if name in x]
            grads = chainer.grad(
                [outputs[name] for name in given],
                [x[name] for name in self.wanted],
                [x[name] for name in given], enable_double_backprop=True)
        pairs = [(g, gg) for g, gg in zip(grads, grad_outputs)
                 if g is not None and gg is not None]
        with numpy.errstate(all='ignore'):
            return tuple(chainer.grad(
                [g for g, _ in pairs], [x[self.names[i]] for i in indexes],
                [gg for _, gg in pairs],
                enable_double_backprop=chainer.config.enable_backprop))


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
) -> chainer.Variable | tuple[chainer.Variable, ...]:
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
    any ``u``; with ``detach_uv=True`` it takes ``u`` and ``v`` as constants,
    as the paper does.  Gradients of any order are available in both modes.

    Args:
        W (:class:`~chainer.Variable` or :ref:`ndarray`): Weight with 2 or
            more dimensions, of dtype float16, float32 or float64.  Sums over
            float16 are made in float32.
        u (:class:`~chainer.Variable` or :ref:`ndarray`): Start vector of
            shape ``(m,)``, of the dtype of ``W`` (or float32 for a float16
            weight).  Any finite non-zero vector; it need not have norm 1.
        n_power_iteration (int): Number ``K`` of iterations, 1 or more.
        gamma (:class:`~chainer.Variable`, :ref:`ndarray`, float or None):
            Scale of shape ``()``; ``None`` means 1.
        factor (float): A constant factor :math:`f` above 0: the norm of
            ``Y``, once u has converged, when gamma is 1.
        eps (float): Floor :math:`\\epsilon` on sigma, in units of sigma.
            Below it ``Y`` is ``W`` times a constant, and so tends to zero
            as ``W`` does.
        axis (int): Output axis of ``W``; may be negative.
        detach_uv (bool): Take ``u`` and ``v`` as constants in the gradient.
        update_u (bool): Overwrite the array ``u`` with the last ``u``,
            unless that is zero or not finite.  ``False`` leaves it alone.
        return_sigma (bool): Return sigma, too.

    Returns:
        ~chainer.Variable: ``Y``, of the shape and dtype of ``W``.  With
        ``return_sigma=True`` a tuple of ``Y`` and sigma, the latter of shape
        ``()`` and of the dtype of ``W`` (float32 for a float16 weight), not
        multiplied by ``gamma`` or ``factor``, and without the floor.

    Raises:
        SpectralNormalizationError: One of :mod:`sn_function.errors`, for
            arguments that do not fit together or have no spectral norm.

    Sigma is never above the true norm of ``W``, but for rounding, so the norm
    of ``Y`` comes down to :math:`\\gamma f` as ``u`` converges.  A weight that
    holds NaN or Inf gives a ``Y`` of NaN, and does not change ``u``.

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
    outputs, _ = normalize(
        W, u, n_power_iteration, gamma, factor, eps, axis, detach_uv,
        update_u, ('Y', 'sigma') if return_sigma else ('Y',))
    return outputs if return_sigma else outputs[0]


def spectral_norm(
        W: ArrayOrVariable,
        u: ArrayOrVariable,
        n_power_iteration: int = 1,
        axis: int = 0,
        *,
        detach_uv: bool = False,
        update_u: bool = False,
) -> chainer.Variable:
    """Estimates the largest singular value of a weight, differentiably.

    For penalties and for logging.  The estimate is never above the true
    value, but for rounding.  Its gradient with respect to ``W`` is
    :math:`u v^T` once ``u`` and ``v`` have converged.

    Args:
        W (:class:`~chainer.Variable` or :ref:`ndarray`): Weight, as in
            :func:`spectral_normalize`.
        u (:class:`~chainer.Variable` or :ref:`ndarray`): Start vector of
            shape ``(W.shape[axis],)``, as in :func:`spectral_normalize`.
        n_power_iteration (int): Number of iterations, 1 or more.
        axis (int): Output axis of ``W``; may be negative.
        detach_uv (bool): Take ``u`` and ``v`` as constants in the gradient.
        update_u (bool): Overwrite the array ``u`` with the last ``u``,
            unless that is zero or not finite.

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
        >>> sigma = F.spectral_norm(W, np.ones(2), n_power_iteration=20)
        >>> sigma.backward()
        >>> print(np.round(W.grad, 4) + 0)
        [[1. 0.]
         [0. 0.]]

    """
    outputs, _ = normalize(
        W, u, n_power_iteration, None, 1.0, 0.0, axis, detach_uv, update_u,
        ('sigma',))
    return outputs[0]


def normalize(
        W: ArrayOrVariable, u: ArrayOrVariable, n_power_iteration: int,
        gamma: Any, factor: Number, eps: Number, axis: int, detach_uv: bool,
        update_u: bool, output_names: Sequence[str],
) -> tuple[tuple[chainer.Variable, ...], Any]:
    """The functions above; returns the iterations as well."""
    _checks.check_settings(n_power_iteration, factor, eps)
    axis = _checks.check_arrays(W, u, axis, update_u)
    gamma = 1.0 if gamma is None else _checks.check_gamma(gamma, W)
    settings = Settings(
        int(n_power_iteration), axis, detach_uv, float(factor), float(eps))
    names, inputs = ['W'], [W]
    constants: dict[str, Any] = {}
    for name, x in (('u', u), ('gamma', gamma)):
        if isinstance(x, chainer.Variable):
            names.append(name)
            inputs.append(x)
        else:
            constants[name] = x
    node = SpectralNormalize(
        settings, names, constants, output_names, update_u)
    return node.apply(inputs), node.it
