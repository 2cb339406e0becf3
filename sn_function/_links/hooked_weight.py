"""One weight of one link, and how its hook normalizes it.

It is where a hook's settings and a link's state meet, on the way to a node of
the graph.
"""
from __future__ import annotations

import warnings
from typing import Any, Protocol, Sequence

import chainer

from sn_function import _checks, errors
from sn_function._arithmetic.interface import (
    NEVER,
    SETTLED,
    Array,
    Iterations,
    Renewal,
    Settings,
)
from sn_function._graph import node
from sn_function._graph import normalize as _graph
from sn_function._links import gamma as _gamma
from sn_function._links import other_axis, recompute, vector
from sn_function._links.state import LinkState
from sn_function._links.weight import axis_of, groups_of, name_of

# How much a vector turns in an iteration, at most, while its weight is trained
# (measured: :doc:`accuracy`).  Where a call does not move it on, as in test
# mode, it has to be settled.
TRAINED_LIMIT = 0.05


class Hook(Protocol):
    """The settings of a hook: what to normalize, and how."""

    weight_name: str
    n_power_iteration: int
    n_warmup: int
    detach_uv: bool
    factor: float | None
    eps: float
    cap: float | None
    groups: str | None
    n_vectors: int
    rtol: float | None
    max_iterations: int
    given_axis: int | None
    update_u: str


def moves_on(hook: Hook, is_train: bool) -> bool:
    """Whether a call moves the vector on, in training mode or not."""
    return is_train or hook.update_u == 'always'


def renewal_of(
        hook: Hook, is_train: bool, gamma: chainer.Parameter | None = None,
        W: chainer.Variable | None = None) -> Renewal:
    """Returns when a call runs more iterations, and makes gamma anew."""
    if hook.rtol is not None:
        renewal = _graph.until(
            hook.rtol, hook.max_iterations, hook.n_power_iteration)
    elif hook.n_warmup > 0:
        renewal = Renewal(
            hook.n_warmup,
            TRAINED_LIMIT if moves_on(hook, is_train) else SETTLED)
    else:
        return NEVER
    if gamma is None or hook.n_warmup == 0:
        return renewal
    return renewal._replace(initial_gamma=_gamma.initial(gamma, W))


