"""The picture that ``SpectralNormReport`` draws."""
from __future__ import annotations

import os
import warnings
from typing import Any, Sequence

from chainer import utils

from sn_function.errors import SpectralNormalizationWarning

# What the panels may show, with their labels; the second is the first one of
# the others that there is.
PANELS = {
    'sigma': ('Raw weights', 'largest singular value'),
    'norm': ('Weights as the layers use them', 'largest singular value'),
    'residual': ('Residuals of the estimates', 'residual, relative to sigma'),
}
STYLES = ('-', '--', ':', '-.')
# Within a power of ten, by the least ratio of the largest value to the least.
TICKS = {
    30: (1, 3), 6: (1, 2, 5), 0: (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)}


def is_available() -> bool:
    """Whether there is Matplotlib; warns where there is none."""
    try:
        import matplotlib.figure
    except ImportError:
        warnings.warn(
            'Matplotlib is not installed, so sigma will be reported but not '
            'plotted. Install it with: pip install matplotlib',
            SpectralNormalizationWarning, stacklevel=3)
        return False
    return matplotlib.figure is not None


def draw(
        history: Sequence[dict[str, float]], path: str) -> None:
    """Draws what was reported, over iterations, and writes it as a PNG.

    Args:
        history: One dictionary for each report, with ``'iteration'`` and
            what was reported under ``'sigma/NAME'``, ``'norm/NAME'`` and so
            on.
        path: The file, which is replaced when the new one is complete.

    """
    from matplotlib.figure import Figure  # draws with Agg, needs no display

    keys = [key.split('/', 1) for entry in history for key in entry
            if '/' in key]
    found = {kind for kind, _ in keys}
    names = list(dict.fromkeys([name for _, name in keys]))  # in their order
    second = [key for key in ('norm', 'residual') if key in found][:1]
    panels = ['sigma', *second]
    width = 4.6 * len(panels)
    figure = Figure(figsize=(width, max(3.6, 0.19 * len(names) + 0.6)))
    for i, key in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        title, label = PANELS[key]
        axes.set_title(title, fontsize=11)
        axes.set_xlabel('iteration')
        axes.set_ylabel(label)
        for name, style in zip(names, _styles(len(names), len(history))):
            x, y = _points(history, key, name)
            axes.plot(x, y, label=name, **style)
        _scale(axes, key)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.tight_layout(w_pad=2)
    # Beside the panels, however long the names are.
    legend = figure.legend(
        handles, labels, loc='center left', bbox_to_anchor=(1, 0.5),
        fontsize=9, frameon=False)
    with utils.tempdir(
            prefix='sigma', dir=os.path.dirname(path) or '.') as directory:
        temporary = os.path.join(directory, 'sigma.png')
        figure.savefig(temporary, dpi=150, format='png', bbox_inches='tight',
                       bbox_extra_artists=(legend,))
        os.replace(temporary, path)


def _points(
        history: Sequence[dict[str, float]], key: str, name: str,
) -> tuple[list[float], list[float]]:
    x, y = [], []
    for entry in history:
        value = entry.get(f'{key}/{name}')
        if value is None and key == 'sigma':  # of a layer without a hook
            value = entry.get(f'true_sigma/{name}')
        if value is not None:
            x.append(entry['iteration'])
            y.append(value)
    return x, y


def _scale(axes: Any, key: str) -> None:
    """Chooses the scale of y, with ticks that are plain numbers, and a grid.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator

    values = [y for line in axes.lines for y in line.get_ydata()
              if 0 < y < float('inf')]
    ratio = max(values) / min(values) if values else 1
    if key == 'norm':
        axes.axhline(1, color='0.6', linewidth=0.8, zorder=0)
    if ratio > 1.5:
        axes.set_yscale('log')
    if 1.5 < ratio < 1000:  # else the powers of ten are enough
        axes.yaxis.set_major_locator(LogLocator(subs=next(
            subs for least, subs in TICKS.items() if ratio > least)))
        axes.yaxis.set_minor_locator(LogLocator(subs=()))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:g}'))
    axes.grid(alpha=0.3)
    axes.spines['top'].set_visible(False)
    axes.spines['right'].set_visible(False)


def _styles(n_lines: int, n_points: int) -> list[dict[str, Any]]:
    """Styles of lines: colours by their order, and neighbours dashed apart."""
    from matplotlib import cm

    common: dict[str, Any] = {'linewidth': 1.4}
    if n_points <= 25:  # more of them would hide the lines
        common.update(marker='.', markersize=5)
    return [
        dict(common, color=cm.viridis(0.9 * i / max(1, n_lines - 1)),
             linestyle=STYLES[i % len(STYLES)] if n_lines > 6 else '-')
        for i in range(n_lines)]
