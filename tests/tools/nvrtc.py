"""Compiles the CUDA kernels as CuPy would, for devices that need not exist.

``python -m tests.tools.nvrtc`` compiles every kernel of
:mod:`sn_function._arithmetic.kernels`, for every combination of dtypes that it
is used with, by CuPy's own generator of sources, its headers and options, and
NVRTC, to the machine code of several architectures.  It prints the registers
and the memory that each one takes.  CuPy and NVRTC are needed, but no driver
and no device.
"""
from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import ctypes
import functools
import glob
import importlib.util
import io
import multiprocessing
import os
import re
import sys
import time
import types
import warnings
from typing import Any, Iterable, Iterator, NamedTuple
from unittest import mock

with warnings.catch_warnings():
    # Chainer imports CuPy, which warns of libraries that nothing here uses.
    warnings.filterwarnings(
        'ignore', r'\s*\w+ library could not be loaded', UserWarning)
    import sn_function  # before chainer, which it repairs

    try:
        import cupy
    except ImportError as e:
        cupy, _no_cupy = None, e

import numpy

from sn_function._arithmetic import kernels as _kernels
from sn_function._arithmetic.matrix import accumulator_dtype

assert sn_function  # it is imported for what it does

# Turing, Ampere, Hopper, Blackwell.
ARCHS = ('sm_75', 'sm_80', 'sm_90', 'sm_100')
# Where one architecture is enough: between them, layouts make no difference.
ONE_ARCH = 'sm_80'
# The threads of a block, as CuPy launches its own kinds.
THREADS = {_kernels.Reduction: 512, _kernels.Elementwise: 128}
REGISTERS = 1 << 16     # of a multiprocessor, on all of these architectures

# Numbers of vectors for those kernels that have several of a weight.  With the
# second, which takes more registers, they are compiled for one weight of
# float32 or float64.  Not for many of float64, where some spill a few bytes.
VECTORS = (8, 16)
# A weight and a vector that may go together.
_PAIRS = ('ee', 'ef', 'ff', 'dd')

INSTALL = '''\
CuPy, NVRTC and the headers of CUDA are needed, but no device.  With Python
3.10 or newer:
    pip install ".[nvrtc]"
with an older one:
    pip install ".[cuda12]" nvidia-cuda-nvrtc-cu12==12.9.* \
nvidia-cuda-runtime-cu12==12.9.*'''


class Unavailable(ImportError):
    """There is no CuPy, or no NVRTC."""


class Layout(NamedTuple):
    """What CuPy makes of the shapes and strides of the arguments."""

    ndim: int
    is_contiguous: bool
    is_wide: bool = False   # sizes that need indices of 64 bits

    def __str__(self) -> str:
        return (f'{self.ndim}-d' + ' strided' * (not self.is_contiguous)
                + ' wide' * self.is_wide)


CONTIGUOUS = Layout(1, True)
# CuPy permutes the axes of a weight, so these hardly ever see a flat one.
REDUCED = Layout(2, False)
LAYOUTS = (CONTIGUOUS, *[Layout(n, False) for n in range(1, 6)],
           Layout(1, True, True), Layout(3, False, True))


class Signature(NamedTuple):
    """The dtypes that a kernel is called with."""

    kernel: Any
    dtypes: tuple[tuple[str, str], ...]     # ('T', 'e'), ...
    is_for_many: bool = False   # weights
    n_vectors: int | None = None

    def __str__(self) -> str:
        return ' '.join([f'{name}={char}' for name, char in self.dtypes]
                        + [f'b={self.n_vectors}'] * bool(self.n_vectors)
                        + ['MAX_WEIGHTS'] * self.is_for_many)


class Case(NamedTuple):
    """One compilation."""

    signature: Signature
    layout: Layout | None   # None for a raw kernel
    arch: str

    def __str__(self) -> str:
        parts = (self.signature.kernel.name, self.signature, self.layout,
                 self.arch)
        return ', '.join([str(part) for part in parts if part is not None])


