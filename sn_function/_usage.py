"""How a run of a model uses its weights.

A copy of the model is run, and nothing of the model itself is changed.
"""
from __future__ import annotations

import contextlib
import copy
import random
from typing import Any, Callable, Iterator

import chainer
import numpy
from chainer.backends import cuda

from sn_function import _models, errors
from sn_function._compat.replacement import ChainersHook
from sn_function._graph import normalize
from sn_function._links import call, n_step, turn


class Usage:
    """How a run of a model used its weights.

    Attributes:
        called (set of str): Paths of the links that were called.
        raw (dict): Names of functions that used a parameter's own array, by
            the path of the parameter.
        unregistered (list of str): Classes of the links with parameters that
            were called, and that the model has outside of ``namedlinks()``.
        ndims (dict): Number of dimensions of each parameter that is
            initialized after the run, by its path.

    """

    def __init__(self) -> None:
        self.called: set[str] = set()
        self.raw: dict[str, str] = {}
        self.unregistered: list[str] = []
        self.ndims: dict[str, int] = {}

    @classmethod
    def of(cls, model: chainer.Link, run: Callable[..., Any]) -> Usage:
        """Runs a copy of the model.

        Raises:
            ModelCopyError: Something in the model cannot be copied.
            RunArgumentError: The run uses the model itself, or no model.

        """
        usage = cls()
        twin = _Twin(model)
        with _same_random_state(model), \
                chainer.using_config('train', False), \
                chainer.no_backprop_mode(), \
                _LinkRecorder(twin, usage) as links, \
                _FunctionRecorder(twin.model, usage):
            run(twin.model)
        if not (links.has_called or usage.raw):
            raise errors.RunArgumentError(model, None)
        usage.ndims = {path: parameter.ndim for path, parameter
                       in twin.model.namedparams(include_uninit=False)}
        return usage


class _Twin:
    """A deep copy of a model, which tells its links from the model's.

    ``Link.copy`` would leave what is in lists and other attributes the
    model's own: links that are not registered, and second names of those that
    are.
    """

    def __init__(self, model: chainer.Link) -> None:
        self._copies: dict[int, Any] = {}  # by the ids of the originals
        try:
            self._copy_sequentials(model)
            self.model = copy.deepcopy(model, self._copies)
        except Exception as error:
            raise errors.ModelCopyError(model, error) from error
        self._ids = {id(x) for x in self._copies.values()}

    def _copy_sequentials(self, model: chainer.Link) -> None:
        # Chainer refuses to copy one with a lambda, as it does to pickle it.
        found = [link for link in model.links()
                 if isinstance(link, chainer.Sequential)]
        for link in found:
            self._copies[id(link)] = object.__new__(type(link))
        for link in found:
            vars(self._copies[id(link)]).update(
                copy.deepcopy(vars(link), self._copies))

    def is_original(self, link: chainer.Link) -> bool:
        """Whether it is a link of the model that was copied."""
        return id(link) in self._copies

    def is_copied(self, link: chainer.Link) -> bool:
        """Whether it is a link of the copy, as it was made."""
        return id(link) in self._ids


@contextlib.contextmanager
def _same_random_state(model: chainer.Link) -> Iterator[None]:
    """Leaves the generators of random numbers as they were."""
    devices = {str(link.device): link.device for link in model.links()
               if link.xp is cuda.cupy}
    states = {}
    for name, device in devices.items():
        with chainer.using_device(device):
            states[name] = cuda.cupy.random.get_random_state()
            cuda.cupy.random.set_random_state(cuda.cupy.random.RandomState())
    of_numpy, of_python = numpy.random.get_state(), random.getstate()
    try:
        yield
    finally:
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)
        for name, device in devices.items():
            with chainer.using_device(device):
                cuda.cupy.random.set_random_state(states[name])


class _LinkRecorder(chainer.LinkHook):
    """Records which links are called."""

    name = '_sn_link_recorder'

    def __init__(self, twin: _Twin, usage: Usage) -> None:
        self.twin = twin
        self.usage = usage
        self.has_called = False
        self.paths: dict[int, list[str]] = {}
        for path, link in twin.model.namedlinks():
            self.paths.setdefault(id(link), []).append(path.rstrip('/'))

    def forward_preprocess(self, args: Any) -> None:
        link = args.link
        # It comes before the hooks of the link, so nothing is changed yet.
        if self.twin.is_original(link):
            raise errors.RunArgumentError(self.twin.model, link)
        if not self.twin.is_copied(link):
            return
        self.has_called = True
        users = [link]
        if n_step.is_n_step(link):  # it uses the weights of its children
            users += link.children()
        for each in users:
            self.usage.called.update(self.paths.get(id(each), ()))
        if id(link) not in self.paths and any(x._params for x in users):
            self.usage.unregistered.append(type(link).__name__)
            self.paths[id(link)] = []  # once


class _FunctionRecorder(chainer.FunctionHook):
    """Records which functions use the array of a parameter."""

    name = '_sn_function_recorder'

    def __init__(self, model: chainer.Link, usage: Usage) -> None:
        self.usage = usage
        self.model = model

    def _arrays(self) -> Iterator[tuple[str, chainer.Link, str, Any]]:
        # Listed in each call, as the run initializes some.
        for path, link in self.model.namedlinks():
            # Chainer's hook passes the weight itself to functions.
            theirs = {hook.weight_name for hook
                      in link.local_link_hooks.values()
                      if isinstance(hook, ChainersHook)}
            for name in link._params - theirs:
                # Not link.W, which is the normalized weight during a call.
                array = call.original(link, name).array
                if array is not None:
                    yield f'{path.rstrip("/")}/{name}', link, name, array

    def forward_preprocess(self, function: Any, in_data: Any) -> None:
        if isinstance(function, normalize.SpectralNormalize):
            return
        for path, link, name, array in self._arrays():
            if any(x is array for x in in_data) and not _is_by_hook(
                    link, name):
                self.usage.raw.setdefault(path, function.label)


def _is_by_hook(link: chainer.Link, name: str) -> bool:
    """Whether it is a hook that uses the weight now, before ours in a call."""
    return isinstance(vars(link)[name], chainer.Parameter) and (
        _models.is_hooked(link, name) and turn.is_calling(link))
