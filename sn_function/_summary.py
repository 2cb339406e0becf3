"""A report on which parameters of a model are normalized."""
from __future__ import annotations

from typing import Any, Callable, Iterator, NamedTuple

import chainer
from chainer import link_hooks
from chainer.links.rnn import n_step_rnn

from sn_function import _models
from sn_function._graph import normalize
from sn_function._links import call
from sn_function.chain import ChainSpectralNormalization
from sn_function.link_hooks import HOOKS

NORMALIZED = 'normalized'
FILTERED_OUT = 'filtered out'
NO_HOOK = 'no hook'
UNSUPPORTED = 'unsupported'
NEVER = 'never'
NO_MATRIX = 'no matrix'
UNKNOWN = 'unknown'


class Row(NamedTuple):
    """One parameter.

    ``shape`` is ``None`` while it is not initialized; ``status`` is one of
    those of :class:`Summary`, and ``note`` explains it, or is empty.
    """

    path: str
    shape: tuple[int, ...] | None
    status: str
    note: str


class Summary(NamedTuple):
    """The parameters of a model, in the order of their paths.

    ``print(summary)`` prints a table; ``rows`` holds the same as data.  A
    parameter is

    * ``'normalized'``: its link has a hook, this package's or Chainer's;
    * ``'filtered out'``: by the filter of a
      :class:`~sn_function.ChainSpectralNormalization`;
    * ``'no hook'``: it could be normalized;
    * ``'unsupported'``: a matrix in a link of another kind, which is not
      normalized unless a hook is added to that link by itself;
    * ``'never'``: it is used without a call of its link, so a hook has no
      effect on it;
    * ``'no matrix'``: a bias, or another parameter with fewer than 2
      dimensions;
    * ``'unknown'``: as ``'unsupported'`` or ``'no matrix'``, and not
      initialized.

    """

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        cells = [('parameter', 'shape', 'status', 'note')]
        cells += [(row.path, _shape_text(row.shape), row.status, row.note)
                  for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ['  '.join(cell.ljust(width) for cell, width in
                           zip(line, widths)).rstrip() for line in cells]
        matrices = [row for row in self.rows
                    if row.status not in (NO_MATRIX, UNKNOWN)]
        n = sum(row.status == NORMALIZED for row in matrices)
        return '\n'.join([*lines, '', f'{n} of {len(matrices)} weights are '
                                      f'normalized'])


def summary(
        model: chainer.Link, run: Callable[[chainer.Link], Any] | None = None,
) -> Summary:
    """Reports for each parameter of a model whether it is normalized.

    A hook acts when its link is called.  Some models use a weight without
    calling its link: :class:`~chainer.links.NStepLSTM` and similar links do,
    and so does ``link.forward(x)``, or ``F.linear(x, link.W)``.  Those of
    Chainer are known; ``run`` finds those of the model itself as well.

    Args:
        model (~chainer.Link): A link or chain.
        run (callable or None): Called once with a copy of the model, in test
            mode and without a graph, such as ``lambda model: model(x)``.
            The model itself and its state are left alone.

    Returns:
        Summary: One row for each parameter.

    .. admonition:: Example

        >>> import chainer
        >>> import numpy as np
        >>> import sn_function
        >>> import chainer.links as L
        >>> model = chainer.Sequential(
        ...     L.Linear(4, 3), chainer.functions.relu, L.Linear(3, 1))
        >>> _ = model.add_hook(
        ...     sn_function.ChainSpectralNormalization('/0'))
        >>> x = np.ones((2, 4), np.float32)
        >>> print(sn_function.summary(model, lambda model: model(x)))
        parameter  shape  status        note
        /0/W       3x4    normalized    SpectralNormalization
        /0/b       3      no matrix
        /1/W       1x3    filtered out
        /1/b       1      no matrix
        <BLANKLINE>
        1 of 2 weights are normalized

    """
    _models.check_models('summary', model)
    usage = None if run is None else _Usage.of(model, run)
    structure = _Structure(model)
    rows = []
    for path, link in model.namedlinks():
        for name in sorted(link._params):
            full = f'{path.rstrip("/")}/{name}'
            shape = _shape(link.__dict__[name])
            status, note = structure.status(link, name, shape)
            if usage is not None and status == NORMALIZED:
                status, note = usage.amend(full, note)
            rows.append(Row(full, shape, status, note))
    return Summary(tuple(rows))


def _shape(parameter: chainer.Parameter) -> tuple[int, ...] | None:
    return None if parameter.array is None else parameter.shape


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return 'lazy' if shape is None else 'x'.join(map(str, shape)) or 'scalar'


class _Structure:
    """What is known of a model's parameters without a run of it.

    Attributes:
        filtered_out (set): Ids of links that the hook of a chain leaves out.
        users (dict): Classes, by name, that use the weights of their child
            links without calling them, by the ids of the children.

    """

    def __init__(self, model: chainer.Link) -> None:
        self.filtered_out = {
            id(link) for chain in model.links()
            for hook in chain.local_link_hooks.values()
            if isinstance(hook, ChainSpectralNormalization)
            for path, link in _models.supported_links(chain)
            if not hook.accepts(path, link)}
        self.users = {
            id(child): type(link).__name__ for link in model.links()
            if isinstance(link, n_step_rnn.NStepRNNBase)
            for child in link.children()}

    def status(
            self, link: chainer.Link, name: str,
            shape: tuple[int, ...] | None) -> tuple[str, str]:
        """Returns the status of a parameter of the link, and the note."""
        hook_names = {
            hook.weight_name: key for key, hook
            in link.local_link_hooks.items() if isinstance(hook, HOOKS)}
        if name in hook_names:
            return NORMALIZED, hook_names[name]
        if shape is not None and len(shape) < 2:
            return NO_MATRIX, ''
        if id(link) in self.users:
            return NEVER, f'{self.users[id(link)]} does not call this link'
        if _models.is_supported(link) and name == 'W':
            is_left_out = id(link) in self.filtered_out
            return FILTERED_OUT if is_left_out else NO_HOOK, ''
        return (UNKNOWN if shape is None else UNSUPPORTED,
                type(link).__name__)


class _Usage:
    """How a run of the model used its weights.

    Attributes:
        called (set of str): Paths of the links that were called.
        raw (dict): Names of functions that used a parameter's own array, by
            the path of the parameter.

    """

    def __init__(self) -> None:
        self.called: set[str] = set()
        self.raw: dict[str, str] = {}

    @classmethod
    def of(cls, model: chainer.Link, run: Callable[..., Any]) -> _Usage:
        usage = cls()
        model = model.copy('copy')
        with chainer.using_config('train', False), \
                chainer.no_backprop_mode(), \
                _LinkRecorder(model, usage), _FunctionRecorder(model, usage):
            run(model)
        return usage

    def amend(self, path: str, note: str) -> tuple[str, str]:
        """Returns the status and the note of a weight that has a hook."""
        if path in self.raw:
            return NEVER, f'{self.raw[path]} uses it without calling the link'
        if path.rpartition('/')[0] not in self.called:
            return NORMALIZED, f'{note}; not called in this run'
        return NORMALIZED, note


class _LinkRecorder(chainer.LinkHook):
    """Records which links are called."""

    name = '_sn_link_recorder'

    def __init__(self, model: chainer.Link, usage: _Usage) -> None:
        self.usage = usage
        self.paths: dict[int, list[str]] = {}
        for path, link in model.namedlinks():
            self.paths.setdefault(id(link), []).append(path.rstrip('/'))

    def forward_preprocess(self, args: Any) -> None:
        self.usage.called.update(self.paths.get(id(args.link), ()))


class _FunctionRecorder(chainer.FunctionHook):
    """Records which functions use the array of a parameter."""

    name = '_sn_function_recorder'

    def __init__(self, model: chainer.Link, usage: _Usage) -> None:
        self.usage = usage
        self.model = model

    def _arrays(self) -> Iterator[tuple[str, Any]]:
        # Listed in each call, as the run initializes some.
        for path, link in self.model.namedlinks():
            # Chainer's hook passes the weight itself to functions.
            theirs = {hook.weight_name for hook
                      in link.local_link_hooks.values()
                      if isinstance(hook, link_hooks.SpectralNormalization)}
            for name in link._params - theirs:
                # Not link.W, which is the normalized weight during a call.
                array = call.original(link, name).array
                if array is not None:
                    yield f'{path.rstrip("/")}/{name}', array

    def forward_preprocess(self, function: Any, in_data: Any) -> None:
        if isinstance(function, normalize.SpectralNormalize):
            return
        for path, array in self._arrays():
            if any(x is array for x in in_data):
                self.usage.raw.setdefault(path, function.label)
