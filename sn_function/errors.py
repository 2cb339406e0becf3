"""Exceptions.  Each builds its own message: what is wrong, what was given,
and what to do.  Every one is raised before anything has been changed."""
from __future__ import annotations

from typing import Any, Mapping, Sequence


class SpectralNormalizationError(Exception):
    """Base class of all errors of this package."""

    def __reduce__(self) -> Any:
        # Pickled with its message, not with the arguments that built it:
        # so an error of a worker process reaches its parent.
        return _rebuild, (type(self), self.args)


def _rebuild(cls: type[BaseException], args: Any) -> BaseException:
    return cls.__new__(cls, *args)


def _describe(x: Any) -> str:
    shape, dtype = getattr(x, 'shape', None), getattr(x, 'dtype', None)
    if shape is None or dtype is None:
        return f'{type(x).__name__} {x!r}'
    return f'{type(x).__name__} of shape {tuple(shape)} and dtype {dtype}'


# Weights

class WeightTypeError(SpectralNormalizationError, TypeError):
    """The weight is not an array of floating point numbers."""

    def __init__(self, W: Any) -> None:
        super().__init__(
            f'W must be a NumPy or CuPy array, or a Variable of one, with '
            f'dtype float16, float32 or float64, but is a {_describe(W)}. '
            f'Convert it first, e.g. W.astype(numpy.float32).')


class WeightShapeError(SpectralNormalizationError, ValueError):
    """The weight cannot be seen as a matrix, or is an empty one."""

    def __init__(self, shape: Sequence[int]) -> None:
        what = ('has fewer than 2 dimensions' if len(shape) < 2
                else 'has an empty dimension')
        super().__init__(
            f'W of shape {tuple(shape)} {what}, so it has no largest '
            f'singular value. Give a weight with 2 or more dimensions, each '
            f'at least 1.')


class UninitializedWeightError(SpectralNormalizationError, ValueError):
    """The weight has no array yet."""

    def __init__(self, owner: str, weight_name: str) -> None:
        super().__init__(
            f'{owner}.{weight_name} has no array yet, so its spectral norm '
            f'is undefined. Initialize it first: give the input size when the '
            f'link is made, call the link once without the hook, or call '
            f'{weight_name}.initialize(shape).')


class WeightNotFoundError(SpectralNormalizationError, ValueError):
    """The link has no parameter of the name given to the hook."""

    def __init__(self, link: Any, weight_name: str) -> None:
        name = type(link).__name__
        what = ('has an attribute of this name that is not a Parameter'
                if hasattr(link, weight_name) else 'has no such attribute')
        known = ', '.join(map(repr, sorted(link._params))) or 'none'
        super().__init__(
            f'Weight {weight_name!r} does not exist: {name} {what}. Its own '
            f'parameters: {known}. Give one of them as weight_name, or add '
            f'the hook to the child link that holds the weight.')


class AxisError(SpectralNormalizationError, ValueError, IndexError):
    """The output axis is out of range."""

    def __init__(self, axis: Any, ndim: int) -> None:
        super().__init__(
            f'axis {axis!r} is not an output axis of a weight with {ndim} '
            f'dimensions. Give an integer from {-ndim} to {ndim - 1}.')


# Start vectors

class VectorTypeError(SpectralNormalizationError, TypeError):
    """The start vector has the wrong type or dtype."""

    def __init__(self, u: Any, expected: Any) -> None:
        super().__init__(
            f'u must be an array of dtype {expected}, as W is, but is a '
            f'{_describe(u)}. Convert it, e.g. u.astype(W.dtype).')


class VectorShapeError(SpectralNormalizationError, ValueError):
    """The start vector's length is not that of the output axis."""

    def __init__(self, shape: Sequence[int], W_shape: Sequence[int],
                 axis: int) -> None:
        super().__init__(
            f'u has shape {tuple(shape)}, but W of shape {tuple(W_shape)} '
            f'with output axis {axis} needs shape ({W_shape[axis]},). Make u '
            f'anew, or check axis.')


