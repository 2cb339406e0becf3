"""Exceptions.  Each builds its own message: what is wrong, what was given,
and what to do.  Every one is raised before anything has been changed."""
from __future__ import annotations

import difflib
import math
import os
from typing import Any, Iterable, Mapping, Sequence


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
        name, text = type(x).__name__, repr(x)
        return text if text.startswith(name) else f'{name} {text}'
    return f'{type(x).__name__} of shape {tuple(shape)} and dtype {dtype}'


def _some(items: Iterable[Any]) -> str:
    items = list(dict.fromkeys(map(str, items)))
    more = f' and {len(items) - 8} more' if len(items) > 8 else ''
    return (', '.join(items[:8]) or 'none') + more


def _links(links: Iterable[tuple[str, Any]]) -> str:
    return _some(f'{path} ({type(link).__name__})' for path, link in links)


def _is_chain(link: Any) -> bool:
    return next(iter(link.children()), None) is not None


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


class MissingVectorError(SpectralNormalizationError, KeyError):
    """A snapshot that is loaded has no vector for a link with a hook."""

    def __init__(self, key: str, has_u: bool) -> None:
        if has_u:
            what = (
                'it has u there, as the links of sngan_projection save it. '
                'Convert the file, and load the result: sn-function convert '
                'SNAPSHOT OUT --to chainer')
        else:
            what = (
                'it is of a model without the hook, or by code that does not '
                'save u. Make the vectors, and load the result: sn-function '
                "repair SNAPSHOT OUT --add '*'; deconvolutions need --axis. "
                'Or load the snapshot before the hook is added, or with '
                'strict=False')
        super().__init__(printable(f'{key!r} is not in the snapshot: {what}.'))

    __str__ = Exception.__str__  # a KeyError shows the repr of its message


class UninitializedWeightError(SpectralNormalizationError, ValueError):
    """The weight has no array yet."""

    def __init__(self, owner: str, weight_name: str) -> None:
        super().__init__(
            f'{owner}.{weight_name} has no array yet, so its spectral norm '
            f'is undefined. Initialize it first: give the input size when the '
            f'link is made, call the model once before (outside of '
            f'sn_function.normalized, and without the hook if that raises '
            f'this), or call {weight_name}.initialize(shape).')


class WeightNotFoundError(SpectralNormalizationError, ValueError):
    """The link has no parameter of the name given to the hook."""

    def __init__(self, link: Any, weight_name: str) -> None:
        name = type(link).__name__
        what = ('has an attribute of this name that is not a Parameter'
                if hasattr(link, weight_name) else 'has no such attribute')
        known = ', '.join(map(repr, sorted(link._params))) or 'none'
        remedy = ('Give one of them as weight_name, or add the hook to the '
                  'child link that holds the weight.')
        if _is_chain(link):
            setting = ('' if weight_name == 'W'
                       else f'weight_name={weight_name!r}')
            remedy = (f'To normalize the links in this chain, add '
                      f'sn_function.ChainSpectralNormalization({setting}) to '
                      f'it. For one weight: {remedy[0].lower()}{remedy[1:]}')
        super().__init__(
            f'Weight {weight_name!r} does not exist: {name} {what}. Its own '
            f'parameters: {known}. {remedy}')


class GroupCountError(SpectralNormalizationError, ValueError):
    """The weight has no such number of groups."""

    def __init__(self, groups: Any, shape: Sequence[int] = ()) -> None:
        super().__init__(
            f'groups, the number of maps that W holds one after another '
            f'along its first axis, must be an integer of at least 1 that '
            f'divides the length of that axis, but is {groups!r}'
            + (f', for W of shape {tuple(shape)}' if shape else '')
            + '. Give the groups of the convolution, or leave it out.')


class NStepWeightError(SpectralNormalizationError, ValueError):
    """A hook for one weight is added to an n-step RNN."""

    def __init__(self, link: Any, weight_name: str) -> None:
        super().__init__(
            f'{type(link).__name__} has no parameter {weight_name!r} of its '
            f'own. A hook on an n-step RNN normalizes all matrices w0, w1, '
            f'... of its layers: leave weight_name out.')


class AxisError(SpectralNormalizationError, ValueError, IndexError):
    """The output axis is out of range, or no integer."""

    def __init__(self, axis: Any, ndim: int | None = None,
                 of: str = 'a weight') -> None:
        super().__init__(
            f'axis, the output axis of weights, must be an integer, but is '
            f'{axis!r}. Leave it out for that of each link: 1 for '
            f'deconvolutions, else 0.'
            if ndim is None else
            f'axis {axis!r} is not an output axis of {of} with {ndim} '
            f'dimensions. Give an integer from {-ndim} to {ndim - 1}.')


# Start vectors

