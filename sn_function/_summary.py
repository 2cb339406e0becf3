"""A report on which parameters of a model are normalized."""
from __future__ import annotations

from typing import Any, Callable, NamedTuple

import chainer

from sn_function import _models, _table
from sn_function._links import n_step
from sn_function._links.bypass import bypasses_hooks
from sn_function._links.gamma import LargestSingularValue
from sn_function._usage import Usage
from sn_function.chain import ChainSpectralNormalization
from sn_function.link_hooks import HOOKS

NORMALIZED = 'normalized'
FILTERED_OUT = 'filtered out'
NO_HOOK = 'no hook'
UNSUPPORTED = 'unsupported'
PARTLY = 'partly'
NEVER = 'never'
NO_MATRIX = 'no matrix'
UNKNOWN = 'unknown'


class SummaryRow(NamedTuple):
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

    ``print(summary)`` prints a table; ``rows`` holds the same as data, and
    ``remarks`` has a sentence for each link that was run but is not
    registered, as in a plain list of links, and one on the weights that were
    used both normalized and raw.  A parameter is

    * ``'normalized'``: its link has a hook, this package's or Chainer's;
    * ``'filtered out'``: by the filter of a
      :class:`~sn_function.ChainSpectralNormalization`;
    * ``'no hook'``: it could be normalized;
    * ``'unsupported'``: a matrix in a link of another kind, which is not
      normalized unless a hook is added to that link by itself;
    * ``'partly'``: calls of its link use it normalized, and something else,
      such as a penalty, takes the parameter itself (found by ``run``);
    * ``'never'``: it has a hook without an effect, as the weight is used
      without a call of its link, or the call calls no hooks;
    * ``'no matrix'``: a bias, or another parameter with fewer than 2
      dimensions;
    * ``'unknown'``: as ``'unsupported'`` or ``'no matrix'``, and not
      initialized, nor by ``run``.

    """

    rows: tuple[SummaryRow, ...]
    remarks: tuple[str, ...] = ()

    @property
    def all_normalized(self) -> bool:
        """Whether every weight is normalized, or left out on purpose.

        For an ``assert``.  It is true if at least one weight is
        ``'normalized'``, each other one is ``'filtered out'``, and there are
        no remarks.  So ``'no hook'``, ``'unsupported'``, ``'partly'``,
        ``'never'`` and ``'unknown'`` make it false.  Only with ``run`` are
        weights found that are used without a call of their link.
        """
        found = {row.status for row in self.rows} - {NO_MATRIX, FILTERED_OUT}
        return found == {NORMALIZED} and not self.remarks

    def __str__(self) -> str:
        table = _table.text(('parameter', 'shape', 'status', 'note'), [
            (row.path, _table.shape_text(row.shape), row.status, row.note)
            for row in self.rows])
        matrices = [row for row in self.rows
                    if row.status not in (NO_MATRIX, UNKNOWN)]
        n = sum(row.status == NORMALIZED for row in matrices)
        return '\n'.join([
            table, '', f'{n} of {len(matrices)} weights are normalized',
            *self.remarks])


def summary(
        model: chainer.Link, run: Callable[[chainer.Link], Any] | None = None,
) -> Summary:
    """Reports for each parameter of a model whether it is normalized.

    A hook acts when its link is called.  Some models use a weight without
    such a call: ``link.forward(x)`` does, and ``F.linear(x, link.W)``, and a
    penalty on ``link.W`` outside of :func:`~sn_function.normalized`; a class
    that defines ``__call__`` instead of ``forward`` calls no hooks, nor does
    :class:`~chainer.links.NStepLSTM` those of its children.  The latter two
    are known; ``run`` finds the others.

    Args:
        model (~chainer.Link): A link or chain.
        run (callable or None): Called once with a copy of the model, in test
            mode and without a graph, such as ``lambda model: model(x)``.
            It must use its argument: the model itself, its state, and the
            generators of random numbers are left alone.

    Returns:
        Summary: One row for each parameter.

    Raises:
        RunArgumentError: ``run`` calls a link of the model itself, before
            that call changes anything; or it uses no model at all.
        ModelCopyError: Something in the model cannot be copied.

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
    usage = None if run is None else Usage.of(model, run)
    structure = _Structure(model)
    rows = []
    for path, link in model.namedlinks():
        for name in sorted(link._params):
            full = f'{path.rstrip("/")}/{name}'
            parameter = link.__dict__[name]
            shape = None if parameter.array is None else parameter.shape
            ndim = _ndim(parameter)
            if ndim is None and usage is not None:
                ndim = usage.ndims.get(full)
            status, note = structure.status(link, name, ndim)
            if usage is not None and status == NORMALIZED:
                status, note = _amend(usage, full, note)
            rows.append(SummaryRow(full, shape, status, note))
    return Summary(tuple(rows), () if usage is None else _remarks(usage, rows))


