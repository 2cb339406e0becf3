"""The spectral norm of each layer: measured, logged, plotted, in a table."""
from __future__ import annotations

from typing import Iterator, NamedTuple

import chainer
import numpy
from chainer import training
from matplotlib.figure import Figure  # draws with Agg, needs no display
from rich.table import Table

from sn_function import functions

TOLERANCE = 0.01


class Sigma(NamedTuple):
    """What is measured of a layer.

    ``estimate`` is the hook's estimate of the raw weight's largest singular
    value, by one power iteration from the stored vector, ``None`` without a
    hook.  ``norm`` is the true largest singular value, by SVD in float64, of
    the weight that the layer computes with.
    """

    name: str
    shape: tuple[int, ...]
    estimate: float | None
    norm: float

    @property
    def error(self) -> float:
        return abs(self.norm - 1)


def measure(model: chainer.Chain) -> Iterator[Sigma]:
    """Measures the linear and convolution layers, and embeddings, of a model.

    The vectors of the hooks are used and not moved on.
    """
    for name, link in model.namedlinks():
        if not hasattr(link, 'W'):
            continue
        estimate, W = None, link.W
        # Both Chainer's hook and this package's have these attributes.
        for hook in link.local_link_hooks.values():
            with chainer.using_config('train', False), \
                    chainer.no_backprop_mode():
                W = hook.normalize_weight(link)
                estimate = float(functions.spectral_norm(
                    link.W, getattr(link, hook.vector_name),
                    axis=hook.axis).array)
        W = chainer.get_device('@numpy').send(W.array)
        yield Sigma(name.lstrip('/'), W.shape, estimate, _norm(W))


def _norm(W: numpy.ndarray) -> float:
    if not numpy.isfinite(W).all():
        return numpy.nan  # of which there is no SVD
    matrix = W.reshape(len(W), -1).astype(numpy.float64)
    return float(numpy.linalg.svd(matrix, compute_uv=False)[0])


class SigmaReport(training.Extension):
    """Reports ``sigma/layer`` and, with a hook, ``norm/layer``.

    ``sigma`` is the largest singular value of the raw weight: the hook's
    estimate, or the true value without a hook.  ``norm`` is the true one of
    the normalized weight.
    """

    priority = training.PRIORITY_WRITER

    def __init__(self, model: chainer.Chain) -> None:
        self.model = model

    def __call__(self, trainer: training.Trainer) -> None:
        for layer in measure(self.model):
            if layer.estimate is None:
                chainer.report({f'sigma/{layer.name}': layer.norm})
            else:
                chainer.report({f'sigma/{layer.name}': layer.estimate,
                                f'norm/{layer.name}': layer.norm})


def plot(log: list[dict[str, float]], path: str) -> None:
    """Draws what ``SigmaReport`` has put into the log of a ``LogReport``."""
    panels = [('sigma', 'Raw weight', 'largest singular value')]
    if any(key.startswith('norm/') for entry in log for key in entry):
        panels.append(('norm', 'Normalized weight', 'true norm, minus 1'))
    figure = Figure(figsize=(5.5 * len(panels), 4.5))
    for i, (prefix, title, label) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        axes.set(title=title, xlabel='iteration', ylabel=label)
        axes.grid(alpha=0.3)
        names = sorted({key.split('/', 1)[1] for entry in log
                        for key in entry if key.startswith(prefix + '/')})
        for name in names:
            points = [(entry['iteration'], entry[f'{prefix}/{name}'])
                      for entry in log if f'{prefix}/{name}' in entry]
            x, y = numpy.array(points).T
            if prefix == 'norm':
                y = y - 1
            axes.plot(x, y, marker='.', label=name)
        if prefix == 'norm':
            axes.axhspan(-TOLERANCE, TOLERANCE, color='0.9',
                         label=f'within {TOLERANCE:.0%} of 1')
            axes.margins(y=0.2)
        else:
            axes.set_ylim(bottom=0)
    # One legend for all panels: the last has all the entries.
    handles, labels = axes.get_legend_handles_labels()
    # Neither `ncols` nor 'outside lower center': Matplotlib 3.5, the last for
    # NumPy 1.17 to 1.19, has none of them.
    figure.legend(handles, labels, loc='lower center', ncol=len(labels))
    figure.suptitle('Spectral norm of the discriminator\'s layers')
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=120)


def make_table(layers: list[Sigma]) -> Table:
    """Returns the table that is printed at the end."""
    hooked = any(layer.estimate is not None for layer in layers)
    of = 'normalized weight' if hooked else 'weight'
    table = Table(title='Spectral norm of the discriminator\'s layers')
    table.add_column('layer')
    table.add_column('weight shape')
    table.add_column('sigma, estimated', justify='right')
    table.add_column(f'sigma of {of}, float64 SVD', justify='right')
    table.add_column('relative error', justify='right')
    for layer in layers:
        estimated = layer.estimate is not None
        table.add_row(
            layer.name, str(layer.shape),
            f'{layer.estimate:.5f}' if estimated else '-',
            f'{layer.norm:.6f}',
            f'{layer.error:.2e}' if estimated else '-')
    return table


def verdict(layers: list[Sigma]) -> str:
    """Returns one sentence on the table: whether the norms are 1."""
    hooked = [layer for layer in layers if layer.estimate is not None]
    if not hooked:
        return 'No layer is normalized.'
    bad = [layer.name for layer in hooked
           if not layer.error <= TOLERANCE]  # NaN is bad, too
    if bad:
        return (f'Warning: the norm of {", ".join(bad)} is off from 1 by more '
                f'than {TOLERANCE:.0%}.')
    return (f'The norms of all {len(hooked)} normalized weights are within '
            f'{TOLERANCE:.0%} of 1.')