class VectorTypeError(SpectralNormalizationError, TypeError):
    """The start vector has the wrong type or dtype."""

    def __init__(self, u: Any, expected: Any) -> None:
        super().__init__(
            f'u must be an array of dtype {expected}, as W is, but is a '
            f'{_describe(u)}. Convert it, e.g. u.astype(W.dtype).')


class VectorShapeError(SpectralNormalizationError, ValueError):
    """The shape of the start vector, or of several, does not fit W."""

    def __init__(self, shape: Sequence[int], W_shape: Sequence[int],
                 axis: int, length: int, most: int = 0) -> None:
        n = W_shape[axis]
        what = 'axis' if length == n else 'axis and groups'
        several = most and (
            f', or (b, {length}) with b from 1 to {most} for several vectors')
        super().__init__(
            f'u has shape {tuple(shape)}, but W of shape {tuple(W_shape)} '
            f'with output axis {axis} '
            + ('' if length == n else 'and a vector for each group ')
            + f'needs shape ({length},){several or ""}. Make u anew, or check '
            f'{what}.')


class MapWeightError(SpectralNormalizationError, ValueError):
    """The weight is not one of a convolution."""

    def __init__(self, W_shape: Sequence[int]) -> None:
        super().__init__(
            f'W has shape {tuple(W_shape)}, but the weight of a convolution '
            f'has 3 dimensions or more. The norm of a matrix as a map is that '
            f'of the matrix: use spectral_normalize.')


class SizeError(SpectralNormalizationError, ValueError):
    """A stride, or another size of a convolution, is out of its range."""

    def __init__(self, name: str, value: Any, ndim: int, least: int) -> None:
        super().__init__(
            f'{name} must be an integer of {least} or more, or {ndim} of '
            f'them, one for each axis of images, but is {value!r}.')


class OutputSizeError(SpectralNormalizationError, ValueError):
    """No deconvolution of such images has that output size."""

    def __init__(self, outsize: Any, insize: Sequence[int],
                 W_shape: Sequence[int]) -> None:
        super().__init__(
            f'outsize={outsize!r} does not fit: only a deconvolution has it '
            f'(transposed=True), and the convolution with W of shape '
            f'{tuple(W_shape)} has to make images of size {tuple(insize)} of '
            f'those of that size. Give another one; or, if those are of the '
            f'size of link.W_map, set that to None.')


class MapShapeError(SpectralNormalizationError, ValueError):
    """The start map, or several of them, do not fit the convolution."""

    def __init__(self, shape: Sequence[int], W_shape: Sequence[int],
                 channels: int) -> None:
        size = ', '.join('hwd'[:len(W_shape) - 2] if len(W_shape) < 6 else (
            f'd{k}' for k in range(1, len(W_shape) - 1)))
        super().__init__(
            f'u has shape {tuple(shape)}, but a convolution with W of shape '
            f'{tuple(W_shape)} needs an input of it, of shape ({channels}, '
            f'{size}), or (b, {channels}, {size}) for several. Make u anew, '
            f'or check groups.')


class InputSizeError(SpectralNormalizationError, ValueError):
    """Images of this size are too small for the convolution."""

    def __init__(self, insize: Sequence[int], W_shape: Sequence[int]) -> None:
        super().__init__(
            f'an input of size {tuple(insize)} gives no output of a '
            f'convolution with W of shape {tuple(W_shape)}. Take larger '
            f'images, or more padding; if that is the size of link.W_map, set '
            f'it to None.')


class VectorDeviceError(SpectralNormalizationError, ValueError):
    """The start vector and the weight are on different devices."""

    def __init__(self, u_device: Any, W_device: Any) -> None:
        super().__init__(
            f'u is on {u_device} and W is on {W_device}. Send u there: '
            f'u = chainer.get_device({str(W_device)!r}).send(u).')


class VectorValueError(SpectralNormalizationError, ValueError):
    """The start vector is zero or not finite, or several are dependent."""

    def __init__(self, u: Any) -> None:
        what = 'holds NaN or Inf'
        if abs(u).max() < math.inf:
            what = ('is all zero' if u.ndim == 1 else
                    'has a row that is zero or depends on others')
        good = ('a finite, non-zero vector' if u.ndim == 1 else
                'finite, linearly independent rows')
        size = u.shape[0] if u.ndim == 1 else tuple(u.shape)
        super().__init__(
            f'u of shape {tuple(u.shape)} {what}, so power iteration cannot '
            f'start from it. Give {good}, e.g. '
            f'numpy.random.normal(size={size}).astype(W.dtype).')


class VectorCountError(SpectralNormalizationError, ValueError):
    """There are more vectors than the kernels of a device are made for."""

    def __init__(self, number: int, most: int) -> None:
        super().__init__(
            f'u holds {number} vectors, but on a CUDA device there are at '
            f'most {most} for a weight. Leave the last ones out: u[:{most}].')