class Result(NamedTuple):
    """The result of a compilation; where it failed, error is not empty."""

    case: Case
    registers: int = 0
    spills: int = 0     # bytes stored and loaded
    stack: int = 0
    shared: int = 0     # bytes
    warnings: str = ''
    error: str = ''

    @property
    def problems(self) -> list[str]:
        """Everything that must not occur."""
        found = [text for text in (self.error, self.warnings) if text]
        if self.spills or self.stack:
            found.append(f'{self.spills} bytes of spills, {self.stack} of '
                         f'stack')
        threads = threads_of(self.case.signature.kernel)
        if self.registers * threads > REGISTERS:
            found.append(f'{self.registers} registers, of {threads} threads')
        return [f'{self.case}: {text}' for text in found]


def threads_of(kernel: Any) -> int:
    """Returns the threads of a block, as the package or CuPy launches them."""
    if isinstance(kernel, _kernels.Raw):
        return int(getattr(_kernels, kernel.threads))
    return THREADS[type(kernel)]


def signatures(kernel: Any) -> list[Signature]:
    """Returns those that the package can use."""
    if isinstance(kernel, _kernels.Raw):
        # For one weight, and for many.  Without u, its type is that of sums.
        return [Signature(kernel, tuple(zip('TU', pair)), is_for_many, b)
                for b in (VECTORS if kernel.has_several else (None,))
                for pair in _PAIRS for is_for_many in (False, True)
                if (kernel.has_u or pair[1] == accumulator_dtype(
                    numpy.dtype(pair[0])).char)
                and (b != VECTORS[1] or (
                    pair in ('ff', 'dd') and not is_for_many))
                and not (b and is_for_many and pair == 'dd')]
    names = {kind for kind, _ in parameters(kernel) if len(kind) == 1}
    found = {}
    for T, U in _PAIRS:
        A = accumulator_dtype(numpy.dtype(T)).char
        for X in U, A:
            dtypes = dict(T=T, U=U, A=A, X=X)
            found[tuple([(name, dtypes[name]) for name in sorted(names)])] = 1
    return [Signature(kernel, dtypes) for dtypes in found]


def parameters(kernel: Any) -> list[tuple[str, str]]:
    """Returns the type and the name of each, outputs last."""
    return [tuple(text.split()[-2:])    # type: ignore[misc]
            for text in ','.join(kernel.arguments[:2]).split(',')]


def cases(kernels: Iterable[Any] = _kernels.ALL,
          archs: Iterable[str] = ARCHS) -> list[Case]:
    """Returns the compilations that prove these kernels."""
    archs = list(archs)
    found = []
    for kernel in kernels:
        for signature in signatures(kernel):
            usual = usual_layout(kernel)
            found += [Case(signature, usual, arch) for arch in archs]
            if usual is None:
                continue
            one = ONE_ARCH if ONE_ARCH in archs else archs[0]
            found += [Case(signature, layout, one)
                      for layout in LAYOUTS if layout != usual]
    return found


def usual_layout(kernel: Any) -> Layout | None:
    return {_kernels.Raw: None, _kernels.Elementwise: CONTIGUOUS,
            _kernels.Reduction: REDUCED}[type(kernel)]


def compile_all(chosen: Iterable[Case]) -> list[Result]:
    """Compiles each, on all processors; the results are in order."""
    load()
    chosen = list(chosen)
    # NVRTC compiles one program at a time, whatever the number of threads.
    with concurrent.futures.ProcessPoolExecutor(
            os.cpu_count(), multiprocessing.get_context('spawn')) as pool:
        return [result._replace(case=case) for case, result in zip(
            chosen, pool.map(compile_one, chosen))]


def compile_one(case: Case) -> Result:
    """Compiles it in this process."""
    cp = load()
    log = io.StringIO()
    kernel = case.signature.kernel
    try:
        with _without_device():
            module = cp.core.compile_with_cache(
                source(case), ('--ptxas-options=-v',),
                arch=case.arch[len('sm_'):], log_stream=log,
                # CuPy leaves a raw kernel as it is.
                prepend_cupy_headers=not isinstance(kernel, _kernels.Raw))
    except Exception as e:
        return Result(case, error=f'{type(e).__name__}: {e}')
    if not module.cubin.startswith(b'\x7fELF'):
        return Result(case, error='CuPy asked for PTX, not for machine code')
    return _read_log(case, log.getvalue())


