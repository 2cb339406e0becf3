"""The link hook: a drop-in for ``chainer.link_hooks.SpectralNormalization``.

State belongs to the link: the vector ``W_u``, with several vectors ``W_us`` as
well, or ``W_map`` and ``W_maps``, which are persistent and so saved and
loaded, and on request the parameter ``gamma``.  A hook holds settings only,
and may serve any number of links.
"""
from __future__ import annotations

import contextlib
import warnings
import weakref
from typing import Any, Callable, Sequence

import chainer

from sn_function import _checks, errors
from sn_function._arithmetic import buffers
from sn_function._arithmetic.matrix import as_matrix, normalize_axis
from sn_function._compat.replacement import ChainersHook
from sn_function._graph import node
from sn_function._links import (
    call,
    gamma,
    n_step,
    optional,
    recompute,
    turn,
    vector,
    weight,
)
from sn_function._links import scope as scopes
from sn_function._links.bypass import bypasses_hooks
from sn_function._links.hooked_weight import HookedWeight, moves_on
from sn_function._links.local_hook import LocalHook
from sn_function._links.state import LinkState
from sn_function._links.weight import (
    axis_of,
    check_map,
    convolution_of,
    groups_of,
    insize_of,
    is_map,
    output_axis,
)

__all__ = ['SpectralNormalization']

optional.install()