class VectorDeviceError(SpectralNormalizationError, ValueError):
    """The start vector and the weight are on different devices."""

    def __init__(self, u_device: Any, W_device: Any) -> None:
        super().__init__(
            f'u is on {u_device} and W is on {W_device}. Send u there: '
            f'u = chainer.get_device({str(W_device)!r}).send(u).')


class VectorValueError(SpectralNormalizationError, ValueError):
    """The start vector is zero or not finite."""

    def __init__(self, u: Any) -> None:
        what = 'is all zero' if not u.any() else 'holds NaN or Inf'
        super().__init__(
            f'u of shape {tuple(u.shape)} {what}, so power iteration cannot '
            f'start from it. Give a finite, non-zero vector, e.g. '
            f'numpy.random.normal(size={u.shape[0]}).astype(W.dtype).')


class VectorUpdateError(SpectralNormalizationError, TypeError):
    """The start vector cannot be overwritten."""

    def __init__(self, u: Any) -> None:
        what = ('is read-only' if getattr(u, 'flags', None) is not None
                else f'is a {type(u).__name__}')
        super().__init__(
            f'update_u=True overwrites u, which must then be a writable '
            f'array, but u {what}. Give a writable array, or '
            f'update_u=False.')


# Settings

class CountError(SpectralNormalizationError, ValueError):
    """There are not as many of one argument as there are weights."""

    def __init__(self, name: str, given: int, expected: int) -> None:
        super().__init__(
            f'{expected} weights and {given} of {name} were given. Give one '
            f'for each weight, in their order.')


class IterationCountError(SpectralNormalizationError, ValueError):
    """A number of iterations is not an integer in its range."""

    def __init__(self, name: str, value: Any, least: int) -> None:
        super().__init__(
            f'{name} must be an integer of at least {least}, but is '
            f'{value!r}.')


class EpsError(SpectralNormalizationError, ValueError):
    """The floor on sigma is negative or not a number."""

    def __init__(self, eps: Any) -> None:
        super().__init__(
            f'eps, the floor on sigma, must be a finite number of at least '
            f'0, but is {eps!r}. The default is 1e-6.')


class FactorError(SpectralNormalizationError, ValueError):
    """The factor is not a positive number."""

    def __init__(self, factor: Any) -> None:
        super().__init__(
            f'factor, the norm that the normalized weight gets, must be a '
            f'finite number above 0, but is {factor!r}. Leave it out for 1.')


class CapError(SpectralNormalizationError, ValueError):
    """The cap is not a positive number."""

    def __init__(self, cap: Any) -> None:
        super().__init__(
            f'cap, the largest norm that a weight may keep, must be a finite '
            f'number above 0, but is {cap!r}. Leave it out to give every '
            f'weight the same norm.')


