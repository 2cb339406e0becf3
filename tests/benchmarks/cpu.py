"""The normalization of weights and of whole models, on the CPU.

``python -m tests.benchmarks.cpu`` times it beside Chainer's hook, PyTorch's
and plain compositions, all in turn in one process, and prints tables;
``--out DIR`` keeps them as ``cpu.csv``, ``cpu.md`` and ``cpu.png``.  Set
``OPENBLAS_NUM_THREADS=1`` and ``OMP_NUM_THREADS=1`` for comparable numbers.

Statistics and tables are in :mod:`tests.benchmarks.report`.  PyTorch and
Matplotlib are imported only when they are called for.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import gc
import importlib.metadata
import itertools
import math
import os
import pathlib
import platform
import sys
import time
import tracemalloc
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import link_hooks

from tests.benchmarks.report import (
    DTYPES,
    Budget,
    markdown_table,
    measure,
    number,
    shape_of,
    text_of,
    text_table,
)

# Of the networks below, and one that is square.
SHAPES = (
    '64x3x3x3', '128x64x4x4', '256x128x4x4', '512x256x3x3', '512x512x3x3',
    '1024x1024x3x3', '4096x4096')
# The shapes that all numbers of iterations and all dtypes are measured with.
THOROUGH = slice(0, 5, 2)
N_LAYERS = (1, 2, 4, 8, 16, 32)
SIDES = (64, 128, 256, 512, 1024, 2048, 4096)
LARGE = 16 << 20  # bytes of a weight that takes fewer rounds
THREADS = ('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS')
BUILT_IN = 'Chainer 7.8.1'
NO_HOOK = 'no hook'

Shapes = Sequence[Any]  # of tuples of int


def residual(
        n_in: int, n_out: int, has_shortcut: bool = True
) -> list[tuple[int, ...]]:
    """The weights of a block: two convolutions, and that of the shortcut."""
    n_hidden = max(n_in, n_out)
    shapes: list[tuple[int, ...]] = [
        (n_hidden, n_in, 3, 3), (n_out, n_hidden, 3, 3)]
    return [*shapes, (n_out, n_in, 1, 1)] if has_shortcut else shapes


def resnet(widths: Sequence[int]) -> list[tuple[int, ...]]:
    """A discriminator of blocks; none but the last keeps the width."""
    return [shape for n_in, n_out in zip(widths, widths[1:])
            for shape in residual(n_in, n_out, n_in != n_out)]


# The discriminators.  A block has its wider width between its convolutions.
MODELS: dict[str, list[tuple[int, ...]]] = {
    'SNGAN 32x32': [
        (64, 3, 3, 3), (64, 64, 4, 4), (128, 64, 3, 3), (128, 128, 4, 4),
        (256, 128, 3, 3), (256, 256, 4, 4), (512, 256, 3, 3), (1, 512 * 16)],
    'SNGAN ResNet 64x64': [
        *resnet((3, 64, 128, 256, 512, 1024, 1024)), (1, 1024)],
    'BigGAN 128x128': resnet((3, 96, 192, 384, 768, 1536, 1536)),
}


# The contenders for one weight

class Case(NamedTuple):
    """What is normalized, the vector it starts from, and gY."""

    W: Any
    u: Any
    gY: Any
    n_power_iteration: int = 1


class Contender(NamedTuple):
    """What is timed; ``backward`` takes what ``forward`` returns."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]
    clear: Callable[[], Any]
    is_traced: bool = True

    def step(self) -> Any:
        """Returns the gradient with respect to the weight."""
        self.clear()
        return self.backward(self.forward())


def case_of(
        shape: Sequence[int], dtype: str = 'float32',
        n_power_iteration: int = 1) -> Case:
    """A weight as an initializer makes it."""
    random = np.random.RandomState(0)
    W, u, gY = (random.standard_normal(size).astype(DTYPES[dtype])
                for size in (shape, shape[:1], shape))
    W *= math.sqrt(shape[0] / math.prod(shape))
    return Case(W, u, gY, n_power_iteration)


