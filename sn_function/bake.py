"""Shipping: a plain model that computes what a normalized one does.

Training needs the raw weight, ``u`` and gamma; a model that is only run needs
none of them.

``sn_function.bake`` is this module's function.  The package imports it at
once, so that a later ``import sn_function.bake`` leaves it in place; so this
module imports nothing of Chainer before the function is called.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import chainer

__all__ = ['bake']

Model = TypeVar('Model', bound='chainer.Link')


def bake(
        model: Model, in_place: bool = False, *, certified: bool = False,
        rtol: float = 1e-3, time_limit: float | None = 10.0) -> Model:
    """Returns a model without hooks that has the normalized weights.

    The weight of every link that has a :class:`SpectralNormalization`, of its
    own or by a :class:`ChainSpectralNormalization`, or Chainer's hook, becomes
    what that hook makes of it in test mode, and the hook, ``u`` and gamma are
    gone.  So the outputs are those of the hooked model with
    ``chainer.config.train`` false, bit for bit; snapshots are those of a model
    that never had a hook; and ``onnx_chainer`` can export it.

    * The baked weight is a new parameter of the same dtype on the same device,
      without a gradient.  A weight that two links share becomes one for each,
      as each has a ``u`` of its own.
    * A copy is left without the update rules and gradients of training.  A
      model that is baked in place needs ``optimizer.setup(model)`` before it
      is trained again: the optimizer knows the raw weights and gammas.
    * Hooks of other kinds stay.  One that changes the weight, too, changes the
      baked one from now on.
    * A NaN in a weight stays in the baked one.
    * There is no way back: keep the snapshot of the hooked model.
    * A model without hooks is not changed, and there is a
      :class:`~sn_function.errors.SpectralNormalizationWarning`.

    With ``certified=True`` each layer surely is c-Lipschitz, with
    c = ``|gamma| * factor``, or ``cap``: its raw weight becomes

    .. math::

        \\bar W = \\gamma f W / \\max(\\mathrm{hi}, \\epsilon)

    where hi is the upper end of the interval that
    :func:`sn_function.certify` gives for the weight: the norm of a
    convolution as a map of images of every size, that of another weight as a
    matrix.  After it is rounded the new weight is certified as well, and made
    smaller by what is missing.

    * The outputs are not those of the hooked model: they differ by the ratio
      of hi and the hook's estimate.  For a kernel of 3 x 3 and a hook with
      ``norm='matrix'`` that is a factor of 1 to 3.
    * ``u`` has no part in it.  A weight whose hi is at most ``cap`` stays as
      it is, and so does one that is zero.
    * Where the time is up the interval is wider, so the weight is smaller.
      The bound holds all the same.

    Args:
        model (~chainer.Link): A link or a chain.
        in_place (bool): Change this model, instead of a deep copy of it.
        certified (bool): Divide each weight by a certified bound of its norm,
            instead of the estimate of its hook.
        rtol (float): How near the bound is to the norm; see
            :func:`sn_function.certify`.
        time_limit (float or None): The most seconds of each certificate, of
            which a weight needs two or a few more.

    Returns:
        ~chainer.Link: The baked model: a copy, or ``model`` itself.

    Raises:
        ModelTypeError: ``model`` is no link; for a file see
            :func:`sn_function.snapshot.bake`.  Nothing has been changed, as
            with each of these errors.
        HookBypassedError: The hook of a link has no effect.
        UninitializedWeightError: A link that has a hook was never called.
        WeightInUseError: It is called within a call of the model.
        CertifyArgumentError: ``rtol`` or ``time_limit`` is out of its range.
        UncertifiedWeightError: With ``certified``, a weight has more than 2
            dimensions and is not of a convolution.
        CertifiedNormError: Likewise, a weight has no finite norm.
        ValueError: Chainer cannot copy a :class:`~chainer.Sequential` that
            has a lambda: give it a named function, or bake in place.

    .. admonition:: Example

        >>> import numpy as np
        >>> import chainer
        >>> import chainer.links as L
        >>> import sn_function
        >>> layer = L.Linear(4, 3).add_hook(
        ...     sn_function.SpectralNormalization(use_gamma=True))
        >>> plain = sn_function.bake(layer)
        >>> sorted(name for name, _ in plain.namedparams())
        ['/W', '/b']
        >>> x = np.ones((1, 4), np.float32)
        >>> with chainer.using_config('train', False):
        ...     bool((plain(x).array == layer(x).array).all())
        ...
        True

        With a certificate, as a map of images of every size:

        >>> layer = L.Convolution2D(2, 3, 3).add_hook(
        ...     sn_function.SpectralNormalization())
        >>> plain = sn_function.bake(layer, certified=True)
        >>> sn_function.certify(plain).hi <= 1
        True

    """
    from sn_function import _bake
    from sn_function._bake_certified import Certificate
    return _bake.bake(
        model, in_place,
        Certificate(rtol, time_limit) if certified else None)