class SpectralNormalization(LocalHook):
    """Divides a link's weight by its largest singular value at each call.

    At each call of the link its weight is replaced, for the time of the call,
    by :func:`~sn_function.functions.spectral_normalize` of it:

    .. math::

        \\bar W = \\gamma f W / \\max(\\sigma(W), \\epsilon), \\quad
        \\sigma(W) = \\max_{\\|h\\|_2 \\le 1} \\|W h\\|_2

    Outside of a call, ``link.W`` is the raw parameter, also when
    ``link.forward`` raises; in the scope of :func:`~sn_function.normalized` it
    is the normalized weight.  The estimate of sigma uses ``link.W_u``, which
    each call in training mode moves on by ``n_power_iteration`` iterations;
    with ``chainer.config.train`` false it stays as it is, unless ``update_u``
    says otherwise.  Where it is found to belong to another weight, it is
    brought to this one first.  Calls of one link from several threads wait
    for each other.

    The hook serves :class:`~chainer.links.Linear`,
    :class:`~chainer.links.EmbedID`, the convolutions and deconvolutions of 1
    to N dimensions, grouped or not, initialized or not, and, by
    ``weight_name``, any other link that uses one of its own parameters as a
    weight.  Add it before ``optimizer.setup(model)`` if ``use_gamma`` is
    true, as that adds a parameter; later there is a warning.

    Chainer calls the hooks of a link in ``Link.__call__``.  A link whose class
    hides that by a ``__call__`` of its own, as was usual before Chainer 5, is
    refused: see :ref:`own-call`.

    On an n-step RNN, such as :class:`~chainer.links.NStepLSTM`, it normalizes
    every matrix ``w0``, ``w1``, ... of every layer, each by its own norm and
    with its own ``u``.  These, and gammas, are on the children of the link,
    as ``link[0].w0_u``; so are the hooks, one for each weight.

    ``SpectralNormalization(detach_uv=True, n_warmup=0)`` follows the numbers
    of Chainer's hook.

    Args:
        n_power_iteration (int): Number of power iterations a call, 1 or more.
        eps (float): Floor on sigma; see
            :func:`~sn_function.functions.spectral_normalize`.
        use_gamma (bool): Multiply by a trainable parameter of shape ``()``,
            ``link.gamma``, that starts as the largest singular value of the
            initial weight, or as 1 where that is zero.  If that name is
            taken, the parameter is called ``weight_name + '_gamma'``.
        factor (float or None): Divides sigma, and so multiplies the weight;
            above 0.  ``None`` means 1.
        weight_name (str): Name of the link's weight; left out for n-step RNNs.
        name (str or None): Name of this hook, ``'SpectralNormalization'`` if
            ``None``.  Hooks on one link need different names.
        detach_uv (bool): Treat u and v as constants in the gradient, as
            Chainer's hook does.  The default is the exact gradient.
        n_warmup (int): Number of iterations that are run when the link's
            vector is created, so that sigma is right from the first call (with
            ``rtol``, until it is reached); and
            the most that are run before a call where the vector is found to
            belong to another weight.  That is one that was loaded without its
            vector, drawn anew or averaged, for example; see :doc:`accuracy`.
        cap (float or None): Instead of ``factor`` and ``eps``: a weight whose
            sigma is below ``cap`` is used as it is, one above it is divided
            by ``sigma / cap``, as in H. Gouk et al., `Regularisation of
            Neural Networks by Enforcing Lipschitz Continuity
            <https://arxiv.org/abs/1804.04368>`_.  Above the cap the result
            does not depend on the size of the weight, so no gradient brings
            the weight back: it is used with the norm ``cap``, as with
            ``factor=cap``.  In that paper the weights themselves are scaled
            after each update, and come back:
            :class:`~sn_function.optimizer_hooks.SpectralNormProjection`.
        groups (str or None): What sigma is for a convolution with groups.
            ``None``, as in Chainer's hook: that of the whole weight as one
            matrix, which is above that of each of its groups.  ``'each'``:
            the largest one of any group, each with a vector and iterations
            of its own, so that the largest group gets the norm 1.  It also
            serves :class:`~chainer.links.DepthwiseConvolution2D`, where
            each channel is a group.  Links without groups are the same with
            both.  See :doc:`models`.
        n_vectors (int): Number of vectors that sigma is estimated from.  1 is
            power iteration.  It cannot follow a weight in training whose
            leading singular values are close, so its estimate is below the
            norm there; several vectors, such as 8 or 16, can: sigma is the
            largest that any vector of their span gives.  A matrix of m x n
            has no more than m and n of them.  With ``groups='each'`` this is
            their number for each group.
        rtol (float or None): Iterate in each call until the residual of the
            estimate is at most this, such as 1e-3; see
            :func:`~sn_function.functions.spectral_normalize`.  ``None`` means
            ``n_power_iteration`` iterations in each call.
        max_iterations (int): The most iterations of a call with ``rtol``.
            Where they do not suffice, there is a warning, once for each link.
        norm (str): ``'matrix'``, as in Chainer's hook: the largest singular
            value of the weight as a matrix.  ``'operator'``: the norm of what
            a convolution or a deconvolution makes of images, which is what
            bounds the layer; see below.
        insize (int, tuple of int or None): With ``norm='operator'``, the size
            of images whose norm is taken, one number for each axis or one for
            all.  ``None``: that of the link's first call.  A ``W_map`` that is
            loaded keeps its own size.
        axis (int or None): Output axis of the weight, the one that is kept
            where it is seen as a matrix; may be negative.  ``None``, as in
            Chainer's hook: that of each link, 1 for deconvolutions, else 0.
            Older code takes 0 for deconvolutions, too.  The norms along two
            axes differ, and ``u`` has another length, so training goes on
            with the same one only: see :doc:`migration`.  With
            ``groups='each'`` it is that of each group.  It does not go
            together with ``norm='operator'``.
        update_u (str): When ``u`` moves on: ``'train'``, as in Chainer's
            hook, in calls in training mode; ``'always'``, in test mode as
            well, with a graph or without, as links of older code do.  The
            output in test mode depends on the calls before then, and ranks
            of ChainerMN need as many calls each.

    **The norm of a convolution.**  A convolution whose weight has the norm 1
    as a matrix may still magnify an image, a 3 x 3 kernel up to 3 times.  With
    ``norm='operator'`` the map itself, from images to images, gets the norm 1,
    with its stride, padding, dilation and groups.  Take it where a bound of
    the layer matters: for networks that are to be invertible, certified, or
    Lipschitz with a constant that is known.

    * Each iteration takes as long as the layer for two images.  On a device
      the host waits for two numbers in each.
    * The singular values of a map of images are close to each other.  So an
      estimate by one iteration in each call is below the norm: give ``rtol``,
      such as 1e-2, and perhaps ``n_vectors``.
    * The norm depends on the size of images: larger ones have a larger norm,
      up to a limit.  It is taken at one size, that of the first call or
      ``insize``, and the same weight is used for images of other sizes.
      Where a bound is to hold for every size, give a larger ``insize`` than
      the layer gets: with 32, kernels of 3 x 3 are within 1 % of the limit.
      :func:`sn_function.certify` bounds the norm for all sizes.
    * The link keeps an input instead of ``W_u``: ``link.W_map``, of shape
      ``(c_in, *insize)``, which is ``None`` until the size is known.  With
      several vectors the others are ``link.W_maps``.  A snapshot without them
      loads, and the next call draws them.
    * On links that are no convolution, such as :class:`~chainer.links.Linear`
      and :class:`~chainer.links.EmbedID`, it is the norm of the matrix, and
      ``W_u`` is kept.

    Attributes:
        vector_name (str): Name of the vector of the link that the hook was
            last added to, ``weight_name + '_u'``, or ``'W_map'``.
            That attribute of the link is ``None`` while the weight is not
            initialized.  With ``n_vectors`` of b above 1 it is the leading
            one, and the link keeps the others under the same name with an
            ``s``: ``link.W_us`` of shape ``(b - 1, m)``, which is persistent,
            too.  A snapshot without them loads; the next call draws them.
        axis (int): Output axis as it was given; else that of the link that
            the hook was last added to: 1 for deconvolutions, else 0.
        name (str): Name of this hook.

    Raises:
        SpectralNormalizationError: One of :mod:`sn_function.errors`, for a
            setting out of its range; and from
            :meth:`~chainer.Link.add_hook`, which then leaves the link as it
            was, for a link that lacks the weight, or never calls hooks.

    See: T. Miyato et al., `Spectral Normalization for Generative Adversarial
    Networks <https://arxiv.org/abs/1802.05957>`_

    .. admonition:: Example

        There are two ways to use it.  Make the link and the hook one by one,
        which gives a handle on what the hook registers:

            >>> import sn_function
            >>> import chainer.links as L
            >>> l = L.Convolution2D(3, 5, 3)
            >>> hook = sn_function.SpectralNormalization()
            >>> _ = l.add_hook(hook)
            >>> # The shape of the first left singular vector.
            >>> getattr(l, hook.vector_name).shape
            (5,)
            >>> # Delete the hook from this link.
            >>> l.delete_hook(hook.name)

        Or both at once, which is handy in a :class:`~chainer.Chain`:

            >>> # The hook handles lazy initialization.
            >>> layer = L.Convolution2D(
            ...     5, 3, stride=1, pad=1).add_hook(
            ...         sn_function.SpectralNormalization())

    """

    name = 'SpectralNormalization'
    groups: str | None = None  # in pickles of versions before 0.2
    n_vectors = 1              # likewise, as the next two
    rtol: float | None = None
    max_iterations = 200
    norm = 'matrix'
    insize: int | tuple[int, ...] | None = None
    # ``axis`` is that of a link where this is ``None``.
    given_axis: int | None = None

    def __init__(
            self,
            n_power_iteration: int = 1,
            eps: float = 1e-6,
            use_gamma: bool = False,
            factor: float | None = None,
            weight_name: str = 'W',
            name: str | None = None,
            *,
            detach_uv: bool = False,
            n_warmup: int = 15,
            cap: float | None = None,
            groups: str | None = None,
            n_vectors: int = 1,
            rtol: float | None = None,
            max_iterations: int = 200,
            norm: str = 'matrix',
            insize: int | Sequence[int] | None = None,
            axis: int | None = None,
            update_u: str = 'train',
    ) -> None:
        _checks.check_settings(n_power_iteration, factor, eps, cap)
        if cap is not None and use_gamma:
            raise errors.CapConflictError('use_gamma', use_gamma)
        _checks.check_count('n_warmup', n_warmup, 0)
        if groups is not None and not (
                isinstance(groups, str) and groups == 'each'):
            raise errors.GroupsError(groups)
        _checks.check_count('n_vectors', n_vectors, 1)
        _checks.check_tolerance(rtol, max_iterations, n_power_iteration)
        insize = _checks.check_norm(norm, groups, insize)
        axis = _checks.check_axis(axis, norm)
        self.n_power_iteration = n_power_iteration
        self.eps = eps
        self.use_gamma = use_gamma
        self.factor = factor
        self.weight_name = weight_name
        self.vector_name = weight_name + '_u'
        self.given_axis = axis
        self.axis = 0 if axis is None else axis
        self.detach_uv = detach_uv
        self.n_warmup = n_warmup
        self.cap = cap
        self.groups = groups
        self.n_vectors = n_vectors
        self.rtol = rtol
        self.max_iterations = max_iterations
        self.norm = norm
        self.insize = insize
        self.update_u = update_u
        if name is not None:
            self.name = name

    def __setstate__(self, state: dict[str, Any]) -> None:
        if '_initialized' in state:     # of Chainer's alone
            raise errors.PickledHookError
        self.__dict__.update(state)

    @property
    def update_u(self) -> str:
        """When ``u`` moves on, ``'train'`` or ``'always'``; may be set."""
        return self.__dict__.get('update_u', 'train')  # not in old pickles

    @update_u.setter
    def update_u(self, value: str) -> None:
        _checks.check_update(value)
        self.__dict__['update_u'] = value

    @property
    def v(self) -> Any:
        """The right vector of the latest call, shape ``(n,)``, or ``None``.

        With ``groups='each'``, those of all groups, one after another; of a
        map of images, of the shape of an output, ``(c_out, *outsize)``.  An
        array on the device of the weight, as in Chainer's hook.  A hook on
        several links gives that of the link that was called last.
        """
        state = _LATEST.get(self, _nothing)()
        return state and state.v

    # Adding and deleting

    def added(self, link: chainer.Link) -> None:
        """Registers the vectors and, with ``use_gamma``, the parameter."""
        weight_name = self.weight_name
        if n_step.holds_weights(link, weight_name):
            n_step.replace_hook(self, link)
            return
        try:
            self._check_link(link)
            gamma_name = (
                gamma.free_name(link, weight_name) if self.use_gamma else None)
            self._warn(link)
        except BaseException:
            # Link.add_hook has put the hook in before it calls this.
            link.local_link_hooks.popitem()
            raise
        if self.given_axis is None:
            self.axis = output_axis(link)
        names = vector.names(self, link)
        self.vector_name = names[0]
        W = vars(link)[weight_name]
        LinkState(weight_name, gamma_name).put(link)
        for name in names:
            setattr(link, name, None)
            link.register_persistent(name)
        if gamma_name is not None:
            gamma.register(link, gamma_name, W, self.axis,
                           groups_of(link, self), vector.map_of(link, self))
        if W.array is not None:
            own = HookedWeight(self, link, W)
            if own.shape is not None:
                own.vector_and_gamma()

    def _check_link(self, link: chainer.Link) -> None:
        W = vars(link).get(self.weight_name)
        if not isinstance(W, chainer.Parameter):
            raise errors.WeightNotFoundError(link, self.weight_name)
        # A link of Chainer's hook has W_u, and one of this its state.
        for name in (*vector.names(self, link), f'{self.weight_name}_u',
                     LinkState.key(self.weight_name)):
            if hasattr(link, name):
                raise errors.HookCollisionError(link, name, self.weight_name)
        if W.array is not None:
            _checks.check_weight(W.array)
            axis_of(link, self, W.ndim)
            check_map(link, self, W)
        self._check_insize(link, W)
        if bypasses_hooks(link):
            raise errors.HookBypassedError([('', link)])

    def _check_insize(
            self, link: chainer.Link, W: chainer.Parameter) -> None:
        convolution = convolution_of(link) if is_map(link, self) else None
        if convolution is None or self.insize is None:
            return
        insize = _checks.as_insize(
            self.insize, type(link).__name__, len(convolution.stride))
        if W.array is not None:
            _checks.check_insize(
                convolution._replace(insize=insize), W.shape)

    def _warn(self, link: chainer.Link) -> None:
        if self.use_gamma and is_set_up(link):
            warnings.warn(errors.UntrainedGammaWarning(
                [type(link).__name__]), stacklevel=4)

    def deleted(self, link: chainer.Link) -> None:
        """Removes the vectors and, with ``use_gamma``, the parameter."""
        gamma_name = LinkState.of(link, self.weight_name).gamma_name
        if gamma_name is not None:
            delattr(link, gamma_name)
        for name in vector.names(self, link):
            if hasattr(link, name):  # n_vectors may have been changed
                delattr(link, name)
        LinkState.remove(link, self.weight_name)
        with contextlib.suppress(AttributeError):  # it may be gone
            buffers.release(call.original(link, self.weight_name).array)

    # Calling

    def forward_preprocess(self, cb_args: Any) -> None:
        """Replaces the weight by the normalized one until the call ends."""
        def make() -> chainer.Variable:
            W = call.original(link, self.weight_name)
            if W.array is None:
                weight.initialize(cb_args, W, self.weight_name)
            if not is_map(link, self):
                return self.normalize_weight(link)
            return self.normalize_weight(link, insize_of(cb_args))

        link = cb_args.link
        call.replace_weight(cb_args, self.weight_name, make)

    def forward_postprocess(self, cb_args: Any) -> None:
        """Ensures that the weight is the link's own parameter again."""
        call.restore_weight(cb_args.link, self.weight_name)

    def normalize_weight(
            self, link: chainer.Link,
            insize: int | Sequence[int] | None = None,
    ) -> chainer.Variable:
        """Returns the link's weight, normalized, and moves its vectors on.

        Args:
            link (~chainer.Link): A link that this hook was added to.
            insize (int, tuple of int or None): With ``norm='operator'``, the
                size of images, where neither ``link.W_map`` nor the hook says
                it.

        Returns:
            ~chainer.Variable: The normalized weight.

        Raises:
            UninitializedWeightError: The weight has no array yet.
            UnknownInputSizeError: Nothing says the size of images.
            InsizeError: ``insize`` is used, and is no size of images.
            InputSizeError: Images of that size are too small.

        """
        if turn.has_turn(link):
            return self._normalize(link, insize)
        with turn.Turn(link):
            return self._normalize(link, insize)

    def _normalize(
            self, link: chainer.Link, insize: int | Sequence[int] | None,
    ) -> chainer.Variable:
        W = call.original(link, self.weight_name)
        if W.array is None:
            raise errors.UninitializedWeightError(
                type(link).__name__, self.weight_name)
        own = HookedWeight(self, link, W, insize)
        state = own.state
        is_train, is_second_run, will_be_run_again = node.config(
            'train', 'in_recomputing', '_will_recompute')
        scope = None if is_second_run else scopes.covering(link)
        try:
            if scope is not None:
                Y, iterations, v_shape = scope.normalize(own)
            else:
                Y, iterations = own.normalize(
                    moves_on(self, is_train) and not is_second_run,
                    is_second_run)
                v_shape = own.v_shape
        except errors.VectorValueError:
            own.discard_bad_vector()
            convolution = own.convolution
            return self._normalize(link, convolution and convolution.insize)
        state.keep(iterations, is_second_run, v_shape)
        _LATEST[self] = weakref.ref(state)
        if is_second_run or will_be_run_again:
            recompute.record(link, state, iterations.start)
        return Y

    def reshape_W(self, W: Any) -> Any:
        """Returns ``W``, a Variable or an array, as a matrix.

        Args:
            W (:class:`~chainer.Variable` or :ref:`ndarray`): Weight of a link
                whose output axis is ``axis``.

        Returns:
            The same in the shape ``(W.shape[axis], -1)``.

        """
        return as_matrix(W, normalize_axis(self.axis, W.ndim))


# The hooks that normalize a weight of their link, ours and Chainer's.
HOOKS = (SpectralNormalization, ChainersHook)


def is_set_up(link: chainer.Link) -> bool:
    """Whether an optimizer has the parameters that the link has now."""
    return any(param.update_rule is not None for param in link.params())


def _nothing() -> None:
    """Stands for a dead weak reference."""


# The state of the link that a hook served last.  It is not a setting, so it
# is not on the hook.
_LATEST: weakref.WeakKeyDictionary[
    SpectralNormalization, Callable[[], LinkState | None]
] = weakref.WeakKeyDictionary()

# Pickles of versions before 0.2 name it here.  Delete in version 0.3.
_LargestSingularValue = gamma.LargestSingularValue
