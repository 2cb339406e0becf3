"""The picture that ``SpectralNormReport`` draws."""
from __future__ import annotations

import json
import math
import os
import time
import warnings
from typing import Any, Sequence

import chainer
from chainer import utils

from sn_function.errors import SpectralNormalizationWarning

# What the panels may show, with their labels: sigma, and beside it the first
# of the others that was reported.
PANELS = {
    'sigma': ('Raw weights', 'largest singular value'),
    'norm': ('Weights as the layers use them', 'largest singular value'),
    'certified_norm': ('Norms of the layers as maps', 'certified bound'),
    'residual': ('Residuals of the estimates', 'residual, relative to sigma'),
}
STYLES = ('-', '--', ':', '-.')
# Ticks within a power of ten.  The key is a ratio of the largest value to the
# smallest; the first one that is exceeded counts.
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


class Picture:
    """A file that shows all that has been reported so far.

    At most a tenth of the time goes into drawing it.  What was reported
    meanwhile is drawn later.

    Args:
        filename: Its name in the directory of the output, or ``None`` for no
            picture.

    Attributes:
        history: One dictionary for each report, as in :func:`draw`.

    """

    def __init__(self, filename: str | None) -> None:
        self.history: list[dict[str, float]] = []
        self.filename = filename
        self._path: str | None = None  # of a picture that is due
        self._rest_until = -math.inf

    def add(
            self, directory: str, iteration: int, values: dict[str, float],
    ) -> None:
        """Adds a report, and draws if it is time to."""
        if self.filename is None:
            return
        self.history.append(dict(values, iteration=iteration))
        self._path = os.path.join(directory, self.filename)
        if time.perf_counter() >= self._rest_until:
            self.draw()

    def draw(self) -> None:
        """Draws what was reported since the last time, if anything."""
        if self._path is None:
            return
        start = time.perf_counter()
        draw(self.history, self._path)
        self._path = None
        end = time.perf_counter()
        self._rest_until = end + 9 * (end - start)

    def serialize(self, serializer: Any) -> None:
        """Saves or loads the history."""
        if isinstance(serializer, chainer.Serializer):
            serializer('_history', json.dumps(self.history))
            return
        try:
            history = serializer('_history', '')
        except KeyError:  # a snapshot of a run without this extension
            return
        self.history = json.loads(str(history) or '[]')


def draw(
        history: Sequence[dict[str, float]], path: str) -> None:
    """Plots what was reported against iterations, and writes a PNG.

    Args:
        history: One dictionary for each report, with ``'iteration'`` and
            what was reported under ``'sigma/NAME'``, ``'norm/NAME'`` and so
            on.
        path: The file, which is replaced once the new one is complete.

    """
    from matplotlib.figure import Figure  # draws with Agg, needs no display

    panels, names = _contents(history)
    width = 4.6 * len(panels)
    figure = Figure(figsize=(width, max(3.6, 0.19 * len(names) + 0.6)))
    for i, key in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        _draw_panel(axes, history, key, names)
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


def _contents(
        history: Sequence[dict[str, float]]) -> tuple[list[str], list[str]]:
    """Returns the keys of the panels, and the names of the layers."""
    keys = [key.split('/', 1) for entry in history for key in entry
            if '/' in key]
    found = {kind for kind, _ in keys}
    names = list(dict.fromkeys([name for _, name in keys]))  # in their order
    second = [key for key in PANELS if key in found - {'sigma'}][:1]
    return ['sigma', *second], names


def _draw_panel(
        axes: Any, history: Sequence[dict[str, float]], key: str,
        names: Sequence[str]) -> None:
    title, label = PANELS[key]
    axes.set_title(title, fontsize=11)
    axes.set_xlabel('iteration')
    axes.set_ylabel(label)
    for name, style in zip(names, _styles(len(names), len(history))):
        x, y = _points(history, key, name)
        axes.plot(x, y, label=name, **style)
    _scale(axes, key)


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
    """Chooses the scale of y, makes its ticks plain numbers, adds a grid."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    values = [y for line in axes.lines for y in line.get_ydata()
              if 0 < y < float('inf')]
    ratio = max(values) / min(values) if values else 1
    if key.endswith('norm'):
        axes.axhline(1, color='0.6', linewidth=0.8, zorder=0)
    if ratio > 1.5:
        axes.set_yscale('log')
    if 1.5 < ratio < 1000:  # beyond that, powers of ten are enough
        axes.yaxis.set_major_locator(LogLocator(subs=next(
            subs for least, subs in TICKS.items() if ratio > least)))
        axes.yaxis.set_minor_locator(LogLocator(subs=()))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:g}'))
    axes.grid(alpha=0.3)
    axes.spines['top'].set_visible(False)
    axes.spines['right'].set_visible(False)


def _styles(n_lines: int, n_points: int) -> list[dict[str, Any]]:
    """Returns styles of lines: colours by order, dashes by neighbours."""
    from matplotlib import cm

    common: dict[str, Any] = {'linewidth': 1.4}
    if n_points <= 25:  # more markers would hide the lines
        common.update(marker='.', markersize=5)
    return [
        dict(common, color=cm.viridis(0.9 * i / max(1, n_lines - 1)),
             linestyle=STYLES[i % len(STYLES)] if n_lines > 6 else '-')
        for i in range(n_lines)]