@functools.lru_cache(maxsize=None)
def load() -> types.SimpleNamespace:
    """Returns the modules of CuPy, with NVRTC at hand.

    Raises:
        Unavailable: If there is none of them.

    """
    if cupy is None:
        raise Unavailable(f'{_no_cupy}\n{INSTALL}') from _no_cupy
    from cupy._core import _kernel, _reduction, _scalar, core
    from cupy.cuda import compiler, function
    _preload_nvrtc()
    try:
        version = compiler._get_nvrtc_version()
    except Exception as e:
        raise Unavailable(f'{e}\n{INSTALL}') from e

    class Module(function.Module):
        """Keeps the machine code that CuPy would load to a device."""

        def load(self, cubin: bytes) -> None:
            self.cubin = cubin

    return types.SimpleNamespace(
        kernel=_kernel, reduction=_reduction, scalar=_scalar,
        core=core, compiler=compiler, Module=Module, version=version)


def _preload_nvrtc() -> None:
    # CuPy 13 asks only the loader, which does not know wheels.
    spec = importlib.util.find_spec('nvidia')
    for path in (spec and spec.submodule_search_locations) or ():
        for library in glob.glob(
                os.path.join(path, 'cuda_nvrtc', 'lib', 'libnvrtc.so.*')):
            ctypes.CDLL(library)


@contextlib.contextmanager
def _without_device() -> Iterator[None]:
    """Makes CuPy compile for a given architecture, and stop there."""
    cp = load()
    get_options = cp.compiler._get_arch_for_options_for_nvrtc
    with contextlib.ExitStack() as stack:
        # Memoized for each device, so it asks which one is current.
        stack.enter_context(mock.patch.object(
            cp.compiler, '_get_arch_for_options_for_nvrtc',
            get_options.__wrapped__))
        stack.enter_context(mock.patch.object(
            cp.compiler, 'function',
            types.SimpleNamespace(Module=cp.Module)))
        # No cache: nothing compiled before is used, nothing is kept.
        stack.enter_context(mock.patch.dict(
            os.environ, CUPY_CACHE_IN_MEMORY='1'))
        yield


def _read_log(case: Case, log: str) -> Result:
    rest = ''.join([
        line for line in log.strip('\0').splitlines(True)
        if not re.match(r'ptxas (info +:|  +\.) ', line)])
    name = case.signature.kernel.name
    if f"entry function '{name}' for '{case.arch}'" not in log:
        return Result(case, error=f'no {name} for {case.arch} in:\n{log}')

    def total(pattern: str, at_least: int) -> int:
        found = re.findall(pattern, log)
        if len(found) < at_least:
            raise ValueError(f'{pattern} is not in:\n{log}')
        return sum(map(int, found))

    return Result(
        case, total(r'Used (\d+) registers', 1),
        total(r'(\d+) bytes spill (?:stores|loads)', 2),
        total(r'(\d+) bytes stack frame', 1),
        total(r'(\d+) bytes smem', 0), rest.strip())


def source(case: Case) -> str:
    """Returns what CuPy would compile, short of its headers."""
    cp = load()
    (kernel, _, is_for_many, n_vectors), layout, _ = case
    dtypes = {name: numpy.dtype(char) for name, char in case.signature.dtypes}
    if isinstance(kernel, _kernels.Raw):
        return kernel.source(
            dtypes['T'], dtypes['U'],
            _kernels.MAX_WEIGHTS if is_for_many else 1, n_vectors)
    assert layout is not None
    is_reduction = isinstance(kernel, _kernels.Reduction)
    if is_reduction:
        made = cupy.ReductionKernel(*kernel.arguments, kernel.name)
        params = made._params
    else:
        made = cupy.ElementwiseKernel(
            *kernel.arguments, kernel.name, preamble=_kernels._LAYOUT)
        params = made.params

    # As the __call__ of the two does; all arguments are arrays.
    n_in = len(made.in_params)
    arrays = [
        numpy.dtype(p.dtype) if p.dtype else dtypes[p.ctype]
        for p in (*made.in_params, *made.out_params)]
    in_types, out_types, type_map = cp.reduction._decide_params_type(
        made.in_params, made.out_params,
        tuple(arrays[:n_in]), tuple(arrays[n_in:]))

    index_32_bits = not layout.is_wide
    infos = []
    for i, (p, dtype) in enumerate(zip(params, (*in_types, *out_types))):
        if p.raw:
            infos.append(_array(dtype, 1, True, index_32_bits))
        elif i < n_in:
            infos.append(_array(
                dtype, layout.ndim, layout.is_contiguous, index_32_bits))
        else:   # the package passes only contiguous ones
            infos.append(_array(
                dtype, 1 if is_reduction else layout.ndim, True,
                index_32_bits))
    infos.append(_indexer(layout.ndim, index_32_bits))
    if not is_reduction:
        return cp.kernel._get_elementwise_kernel_code(
            tuple(infos), type_map, params, made.operation, made.name,
            made.preamble, **made.kwargs)

    infos += [_indexer(1, index_32_bits), _number(numpy.dtype('i'))]
    type_map = cp.kernel._TypeMap(
        (*type_map._pairs, ('IndexT', 'int32' if index_32_bits else 'int64')))
    return cp.reduction._ReductionKernel_get_cached_function_code(
        made.nin, made.nout, params, tuple(infos), type_map, made.name,
        THREADS[_kernels.Reduction], made.reduce_type, made.identity,
        made.map_expr, made.reduce_expr, made.post_map_expr, made.preamble,
        made.options)