class VectorAxisError(SpectralNormalizationError, ValueError):
    """The vector in a snapshot is of another axis than that of the hook."""

    def __init__(self, link: str, vector_name: str, length: int,
                 W_shape: Sequence[int], axis: int, other: int) -> None:
        super().__init__(
            f'{vector_name} of {link} has length {length} in the snapshot, '
            f'but the hook takes axis {axis} of the weight of shape '
            f'{tuple(W_shape)}, so it needs length {W_shape[axis]}. '
            f'{_other_axis(axis, other)}')


def _other_axis(axis: int, other: int) -> str:
    return (f'The snapshot is of code that takes axis {other}, as links of '
            f'SN-GANs do for deconvolutions, too. To go on as that code did, '
            f'give the hooks of its links axis={other}. Or it is of '
            f'sn-function repair --add: then repeat that with '
            f'--axis PATTERN={axis} for this weight.')


class VectorUpdateError(SpectralNormalizationError, TypeError):
    """The start vector cannot be overwritten."""

    def __init__(self, u: Any) -> None:
        flags = getattr(u, 'flags', None)
        what = (f'is a {type(u).__name__}' if flags is None
                else 'is not C-contiguous' if not flags.c_contiguous
                and getattr(flags, 'writeable', True) else 'is read-only')
        super().__init__(
            f'update_u=True overwrites u, which must then be a writable '
            f'array, and a map C-contiguous, but u {what}. Give such an '
            f'array, or update_u=False.')


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


class RtolError(SpectralNormalizationError, ValueError):
    """The tolerance is not a positive number."""

    def __init__(self, rtol: Any) -> None:
        super().__init__(
            f'rtol, the largest relative residual of an estimate, must be a '
            f'finite number above 0, such as 1e-3, or None for a fixed number '
            f'of iterations, but is {rtol!r}.')


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


class GroupsError(SpectralNormalizationError, ValueError):
    """The hook is told something unknown about groups."""

    def __init__(self, groups: Any) -> None:
        super().__init__(
            f"groups must be 'each', for the largest norm of any group of a "
            f"grouped convolution, or None, for that of the whole weight as "
            f"one matrix, but is {groups!r}. How many groups there are is "
            f"known from the link.")


class NormError(SpectralNormalizationError, ValueError):
    """The hook is told an unknown norm."""

    def __init__(self, norm: Any) -> None:
        super().__init__(
            f"norm must be 'matrix', for the weight as a matrix, or "
            f"'operator', for what a convolution makes of images, but is "
            f'{norm!r}.')


class NormConflictError(SpectralNormalizationError, ValueError):
    """A norm is given with a setting that it has no use for."""

    def __init__(self, norm: str, name: str, value: Any) -> None:
        why = {
            'groups': 'the map of a convolution has its groups by itself',
            'axis': 'the map of a convolution has no output axis to choose',
            'insize': "only norm='operator' depends on the size of images",
        }[name]
        super().__init__(
            f'norm={norm!r} and {name}={value!r} do not go together: {why}. '
            f'Leave {name} out, or choose the other norm.')


class UpdateModeError(SpectralNormalizationError, ValueError):
    """The hook is told something unknown about when u moves on."""

    def __init__(self, update_u: Any) -> None:
        super().__init__(
            f"update_u must be 'train', where calls in training mode move u "
            f"on, or 'always', where those in test mode do so, too, but is "
            f"{update_u!r}.")


class InsizeError(SpectralNormalizationError, ValueError):
    """The size of images is not one, or not of as many dimensions."""

    def __init__(self, insize: Any, owner: str = '', ndim: int = 0) -> None:
        what = (f'a tuple of {ndim}, as {owner} has {ndim} dimensions'
                if ndim else 'a tuple of them')
        super().__init__(
            f'insize, the size of the images that a convolution is called '
            f'with, must be an integer of at least 1 or {what}, but is '
            f'{insize!r}. Leave it out for that of the first call.')


class UnknownMapError(SpectralNormalizationError, ValueError):
    """What a link makes of its input is not known."""

    def __init__(self, link: Any, weight_name: str) -> None:
        super().__init__(
            f"norm='operator' is the norm of what a convolution or a "
            f'deconvolution of Chainer makes of images, by its W. What '
            f'{type(link).__name__} does with {weight_name}, which has more '
            f"than 2 dimensions, is not known. Use norm='matrix', or a link "
            f'of Chainer.')


class UnknownInputSizeError(SpectralNormalizationError, ValueError):
    """The size of the images, which the norm depends on, is not known yet."""

    def __init__(self, owner: str, weight_name: str) -> None:
        super().__init__(
            f"{owner}.{weight_name} is normalized with norm='operator', that "
            f'of the map of images, and their size is not known before the '
            f'first call with an array of as many dimensions as the weight. '
            f'Call the link once, or give the size to the hook, e.g. '
            f"SpectralNormalization(norm='operator', insize=32).")


