"""Vectors of a weight, loaded from snapshots: some lack them, or have others.

``W_u`` is in any snapshot of a link with a hook, Chainer's or ours; ``W_us``
is in those of hooks with several vectors only, and ``W_map`` in those of hooks
that take the norm of a map.  Chainer's deserializers raise
an error for what a file lacks, and links have no say in it.  So
``Link.serialize`` is replaced by one that gives such links a deserializer
which returns ``None`` for these names: then the next call makes the vectors.
Where ``W_u`` is missing, it says which command makes it; where it is there,
:mod:`.other_axis` looks at it.
"""
from __future__ import annotations

import functools
from typing import Any

import chainer

from sn_function import errors
from sn_function._links import call, other_axis, vector

_serialize = chainer.Link.serialize


@functools.wraps(_serialize)
def serialize(link: chainer.Link, serializer: Any) -> None:
    """Replaces ``Link.serialize``.

    Raises:
        MissingVectorError: A snapshot has no ``W_u`` for the link.
        VectorAxisError: It has one of another output axis.

    """
    hooks = [hook for hook in link.local_link_hooks.values()
             if hasattr(hook, 'n_vectors')]
    if not hooks or isinstance(serializer, chainer.Serializer):
        _serialize(link, serializer)
        return
    try:
        _serialize(link, _OfHooks(serializer, link, hooks))
    except Exception as e:
        for hook in hooks:
            name = vector.names(hook, link)[0]
            if name not in vector.optional_names(hook, link):
                _explain(link, serializer, hook.weight_name, name, e)
        raise


def _explain(
        link: chainer.Link, of_file: Any, weight_name: str, name: str,
        error: Exception) -> None:
    """Raises an error that names a command, if it is for want of a vector."""
    if not _lacks(of_file, name) or _lacks(of_file, weight_name):
        return
    # With u there, gamma has another shape: no KeyError, on a device.
    has_u = not (hasattr(link, 'u') or _lacks(of_file, 'u'))
    if has_u or isinstance(error, KeyError):
        raise errors.MissingVectorError(
            _path_of(of_file) + name, has_u) from error


def _lacks(of_file: Any, name: str) -> bool:
    try:
        of_file(name, None)
    except KeyError:
        return True
    except Exception:  # it is there, or the file cannot be read
        return False
    return False


def _path_of(of_file: Any) -> str:
    """Returns where in a .npz or HDF5 file Chainer reads a link."""
    path = getattr(of_file, 'path', None)
    if path is None:
        path = getattr(getattr(of_file, 'group', None), 'name', '') + '/'
    return path.lstrip('/')


def install() -> None:
    """Has all links use it."""
    chainer.Link.serialize = serialize


class _OfHooks(chainer.Deserializer):
    """A deserializer that may lack some names, and have other shapes there."""

    def __init__(
            self, of_file: Any, link: chainer.Link, hooks: list[Any]) -> None:
        self._of_file = of_file
        self._link = link
        self._names = {
            name for hook in hooks
            for name in vector.optional_names(hook, link)}
        self._hooks = {vector.names(hook, link)[0]: hook for hook in hooks}

    def __getitem__(self, key: str) -> Any:
        return self._of_file[key]

    def __call__(self, key: str, value: Any) -> Any:
        if key not in self._names:
            hook = self._hooks.get(key)
            if hook is not None:
                self._check(hook, key)
            return self._of_file(key, value)
        try:
            loaded = self._of_file(key, None)
        except KeyError:
            return None
        if loaded is None:  # it was saved so, or is to be left alone
            return self._of_file(key, value)
        if value is None or loaded.shape != value.shape:
            return loaded
        chainer.backend.copyto(value, loaded.astype(value.dtype))
        return value

    def _check(self, hook: Any, key: str) -> None:
        u = self._of_file(key, None)
        W = call.original(self._link, hook.weight_name).array
        if u is not None and W is not None:
            other_axis.check(self._link, hook, key, W, u)