def differentiated(
        forward: Callable[[], Any], W: chainer.Parameter, gY: Any
) -> Contender:
    def backward(Y: Any) -> Any:
        Y.grad = gY
        Y.backward()
        return W.grad

    return Contender(forward, backward, W.cleargrad)


def hooked(hook: Any, case: Case) -> Contender:
    """Either hook, on a link that has that weight."""
    link = Weight(case.W, case.gY)
    link.add_hook(hook)
    link.W_u[...] = case.u
    return differentiated(
        lambda: hook.normalize_weight(link), link.W, case.gY)


def composition(case: Case) -> Contender:
    """What one writes without a hook; the gradient goes through it all."""
    parameter = chainer.Parameter(case.W)
    state = case.u.copy()

    def unit(x: Any) -> Any:
        return x / F.broadcast_to(F.sqrt(F.sum(x * x)), x.shape)

    def forward() -> Any:
        W = F.reshape(parameter, (len(case.W), -1))
        u = chainer.as_variable(state.copy())
        for _ in range(case.n_power_iteration):
            t = F.matmul(W, unit(F.matmul(u, W)))
            u = unit(t)
        state[...] = u.array
        sigma = F.matmul(u, t)
        return parameter / F.broadcast_to(sigma, parameter.shape)

    return differentiated(forward, parameter, case.gY)


def torch_contender(case: Case) -> Contender:
    """PyTorch's parametrization of a layer that has that weight."""
    import torch

    torch.set_num_threads(1)
    m, n, *ksize = case.W.shape
    kinds: list[Any] = [
        torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d]
    module = kinds[len(ksize)](
        n, m, *[tuple(ksize)][:len(ksize)], bias=False)
    module.weight.data = torch.from_numpy(case.W.copy())
    torch.nn.utils.parametrizations.spectral_norm(
        module, n_power_iterations=case.n_power_iteration)
    W = module.parametrizations.weight.original
    gY = torch.from_numpy(case.gY)

    def backward(Y: Any) -> Any:
        Y.backward(gY)
        return W.grad.numpy()

    def clear() -> None:
        W.grad = None

    return Contender(lambda: module.weight, backward, clear, False)


class Identity(chainer.FunctionNode):
    """A node, and one more for its gradient, as ours has."""

    def forward(self, inputs: Any) -> Any:
        return inputs

    def backward(self, indexes: Any, grad_outputs: Any) -> Any:
        return Identity().apply(grad_outputs)


def identity(case: Case) -> Contender:
    W = chainer.Parameter(case.W)
    return differentiated(lambda: Identity().apply((W,))[0], W, case.gY)


def copy(case: Case) -> Contender:
    target = np.empty_like(case.W)

    def forward() -> Any:
        np.copyto(target, case.W)
        return target

    return Contender(forward, lambda Y: Y, lambda: None)


def why_no_torch() -> str | None:
    try:
        import torch
        return None if torch else 'it is empty'
    except Exception as error:
        return text_of(error)


# What makes each; may raise what it likes.
CONTENDERS: dict[str, Callable[[Case], Contender]] = {
    BUILT_IN: lambda case: hooked(
        link_hooks.SpectralNormalization(case.n_power_iteration), case),
    'exact': lambda case: hooked(sn_function.SpectralNormalization(
        case.n_power_iteration, n_warmup=0), case),
    'detached': lambda case: hooked(sn_function.SpectralNormalization(
        case.n_power_iteration, n_warmup=0, detach_uv=True), case),
    'composition': composition,
    'PyTorch': torch_contender,
    'identity': identity,
    'copy': copy,
}


def makers(case: Case) -> dict[str, Callable[[], Contender]]:
    return {name: functools.partial(make, case)
            for name, make in CONTENDERS.items()
            if name != 'PyTorch' or why_no_torch() is None}


# The contenders for a model

class Use(chainer.FunctionNode):
    """``(x, W) -> x``, whose gradient with respect to W is given."""

    def __init__(self, gY: Any) -> None:
        super().__init__()
        self.gY = gY

    def forward(self, inputs: Any) -> Any:
        self.retain_inputs((1,))  # as a convolution does
        return inputs[0],

    def backward(self, indexes: Any, grad_outputs: Any) -> Any:
        return tuple(grad_outputs[0] if i == 0 else chainer.Variable(self.gY)
                     for i in indexes)


