"""Optimizer hooks: a penalty on the spectral norm, or a bound on it, instead
of a division."""
from __future__ import annotations

import math
from typing import Any

import chainer
import numpy

from sn_function import _checks, _models, errors
from sn_function._arithmetic import quality
from sn_function._arithmetic.choose import arithmetic_of, is_on_device
from sn_function._arithmetic.interface import Backward, Forward
from sn_function._weights_hook import (
    WeightsHook,
    unit_vector_of_largest_row,
)

__all__ = ['SpectralNormPenalty', 'SpectralNormProjection']

# Attributes of a parameter's update rule, which is copied and pickled with
# the parameter.  One for each hook, as both may be used together.
VECTOR = '_sn_penalty_u'
PROJECTION_VECTOR = '_sn_projection_u'


class SpectralNormPenalty(WeightsHook):
    """Optimizer hook that adds a penalty on the spectral norm of each weight.

    To the loss of the optimizer's target it adds

    .. math::

        \\frac{\\lambda}{2} \\sum_W \\sigma(W)^2,

    or rather its gradient :math:`\\lambda \\sigma u v^T` to that of each
    weight, before the update.  The vectors come from power iterations, and
    are constants in the gradient, as in the paper.  The gradient is exact
    once they have converged.  Before that, a second iteration brings it
    closer to the gradient of the true norm than differentiating the first
    iteration would.

    The weights are those of the links of the target that
    :class:`~sn_function.ChainSpectralNormalization` takes: linear layers,
    embeddings, convolutions and deconvolutions, except for those that a link
    hook normalizes already.  As with :class:`chainer.optimizer_hooks.\
WeightDecay`, a weight without a gradient is left alone, as is one whose
    update rule is disabled, and the rate is scaled where the loss is.

    The value of the penalty is reported as ``spectral_norm_penalty``, by
    :func:`chainer.report` with the target as the observer: as
    ``main/spectral_norm_penalty`` by a trainer.  The host does not wait for
    the device.

    Each weight has a vector ``u``.  The first update makes it, from the
    largest row of the weight by some iterations, and each update advances it.
    It is not in Chainer's snapshots, so a resumed run makes a new one and
    continues with nearly the same numbers; add
    ``trainer.extend(extensions.SpectralNormPenaltyState(optimizer))`` to
    continue with the same.

    Args:
        rate (float): Coefficient :math:`\\lambda` of the penalty, at least 0.
        n_power_iteration (int): Number of iterations in each update.
        filter (str, type, callable, list or None): Which links, as in
            :class:`~sn_function.ChainSpectralNormalization`: a pattern of
            their paths in the target, such as ``'/block*/conv?'``; a class; a
            function that is called with the path and the link; or a list of
            these, for links that any of them takes.  ``None`` takes all.
        exclude (str, type, callable, list or None): Which links not, though
            the filter takes them, likewise.

    Attributes:
        rate (float): Coefficient of the penalty, which may be changed.
        timing (str): ``'pre'``: the hook is called before the update.
        call_for_each_param (bool): ``False``: it is called once an update.

    Raises:
        SpectralNormalizationError: One of :mod:`sn_function.errors`; from the
            first update where no weight is found.

    See: Y. Yoshida and T. Miyato, `Spectral Norm Regularization for Improving
    the Generalizability of Deep Learning <https://arxiv.org/abs/1705.10941>`_

    .. admonition:: Example

        >>> import chainer, chainer.links as L
        >>> import numpy as np
        >>> from sn_function.optimizer_hooks import SpectralNormPenalty
        >>> model = L.Linear(3, 3)
        >>> model.W.array[...] = np.diag([4, 2, 1])
        >>> optimizer = chainer.optimizers.SGD(lr=0.5).setup(model)
        >>> optimizer.add_hook(SpectralNormPenalty(rate=0.5))
        >>> model.cleargrads()
        >>> optimizer.update()          # 4 - 0.5 * 0.5 * 4
        >>> print(model.W.array.diagonal().round(3))
        [3. 2. 1.]

    """

    name = 'SpectralNormPenalty'
    timing = 'pre'

    _settings = 'rate', 'n_power_iteration', 'filter'
    _vector = VECTOR
    _n_warmup = 15
    _no_weight = errors.NoPenaltyError

    def __init__(
            self, rate: float, n_power_iteration: int = 1,
            filter: _models.Filter = None,
            exclude: _models.Filter = None) -> None:
        if not 0 <= _checks.as_float(rate) < math.inf:
            raise errors.PenaltyRateError(rate)
        super().__init__(n_power_iteration, filter, exclude)
        self.rate = rate

    def __call__(self, optimizer: chainer.Optimizer) -> None:
        """Adds the gradient of the penalty to that of the weights."""
        penalty: Any = 0.
        for group in self._groups(optimizer.target, _has_gradient):
            with chainer.using_device(group[0].W.device):
                value = self._add_gradients(group)
            # It is an array on a device, and a number on the host.
            if is_on_device(value):
                value = optimizer.target.device.send(value)
            with chainer.using_device(optimizer.target.device):
                penalty = penalty + value
        _report(penalty, optimizer.target)

    def _add_gradients(self, links: list[chainer.Link]) -> Any:
        """Adds the gradients for one device; returns the penalty of these."""
        forwards = [self._forward(link, link.W.array) for link in links]
        arithmetic = arithmetic_of(links[0].W.array)
        backwards = []
        total: Any = 0.
        for link, call, ((sigma,), iterations) in zip(
                links, forwards, arithmetic.normalize_all(forwards)):
            rate = self.rate
            if link.W._loss_scale is not None:
                rate *= link.W._loss_scale
            backwards.append(Backward(
                call.settings, iterations, ('W',), call.W, call.u, 1.,
                gsigma=(sigma * rate).astype(sigma.dtype)))
            total = total + sigma.astype(numpy.float64) ** 2
        for link, (gW,) in zip(links, arithmetic.gradients_all(backwards)):
            link.W.grad += gW
        return self.rate / 2 * total