class GammaError(SpectralNormalizationError, TypeError):
    """gamma is not a number."""

    def __init__(self, gamma: Any) -> None:
        super().__init__(
            f'gamma must be a number, or an array or Variable of shape () '
            f'and floating point dtype on the device of W, but is a '
            f'{_describe(gamma)}. Give gamma=1.0, for example, or '
            f'chainer.Parameter(numpy.array(1, W.dtype)).')


# Models

class ModelTypeError(SpectralNormalizationError, TypeError):
    """Something else is given in the place of a model, or nothing."""

    def __init__(self, function: str, *given: Any) -> None:
        what = _describe(given[0]) if given else 'nothing'
        remedy = (_instead_of_model(function, given[0]) if given
                  else f'Name the models: {function}(model).')
        super().__init__(
            f'{function} takes a model, which is a chainer.Link or a Chain, '
            f'but was given {what}. {remedy}')


def _instead_of_model(function: str, given: Any) -> str:
    if isinstance(given, (str, bytes, os.PathLike)):
        command = 'bake' if function == 'bake' else 'inspect'
        arguments = {'bake': 'SNAPSHOT OUT', 'inspect': 'SNAPSHOT'}[command]
        python = arguments.lower().replace(' ', ', ')
        return (f'If that is the file of a snapshot, load it into its model '
                f'first: chainer.serializers.load_npz(file, model). For files '
                f'alone there is sn_function.snapshot.{command}({python}), '
                f'or the command `sn-function {command} {arguments}`.')
    if isinstance(given, type):
        return f'Give an object of this class: {given.__name__}(...).'
    if hasattr(given, 'forward_preprocess'):
        return ('Add the hook to a link, model.add_hook(hook), and give the '
                'model.')
    if hasattr(given, 'target'):
        return 'Give the model that it optimizes, optimizer.target.'
    if isinstance(given, (list, tuple)) and (
            function in ('cached', 'normalized')):
        return f'Give the models one by one: {function}(*models).'
    return 'Give the link that has the weights.'


# Hooks

class HookBypassedError(SpectralNormalizationError, ValueError):
    """A link never calls its hooks."""

    def __init__(
            self, links: Sequence[tuple[str, Any]], or_else: str = '') -> None:
        where = _some(f'{path or type(link).__name__} ({_own_call(link)})'
                      for path, link in links)
        super().__init__(
            f'A hook has no effect on a link whose class hides the __call__ '
            f'of chainer.Link, which calls the hooks: {where}. Rename this '
            f'__call__ to forward, as of Chainer 5, or let it call '
            f'super().__call__ in the place of self.forward{or_else}.')


def _own_call(link: Any) -> str:
    """Where the call of a link is defined, such as ``Block.__call__``."""
    cls = next(c for c in type(link).__mro__ if '__call__' in vars(c))
    return f'{cls.__name__}.__call__'


class HookCollisionError(SpectralNormalizationError, ValueError):
    """The weight has a hook already."""

    def __init__(self, link: Any, attribute: str, weight_name: str) -> None:
        super().__init__(
            f'{type(link).__name__} already has an attribute '
            f'{attribute!r}, which this hook would use for '
            f'{weight_name!r}. If the weight is normalized already, delete '
            f'that hook first with link.delete_hook(name); if the attribute '
            f'is your own, rename it.')


class BothHooksError(SpectralNormalizationError, ValueError):
    """The weight has this hook already, in the place of Chainer's."""

    def __init__(self, link: Any, weight_name: str) -> None:
        super().__init__(
            f'{type(link).__name__} already has a hook that normalizes '
            f'{weight_name!r}. With sn-function run --hook, as with '
            f'install(hook=True), the SpectralNormalization of '
            f'chainer.link_hooks is that of sn_function. Where a program adds '
            f'both, remove one, or run it without --hook.')


class PickledHookError(SpectralNormalizationError, TypeError):
    """A pickle of Chainer's hook is loaded where this one has its place."""

    def __init__(self) -> None:
        super().__init__(
            "This is a pickle of a model with Chainer's hook. Load it in a "
            'program that runs without --hook, and without '
            'install(hook=True), and save its snapshot by save_npz there: '
            'that loads into models with either hook.')


class HookInUseError(SpectralNormalizationError, RuntimeError):
    """It is too late to take the place of Chainer's hook."""

    def __init__(self, modules: Iterable[str]) -> None:
        super().__init__(
            f"Chainer's SpectralNormalization has been imported by "
            f'{_some(modules)}, which goes on with it. Call '
            f'sn_function.install(hook=True) before that, at the top of the '
            f'program, or start it by sn-function run --hook.')


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