class Weight(L.Linear):
    """A layer without a cost of its own; the hook of a chain takes it."""

    def __init__(self, W: Any, gY: Any) -> None:
        super().__init__(None, len(W), nobias=True)
        self.gY = gY
        with self.init_scope():
            # An array of its own, on memory that others may share.
            self.W = chainer.Parameter(W[...])

    def forward(self, x: Any) -> Any:
        return Use(self.gY).apply((x, self.W))[0]


class Model(chainer.ChainList):
    """Layers one after another."""

    def forward(self, x: Any) -> Any:
        for layer in self:
            x = layer(x)
        return x


def model_contender(
        model: Model, make_hook: Callable[[], Any] | None,
        is_on_chain: bool, is_cached: bool) -> Contender:
    """A step of training: real, fake, the generator's, and one backward."""
    if make_hook is not None:
        for link in [model] if is_on_chain else model:
            link.add_hook(make_hook())
    # Looked up here: what cannot be made is told from what fails.
    scope = (functools.partial(sn_function.cached, model) if is_cached
             else contextlib.nullcontext)
    x = np.zeros((), 'f')

    def forward() -> Any:
        with contextlib.ExitStack() as stack:
            stack.enter_context(scope())
            return sum(model(x) for _ in range(3)), stack.pop_all()

    def backward(loss_and_scope: Any) -> Any:
        loss, stack = loss_and_scope
        with stack:
            loss.backward()
        return [layer.W.grad for layer in model]

    return Contender(forward, backward, model.cleargrads)


def model_makers(shapes: Shapes) -> dict[str, Callable[[], Contender]]:
    # Nothing writes into them, so that models can share them.
    cases = {shape: case_of(shape) for shape in set(shapes)}

    def make(make_hook: Callable[[], Any] | None = None,
             is_on_chain: bool = False, is_cached: bool = False
             ) -> Contender:
        model = Model(*(
            Weight(cases[shape].W, cases[shape].gY) for shape in shapes))
        return model_contender(model, make_hook, is_on_chain, is_cached)

    def ours(**settings: Any) -> Any:
        return sn_function.SpectralNormalization(n_warmup=0, **settings)

    def on_chain(**settings: Any) -> Any:
        return sn_function.ChainSpectralNormalization(n_warmup=0, **settings)

    def detached() -> Any:
        return on_chain(detach_uv=True)

    return {
        NO_HOOK: make,
        BUILT_IN: lambda: make(link_hooks.SpectralNormalization),
        'hook': lambda: make(ours),
        'hook, cached': lambda: make(ours, is_cached=True),
        'chain hook': lambda: make(on_chain, True),
        'chain hook, cached': lambda: make(on_chain, True, True),
        'the same, detached': lambda: make(detached, True, True),
    }


# Measuring

class Row(NamedTuple):
    """A measurement.  Times are of the step, in microseconds.

    Attributes:
        kind: weight, model, layers (their number) or side (of a square).
        ratio: Chainer's median over this one; without that of no hook.
        copies: The median over that of a copy of the weight.
        peak: Bytes at most, above the level before the step.
        kept: Bytes from forward to backward, the normalized weight included.

    """

    kind: str
    name: str
    dtype: str
    K: int
    contender: str
    p20: float = math.nan
    median: float = math.nan
    p80: float = math.nan
    ratio: float = math.nan
    copies: float = math.nan
    peak: float = math.nan
    kept: float = math.nan
    note: str = ''


