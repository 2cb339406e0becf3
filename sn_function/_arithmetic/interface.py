"""What nodes ask of an arithmetic: that of NumPy, or that of CuPy.

:mod:`.host` and :mod:`.device` are both an :class:`Arithmetic`, and
:func:`.choose.arithmetic_of` says which one an array needs.
"""
from __future__ import annotations

from typing import Any, NamedTuple, Protocol, Sequence, Tuple

from sn_function._arithmetic.convolution import Convolution
from sn_function._arithmetic.groups import Groups

Array = Any  # numpy.ndarray or cupy.ndarray
Arrays = Tuple[Array, ...]


class Settings(NamedTuple):
    """What the caller chose.

    ``Y`` is ``gamma factor W`` divided by sigma, by ``eps`` where sigma is
    less, and by ``at_zero`` where sigma is zero.  That is for the gradient, as
    Y is zero there: ``1 / eps`` would make any step away from zero a huge one.
    Without ``groups`` a weight is one matrix, and without ``n_vectors`` there
    is one ``u``, of shape ``(m,)``; else it is of shape ``(n_vectors, m)``.
    With a ``convolution`` that matrix is the map of the layer, and ``m``
    counts the entries of an input.
    """

    n_power_iteration: int
    axis: int
    detach_uv: bool
    factor: float = 1.0
    eps: float = 0.0
    at_zero: float = 1.0
    groups: Groups | None = None
    n_vectors: int | None = None
    convolution: Convolution | None = None


def n_vectors_of(u: Any) -> int | None:
    """Returns ``b`` for vectors of shape ``(b, m)``; ``None`` for ``(m,)``."""
    return len(u) if u.ndim == 2 else None


class Renewal(NamedTuple):
    """When a hook makes u and gamma anew, before a forward uses them.

    u turns by ``1 - u_0 . u_1`` in the first iteration, with both of length 1.
    Where that is more than ``limit``, u belongs to another weight.  Then
    iterations are run first, outside of the graph, until it turns by less than
    :data:`SETTLED`, but no more than ``n_warmup``.

    gamma is made anew where it still is ``initial_gamma``, and sigma is off
    from that by more than :data:`GAMMA_LIMIT`.  Then both become sigma, or 1
    where that is zero.  A sigma that is less says nothing while u turns by
    more than :data:`GAMMA_TURN`, as an estimate is never above the norm.

    Attributes:
        n_warmup: The most iterations before those of the call, rounded up to
            whole calls; 0 for none.
        limit: How much a vector of this weight turns, at most.
        initial_gamma: Array of shape ``()`` with the value that gamma was
            initialized with, or ``None`` if gamma is left alone.
        rtol: Instead of the limits: the largest residual that is accepted.

    """

    n_warmup: int
    limit: float
    initial_gamma: Any = None
    rtol: float | None = None

    def accepts(self, iterations: Any, limit: float) -> bool:
        """Whether no further iterations are needed; on the host."""
        if self.rtol is None:
            return iterations.turn() <= limit
        return iterations.residual() <= self.rtol


NEVER = Renewal(0, 2.0)
SETTLED = 1e-3
GAMMA_LIMIT = 0.1
GAMMA_TURN = 1e-2


class Iterations(Protocol):
    """What a forward computed, for its backward and for higher orders.

    ``u`` and ``v`` are the last vectors, and ``start`` is what the iterations
    began with: a vector, or several.
    """

    @property
    def u(self) -> Array: ...

    @property
    def v(self) -> Array: ...

    @property
    def start(self) -> Array: ...

    @property
    def restarted(self) -> Any:
        """Whether ``start`` is another vector than the one given."""

    @property
    def sigma(self) -> Any:
        """The estimate: a float, or an array of shape ``()`` of a device."""

    def floored(self, settings: Settings) -> tuple[Any, Any]:
        """Returns what ``W`` is divided by, and whether that is sigma."""


class Forward(NamedTuple):
    """The normalization of one weight.

    Attributes:
        settings: What the caller chose.
        W: Weight with 2 or more dimensions.
        u: Start vector, shape ``(m,)``, or with groups ``(G m,)``; or several
            of them, shape ``(b, m)``.
        gamma: A float, or an array of shape ``()``.
        output_names: ``'Y'``, ``'sigma'``, both or none.
        update_u: Whether to overwrite ``u`` with what follows it, unless sigma
            is zero or not finite.
        reuse: Whether a backward will follow.  Then the host makes ``Y`` in
            memory that this weight has needed before, and a device, which has
            a pool of memory anyway, allocates for the backward, too.
        renewal: When u and gamma are made anew.

    """

    settings: Settings
    W: Array
    u: Array
    gamma: Any
    output_names: tuple[str, ...]
    update_u: bool = False
    reuse: bool = False
    renewal: Renewal = NEVER


class Backward(NamedTuple):
    """The gradient of the normalization of one weight.

    Attributes:
        settings: What the caller chose.
        iterations: What the forward computed.
        wanted: ``'W'``, ``'u'`` and ``'gamma'``, or some of them.
        W: Weight.
        u: Start vector, for the dtype of its gradient, if that is wanted.
        gamma: A float, or an array of shape ``()``.
        gY: Upstream gradient of ``Y``, of its shape, or ``None``.
        gsigma: Upstream gradient of sigma, shape ``()``, or ``None``.
        reuse: As in :class:`Forward`, for ``gW``.

    """

    settings: Settings
    iterations: Any
    wanted: Sequence[str]
    W: Array
    u: Array
    gamma: Any
    gY: Array = None
    gsigma: Array = None
    reuse: bool = False


class Arithmetic(Protocol):
    """The operations on arrays that nodes and hooks are made of."""

    def normalize_all(
            self, calls: Sequence[Forward],
    ) -> list[tuple[Arrays, Any]]:
        """Returns ``Y`` and ``sigma``, as named, and :class:`Iterations`.

        Raises:
            VectorValueError: On the host, a ``u`` is zero or not finite.  No
                ``u`` is changed then.

        """

    def gradients_all(self, calls: Sequence[Backward]) -> list[Arrays]:
        """Returns ``gW``, ``gu`` and ``ggamma``, as wanted."""

    def warm_up(
            self, W: Array, u: Array, axis: int, n: int,
            groups: Groups | None = None, rtol: float | None = None,
            convolution: Convolution | None = None) -> None:
        """Moves ``u`` on by ``n`` iterations, unless it would not be finite.

        On the host fewer are enough where the residual is at most ``rtol``.
        """
