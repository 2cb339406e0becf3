"""A picture of real and generated images."""
from __future__ import annotations

from typing import Any

import numpy
from digits_data import Images
from matplotlib.figure import Figure  # draws with Agg, needs no display
from sngan_models import N_CLASSES, Generator


def draw(
        images: Images, gen: Generator, noise: Any, title: str, path: str,
        rows: int = 8) -> None:
    """Draws real and generated images side by side, a column a class.

    The title is that of the generated ones.
    """
    labels = numpy.arange(rows * N_CLASSES, dtype=numpy.int32) % N_CLASSES
    real = numpy.stack(
        [images.test[images.test_labels == label][:rows]
         for label in range(N_CLASSES)], axis=1)
    fake = gen.sample(noise[:len(labels)], labels).reshape(real.shape)
    figure = Figure(figsize=(12, 0.6 * rows + 0.4), layout='constrained')
    for i, (text, grid) in enumerate(
            (('real, held out', real), (title, fake))):
        axes = figure.add_subplot(1, 2, i + 1)
        axes.set_title(text)
        axes.axis('off')
        axes.imshow(_tile(grid), cmap='gray_r', vmin=0, vmax=1,
                    interpolation='bicubic')
    figure.savefig(path, dpi=100)


def _tile(grid: numpy.ndarray) -> numpy.ndarray:
    """Makes one image of images (rows, columns, C, H, W) in [-1, 1]."""
    rows, columns, channels, height, width = grid.shape
    pad = height // 8  # around each image, in the color of its background
    grid = numpy.pad(
        grid, [(0, 0)] * 3 + [(pad, pad)] * 2, constant_values=-1)
    grid = grid.transpose(0, 3, 1, 4, 2).reshape(
        rows * (height + 2 * pad), columns * (width + 2 * pad), channels)
    return (grid.squeeze() + 1) / 2