def time_on_host(
        step: Callable[[], Any], n: int) -> tuple[float, float]:
    """Seconds of one of ``n`` calls, without the collector of garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(n):
            step()
        seconds = (time.perf_counter() - start) / n
    finally:
        if was_enabled:
            gc.enable()
    return seconds, seconds


def memory_of(contender: Contender) -> tuple[float, float]:
    """Bytes of a step: at most, and from forward to backward.

    Of the first step: later ones may use memory again.
    """
    if not contender.is_traced:
        return math.nan, math.nan
    # NumPy reports its arrays to tracemalloc, beside Python's objects.
    # It does not count what was there before it was started.
    contender.clear()
    tracemalloc.start()
    try:
        Y = contender.forward()
        kept, _ = tracemalloc.get_traced_memory()
        contender.backward(Y)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak, kept


def checked(make: Callable[[], Contender]) -> Contender:
    """Makes a contender, which must be up to it."""
    contender = make()
    gW = contender.step()
    for g in gW if isinstance(gW, list) else [gW]:
        if not np.isfinite(g).all():
            raise FloatingPointError('its gradient is not finite')
    return contender


def measured(
        to_make: dict[str, Callable[[], Contender]], nbytes: int,
        n_rounds: int, seconds: float = 0.02) -> dict[str, dict[str, Any]]:
    """The numbers of each, or ``error``, and ``peak`` and ``kept``."""
    made, found = {}, {}
    for name, make in to_make.items():
        try:
            made[name] = checked(make)
        except Exception as error:
            found[name] = {'error': text_of(error)}
    gc.collect()
    is_large = nbytes > LARGE
    found.update(measure(
        {name: contender.step for name, contender in made.items()},
        time_on_host, Budget(math.inf),
        min(n_rounds, max(7, n_rounds // 4)) if is_large else n_rounds,
        seconds, 1 if is_large else 3))
    for name in list(made):
        del made[name]
        found[name]['peak'], found[name]['kept'] = memory_of(to_make[name]())
    return {name: found[name] for name in to_make}


def rows_of(
        kind: str, name: str, dtype: str, K: int,
        found: dict[str, dict[str, Any]]) -> list[Row]:
    def median(contender: str, default: float = math.nan) -> float:
        return found.get(contender, {}).get('wall', {}).get('median', default)

    nothing = median(NO_HOOK, 0.0)
    rows = []
    for contender, numbers in found.items():
        row = Row(kind, name, dtype, K, contender)
        if 'error' in numbers:
            rows.append(row._replace(note=numbers['error']))
            continue
        net = median(contender) - nothing
        rows.append(row._replace(
            **numbers['wall'], peak=numbers['peak'], kept=numbers['kept'],
            ratio=(median(BUILT_IN) - nothing) / net if net > 0 else math.nan,
            copies=median(contender) / median('copy')))
    return rows


def nbytes_of(shapes: Shapes, dtype: str = 'float32') -> int:
    return (sum(map(math.prod, shapes))
            * np.dtype(DTYPES[dtype]).itemsize)


def weight_rows(
        kind: str, name: str, shape: tuple[int, ...], dtype: str, K: int,
        n_rounds: int) -> list[Row]:
    return rows_of(kind, name, dtype, K, measured(
        makers(case_of(shape, dtype, K)), nbytes_of([shape], dtype),
        n_rounds))


def model_rows(
        kind: str, name: str, shapes: Shapes, n_rounds: int) -> list[Row]:
    return rows_of(kind, name, 'float32', 1, measured(
        model_makers(shapes), nbytes_of(shapes), n_rounds))


def measurements(args: argparse.Namespace) -> Iterator[list[Row]]:
    """All rows; what is printed as one table comes at once."""
    for shape in args.shapes:
        is_thorough = shape in args.shapes[THOROUGH]
        for i, dtype in enumerate(args.dtypes):
            for j, K in enumerate(args.iterations):
                if i == j == 0 or (is_thorough and not (i and j)):
                    yield weight_rows(
                        'weight', shape, shape_of(shape), dtype, K,
                        args.rounds)
    for name in args.models:
        yield model_rows('model', name, MODELS[name], args.rounds)
    yield [row for n in (N_LAYERS[:3] if args.quick else N_LAYERS)
           for row in model_rows(
               'layers', str(n), [(64, 64, 3, 3)] * n, args.rounds)]
    yield [row for side in (SIDES[:2] if args.quick else SIDES)
           for row in weight_rows(
               'side', str(side), (side, side), 'float32', 1, args.rounds)]


# Tables

WEIGHT_HEADER = (
    'contender', 'median us', '20 to 80 %', 'Chainer over it', 'copies',
    'peak MiB', 'peak / W', 'kept MiB', 'kept / W')
MODEL_HEADER = (
    'contender', 'step ms', '20 to 80 %', 'minus no hook', 'Chainer over it',
    'peak MiB', 'kept MiB')
GROWTH = {
    'layers': 'Models of layers of 64x64x3x3: us of a step',
    'side': 'Square weights: us of forward and backward'}


def spread(row: Row, unit: float = 1.0) -> str:
    if math.isnan(row.median):
        return 'n/a'
    return f'{number(row.p20 / unit)} to {number(row.p80 / unit)}'


def weight_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    nbytes = nbytes_of([shape_of(rows[0].name)], rows[0].dtype)
    return [(row.contender, number(row.median), spread(row),
             *map(number, (row.ratio, row.copies,
                           row.peak / 2 ** 20, row.peak / nbytes,
                           row.kept / 2 ** 20, row.kept / nbytes)))
            for row in rows]


def model_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    nothing = next(row.median for row in rows if row.contender == NO_HOOK)
    return [(row.contender, number(row.median / 1e3), spread(row, 1e3),
             'n/a' if row.contender == NO_HOOK
             else number((row.median - nothing) / 1e3),
             *map(number, (row.ratio, row.peak / 2 ** 20, row.kept / 2 ** 20)))
            for row in rows]


def growth_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One line for each contender, one column for each size."""
    return [(contender, *(number(row.median) for row in rows
                          if row.contender == contender))
            for contender in dict.fromkeys(row.contender for row in rows)]