class ForeignHookError(SpectralNormalizationError, TypeError):
    """The normalized weights of Chainer's hook are asked for."""

    def __init__(self, links: Sequence[tuple[str, Any]]) -> None:
        where = _links(links)
        super().__init__(
            f'These links have the hook of Chainer, which normalizes anew in '
            f'each call, so there is no weight that their attributes could '
            f'be: {where}. Give them sn_function.SpectralNormalization('
            f'detach_uv=True, n_warmup=0) in its place, which follows the '
            f'same numbers.')


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


class UncertifiedWeightError(SpectralNormalizationError, ValueError):
    """The map that a weight stands for is not known."""

    def __init__(self, weights: Sequence[str]) -> None:
        super().__init__(
            f'The norms of these weights cannot be certified, as it is not '
            f'known which map they are of: {_some(weights)}. Known are '
            f'weights of 2 dimensions, and W of the convolutions and '
            f'deconvolutions of chainer.links. Bake without certified=True, '
            f'or delete the hooks of these links first.')


class CertifiedNormError(SpectralNormalizationError, ValueError):
    """A weight has no finite norm."""

    def __init__(self, where: str, weight_name: str) -> None:
        super().__init__(
            f'{where}.{weight_name} has no finite norm that can be '
            f'certified: it holds NaN or Inf, or would with its gamma and '
            f'factor. Bake an earlier snapshot, or a smaller factor.')


class FilterError(SpectralNormalizationError, TypeError):
    """A filter is not of a kind that can choose links."""

    def __init__(self, filter: Any) -> None:
        super().__init__(
            f'A filter of links must be a pattern of their paths such as '
            f'"/block*/conv", a class of links, a function of a path and a '
            f'link, or a list of these, but is {filter!r}.')


class NoLinkError(SpectralNormalizationError, ValueError):
    """A chain has no link whose weight could be normalized."""

    def __init__(
            self, chain: Any, weight_name: str, filter: Any,
            supported: Sequence[tuple[str, Any]],
            free: Sequence[tuple[str, Any]], exclude: Any = None) -> None:
        paths = _some(path for path, _ in free or supported)
        if free and exclude is not None:
            what = (f'The filter {filter!r} takes none of its links but those '
                    f'that exclude={exclude!r} leaves out. They are {paths}. '
                    f'Exclude less')
        elif free:
            what = (f'The filter {filter!r} takes none of its links, which '
                    f'are {paths}.{_near(filter, free)} Give a filter that '
                    f'takes some of these paths, or none for all')
        elif supported:
            what = (f'All links whose {weight_name} could be normalized have '
                    f'a hook already: {paths}. Do without this one, or delete '
                    f'theirs first with link.delete_hook(name)')
        else:
            what = (f'None is a Linear, an EmbedID, a convolution or a '
                    f'deconvolution that has a {weight_name}: '
                    f'{_links(chain.namedlinks())}. Add the hook when all '
                    f'links are in the chain, put the class of an n-step RNN '
                    f'into the filter, or add SpectralNormalization to the '
                    f'links themselves')
        super().__init__(
            f'{type(chain).__name__} has no link to normalize. {what}. '
            f'chain.namedlinks() has all paths.')


class NothingExcludedError(SpectralNormalizationError, ValueError):
    """What is to be left out is not there."""

    def __init__(
            self, model: Any, exclude: Any,
            links: Sequence[tuple[str, Any]]) -> None:
        text = getattr(exclude, '__qualname__', None) or repr(exclude)
        paths = _links(links)
        super().__init__(
            f'exclude={text} leaves out none of the links of '
            f'{type(model).__name__} whose weights could be normalized, which '
            f'are {paths}.{_near(exclude, links)} Give what takes some of '
            f'them, or leave it out.')


def _near(filter: Any, links: Sequence[tuple[str, Any]]) -> str:
    """What the patterns of a filter that takes nothing may have meant."""
    patterns = filter if isinstance(filter, (list, tuple)) else [filter]
    for one in patterns:
        if not isinstance(one, str):
            continue
        if one[:1] not in ('/', '*', '?', '['):
            return (f' Paths begin with a slash, so {one!r} takes nothing: '
                    f'did you mean {"/" + one!r}?')
        near = _near_paths(one, [path for path, _ in links])
        if near:
            return f' Did you mean {" or ".join(map(repr, near[:3]))}?'
    return ''


def _near_paths(pattern: str, paths: Sequence[str]) -> list[str]:
    """Paths that look like a pattern, or whose last name does like its."""
    def last(path: str) -> str:
        return path.rpartition('/')[2]

    near = difflib.get_close_matches(last(pattern), map(last, paths))
    return difflib.get_close_matches(pattern, paths) or [
        path for path in paths if last(path) in near]


class ModelCopyError(SpectralNormalizationError, TypeError):
    """A model that is to be run cannot be copied."""

    def __init__(self, model: Any, cause: BaseException) -> None:
        super().__init__(
            f'The run needs a deep copy of the model, but copy.deepcopy of '
            f'this {type(model).__name__} raised {type(cause).__name__}: '
            f'{cause} Define __deepcopy__ for what cannot be copied, or ask '
            f'for the summary without a run.')