def _amend(usage: Usage, path: str, note: str) -> tuple[str, str]:
    """Returns the status and the note of a weight that has a hook."""
    is_called = path.rpartition('/')[0] in usage.called
    if path in usage.raw:
        return PARTLY if is_called else NEVER, (
            f'{usage.raw[path]} uses it without calling the link')
    if not is_called:
        return NORMALIZED, f'{note}; not called in this run'
    return NORMALIZED, note


def _remarks(usage: Usage, rows: list[SummaryRow]) -> tuple[str, ...]:
    remarks = [
        f'{name} of the model was called and is not in its namedlinks(): it '
        f'has no rows, and optimizers, snapshots and hooks of chains do not '
        f'find it either.' for name in usage.unregistered]
    partly = [row.path for row in rows if row.status == PARTLY]
    if partly:
        remarks.append(
            f'The layers compute with the normalized weights, but the raw '
            f'ones are used as well: {", ".join(partly)}. Within `with '
            f'sn_function.normalized(model):` link.W is the normalized one.')
    return tuple(remarks)


def _ndim(parameter: chainer.Parameter) -> int | None:
    """Returns the number of dimensions, or ``None`` where it is unknown."""
    if isinstance(parameter.initializer, LargestSingularValue):
        return 0  # a gamma
    return None if parameter.array is None else parameter.ndim


class _Structure:
    """What is known of a model's parameters without a run of it.

    Attributes:
        filtered_out (set): Ids of links that the hook of a chain leaves out.
        owners (dict): The n-step RNNs by the ids of their children, whose
            weights they use without calling them.

    """

    def __init__(self, model: chainer.Link) -> None:
        self.filtered_out = {
            found for chain in model.links()
            for hook in chain.local_link_hooks.values()
            if isinstance(hook, ChainSpectralNormalization)
            for found in hook.links_left_out(chain)}
        self.owners = {
            id(layer): link for link in model.links()
            if n_step.is_n_step(link) for layer in link.children()}

    def status(
            self, link: chainer.Link, name: str, ndim: int | None,
    ) -> tuple[str, str]:
        """Returns the status of a parameter of the link, and the note."""
        for key, hook in link.local_link_hooks.items():
            if isinstance(hook, HOOKS) and hook.weight_name == name:
                return self._status_of_hooked(link, key, hook)
        if ndim is not None and ndim < 2:
            return NO_MATRIX, ''
        owner = self.owners.get(id(link))
        if owner is not None and name in n_step.weight_names(owner):
            return NO_HOOK, ''
        is_left_out = id(link) in self.filtered_out
        if (is_left_out or _models.is_supported(link)) and name == 'W':
            return FILTERED_OUT if is_left_out else NO_HOOK, ''
        return (UNKNOWN if ndim is None else UNSUPPORTED,
                type(link).__name__)

    def _status_of_hooked(
            self, link: chainer.Link, key: str, hook: Any) -> tuple[str, str]:
        owner = self.owners.get(id(link), link)
        if bypasses_hooks(owner):
            return NEVER, f'{type(owner).__name__}.__call__ calls no hooks'
        if owner is not link and not n_step.is_of_layers(hook, owner):
            return NEVER, (f'{type(owner).__name__} does not call this link: '
                           f'it needs a hook itself')
        return NORMALIZED, key
