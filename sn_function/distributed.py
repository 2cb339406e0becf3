"""ChainerMN: the same ``u`` on every rank of MPI, with one broadcast.

``u`` depends on its start and on the weights since then.  In data-parallel
training the ranks have the same weights in each step.  So they have the same
``u`` in each step if they start with the same, and nothing needs to be sent.
ChainerMN sends parameters at the start, but leaves each rank with a ``u`` of
its own.  This module sends ``u`` along:

.. code-block:: python

    import chainermn
    import sn_function.distributed

    comm = chainermn.create_communicator('naive')
    optimizer = sn_function.distributed.create_multi_node_optimizer(
        chainer.optimizers.Adam(), comm)

It needs the extra ``mpi``: mpi4py and an MPI, such as Open MPI.  It serves
:class:`sn_function.SpectralNormalization` and Chainer's own hook.
"""
from __future__ import annotations

import functools
import hashlib
from typing import Any, Iterator

import chainer
import numpy
from chainer import serializers
from chainer.backends import cuda

from sn_function import _models, errors
from sn_function._graph.sharded import sharded_spectral_normalize
from sn_function._links import call, vector
from sn_function._links.gamma import LargestSingularValue
from sn_function._links.hooked_weight import HookedWeight
from sn_function._models import vector_names as vector_names
from sn_function.extensions import SpectralNormPenaltyState
from sn_function.link_hooks import SpectralNormalization
from sn_function.optimizer_hooks import VECTOR

__all__ = [
    'assert_synchronized',
    'bcast_data',
    'create_multi_node_optimizer',
    'sharded_spectral_normalize',
]


def create_multi_node_optimizer(
        actual_optimizer: chainer.Optimizer, communicator: Any,
        double_buffering: bool = False, zero_fill: bool = True) -> Any:
    """Returns ChainerMN's optimizer, which also makes ``u`` the same.

    It replaces ``chainermn.create_multi_node_optimizer``, which broadcasts
    the parameters of rank 0 in the first update, and in any that finds new
    ones, of links that were lazy; that update does nothing else.  This one
    also sends what else determines all further steps: the vectors of spectral
    normalization, and the state of the optimizer, as ranks may have loaded
    different snapshots.

    With ``norm='operator'`` a link whose first call comes after that update
    draws its vectors then, on each rank by itself.  Give its hook ``insize``,
    or call :func:`bcast_data` after that call.

    It compares first.  Where all ranks have the same, bit by bit, nothing is
    sent and the update is not lost: so a run that is resumed continues with
    the same numbers.  In all other steps nothing is added.

    Args:
        actual_optimizer (~chainer.Optimizer): Optimizer of Chainer.
        communicator: Communicator of ChainerMN.
        double_buffering (bool): As in ChainerMN, for ``pure_nccl`` only; the
            first update is then lost in any case.
        zero_fill (bool): As in ChainerMN.

    Returns:
        The optimizer of ChainerMN.

    """
    import chainermn
    kind: Any = type(chainermn.create_multi_node_optimizer(
        actual_optimizer, communicator, double_buffering, zero_fill))
    return _synchronizing(kind)(actual_optimizer, communicator, zero_fill)


def bcast_data(communicator: Any, model: chainer.Link) -> None:
    """Broadcasts the parameters and the vectors of rank 0.

    It replaces ``communicator.bcast_data(model)``, where that is called
    directly.  Parameters that have no array yet are left out, and with
    ``norm='operator'`` the vectors of links that were not called yet, unless
    the hook has ``insize``.  All ranks have to call it.

    Args:
        communicator: Communicator of ChainerMN.
        model (~chainer.Link): A link or a chain.

    """
    _bcast_vectors(communicator, model)
    communicator.bcast_data(model)


def assert_synchronized(communicator: Any, model: chainer.Link) -> None:
    """Raises an error unless all ranks have the same model, bit by bit.

    It compares parameters and the vectors of spectral normalization.  Other
    persistent values, such as the statistics of BatchNormalization, may
    differ.  A rank sends 16 bytes, and the hashes of all arrays only if
    something differs.  All ranks have to call it, and all raise the same
    error.

    Args:
        communicator: Communicator of ChainerMN.
        model (~chainer.Link): A link or a chain.

    Raises:
        NotSynchronizedError: Its message names what differs, and the ranks.

    """
    digests = _digests(model)
    if not _agree(communicator, digests):
        raise errors.NotSynchronizedError(_from_root(
            communicator, communicator.gather_obj(digests), _compare))


# The optimizer

@functools.lru_cache(maxsize=None)
def _synchronizing(kind: Any) -> Any:
    """Derives from a class of ChainerMN, which is imported on demand only."""
    return type(kind.__name__, (_Synchronizing, kind), {})


class _Synchronizing:
    """Broadcasts more than parameters, and only where ranks differ."""

    communicator: Any
    actual_optimizer: Any

    def is_changed(self, target: chainer.Link, *previous: Any) -> bool:
        """Whether ChainerMN is to broadcast, instead of an update."""
        if not super().is_changed(target, *previous):  # type: ignore[misc]
            return False
        comm, optimizer = self.communicator, self.actual_optimizer
        # With double buffering, which passes `previous`, ChainerMN prepares
        # itself while it broadcasts.
        if not previous and _agree(comm, _digests(target, optimizer)):
            return False
        _bcast_vectors(comm, target)
        _bcast_state(comm, optimizer)
        return True


