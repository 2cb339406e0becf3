"""One weight of one link, and how its hook normalizes it.

It is where a hook's settings and a link's state meet, on the way to a node of
the graph.
"""
from __future__ import annotations

from typing import Any, Protocol, Sequence

import chainer

from sn_function._arithmetic.interface import Array, Iterations
from sn_function._graph import normalize as _graph
from sn_function._links import gamma as _gamma
from sn_function._links import recompute, vector
from sn_function._links.state import LinkState
from sn_function._links.weight import groups_of, output_axis


class Hook(Protocol):
    """The settings of a hook: what to normalize, and how."""

    weight_name: str
    vector_name: str
    n_power_iteration: int
    n_warmup: int
    detach_uv: bool
    factor: float | None
    eps: float
    cap: float | None
    groups: str | None


class HookedWeight:
    """One weight of one link, and how its hook normalizes it.

    Args:
        hook: The hook.
        link: The link.
        W: The weight, which has an array.  It is no parameter of the link
            where another hook has replaced that.

    Attributes:
        state (LinkState): What the link keeps for the hook.

    """

    __slots__ = ('W', 'hook', 'link', 'state')

    def __init__(
            self, hook: Hook, link: chainer.Link, W: chainer.Variable,
    ) -> None:
        self.hook = hook
        self.link = link
        self.W = W
        self.state = LinkState.of(link, hook.weight_name)

    def vector_and_gamma(self) -> tuple[Array, chainer.Parameter | None]:
        """Returns u and gamma, initialized where they are not yet.

        Both are initialized anew where the weight was, in a copy of its link.
        """
        hook, link, state, W = self.hook, self.link, self.state, self.W.array
        is_stale = state.is_stale(W, getattr(link, hook.vector_name))
        groups = groups_of(link, hook.groups)
        u = vector.find(link, hook.vector_name, W, hook.n_warmup, groups)
        gamma = None
        if state.gamma_name is not None:
            gamma = getattr(link, state.gamma_name)
            _gamma.initialize(gamma, self.W, is_stale)
        if is_stale:  # the last, as it raises if u is zero
            vector.warm_up(link, W, u, hook.n_warmup, groups)
        state.watch(self.W, u)
        return u, gamma

    def for_node(
            self, u: Array, gamma: chainer.Parameter | None, update_u: bool,
    ) -> tuple[_graph.Normalization, list[Any]]:
        """Returns the weight for :func:`normalize`."""
        hook, state = self.hook, self.state
        given = (hook.n_power_iteration, hook.detach_uv, hook.factor,
                 hook.eps, hook.cap, hook.groups)
        if state.settings[0] != given:
            state.settings = given, _graph.make_settings(
                hook.n_power_iteration, output_axis(self.link),
                hook.detach_uv, hook.factor, hook.eps, hook.cap,
                groups_of(self.link, hook.groups))
        return _graph.make_weight(
            self.W, u, gamma, state.settings[1], ('Y',), update_u)

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
        result, = normalize([self.for_node(u, gamma, update_u)])
        return result


def normalize(
        weights: Sequence[tuple[_graph.Normalization, list[Any]]],
        is_shared: bool = False,
) -> list[tuple[chainer.Variable, Iterations]]:
    """Returns the normalized weights, in one node.

    Args:
        weights: Results of :meth:`HookedWeight.for_node`.
        is_shared: Whether several calls use them.

    """
    outputs = _graph.normalize(weights, is_shared)
    return [(Y, weight.iterations)
            for (weight, _), (Y,) in zip(weights, outputs)]