class RunArgumentError(SpectralNormalizationError, ValueError):
    """A run does not use the copy of the model that it is given."""

    def __init__(self, model: Any, link: Any) -> None:
        name = type(model).__name__
        what = ('called no link of it' if link is None else
                f'called a {type(link).__name__} of the model itself')
        super().__init__(
            f'run is called with a copy of the {name}, so that the model '
            f'stays as it is, but {what}. Use the argument and no other '
            f'name of the model, e.g. summary(model, lambda model: '
            f'model(x)).')


# Monitoring and optimizer hooks

class NothingToReportError(SpectralNormalizationError, ValueError):
    """A model has no weight whose sigma could be reported."""

    def __init__(self, model: Any, true_sigma: bool) -> None:
        name = type(model).__name__
        what = (f'{name} has no spectral normalization, so there is no '
                f'estimate of sigma to report. Add a hook to its links before '
                f'the trainer runs, or ask for the true values with '
                f'true_sigma=True.')
        if true_sigma:
            what = (f'{name} has no spectral normalization, and no link that '
                    f'is a Linear, an EmbedID, a convolution or a '
                    f'deconvolution, so there is nothing to report. Its '
                    f'links: {_links(model.namedlinks())}. Add a hook to one '
                    f'that has a weight, or leave the report out.')
        super().__init__(what)


class ToleranceError(SpectralNormalizationError, ValueError):
    """The tolerance is not a positive number."""

    def __init__(self, tolerance: Any) -> None:
        super().__init__(
            f'tolerance, the relative error of sigma that is not worth a '
            f'warning, must be a number above 0, but is {tolerance!r}.')


class LipschitzError(SpectralNormalizationError, ValueError):
    """Layers of a network have no known bound on their Lipschitz constant."""

    def __init__(self, model: Any, unknown: Sequence[str]) -> None:
        super().__init__(
            f'The Lipschitz constant of {type(model).__name__} has no known '
            f'bound, as that of these layers has none: {_some(unknown)}. '
            f'Known are Linear, convolutions, an EmbedID that comes first, '
            f'BatchNormalization, links without parameters, and, in a '
            f'Sequential, ReLU-like functions and pooling, with '
            f'functools.partial where they need arguments. Bound the others '
            f'by other means: measure() has the interval of each layer.')


class ShortcutError(SpectralNormalizationError, TypeError):
    """The shortcut of a residual chain is not named."""

    def __init__(self, shortcut: Any) -> None:
        super().__init__(
            f'residual must be a filter of links, or a dictionary from '
            f'filters to the names of the children that are the shortcut, '
            f'such as {{Block: "conv_shortcut"}}, but a name is '
            f'{shortcut!r}.')


class PenaltyRateError(SpectralNormalizationError, ValueError):
    """The rate of the penalty is negative or not a number."""

    def __init__(self, rate: Any) -> None:
        super().__init__(
            f'rate, the coefficient of the penalty, must be a finite number '
            f'of at least 0, but is {rate!r}.')


class ProjectionNormError(SpectralNormalizationError, ValueError):
    """The bound of the projection is not a positive number."""

    def __init__(self, c: Any) -> None:
        super().__init__(
            f'c, the largest norm that a weight has after an update, must be '
            f'a finite number above 0, but is {c!r}.')


class NoWeightError(SpectralNormalizationError, ValueError):
    """An optimizer hook finds no weight; base of those below."""

    def __init__(self, target: Any, verb: str) -> None:
        super().__init__(
            f'{type(target).__name__} has no link that is a Linear, an '
            f'EmbedID, a convolution or a deconvolution, has no spectral '
            f'normalization, and passes the filter and exclude=, so there is '
            f'nothing to {verb}. Its links: {_links(target.namedlinks())}. '
            f'Look at target.namedlinks() for the paths that these are '
            f'called with, or remove the hook from the optimizer.')


class NoPenaltyError(NoWeightError):
    """No weight of the optimizer's target gets the penalty."""

    def __init__(self, target: Any) -> None:
        super().__init__(target, 'penalize')


class NoProjectionError(NoWeightError):
    """No weight of the optimizer's target is projected."""

    def __init__(self, target: Any) -> None:
        super().__init__(target, 'project')


class CertifyLinkError(SpectralNormalizationError, ValueError):
    """It is not known what a link does with its weight."""

    def __init__(self, link: Any) -> None:
        remedy = ('Give its links one by one.' if _is_chain(link) else
                  'Of other links it knows that map if W is a matrix with a '
                  'hook of this package.')
        super().__init__(
            f'certify finds the norm of the map of Linear, EmbedID, and the '
            f'convolutions and deconvolutions of Chainer, from their weight '
            f'W, but was given a {type(link).__name__}. {remedy}')


