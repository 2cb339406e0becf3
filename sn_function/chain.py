"""Whole models: a hook for a chain, and a scope that shares what it computed.

Both normalize each weight once, however often its link is called, and all
weights in one node of the graph, which saves time where they are small.
"""
from __future__ import annotations

import contextlib
import uuid
import warnings
from typing import Any, Iterator, Sequence

import chainer

from sn_function import _models, errors
from sn_function._links import call, n_step
from sn_function._links import scope as scopes
from sn_function._links.bypass import bypasses_hooks
from sn_function._links.printing import settings_text
from sn_function._links.state import LinkState
from sn_function.link_hooks import LocalHook, SpectralNormalization, is_set_up

__all__ = ['ChainSpectralNormalization', 'cached']


@contextlib.contextmanager
def cached(*models: chainer.Link) -> Iterator[None]:
    """A scope in which each weight is normalized once, and u advances once.

    A step of a GAN calls its discriminator two or three times, with the same
    weights.  Within this scope all calls of a link that has a
    :class:`SpectralNormalization` use one normalized weight, the same
    Variable: the first call makes it, for all links of the models at once, in
    one node of the graph.  The gradients of all calls are summed there, so one
    backward of the sum of the losses goes through the normalization once.

    * ``u`` advances when a link is first called in training mode, or with
      ``update_u='always'`` in any; a call in test mode uses the same weight
      as the others.
    * After an optimizer has updated a weight (or gamma), or its array was
      replaced, the next call normalizes it again.  Another change in place,
      such as ``link.W.array[...] = 0``, is not noticed before the scope ends.
    * A weight normalized under :func:`chainer.no_backprop_mode` has no graph;
      a call that needs one normalizes it again, from the same ``u``.
    * :meth:`~chainer.Variable.unchain_backward` leaves a normalized weight
      connected with its parameter, as other calls share it.
    * If scopes are nested, the outermost one that has the link counts.  A
      scope belongs to its thread.
    * A second run by :func:`chainer.functions.forget` starts from the ``u``
      that the first one started from, in the scope or after it.
    * ``link.W`` is the parameter outside of calls;
      :func:`~sn_function.normalized` is a scope in which it is not.
    * If no link of the models has that hook, nothing is shared, and there is
      a :class:`~sn_function.errors.SpectralNormalizationWarning`.  Chainer's
      hook does not count.

    Args:
        models (~chainer.Link): Links or chains.

    Raises:
        ModelTypeError: There is none, or one is no link.

    .. admonition:: Example

        >>> import numpy as np
        >>> import sn_function
        >>> import chainer.links as L
        >>> x = np.ones((1, 4), np.float32)
        >>> layer = L.Linear(4, 3).add_hook(
        ...     sn_function.SpectralNormalization())
        >>> with sn_function.cached(layer):
        ...     loss = (layer(x) - layer(-x)).array.sum()  # normalizes once

    """
    _models.check_models('cached', *models)
    scope = scopes.Scope(models, SpectralNormalization)
    if not scope.has_hooks():
        warnings.warn(errors.NothingToShareWarning(models), stacklevel=3)
    scopes.begin(scope)
    try:
        yield
    finally:
        scopes.end(scope)


