"""What the optimizer hooks share: the weights they find, and their vectors."""
from __future__ import annotations

from typing import Any, Callable

import chainer
import numpy

from sn_function import _checks, _models, errors
from sn_function._arithmetic.choose import arithmetic_of, is_on_device
from sn_function._arithmetic.interface import Forward, Settings
from sn_function._arithmetic.matrix import accumulator_dtype
from sn_function.link_hooks import output_axis


class WeightsHook:
    """Optimizer hook that acts on the weights of supported links."""

    name: str
    timing: str
    call_for_each_param = False
    exclude: _models.Filter = None  # in pickles of versions before 0.2

    _settings: tuple[str, ...]
    _vector: str
    _n_warmup: int
    _no_weight: Callable[[chainer.Link], errors.NoWeightError]

    def __init__(
            self, n_power_iteration: int, filter: _models.Filter,
            exclude: _models.Filter) -> None:
        _checks.check_count('n_power_iteration', n_power_iteration, 1)
        _models.check_filter(filter)
        _models.check_filter(exclude)
        self.n_power_iteration = n_power_iteration
        self.filter = filter
        self.exclude = exclude

    def __repr__(self) -> str:
        names = [*self._settings, *['exclude'] * (self.exclude is not None)]
        settings = ', '.join(
            f'{name}={getattr(self, name)!r}' for name in names)
        return f'{type(self).__name__}({settings})'

    def _groups(
            self, target: chainer.Link,
            takes: Callable[[chainer.Parameter], bool],
    ) -> list[list[chainer.Link]]:
        """Returns the links, device by device, whose weights it takes.

        Raises:
            NoWeightError: No weight is found, whether it takes it or not.
            NothingExcludedError: A part of ``exclude`` takes no link.

        """
        supported = list(_models.supported_links(target))
        excluded = _models.excluded(target, self.exclude, supported)
        found = {  # a weight may be shared
            id(link.W): link for path, link in supported
            if not _models.is_hooked(link)
            and _models.takes(self.filter, path, link)
            and id(link) not in excluded}
        if not found:
            raise self._no_weight(target)
        by_device: dict[str, list[chainer.Link]] = {}
        for link in found.values():
            if takes(link.W):
                by_device.setdefault(str(link.W.device), []).append(link)
        return list(by_device.values())

    def _forward(self, link: chainer.Link, W: Any) -> Forward:
        """Declares power iterations for sigma that move the vector on."""
        return Forward(
            Settings(self.n_power_iteration, output_axis(link), True), W,
            vector_of(link, W, self._vector, self._n_warmup), 1., ('sigma',),
            update_u=True)


def vector_of(link: chainer.Link, W: Any, name: str, n_warmup: int) -> Any:
    """Returns the vector of a hook, which the weight's update rule keeps."""
    rule = link.W.update_rule
    axis = output_axis(link)
    dtype = accumulator_dtype(W.dtype)
    u = getattr(rule, name, None)
    if u is not None and u.shape == (W.shape[axis],):
        u = link.W.device.send(u).astype(dtype, copy=False)
        # On a device the iteration replaces a bad vector itself, and the
        # host need not wait for its values.
        if is_on_device(u) or (numpy.isfinite(u).all() and u.any()):
            setattr(rule, name, u)
            return u
    u = unit_vector_of_largest_row(W, axis, dtype)
    arithmetic_of(W).warm_up(W, u, axis, n_warmup)
    setattr(rule, name, u)
    return u


def unit_vector_of_largest_row(W: Any, axis: int, dtype: Any) -> Any:
    """Returns a start vector that depends on nothing but the weight.

    It is hardly ever orthogonal to the leading singular vector.
    """
    xp = chainer.backend.get_array_module(W)
    axes = tuple(k for k in range(W.ndim) if k != axis)
    with numpy.errstate(all='ignore'):  # squares may overflow
        norms = (W.astype(dtype, copy=False) ** 2).sum(axis=axes)
    return (xp.arange(len(norms)) == norms.argmax()).astype(dtype)