def section(rows: Sequence[Row]) -> tuple[str, Any, Any]:
    """Title, header and cells of a table."""
    first = rows[0]
    if first.kind == 'weight':
        return (f'{first.name}, {first.dtype}, K = {first.K}', WEIGHT_HEADER,
                weight_cells(rows))
    if first.kind == 'model':
        shapes = MODELS[first.name]
        return (f'{first.name}: a step of {len(shapes)} weights, '
                f'{number(nbytes_of(shapes) / 2 ** 20)} MiB',
                MODEL_HEADER, model_cells(rows))
    names = dict.fromkeys(row.name for row in rows)
    return GROWTH[first.kind], ('contender', *names), growth_cells(rows)


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each table."""
    def key(row: Row) -> tuple[Any, ...]:
        return ((row.kind,) if row.kind in GROWTH
                else (row.kind, row.name, row.dtype, row.K))

    return [list(group) for _, group in itertools.groupby(rows, key)]


def missing(rows: Sequence[Row]) -> list[str]:
    """What could not be measured, and why; each reason once."""
    where: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            where.setdefault(f'{row.contender}: {row.note}', []).append(
                f'{row.name} {row.dtype}, K = {row.K}'
                if row.kind == 'weight' else
                f'{row.kind} {row.name}')
    lines = [f'{what} ({"; ".join(places)})'
             for what, places in where.items()]
    reason = why_no_torch()
    return lines if reason is None else [*lines, f'PyTorch: {reason}']


LEGEND = (
    'Forward and backward of the normalization alone, one thread, contenders '
    'in turn in one process: medians and 20/80 percentiles. "exact" and '
    '"detached" are this package\'s hook, the latter with `detach_uv=True`; '
    '"composition" is the same out of Chainer\'s functions; "identity" is a '
    'node that does nothing, with one for its gradient; "copy" copies the '
    'weight. "Chainer over it" is the time of Chainer\'s hook over that of '
    'the contender. "copies" is the time in copies. "peak" is what a step '
    'takes at most, "kept" what it keeps from forward to backward: both of a '
    'first step, with the normalized weight and with Python\'s objects, and '
    'also in weights; what PyTorch takes is not seen. A step of a model calls '
    'it three times (real, fake, the generator\'s) and backward once, with '
    'layers that cost nothing; "cached" is in `sn_function.cached(model)`, '
    'and "chain hook" is one `ChainSpectralNormalization` on the model.')


def as_markdown(rows: Sequence[Row], command: str) -> str:
    blocks = ['# The normalization on a CPU', f'{machine()}. `{command}`',
              LEGEND]
    for group in groups(rows):
        title, header, cells = section(group)
        blocks += [f'## {title}', markdown_table(header, cells)]
    lines = missing(rows)
    if lines:
        blocks += ['## Not measured', '\n'.join(f'* {x}' for x in lines)]
    return '\n\n'.join(blocks) + '\n'


def write_csv(path: pathlib.Path, rows: Sequence[Row]) -> None:
    with path.open('w', encoding='utf-8', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow([
            {'peak': 'peak bytes', 'kept': 'retained bytes'}.get(name, name)
            for name in Row._fields])
        for row in rows:
            writer.writerow([
                '' if x != x else f'{x:.6g}' if isinstance(x, float) else x
                for x in row])


def draw(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Time over the number of layers and over the side of a weight."""
    from matplotlib.figure import Figure  # without pyplot it draws with Agg

    figure = Figure(figsize=(11, 4.5), dpi=100)
    for axes, (kind, title) in zip(figure.subplots(1, 2), GROWTH.items()):
        of_kind = [row for row in rows if row.kind == kind]
        for name in dict.fromkeys(row.contender for row in of_kind):
            points = [(int(row.name), row.median) for row in of_kind
                      if row.contender == name and row.median == row.median]
            if points:
                axes.plot(*zip(*points), marker='o', markersize=3, label=name)
        axes.set_xscale('log', base=2)
        axes.set_yscale('log')
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(kind)
        axes.set_ylabel('us')
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path)


