"""Attributes of links that read as the normalized weights, in a scope.

``link.__dict__['W']`` stays the parameter.  So whatever goes by it, such as
optimizers, snapshots, copies, ``params()`` and other threads, is as ever, and
there is nothing to put back.  Only the attribute is different: the class of
the link gets a descriptor of that name, which looks whether its thread is in
such a scope.  It is never removed, as another thread may be in one.
"""
from __future__ import annotations

import inspect
from typing import Any, Iterable

import chainer

from sn_function._graph import node
from sn_function._links import call, n_step, recompute, turn
from sn_function._links import scope as scopes
from sn_function._links.hooked_weight import Hook
from sn_function._links.local_hook import LocalHook

# What a normalized weight was read of: the link, and its parameter.
_PARAMETER = '_sn_parameter'


class _Nothing:
    """Stands for no attribute; it is the same in a class that was pickled."""


class ReadingScope(scopes.Scope):
    """A scope in which attributes read as the weights of its calls.

    Attributes:
        forgets (list): The nodes of :func:`chainer.functions.forget` whose
            first run opened it.
        second_run: The node whose second run opened it, or ``None``.

    """

    def __init__(
            self, models: Iterable[chainer.Link], kind: type[Hook]) -> None:
        super().__init__(models, kind)
        self.forgets = recompute.first_runs()
        self.second_run = recompute.second_run()
        self._parameters: list[tuple[chainer.Link, str, Any]] = []
        for link in self.links.values():
            for hook in link.local_link_hooks.values():
                name = _name_of(hook)
                if name is None or name not in vars(link):
                    continue
                _install(type(link), name)
                W = call.original(link, name)
                if isinstance(W, chainer.Parameter):
                    self._parameters.append((link, name, W))

    def restore(self) -> None:
        """Puts parameters back where the program has put anything else."""
        for link, name, W in self._parameters:
            if name in link._params and not isinstance(
                    call.original(link, name), chainer.Parameter):
                vars(link)[name] = W
        for link in self.links.values():
            if n_step.is_hooked(link):
                n_step.put_back_weights(link)


class _Attribute:
    """Describes an attribute that may read as a normalized weight.

    Args:
        name: Its name.
        inherited: What the class had there.

    """

    def __init__(self, name: str, inherited: Any) -> None:
        self._name = name
        self._inherited = inherited

    def __get__(self, link: Any, cls: type) -> Any:
        if link is None or self._name not in link.__dict__:
            return self._get_inherited(link, cls)
        if scopes.are_open() or recompute.have_reads():
            return _read(link, self._name)
        return link.__dict__[self._name]

    def _get_inherited(self, link: Any, cls: type) -> Any:
        inherited = self._inherited
        if inherited is _Nothing:
            raise AttributeError(
                f'{cls.__name__} has no attribute {self._name!r}')
        bind = getattr(type(inherited), '__get__', None)
        return inherited if bind is None else bind(inherited, link, cls)

    def __set__(self, link: Any, value: Any) -> None:
        of, W = getattr(value, _PARAMETER, (None, None))
        # What was read is put back, after something else was there.  In a
        # call it is what the call began with.
        if of is link and not turn.is_calling(link):
            value = W
        link.__dict__[self._name] = value

    def __delete__(self, link: Any) -> None:
        if self._name not in link.__dict__:
            raise AttributeError(self._name)
        del link.__dict__[self._name]


def _install(cls: type, name: str) -> None:
    inherited = inspect.getattr_static(cls, name, _Nothing)
    # A property makes the attribute itself.
    if not inspect.isdatadescriptor(inherited):
        setattr(cls, name, _Attribute(name, inherited))


def _name_of(hook: Any) -> str | None:
    """Returns the name of what a hook replaces in a call, if one of ours."""
    if isinstance(hook, n_step.HookOfLayers):
        return n_step.WEIGHTS
    if isinstance(hook, LocalHook):
        return getattr(hook, 'weight_name', None)
    return None


def _read(link: chainer.Link, name: str) -> Any:
    """Returns what the attribute is, in a scope or in a second run."""
    scope = _covering(link, recompute.second_run())
    if scope is None and not (
            recompute.have_reads() and recompute.was_read(link, name)):
        return link.__dict__[name]
    hook = next((hook for hook in link.local_link_hooks.values()
                 if _name_of(hook) == name), None)
    # In a call it is what hooks have put there so far.
    if hook is None or turn.is_calling(link):
        return link.__dict__[name]
    if node.config('_will_recompute')[0]:
        recompute.record_read(link, name, scope.forgets if scope else ())
    if isinstance(hook, n_step.HookOfLayers):
        return hook.normalized_weights(link)
    W = call.original(link, name)
    if not isinstance(W, chainer.Parameter):
        return W  # the program has put it there
    Y = hook.normalize_weight(link)
    setattr(Y, _PARAMETER, (link, W))
    return Y


def _covering(link: chainer.Link, second_run: Any) -> ReadingScope | None:
    """Returns the outermost scope in which it reads as normalized.

    In a second run that is one which the function itself has opened.  Others
    may have been opened after the first run.
    """
    for scope in scopes.opened():
        if isinstance(scope, ReadingScope) and id(link) in scope.links and (
                scope.second_run is second_run):
            return scope
    return None