class CertifyArgumentError(SpectralNormalizationError, ValueError):
    """An argument of certify is out of its range."""

    def __init__(self, name: str, value: Any, what: str) -> None:
        super().__init__(f'{name} must be {what}, but is {value!r}.')


class SpectralNormalizationWarning(UserWarning):
    """A weight, its vector or its estimate of sigma is not right, or what was
    asked for has no effect."""


class ChainCallWarning(SpectralNormalizationWarning):
    """The hook of a chain does not see the calls of the chain."""

    def __init__(self, chain: Any) -> None:
        call = _own_call(chain)
        super().__init__(
            f'{call} hides the __call__ of chainer.Link, which calls the hook '
            f'of a {type(chain).__name__}. The links in it are normalized '
            f'all the same, but each by itself and in each of its calls, so '
            f'one that is called twice is normalized twice, and its u moves '
            f'on twice. Rename {call} to forward, as of Chainer 5, or call '
            f'it in the scope `with sn_function.cached(model):`.')


class UntrainedGammaWarning(SpectralNormalizationWarning):
    """gamma is added to a link that an optimizer was set up for already."""

    def __init__(self, links: Sequence[str]) -> None:
        super().__init__(
            f'use_gamma adds a parameter, gamma, but an optimizer was set up '
            f'for the others of {_some(links)} already. It does not know '
            f'gamma, which stays what it is. Call optimizer.setup(model) '
            f'after the hook is added, again if it was called before.')


class VectorAxisWarning(SpectralNormalizationWarning):
    """The vector in a snapshot seems to be of another axis than the hook's."""

    def __init__(
            self, link: str, vector_name: str, axis: int, other: int) -> None:
        super().__init__(
            f'{vector_name} of {link}, as it is in the snapshot, has settled '
            f'along axis {other} of the weight, and not along axis {axis}, '
            f'which the hook takes. {_other_axis(axis, other)}')


class ToleranceWarning(SpectralNormalizationWarning):
    """The estimate of sigma is not as good as rtol asks for."""

    def __init__(self, where: str, rtol: float | None) -> None:
        super().__init__(
            f'{where}: the residual is above rtol={rtol} after '
            f'max_iterations. The estimate of sigma may be too low. Allow '
            f'more iterations, or use several vectors, which need fewer.')


class NothingToBakeWarning(SpectralNormalizationWarning):
    """A model without hooks is baked."""

    def __init__(self, model: Any) -> None:
        super().__init__(
            f'{type(model).__name__} has no spectral normalization, so bake '
            f'leaves all its weights as they are. If it was trained with '
            f'hooks, add them before its snapshot is loaded, and bake it '
            f'then; sn_function.summary(model) shows what has a hook.')


class NothingToShareWarning(SpectralNormalizationWarning):
    """Models without this package's hooks share their weights."""

    def __init__(
            self, models: Sequence[Any], function: str = 'cached') -> None:
        names = _some(type(model).__name__ for model in models)
        super().__init__(
            f'{function} has no effect: no link of {names} has the hook '
            f'sn_function.SpectralNormalization; that of Chainer has no part '
            f'in it. Add the hook, or leave the scope out; '
            f'sn_function.summary(model) shows what has a hook.')


class NothingToRefreshWarning(SpectralNormalizationWarning):
    """Vectors of a model without hooks are made anew."""

    def __init__(self, model: Any) -> None:
        super().__init__(
            f'{type(model).__name__} has no spectral normalization, so '
            f'refresh has no vector to make anew. Add the hook first; '
            f'sn_function.summary(model) shows what has a hook.')


# Processes that train one model