class ChainSpectralNormalization(LocalHook):
    """Normalizes the weights of all links of a chain in each call of it.

    Adds a :class:`~sn_function.SpectralNormalization` to every link in the
    chain that it supports: :class:`~chainer.links.Linear`,
    :class:`~chainer.links.EmbedID`, the convolutions and the deconvolutions,
    and with ``groups='each'`` or ``norm='operator'``
    :class:`~chainer.links.DepthwiseConvolution2D`.
    When the chain is called, all these weights are normalized in one node of
    the graph; a link that the chain calls twice uses the same normalized
    weight twice.  Otherwise it is the same as a hook on each link: the same
    numbers, the same snapshots, also when a link is called by itself.  A call
    of the chain is a scope like :func:`cached`.

    An n-step RNN is taken where the filter has its class, such as
    ``[L.Linear, L.NStepLSTM]``, and otherwise is not.

    Links that already have such a hook for that weight keep it; links that are
    put into the chain later get none.  :meth:`~chainer.Link.delete_hook`
    removes the hooks that were added.

    Chainer does not tell a hook of a call of a chain whose class has a
    ``__call__`` of its own, in the place of ``forward``.  Then each link
    normalizes its weight by itself, and there is a warning.  A link of such a
    class could not be normalized at all, and is refused, unless the filter
    leaves it out: see :ref:`own-call`.

    Args:
        filter (str, type, callable, list or None): Which links: a pattern
            of their paths in the chain, such as ``'/block*/conv?'``, with the
            wildcards of :mod:`fnmatch`, where ``*`` also stands for slashes; a
            class; a function that is called with the path and the link; or a
            list of these, for links that any of them takes.  ``None`` takes
            every supported link.  A function must be one of a module if the
            chain is to be pickled.
        name (str or None): Name of this hook,
            ``'ChainSpectralNormalization'`` if ``None``.
        exclude (str, type, callable, list or None): Which links not, though
            the filter takes them, in the same forms.  A pattern or a class
            also leaves out all links in a chain that it takes: ``'/bn*'``,
            or the class of a conditional batch normalization for the
            embeddings in it.
        n_power_iteration, ..., update_u: The settings of
            :class:`~sn_function.SpectralNormalization`, for all of the links.

    Attributes:
        hook (SpectralNormalization): The hook on the links.

    Raises:
        SpectralNormalizationError: One of :mod:`sn_function.errors`; from
            :meth:`~chainer.Link.add_hook`, which then leaves the chain as it
            was, where no link is found, or one that never calls hooks.

    .. admonition:: Example

        >>> import chainer
        >>> import sn_function
        >>> import chainer.links as L
        >>> model = chainer.Sequential(
        ...     L.Linear(4, 3), chainer.functions.relu, L.Linear(3, 1))
        >>> hook = sn_function.ChainSpectralNormalization(
        ...     filter=lambda path, link: path != '/1', detach_uv=True)
        >>> _ = model.add_hook(hook)
        >>> [path for path, link in model.namedlinks()
        ...  if hasattr(link, 'W_u')]
        ['/0']

    """

    name = 'ChainSpectralNormalization'

    exclude: _models.Filter = None  # in pickles of versions before 0.2

    # The settings are written out for editors and type checkers; a test
    # compares them with those of the hook of a link.
    def __init__(
            self,
            filter: _models.Filter = None,
            name: str | None = None,
            *,
            exclude: _models.Filter = None,
            n_power_iteration: int = 1,
            eps: float = 1e-6,
            use_gamma: bool = False,
            factor: float | None = None,
            weight_name: str = 'W',
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
        _models.check_filter(filter)
        _models.check_filter(exclude)
        self.filter = filter
        self.exclude = exclude
        self.hook = _HookOfLink(
            n_power_iteration=n_power_iteration, eps=eps,
            use_gamma=use_gamma, factor=factor, weight_name=weight_name,
            detach_uv=detach_uv, n_warmup=n_warmup, cap=cap, groups=groups,
            n_vectors=n_vectors, rtol=rtol, max_iterations=max_iterations,
            norm=norm, insize=insize, axis=axis, update_u=update_u)
        if name is not None:
            self.name = name

    def added(self, chain: chainer.Link) -> None:
        """Adds the hook to the links."""
        done: list[chainer.Link] = []
        try:
            links = self._links(chain)
            self._check(chain, links)
            for _, link in links:
                link.add_hook(self.hook)
                done.append(link)
        except BaseException:
            for link in done:
                link.delete_hook(self.hook.name)
            # Link.add_hook has put the hook in before it calls this.
            chain.local_link_hooks.popitem()
            raise

    def _links(self, chain: chainer.Link) -> list[tuple[str, chainer.Link]]:
        """Returns the links that get the hook, with the path of each."""
        weight_name = self.hook.weight_name
        supported = self._supported(chain)
        n_steps = [(path, link) for path, link in chain.namedlinks()
                   if _models.names_n_step_class(self.filter, link)]
        excluded = _models.excluded(
            chain, self.exclude, supported + n_steps)
        free = [(path, link) for path, link in supported
                if not LinkState.is_on(link, weight_name)]
        chosen = [
            *((path, link) for path, link in free
              if _models.takes(self.filter, path, link)),
            *((path, link) for path, link in n_steps
              if not n_step.is_hooked(link))]
        chosen = [(path, link) for path, link in chosen
                  if id(link) not in excluded]
        if not chosen:
            raise errors.NoLinkError(
                chain, weight_name, self.filter, supported, free,
                self.exclude)
        found: dict[int, tuple[str, chainer.Link]] = {}
        for path, link in chosen:  # once each: it may have several paths
            found.setdefault(id(link), (path, link))
        return list(found.values())

    def _supported(
            self, chain: chainer.Link) -> list[tuple[str, chainer.Link]]:
        hook = self.hook
        return list(_models.supported_links(
            chain, hook.weight_name, hook.groups, hook.norm))

    def _check(
            self, chain: chainer.Link,
            links: list[tuple[str, chainer.Link]]) -> None:
        """Raises an error or warns where the hook would have no effect."""
        bypassing = [each for each in links if bypasses_hooks(each[1])]
        if bypassing:
            raise errors.HookBypassedError(
                bypassing, ', or leave these links out by the filter of the '
                'hook, or by exclude=')
        if bypasses_hooks(chain):
            warnings.warn(errors.ChainCallWarning(chain), stacklevel=4)
        if self.hook.use_gamma:
            set_up = [path for path, link in links if is_set_up(link)]
            if set_up:
                warnings.warn(
                    errors.UntrainedGammaWarning(set_up), stacklevel=4)

    def __repr__(self) -> str:
        settings = settings_text(self.hook)
        if self.filter is not None:
            settings = f'{_models.filter_text(self.filter)}, {settings}'
        if self.exclude is not None:
            settings += f', exclude={_models.filter_text(self.exclude)}'
        if self.name != type(self).name:
            settings += f', name={self.name!r}'
        return f'{type(self).__name__}({settings})'

    def links_left_out(self, chain: chainer.Link) -> set[int]:
        """Returns the ids of the links that the filters leave out."""
        supported = self._supported(chain)
        return _models.excluded(
            chain, self.exclude, supported, is_strict=False) | {
                id(link) for path, link in supported
                if not _models.takes(self.filter, path, link)}

    def deleted(self, chain: chainer.Link) -> None:
        """Deletes the hook from the links."""
        for link in chain.links():
            hook = link.local_link_hooks.get(self.hook.name)
            if getattr(hook, 'key', None) == self.hook.key:
                link.delete_hook(self.hook.name)

    def forward_preprocess(self, cb_args: Any) -> None:
        """Opens the scope, unless this call is in one, or a second run."""
        chain = cb_args.link
        if scopes.covering(chain) is None and (
                not chainer.config.in_recomputing):
            call.apply(cb_args, self.name, scopes.ScopeOfCall(
                chain, SpectralNormalization))

    def forward_postprocess(self, cb_args: Any) -> None:
        """Ensures that the scope is closed."""
        scope = scopes.covering(cb_args.link)
        if isinstance(scope, scopes.ScopeOfCall) and (
                scope.link is cb_args.link):
            scope.restore_unless_called()


class _HookOfLink(SpectralNormalization):
    """Has a key, which a copy of it shares: a copied link has a copied hook.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.key = uuid.uuid4().hex

    def _warn(self, link: chainer.Link) -> None:
        """Leaves it to the hook of the chain, which warns once for all."""

    def __repr__(self) -> str:
        return f'{SpectralNormalization.__name__}({settings_text(self)})'