class CapConflictError(SpectralNormalizationError, ValueError):
    """The cap is given with a setting that would undo it."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(
            f'cap leaves weights with a smaller norm alone, and '
            f'{name}={value!r} scales every weight. Give one of the two.')


class GammaError(SpectralNormalizationError, TypeError):
    """gamma is not a number."""

    def __init__(self, gamma: Any) -> None:
        super().__init__(
            f'gamma must be a number, or an array or Variable of shape () '
            f'and floating point dtype on the device of W, but is a '
            f'{_describe(gamma)}. Give gamma=1.0, for example, or '
            f'chainer.Parameter(numpy.array(1, W.dtype)).')


# Hooks

class HookCollisionError(SpectralNormalizationError, ValueError):
    """The weight has a hook already."""

    def __init__(self, link: Any, attribute: str, weight_name: str) -> None:
        super().__init__(
            f'{type(link).__name__} already has an attribute '
            f'{attribute!r}, which this hook would use for '
            f'{weight_name!r}. If the weight is normalized already, delete '
            f'that hook first with link.delete_hook(name); if the attribute '
            f'is your own, rename it.')


class HookNotAddedError(SpectralNormalizationError, ValueError):
    """The normalized weight of a link without the hook is asked for."""

    def __init__(self, link: Any, weight_name: str) -> None:
        super().__init__(
            f'{type(link).__name__} has no spectral normalization of '
            f'{weight_name!r}. Add it first: link.add_hook(hook).')


class WeightInUseError(SpectralNormalizationError, RuntimeError):
    """A weight is baked while another one is in its place."""

    def __init__(self, owner: str, weight_name: str) -> None:
        super().__init__(
            f'{owner}.{weight_name} is not a Parameter now. That is so during '
            f'a call of the link, and after a call that raised under '
            f'Chainer\'s hook. Bake the model outside of its calls, and put '
            f'the Parameter back first.')


class DeadlockError(SpectralNormalizationError, RuntimeError):
    """Two threads are in calls of links, and each waits for the other."""

    def __init__(self, link: Any) -> None:
        super().__init__(
            f'A call of {type(link).__name__} waits for another thread, which '
            f'waits for this one: calls of one link with a hook wait for each '
            f'other, and these links call each other. Enter them by the same '
            f'link from all threads, or from one thread at a time.')


class HookedExportError(SpectralNormalizationError, RuntimeError):
    """A model is exported that still normalizes its weights."""

    def __init__(self, paths: Sequence[str]) -> None:
        what = (f'these links have a hook for it: {", ".join(paths)}' if paths
                else 'the model computes it, in a link that is not among its '
                     'namedlinks() or without a link')
        super().__init__(
            f'ONNX has no spectral normalization, but {what}. Export a model '
            f'that has the normalized weights instead: '
            f'onnx_chainer.export(sn_function.bake(model), args).')


class FilterError(SpectralNormalizationError, TypeError):
    """A filter is not of a kind that can choose links."""

    def __init__(self, filter: Any) -> None:
        super().__init__(
            f'A filter of links must be a pattern of their paths such as '
            f'"/block*/conv", a class of links, a function of a path and a '
            f'link, or a list of these, but is {filter!r}.')


class NoLinkError(SpectralNormalizationError, ValueError):
    """A chain has no link whose weight could be normalized."""

    def __init__(self, chain: Any, weight_name: str) -> None:
        super().__init__(
            f'{type(chain).__name__} has no link that is a Linear, an '
            f'EmbedID, a convolution or a deconvolution, has a {weight_name} '
            f'without spectral normalization, and passes the filter. Add the '
            f'hook when all links are in the chain, look at '
            f'chain.namedlinks() for the paths that the filter is called '
            f'with, or add SpectralNormalization to the links themselves.')


# Monitoring and the penalty

class NothingToReportError(SpectralNormalizationError, ValueError):
    """A model has no weight whose sigma could be reported."""

    def __init__(self, model: Any) -> None:
        super().__init__(
            f'{type(model).__name__} has no spectral normalization, so there '
            f'is no estimate of sigma to report. Add a hook to its links '
            f'before the trainer runs, or ask for the true values with '
            f'true_sigma=True.')


class ToleranceError(SpectralNormalizationError, ValueError):
    """The tolerance is not a positive number."""

    def __init__(self, tolerance: Any) -> None:
        super().__init__(
            f'tolerance, the relative error of sigma that is not worth a '
            f'warning, must be a number above 0, but is {tolerance!r}.')


class PenaltyRateError(SpectralNormalizationError, ValueError):
    """The rate of the penalty is negative or not a number."""

    def __init__(self, rate: Any) -> None:
        super().__init__(
            f'rate, the coefficient of the penalty, must be a finite number '
            f'of at least 0, but is {rate!r}.')


class NoPenaltyError(SpectralNormalizationError, ValueError):
    """No weight of the optimizer's target gets the penalty."""

    def __init__(self, target: Any) -> None:
        super().__init__(
            f'{type(target).__name__} has no link that is a Linear, an '
            f'EmbedID, a convolution or a deconvolution, has no spectral '
            f'normalization, and passes the filter, so there is nothing to '
            f'penalize. Look at target.namedlinks() for the paths that the '
            f'filter is called with, or remove the hook from the optimizer.')


class SpectralNormalizationWarning(UserWarning):
    """A weight, its vector or its estimate of sigma is not right."""


# Processes that train one model

