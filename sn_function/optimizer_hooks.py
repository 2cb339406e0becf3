"""Optimizer hooks: a penalty on the spectral norm, instead of a division."""
from __future__ import annotations

import math
from typing import Any

import chainer
import numpy

from sn_function import _checks, _models, errors
from sn_function._arithmetic.choose import arithmetic_of, is_on_device
from sn_function._arithmetic.interface import Backward, Forward, Settings
from sn_function._arithmetic.matrix import accumulator_dtype
from sn_function.link_hooks import output_axis

# An attribute of a parameter's update rule, which is copied and pickled with
# the parameter.
VECTOR = '_sn_penalty_u'
N_WARMUP = 15


class SpectralNormPenalty:
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
    call_for_each_param = False
    timing = 'pre'

    def __init__(
            self, rate: float, n_power_iteration: int = 1,
            filter: _models.Filter = None) -> None:
        _check_rate(rate)
        _checks.check_count('n_power_iteration', n_power_iteration, 1)
        _models.check_filter(filter)
        self.rate = rate
        self.n_power_iteration = n_power_iteration
        self.filter = filter

    def __call__(self, optimizer: chainer.Optimizer) -> None:
        """Adds the gradient of the penalty to that of the weights."""
        links = self._links(optimizer.target)
        if not links:
            raise errors.NoPenaltyError(optimizer.target)
        by_device: dict[str, list[chainer.Link]] = {}
        for link in links:
            if _is_updated(link.W):
                by_device.setdefault(str(link.W.device), []).append(link)
        penalty: Any = 0.
        for group in by_device.values():
            with chainer.using_device(group[0].W.device):
                value = self._add_gradients(group)
            # It is an array on a device, and a number on the host.
            if is_on_device(value):
                value = optimizer.target.device.send(value)
            penalty = penalty + value
        _report(penalty, optimizer.target)

    def _links(self, target: chainer.Link) -> list[chainer.Link]:
        found = {  # a weight may be shared
            id(link.W): link for path, link in _models.supported_links(target)
            if not _models.is_hooked(link)
            and _models.takes(self.filter, path, link)}
        return list(found.values())

    def _add_gradients(self, links: list[chainer.Link]) -> Any:
        """Adds the gradients for one device; returns the penalty of these."""
        forwards = [
            Forward(Settings(self.n_power_iteration, output_axis(link), True),
                    link.W.array, vector_of(link), 1., ('sigma',),
                    update_u=True)
            for link in links]
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


def vector_of(link: chainer.Link) -> Any:
    """Returns the penalty's vector, which the weight's update rule keeps."""
    W = link.W.array
    rule = link.W.update_rule
    axis = output_axis(link)
    dtype = accumulator_dtype(W.dtype)
    u = getattr(rule, VECTOR, None)
    if u is not None and u.shape == (W.shape[axis],):
        u = link.W.device.send(u).astype(dtype, copy=False)
        # On a device the iteration replaces a bad vector itself, and the
        # host need not wait for its values.
        if is_on_device(u) or (numpy.isfinite(u).all() and u.any()):
            setattr(rule, VECTOR, u)
            return u
    u = _unit_vector_of_largest_row(W, axis, dtype)
    arithmetic_of(W).warm_up(W, u, axis, N_WARMUP)
    setattr(rule, VECTOR, u)
    return u


def _unit_vector_of_largest_row(W: Any, axis: int, dtype: Any) -> Any:
    """Returns a start vector that depends on nothing but the weight.

    It is hardly ever orthogonal to the leading singular vector.
    """
    xp = chainer.backend.get_array_module(W)
    axes = tuple(k for k in range(W.ndim) if k != axis)
    with numpy.errstate(all='ignore'):  # squares may overflow
        norms = (W.astype(dtype, copy=False) ** 2).sum(axis=axes)
    return (xp.arange(len(norms)) == norms.argmax()).astype(dtype)


def _is_updated(W: chainer.Parameter) -> bool:
    rule = W.update_rule
    return (W.array is not None and W.grad is not None
            and rule is not None and rule.enabled)


def _check_rate(rate: Any) -> None:
    if not 0 <= _checks.as_float(rate) < math.inf:
        raise errors.PenaltyRateError(rate)


def _report(penalty: Any, target: chainer.Link) -> None:
    values = {'spectral_norm_penalty': penalty}
    try:
        chainer.report(values, target)
    except KeyError:  # a reporter that does not know the target
        chainer.report(values)