# The kinds of arguments are numbers that CuPy does not show to Python.


def _array(dtype: Any, ndim: int, contiguous: bool, narrow: bool) -> Any:
    cp = load()
    return cp.kernel._ArgInfo(
        1, cupy.ndarray, dtype, ndim, contiguous, narrow)


def _indexer(ndim: int, narrow: bool) -> Any:
    cp = load()
    return cp.kernel._ArgInfo(2, object, None, ndim, True, narrow)


def _number(dtype: Any) -> Any:
    cp = load()
    return cp.kernel._ArgInfo(3, cp.scalar.CScalar, dtype, 0, True, True)


def table(results: Iterable[Result], archs: Iterable[str]) -> Iterator[str]:
    """Formats what each kernel takes, for each architecture."""
    rows: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for result in results:
        signature, layout, arch = result.case
        label = str(signature)
        if layout != usual_layout(signature.kernel):
            label = 'other layouts, at most'
        rows.setdefault((signature.kernel.name, label), {}).setdefault(
            arch, []).append(result)
    archs = list(archs)
    yield f'{"kernel":20}{"dtypes":27}' + ''.join(
        f'{arch:>14}' for arch in archs)
    yield f'{"":47}' + f'{"reg spill   sh":>14}' * len(archs)
    last = ''
    # Other layouts come last, whatever the order they were compiled in.
    for name, label in sorted(rows, key=lambda row: (
            [k.name for k in _kernels.ALL].index(row[0]), row[1])):
        cells = [_cell(rows[name, label].get(arch, [])) for arch in archs]
        shown = '' if name == last else name
        yield f'{shown:20}{label:27}' + ''.join(cells)
        last = name


def _cell(results: list[Result]) -> str:
    if not results:
        return f'{"":14}'
    if any(result.error for result in results):
        return f'{"failed":>14}'
    registers, spills, shared = map(max, zip(*[
        (result.registers, result.spills + result.stack, result.shared)
        for result in results]))
    return f'{registers:5}{spills:4}{shared:5}'


def main() -> int:
    parser = argparse.ArgumentParser(
        prog='python -m tests.tools.nvrtc',
        description='Compiles every CUDA kernel; no device is needed.')
    parser.add_argument(
        '--arch', nargs='+', default=ARCHS, metavar='sm_XX',
        help='architectures to compile for; default: ' + ' '.join(ARCHS))
    archs = parser.parse_args().arch
    try:
        cp = load()
    except Unavailable as e:
        print(e, file=sys.stderr)
        return 2
    start = time.perf_counter()
    chosen = cases(archs=archs)
    print('CuPy {}, NVRTC {}.{}: registers of a thread, bytes spilled, bytes '
          'shared'.format(cupy.__version__, *cp.version))
    results = compile_all(chosen)
    print(*table(results, archs), sep='\n')
    problems = [each for result in results for each in result.problems]
    for problem in problems:
        print('', problem, sep='\n')
    failed = sum(bool(result.problems) for result in results)
    print(f'{len(_kernels.ALL)} kernels x dtypes x {len(LAYOUTS)} layouts, '
          f'{len(results)} compilations, {failed} failed, '
          f'{time.perf_counter() - start:.0f} s')
    return bool(failed)


if __name__ == '__main__':
    sys.exit(main())