class NotSynchronizedError(SpectralNormalizationError, RuntimeError):
    """Ranks have different models."""

    def __init__(self, differences: Mapping[str, Sequence[int]]) -> None:
        def some(items: Sequence[str]) -> str:
            more = f' and {len(items) - 8} more' if len(items) > 8 else ''
            return ', '.join(items[:8]) + more

        self.differences = differences
        found = [f'{path} of {"rank" if len(ranks) == 1 else "ranks"} '
                 f'{some([str(rank) for rank in ranks])}'
                 for path, ranks in differences.items()]
        super().__init__(
            f'These differ from rank 0, or exist on one of the two only: '
            f'{some(found)}. Make the optimizer with '
            f'sn_function.distributed.create_multi_node_optimizer, call the '
            f'model in training mode on all ranks or on none, and do not '
            f'change a weight on one rank alone.')


# Weights whose rows are spread over processes

class CommunicatorError(SpectralNormalizationError, TypeError):
    """The argument is not a communicator."""

    def __init__(self, comm: Any) -> None:
        super().__init__(
            f'comm must be an intracommunicator of mpi4py, such as '
            f'mpi4py.MPI.COMM_WORLD, or a communicator of ChainerMN, but is a '
            f'{type(comm).__name__}.')


class OtherRankError(SpectralNormalizationError, RuntimeError):
    """Another rank has refused its arguments."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(
            f'Rank {rank} has refused its arguments, so all ranks stop. '
            f'Correct the arguments there: {message}')


class ShardMismatchError(SpectralNormalizationError, ValueError):
    """The ranks give arguments that do not fit together."""

    def __init__(self, name: str, own: float, least: float,
                 most: float) -> None:
        super().__init__(
            f'All ranks must agree on {name}, but it is {own:g} on this one '
            f'and from {least:g} to {most:g} on all. Give all ranks the same '
            f'settings, and rows of one weight.')


class ShardedVectorTypeError(SpectralNormalizationError, TypeError):
    """The start vector of a sharded weight is a Variable."""

    def __init__(self) -> None:
        super().__init__(
            'u must be an array, because a sharded weight has no gradient '
            'with respect to it, but is a Variable. Give u.array.')


class ShardedVectorValueError(VectorValueError):
    """The start vector of a sharded weight is zero or not finite."""

    def __init__(self, largest: float) -> None:
        what = ('is all zero on all ranks' if largest == 0
                else 'holds NaN or Inf on one rank or more')
        SpectralNormalizationError.__init__(
            self, f'u {what}, so power iteration cannot start from it. Give '
            f'a vector that is finite on all ranks and not zero on one of '
            f'them, e.g. numpy.random.normal(size=len(W)).astype(W.dtype).')


class ShardedDeviceError(SpectralNormalizationError, TypeError):
    """The rows of a sharded weight are not in the memory of the host."""

    def __init__(self) -> None:
        super().__init__(
            'W and u are CuPy arrays, but rows that are spread over ranks '
            'must be NumPy arrays. Send them to the host first: '
            'chainer.functions.copy(W, -1) for a Variable, '
            'chainer.get_device("@numpy").send(u) for an array.')


class ShardedDoubleBackwardError(
        SpectralNormalizationError, NotImplementedError):
    """The gradient of a sharded weight is differentiated again."""

    def __init__(self) -> None:
        super().__init__(
            'A weight whose rows are spread over ranks has gradients of first '
            'order only, but this one was differentiated twice. Unchain its '
            'gradient, or normalize the whole weight on each rank.')


# Snapshots

def printable(text: str) -> str:
    """A name from a file, with control characters escaped."""
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class SnapshotError(SpectralNormalizationError, ValueError):
    """A snapshot cannot be used as asked; base of those below."""

    def __init__(self, path: str, key: str | None, what: str,
                 remedy: str) -> None:
        where = path if key is None else f'{path}, entry {key!r}'
        super().__init__(printable(f'{where}: {what}. {remedy}'))


class SnapshotFileError(SnapshotError):
    """The file cannot be opened, is damaged, or is no snapshot."""

    def __init__(self, path: str, what: str, remedy: str) -> None:
        super().__init__(path, None, what, remedy)


class SnapshotPackageError(SnapshotError, ImportError):
    """A file of this kind needs a package that is not installed."""

    def __init__(self, path: str, package: str) -> None:
        package = package.split('.')[0]
        super().__init__(
            path, None, f'it needs the package {package}, which cannot be '
            f'imported', f'Install it: pip install {package}')


class SnapshotEntryError(SnapshotError):
    """An entry of the file is damaged."""

    def __init__(self, path: str, key: str, what: str) -> None:
        super().__init__(
            path, key, f'it is damaged: {what}',
            'Take another copy of the file, or save it again.')


class SnapshotPickleError(SnapshotError):
    """An entry that is needed is a pickled object, which is not opened."""

    def __init__(self, path: str, key: str) -> None:
        super().__init__(
            path, key, 'it is not a plain array but an object, such as the '
            'None of a parameter that was not initialized. Objects are never '
            'unpickled, as that may run code',
            'Call the model once, and save it again.')


class SnapshotLayoutError(SnapshotError):
    """The entries are not those of weights with spectral normalization."""

    def __init__(self, path: str, what: str, keys: Sequence[str]) -> None:
        some = ', '.join(map(repr, list(keys)[:4])) or 'none'
        super().__init__(
            path, None, f'{what}. Its entries: {some}'
            + (f' and {len(keys) - 4} more' if len(keys) > 4 else ''),
            'Known are W with W_u (Chainer, sn_function), W with u '
            '(sngan_projection), weight_orig with weight_u and weight_v, and '
            'parametrizations.weight (PyTorch).')


class SnapshotModelError(SnapshotError):
    """It is not clear which model of the snapshot is meant."""

    def __init__(self, path: str, model: str | None,
                 models: Sequence[str]) -> None:
        what = ('it holds several models' if model is None
                else f'it has no entries below {model!r}')
        known = ', '.join(models) or 'none, as the file is of one model'
        super().__init__(
            path, None, f'{what}. Its models: {known}',
            'Name one of them, or the path of a link: --model NAME, or '
            'model=NAME.')


class SnapshotWeightError(SnapshotError):
    """A weight is missing, or is not one that can be normalized."""

    def __init__(self, path: str, key: str, what: str) -> None:
        super().__init__(
            path, key, what,
            'It cannot be repaired: take an earlier snapshot.')


class SnapshotVectorError(SnapshotError):
    """A vector is missing, zero, not finite, or of the wrong length."""

    def __init__(self, path: str, key: str, what: str) -> None:
        super().__init__(
            path, key, what,
            'Make it anew first: sn-function repair SNAPSHOT OUT, or '
            'snapshot.repair(src, dst).')


class SnapshotAxisError(SnapshotError):
    """It is not clear which axis of a weight is that of its outputs."""

    def __init__(self, path: str, key: str, what: str) -> None:
        super().__init__(
            path, key, what,
            f'Say which it is, 1 for a deconvolution, else 0: --axis {key}=1 '
            f'or --axis {key}=0, or axes={{{key!r}: 1}}.')


class SnapshotGammaError(SnapshotError):
    """A weight has a gamma, or a possible one, that is in the way."""

    def __init__(self, path: str, key: str, what: str) -> None:
        super().__init__(
            path, key, what,
            'Bake the snapshot instead, or load it into its model in Python.')


class SnapshotTargetError(SnapshotError):
    """A weight cannot be put into the layout that was asked for."""

    def __init__(self, path: str, key: str, what: str) -> None:
        super().__init__(
            path, key, what, 'Choose another layout, or bake the snapshot.')


class LayoutNameError(SpectralNormalizationError, ValueError):
    """There is no layout of this name."""

    def __init__(self, layout: Any, known: Sequence[str]) -> None:
        super().__init__(
            f'layout must be one of {", ".join(map(repr, known))}, but is '
            f'{layout!r}.')


class SnapshotOutputError(SnapshotError):
    """The output cannot be written, or must not be."""

    def __init__(self, path: str, what: str, remedy: str) -> None:
        super().__init__(path, None, what, remedy)