def _bcast_state(comm: Any, optimizer: chainer.Optimizer) -> None:
    is_root = comm.rank == 0
    state = comm.bcast_obj(_state(optimizer) if is_root else None)
    for param in optimizer.target.params():
        rule = param.update_rule
        if rule is None:
            continue
        if not is_root:
            rule._state = None      # what rank 0 lacks must go
        # This is not in the state; the update makes it from the parameter.
        rule._fp32_param = None
    if not is_root:
        deserializer = serializers.NpzDeserializer(state, strict=False)
        deserializer.load(optimizer)
        SpectralNormPenaltyState(optimizer).serialize(deserializer[VECTOR])


def _state(optimizer: chainer.Optimizer) -> dict[str, numpy.ndarray]:
    """Returns what snapshots hold of an optimizer and its hooks' vectors."""
    serializer = serializers.DictionarySerializer()
    serializer.save(optimizer)
    SpectralNormPenaltyState(optimizer).serialize(serializer[VECTOR])
    return {key: numpy.asarray(x) for key, x in serializer.target.items()}


# The vectors

def _vectors(model: chainer.Link) -> Iterator[tuple[str, chainer.Link, str]]:
    """Yields the path of each array of vectors, its link and its name."""
    for path, link, _, hook in _models.hooked_weights(model):
        for name in vector.names(hook, link):
            yield f'{path.rstrip("/")}/{name}', link, name


def _bcast_vectors(comm: Any, model: chainer.Link) -> None:
    """Gives all ranks the vectors of rank 0."""
    for _, link, _, hook in _models.hooked_weights(model):
        if isinstance(hook, SpectralNormalization):
            _make_vectors(link, hook)
    vectors = list(_vectors(model))
    us = comm.bcast_obj({
        path: cuda.to_cpu(getattr(link, name, None))
        for path, link, name in vectors} if comm.rank == 0 else None)
    if comm.rank != 0:
        for path, link, name in vectors:
            _put(link, name, us.get(path))
    # From what gamma was initialized the hook tells whether it is to follow
    # its weight.
    gammas = {path: initializer for path, param in model.namedparams()
              for initializer in [param.initializer]
              if isinstance(initializer, LargestSingularValue)}
    origins = comm.bcast_obj({
        path: initializer.origin for path, initializer in gammas.items()
    } if comm.rank == 0 else None)
    for path, initializer in gammas.items():
        initializer.origin = origins.get(path, initializer.origin)


def _make_vectors(link: chainer.Link, hook: SpectralNormalization) -> None:
    """Does to u now what the hook would do once, in the next call.

    The hook makes u where there is none, or where it is zero or not finite.
    """
    W = call.original(link, hook.weight_name)
    if W.array is None:
        return
    own = HookedWeight(hook, link, W)
    for name in vector.unsound_names(hook, link):
        setattr(link, name, None)
    if own.shape is not None:
        own.vector_and_gamma()


def _put(link: chainer.Link, name: str, u: Any) -> None:
    # Chainer's hook adds the attribute in the first call.
    if hasattr(link, name):
        vector.put(link, name, u)


# The comparison

def _digests(
        model: chainer.Link, optimizer: chainer.Optimizer | None = None,
) -> dict[str, bytes]:
    """Returns hashes of all that has to be the same, by paths."""
    digests = {path: _digest(p.array) for path, p in model.namedparams()}
    for path, link, name in _vectors(model):
        digests[path] = _digest(getattr(link, name, None))
    if optimizer is not None:
        for path, x in _state(optimizer).items():
            digests[f'optimizer: {path}'] = _digest(x)
    return digests


def _digest(x: Any) -> bytes:
    if x is None or x.dtype == object:      # a None of Chainer's serializer
        return b''
    x = numpy.ascontiguousarray(cuda.to_cpu(x))
    digest = hashlib.blake2b(f'{x.dtype} {x.shape}'.encode(), digest_size=16)
    digest.update(x.reshape(-1).view(numpy.uint8))
    return digest.digest()


def _agree(comm: Any, digests: dict[str, bytes]) -> bool:
    """Whether all ranks have the same; each of them gets the answer."""
    every = hashlib.blake2b(
        repr(sorted(digests.items())).encode(), digest_size=16).digest()
    return _from_root(comm, comm.gather_obj(every), _are_same)


def _from_root(comm: Any, gathered: Any, decide: Any) -> Any:
    """Returns the decision of rank 0, so that all take the same branch."""
    return comm.bcast_obj(decide(gathered) if comm.rank == 0 else None)


def _are_same(digests: list[bytes]) -> bool:
    return len(set(digests)) == 1


def _compare(ranks: list[dict[str, bytes]]) -> dict[str, list[int]]:
    """Returns what differs from rank 0, and on which ranks."""
    first = ranks[0]
    found = {
        path: [rank for rank, digests in enumerate(ranks)
               if digests.get(path) != first.get(path)]
        for path in sorted({path for each in ranks for path in each})}
    return {path: bad for path, bad in found.items() if bad}