# The run

def machine() -> str:
    """What the numbers were measured on, and with, in one line."""
    versions = {
        'Python': platform.python_version(), 'NumPy': np.__version__,
        'Chainer': chainer.__version__,
        'sn_function': sn_function.__version__}
    for name, package in (('SciPy', 'scipy'), ('PyTorch', 'torch')):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(package)
    return ', '.join([
        platform.machine(), *map(' '.join, versions.items()),
        *(f'{name}={os.environ.get(name, "")}' for name in THREADS)])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='few of all')
    parser.add_argument('--shapes', nargs='*', help='e.g. 64x3x3x3')
    parser.add_argument('--models', nargs='*', choices=MODELS)
    parser.add_argument(
        '--iterations', nargs='+', type=int,
        help='the first for all shapes, the others for some')
    parser.add_argument(
        '--dtypes', nargs='+', choices=DTYPES, default=list(DTYPES),
        help='likewise')
    parser.add_argument('--rounds', type=int, help='number of times each')
    parser.add_argument('--out', type=pathlib.Path, help='folder of results')
    args = parser.parse_args(argv)
    for name, value in {
            'shapes': list(SHAPES[:2] if args.quick else SHAPES),
            'models': list(MODELS)[:1 if args.quick else None],
            'iterations': [1, 2] if args.quick else [1, 2, 5],
            'rounds': 3 if args.quick else 30}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if any(os.environ.get(name) != '1' for name in THREADS):
        print(f'Set {" and ".join(THREADS)} to 1: threads of BLAS make the '
              f'times vary.', file=sys.stderr)
    print(machine())
    rows: list[Row] = []
    for group in measurements(args):
        title, header, cells = section(group)
        print(f'\n== {title}\n{text_table(header, cells)}', flush=True)
        rows += group
    for line in missing(rows):
        print(f'* {line}')
    if args.out is None:
        return
    options = sys.argv[1:] if argv is None else argv
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / 'cpu.csv', rows)
    (args.out / 'cpu.md').write_text(as_markdown(rows, ' '.join(
        ['python -m tests.benchmarks.cpu', *options])), encoding='utf-8')
    try:
        draw(args.out / 'cpu.png', rows)
    except ImportError as error:
        print(f'cpu.png is not drawn: {text_of(error)}', file=sys.stderr)


if __name__ == '__main__':
    main()