class HookedWeight:
    """One weight of one link, and how its hook normalizes it.

    Args:
        hook: The hook.
        link: The link.
        W: The weight, which has an array.  It is no parameter of the link
            where another hook has replaced that.
        insize: Size of the images of a call, for the norm of a map of which
            nothing else says a size.

    Attributes:
        state (LinkState): What the link keeps for the hook.
        convolution (Convolution or None): The map whose norm the hook takes,
            if that is not the weight as a matrix.

    """

    __slots__ = ('W', 'convolution', 'hook', 'link', 'state')

    def __init__(
            self, hook: Hook, link: chainer.Link, W: chainer.Variable,
            insize: int | Sequence[int] | None = None) -> None:
        self.hook = hook
        self.link = link
        self.W = W
        self.state = LinkState.of(link, hook.weight_name)
        self.convolution = vector.map_of(link, hook, insize)

    @property
    def settings(self) -> Settings:
        """The hook's settings, checked, and what the link adds to them."""
        hook, state = self.hook, self.state
        axis = axis_of(self.link, hook, self.W.ndim)
        given = (hook.n_power_iteration, axis, hook.detach_uv, hook.factor,
                 hook.eps, hook.cap, hook.groups)
        if state.settings[0] != given:
            state.settings = given, _graph.make_settings(
                hook.n_power_iteration, axis, hook.detach_uv, hook.factor,
                hook.eps, hook.cap, groups_of(self.link, hook))
        settings: Settings = state.settings[1]
        if self.convolution is None:
            return settings
        return settings._replace(convolution=self.convolution)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """That of one vector, as the link keeps it; ``None`` if unknown."""
        return vector.shape_of(
            self.link, self.hook, self.W.array.shape, self.convolution)

    @property
    def v_shape(self) -> tuple[int, ...] | None:
        """Shape of the outputs of a map; ``None`` for a matrix."""
        if self.convolution is None:
            return None
        return self.convolution.out_shape(self.W.shape)

    def vector_and_gamma(self) -> tuple[Array, chainer.Parameter | None]:
        """Returns u and gamma, initialized where they are not yet.

        Both are made anew for a weight of another shape.

        Raises:
            UnknownInputSizeError: u is an input, of a size that is not known.
            InputSizeError, OutputSizeError: There are no outputs of that size.

        """
        hook, link, W = self.hook, self.link, self.W.array
        shape = self.shape
        if shape is None:
            raise errors.UnknownInputSizeError(
                type(link).__name__, hook.weight_name)
        if self.convolution is not None:
            _checks.check_insize(self.convolution, W.shape)
        gamma = None
        if self.state.gamma_name is not None:
            gamma = getattr(link, self.state.gamma_name)
        misfits: list[Any] = []
        remedy = ''
        for k, name in enumerate(vector.names(hook, link)):
            u = getattr(link, name, None)
            if u is not None and u.shape[k:] != shape:
                misfits.append(name)
                other = other_axis.by_length(link, hook, W.shape, u.shape[k:])
                if other is not None:
                    remedy = (f' The length was that of axis {other}: to go '
                              f'on along that one, give the hook '
                              f'axis={other}.')
        if misfits:
            self._discard(misfits)
        is_gamma_misfit = gamma is not None and not _gamma.fits(gamma, self.W)
        if is_gamma_misfit:
            misfits.append(self.state.gamma_name)
        if misfits:
            *others, last = misfits
            names = f'{", ".join(others)} and {last}' if others else last
            self._warn(f'{names} belonged to a weight of another shape than '
                       f'{W.shape}.', len(misfits) > 1, remedy)
        u = vector.find(link, hook, W, self.convolution)
        if gamma is not None:
            _gamma.initialize(
                gamma, self.W, is_gamma_misfit, self.convolution)
        return u, gamma

    def discard_bad_vector(self) -> None:
        """Has what is wrong in the vectors made anew, and warns of that."""
        leading, *others = vector.names(self.hook, self.link)
        if others and leading not in vector.unsound_names(
                self.hook, self.link):
            self._warn(f'{others[0]} was zero or not finite, or its rows '
                       f'were not independent.')
            self._discard(others)
            return
        # Other hooks leave such a vector behind after one NaN.
        self._warn(f'{leading} was zero or not finite, as in a snapshot of a '
                   f'model that had met a NaN.')
        self._discard([leading, *others])

    def _discard(self, names: list[str]) -> None:
        for name in names:
            setattr(self.link, name, None)
        self.state.forget_start()

    def _warn(
            self, why: str, are_several: bool = False,
            remedy: str = '') -> None:
        what = 'They were' if are_several else 'It was'
        warnings.warn(
            f'{name_of(self.link)}: {why} {what} made anew.{remedy}',
            errors.SpectralNormalizationWarning, stacklevel=5)

    def for_node(
            self, u: Array, gamma: chainer.Parameter | None, update_u: bool,
            is_first: bool = True,
    ) -> tuple[_graph.Normalization, list[Any]]:
        """Returns the weight for :func:`.normalize.apply`.

        Args:
            u: The vector.
            gamma: The factor, if any.
            update_u: Whether the vector moves on.
            is_first: Whether u may be one of another weight.  It is not if
                iterations have started from it already.

        """
        renewal = NEVER
        if is_first:
            is_train, = node.config('train')
            renewal = renewal_of(self.hook, is_train, gamma, self.W)
        return _graph.make_weight(
            self.W, u, gamma, self.settings, ('Y',), update_u, renewal)

    def normalize(
            self, update_u: bool, is_second_run: bool = False,
    ) -> tuple[chainer.Variable, Iterations]:
        """Returns the normalized weight, in a node of its own.

        Args:
            update_u: Whether the vector moves on.
            is_second_run: Start from the vector that the first run of the
                same call started from.

        """
        u, gamma = self.vector_and_gamma()
        if is_second_run:
            u = recompute.start_vector(self.link, self.state, u)
        weight, inputs = self.for_node(
            u, gamma, update_u, is_first=not is_second_run)
        Y, = _graph.apply([(weight, inputs)])
        self.check_convergence(weight)
        return Y, weight.iterations

    def check_convergence(self, weight: _graph.Normalization) -> None:
        """Warns, once for the link, where a tolerance was not reached."""
        if not (weight.has_converged or self.state.has_warned):
            self.state.has_warned = True
            warnings.warn(errors.ToleranceWarning(
                f'{name_of(self.link)}, {self.hook.weight_name}',
                self.hook.rtol),
                stacklevel=5)