class SpectralNormProjection(WeightsHook):
    """Optimizer hook that scales each weight back to a largest norm.

    After each update it replaces each weight whose norm is above :math:`c`:

    .. math::

        W \\leftarrow W \\frac{c}{\\sigma(W)} \\quad
        \\text{where } \\sigma(W) > c .

    The target computes with its own weights, and their gradients are the
    ordinary ones.  So a weight may move away from the bound again, which one
    above the ``cap`` of :class:`~sn_function.SpectralNormalization` cannot.

    The weights are those of :class:`SpectralNormPenalty`.  One whose update
    rule is disabled is left alone, as is one that is not initialized, or
    holds NaN or Inf.  Where Chainer keeps a float32 copy of a float16 weight
    (``use_fp32_update``), that is scaled, too.  The host does not wait for
    the device.

    Power iterations never find more than the norm.  Therefore the hook takes
    :math:`\\sigma (1 + r / \\sqrt 2)` for it, with the residual :math:`r` of
    :class:`~sn_function.extensions.SpectralNormReport`: some singular value
    is between the two.  If that is the largest one, the norm is at most
    :math:`c`, and at least about :math:`c (1 - r)` where the weight has been
    scaled.  If it is not, because another one has outgrown it within a few
    updates, the norm is too large until the iterations find that one: rarely,
    and the less the smaller the updates and the more iterations.
    :doc:`monitoring` has measured both.

    Each weight has a vector ``u`` of its own, made and kept as for the
    penalty, with more iterations for the first update.  As it may miss a
    singular value that becomes the largest one, each update also runs
    iterations from the largest row, and the larger estimate counts.  Add
    ``trainer.extend(extensions.SpectralNormPenaltyState(optimizer))`` to
    resume with the same numbers.

    Args:
        c (float): Largest norm of a weight, above 0.
        n_power_iteration (int): Number of iterations in each update, from
            each of the two vectors.
        filter, exclude (str, type, callable, list or None): Which links, as
            for :class:`SpectralNormPenalty`.

    Attributes:
        c (float): Largest norm, which may be changed.
        timing (str): ``'post'``: the hook is called after the update.
        call_for_each_param (bool): ``False``: it is called once an update.

    Raises:
        SpectralNormalizationError: One of :mod:`sn_function.errors`; after
            the first update where no weight is found.

    See: H. Gouk et al., `Regularisation of Neural Networks by Enforcing
    Lipschitz Continuity <https://arxiv.org/abs/1804.04368>`_

    .. admonition:: Example

        >>> import chainer, chainer.links as L
        >>> import numpy as np
        >>> from sn_function.optimizer_hooks import SpectralNormProjection
        >>> model = L.Linear(3, 3)
        >>> model.W.array[...] = np.diag([4, 2, 1])
        >>> optimizer = chainer.optimizers.SGD().setup(model)
        >>> optimizer.add_hook(SpectralNormProjection(c=2.0))
        >>> model.cleargrads()
        >>> optimizer.update()
        >>> print(model.W.array.diagonal().round(3))
        [2.  1.  0.5]

    """

    name = 'SpectralNormProjection'
    timing = 'post'

    _settings = 'c', 'n_power_iteration', 'filter'
    _vector = PROJECTION_VECTOR
    # Once; the first update may find a weight far from the bound.
    _n_warmup = 100
    _no_weight = errors.NoProjectionError

    def __init__(
            self, c: float, n_power_iteration: int = 5,
            filter: _models.Filter = None,
            exclude: _models.Filter = None) -> None:
        if not 0 < _checks.as_float(c) < math.inf:
            raise errors.ProjectionNormError(c)
        super().__init__(n_power_iteration, filter, exclude)
        self.c = c

    def __call__(self, optimizer: chainer.Optimizer) -> None:
        """Scales the weights whose norm is above the bound."""
        for group in self._groups(optimizer.target, _is_updated):
            with chainer.using_device(group[0].W.device):
                self._project(group)

    def _project(self, links: list[chainer.Link]) -> None:
        """Scales the weights on one device."""
        kept = [self._forward(link, _updated_array(link.W)) for link in links]
        # The kept vector may be an exact singular vector, but no longer that
        # of the largest value: then it stays where it is.
        fresh = [call._replace(update_u=False, u=unit_vector_of_largest_row(
            call.W, call.settings.axis, call.u.dtype)) for call in kept]
        results = arithmetic_of(links[0].W.array).normalize_all(kept + fresh)
        for link, call, *both in zip(
                links, kept, results, results[len(links):]):
            W, scale = call.W, self._scale(call, *both)
            # Only the host knows at once that there is nothing to do.
            if is_on_device(W) or scale < 1:
                W[...] = W.astype(scale.dtype, copy=False) * scale
                if W is not link.W.array:
                    link.W.array[...] = W

    def _scale(self, call: Forward, kept: Any, fresh: Any) -> Any:
        """Keeps the better vector, and returns what the weight is multiplied
        by, shape ``()``; 1 if its norm is below the bound, or not a number."""
        ((sigma,), iterations), ((other,), others) = kept, fresh
        xp = chainer.backend.get_array_module(sigma)
        with numpy.errstate(all='ignore'):
            is_better = other > sigma
            call.u[...] = xp.where(is_better, others.u, call.u)
            norm = xp.where(
                is_better, _upper_end(call, other, others),
                _upper_end(call, sigma, iterations))
            is_above = (norm > self.c) & (norm < math.inf)
            return xp.where(is_above, self.c / norm, 1.).astype(sigma.dtype)


def _upper_end(call: Forward, sigma: Any, iterations: Any) -> Any:
    """Returns the upper end of the range that has some singular value."""
    r = quality.residual(call.W, call.settings, sigma, iterations)
    return sigma * (1 + r / math.sqrt(2))


def _is_updated(W: chainer.Parameter) -> bool:
    rule = W.update_rule
    return W.array is not None and rule is not None and rule.enabled


def _has_gradient(W: chainer.Parameter) -> bool:
    return _is_updated(W) and W.grad is not None


def _updated_array(W: chainer.Parameter) -> Any:
    """Returns the array that the next update starts from: the float32 copy of
    a float16 weight where there is one, else that of the weight."""
    rule = W.update_rule
    copy = rule._fp32_param
    if copy is not None and rule._use_fp32_update and (
            W.dtype == numpy.float16):
        return copy.array
    return W.array


def _report(penalty: Any, target: chainer.Link) -> None:
    values = {'spectral_norm_penalty': penalty}
    try:
        chainer.report(values, target)
    except KeyError:  # a reporter that does not know the target
        chainer.report(values)