class NotSynchronizedError(SpectralNormalizationError, RuntimeError):
    """Ranks have different models."""

    def __init__(self, differences: Mapping[str, Sequence[int]]) -> None:
        self.differences = differences
        found = [f'{path} of {"rank" if len(ranks) == 1 else "ranks"} '
                 f'{_some(ranks)}'
                 for path, ranks in differences.items()]
        super().__init__(
            f'These differ from rank 0, or exist on one of the two only: '
            f'{_some(found)}. Make the optimizer with '
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


def _some_keys(keys: Sequence[str], n: int = 4) -> str:
    """The first few of the names, and how many more there are."""
    some = ', '.join(map(repr, list(keys)[:n])) or 'none'
    return some + (f' and {len(keys) - n} more' if len(keys) > n else '')


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

    def __init__(self, path: str, package: str, why: str) -> None:
        package = package.split('.')[0]
        super().__init__(
            path, None, f'a file of this kind needs the package {package}, '
            f'which cannot be imported: {why}',
            f'Install it: pip install {package}')


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
        super().__init__(
            path, None,
            f'its layout is unknown: {what}. Its entries: {_some_keys(keys)}',
            'Known are W with W_u (Chainer, sn_function), W with u '
            '(sngan_projection), and of PyTorch weight_orig with weight_u, '
            'parametrizations.weight, weight_bar with weight_u, and weight '
            'with u0. A weight of another name gets a vector by sn-function '
            'repair SNAPSHOT OUT --add KEY, or snapshot.repair(src, dst, '
            'add_u=[KEY]).')


class SnapshotNoVectorError(SnapshotLayoutError):
    """No weight of the snapshot has a vector."""

    def __init__(self, path: str, keys: Sequence[str]) -> None:
        SnapshotError.__init__(
            self, path, None,
            f'no weight has a vector of a known name, such as W_u or '
            f'weight_u: it is of a model without hooks, or by code that does '
            f'not save u. Its weights: {_some_keys(keys)}',
            'Make the vectors first: sn-function repair SNAPSHOT OUT --add '
            "'*', or a PATTERN of weights, or snapshot.repair(src, dst, "
            "add_u=['*']).")


class SnapshotPartialError(SnapshotError):
    """Some weights of a model have a vector, and others have none."""

    def __init__(self, path: str, keys: Sequence[str], n_with: int) -> None:
        super().__init__(
            path, None,
            f'{n_with} of its {n_with + len(keys)} weights have a vector, and '
            f'{_some_keys(keys, 8)} none, so a model with hooks on all of '
            f'them could not load the output',
            'Say what is to become of them: --fill makes their vectors, '
            '--no-fill leaves them as they are, for layers without a hook; '
            'or fill=True, fill=False. Those of some alone are made before, '
            'by sn-function repair SNAPSHOT OUT --add PATTERN.')


class SnapshotPatternError(SnapshotError):
    """A pattern fits none of the weights."""

    def __init__(self, path: str, pattern: str, what: str,
                 keys: Sequence[str]) -> None:
        super().__init__(
            path, None, f'{what}: {pattern!r}',
            f'Give a pattern that fits one of {_some_keys(keys)}.' if keys
            else 'The file has none.')


class SnapshotRenameError(SnapshotError):
    """A path cannot be renamed as asked."""

    def __init__(self, path: str, old: str, what: str,
                 paths: Sequence[str]) -> None:
        super().__init__(
            path, None, f'{old!r} cannot be renamed: {what}',
            f'Give a path of the file, in whole parts: it has '
            f'{_some_keys(paths)}.')


class SnapshotNameError(SnapshotError):
    """Two entries would get the same name."""

    def __init__(self, path: str, name: str, first: str, second: str) -> None:
        super().__init__(
            path, None, f'two entries would get the name {name!r}: '
            f'{first!r} and {second!r}',
            'Give one of them another: --rename OLD=NEW, or rename={OLD: NEW}'
            ', of convert and bake.')


class SnapshotModelError(SnapshotError):
    """It is not clear which model of the snapshot is meant."""

    def __init__(self, path: str, model: str | None,
                 models: Sequence[str]) -> None:
        what = ('it holds several models' if model is None
                else f'it has no entries below {model!r}')
        name = 'or the path of a link: --model NAME, or model=NAME.'
        if models:
            super().__init__(
                path, None, f'{what}. Its models: {", ".join(models)}',
                f'Name one of them, {name}')
        else:
            super().__init__(
                path, None, f'{what}, as it is of one model',
                f'Give no name, {name}')


class SnapshotWeightError(SnapshotError):
    """A weight, or its gamma, holds NaN or Inf."""

    def __init__(self, path: str, key: str, what: str) -> None:
        super().__init__(
            path, key, what,
            'It is lost, and no command can repair it: take an earlier '
            'snapshot.')


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


class SnapshotMapError(SnapshotError):
    """What a weight does as a convolution is not known, or not so."""

    def __init__(self, path: str, key: str, what: str) -> None:
        super().__init__(
            path, key, what,
            f'Say what its layer has: --stride {key}=N --pad {key}=N, and '
            f'--dilate, --groups and --axis where they are not 1, 1 and 0, '
            f'or stride={{{key!r}: N}}, and so on. Or load the model in '
            f'Python, for sn_function.bake(model).')


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


class MapOptionError(SpectralNormalizationError, ValueError):
    """A stride, padding, dilation or number of groups is none."""

    def __init__(self, name: str, value: Any) -> None:
        least = 'zero or more' if name == 'pad' else 'one or more'
        kind = ("an integer or 'depthwise'" if name == 'groups'
                else 'an integer, or one for each axis of the images')
        super().__init__(
            f'{name} must be {kind}, each {least}, or a dictionary of these '
            f'by patterns of weights, but is {_describe(value)}.')


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


__all__ = [name for name, each in dict(globals()).items()
           if isinstance(each, type) and each.__module__ == __name__]
