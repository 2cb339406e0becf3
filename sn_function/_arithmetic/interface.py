"""What nodes ask of an arithmetic: that of NumPy, or that of CuPy.

:mod:`.host` and :mod:`.device` are both an :class:`Arithmetic`, and
:func:`.choose.arithmetic_of` says which one an array needs.
"""
from __future__ import annotations

from typing import Any, NamedTuple, Protocol, Sequence, Tuple

from sn_function._arithmetic.groups import Groups

Array = Any  # numpy.ndarray or cupy.ndarray
Arrays = Tuple[Array, ...]


class Settings(NamedTuple):
    """What the caller chose; without ``groups`` a weight is one matrix."""

    n_power_iteration: int
    axis: int
    detach_uv: bool
    factor: float = 1.0
    eps: float = 0.0
    groups: Groups | None = None


class Iterations(Protocol):
    """What a forward computed, for its backward and for higher orders.

    ``u`` and ``v`` are the last vectors, and ``start`` is the one that the
    iterations began with.
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

    def floored(self, eps: float) -> tuple[Any, Any]:
        """Returns ``max(sigma, eps)``, and whether that is sigma."""


class Forward(NamedTuple):
    """The normalization of one weight.

    Attributes:
        settings: What the caller chose.
        W: Weight with 2 or more dimensions.
        u: Start vector, shape ``(m,)``, or with groups ``(G m,)``.
        gamma: A float, or an array of shape ``()``.
        output_names: ``'Y'``, ``'sigma'``, both or none.
        update_u: Whether to overwrite ``u`` with ``u_K``, unless that is zero
            or not finite.
        reuse: Whether to make ``Y`` in memory that this weight has needed
            before; a device has a pool of memory anyway.

    """

    settings: Settings
    W: Array
    u: Array
    gamma: Any
    output_names: tuple[str, ...]
    update_u: bool = False
    reuse: bool = False


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
            groups: Groups | None = None) -> None:
        """Moves ``u`` on by ``n`` iterations, unless it would not be finite.
        """
