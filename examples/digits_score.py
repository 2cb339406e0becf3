"""A score for generated images: a Frechet distance, as the FID is one.

The features are those of a small classifier of the same images, instead of
the Inception network.  So distances can be compared with each other, but not
with published FIDs.
"""
from __future__ import annotations

from typing import Any, Tuple

import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from digits_data import Images
from rich.table import Table
from sngan_models import ImageShape

N_FEATURES = 32  # few, so that some hundred images suffice for a covariance
MAX_SAMPLES = 2000
Gaussian = Tuple[numpy.ndarray, numpy.ndarray]


class Classifier(chainer.Chain):
    """Images to 10 class scores, through ``N_FEATURES`` features."""

    def __init__(
            self, shape: ImageShape, random: numpy.random.RandomState
    ) -> None:
        super().__init__()
        channels, height, width = shape
        W = chainer.initializers.LeCunNormal(rng=random)
        with self.init_scope():
            self.conv1 = L.Convolution2D(
                channels, 32, 3, pad=1, initialW=W)
            self.conv2 = L.Convolution2D(
                32, 64, 4, stride=2, pad=1, initialW=W)
            self.linear1 = L.Linear(
                64 * (height // 2) * (width // 2), N_FEATURES, initialW=W)
            self.linear2 = L.Linear(N_FEATURES, 10, initialW=W)

    def forward(self, x: Any) -> chainer.Variable:
        return self.linear2(self.features(x))

    def features(self, x: Any) -> chainer.Variable:
        h = F.relu(self.conv1(x))
        h = F.relu(self.conv2(h))
        return F.relu(self.linear1(h))


def train_classifier(
        images: Images, device: chainer.backend.Device,
        iterations: int = 300, batchsize: int = 64
) -> Classifier:
    """Returns a classifier, the same at each run with the same images."""
    random = numpy.random.RandomState(0)
    model = Classifier(images.train.shape[1:], random)
    model.to_device(device)
    optimizer = chainer.optimizers.Adam().setup(model)
    for _ in range(iterations):
        i = random.randint(len(images.train), size=batchsize)
        x, t = device.send((images.train[i], images.train_labels[i]))
        optimizer.update(lambda x, t: F.softmax_cross_entropy(model(x), t),
                         x, t)
    return model


def accuracy(
        model: Classifier, x: numpy.ndarray, labels: numpy.ndarray) -> float:
    """Returns the share of images that are classified correctly."""
    y = _apply(model, model.forward, x)
    return float((y.argmax(axis=1) == labels).mean())


def fit_gaussian(model: Classifier, x: numpy.ndarray) -> Gaussian:
    """Returns mean and covariance of the features of images, in float64."""
    h = _apply(model, model.features, x).astype(numpy.float64)
    return h.mean(axis=0), numpy.cov(h, rowvar=False)


def frechet_distance(p: Gaussian, q: Gaussian) -> float:
    """Returns the squared Frechet distance of two Gaussians.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).  The trace of the root is
    that of (R C2 R)^(1/2) with R = C1^(1/2), a symmetric matrix.  That is
    safe also if C1 and C2 are singular, because a feature is always 0.
    """
    (m1, C1), (m2, C2) = p, q
    w, V = numpy.linalg.eigh(C1)
    R = (V * numpy.sqrt(w.clip(min=0))) @ V.T
    w = numpy.linalg.eigvalsh(R @ C2 @ R)
    trace = numpy.trace(C1) + numpy.trace(C2)
    trace -= 2 * numpy.sqrt(w.clip(min=0)).sum()
    return float(((m1 - m2) ** 2).sum() + trace)


class Scorer:
    """Scores generated images against the held-out ones.

    The classifier is trained once, when this is made.
    """

    def __init__(self, images: Images, device: chainer.backend.Device) -> None:
        self.images = images
        self.model = train_classifier(images, device)
        self.real = fit_gaussian(self.model, images.test)

    def distance(self, x: numpy.ndarray) -> float:
        """Returns the Frechet distance of images to the held-out ones."""
        return frechet_distance(fit_gaussian(self.model, x), self.real)

    def scores(self, samples: dict[str, tuple]) -> dict[str, Any]:
        """Scores each set of images, with labels."""
        images, model = self.images, self.model
        return {
            'n_features': N_FEATURES,
            'n_held_out': len(images.test),
            'accuracy_held_out': accuracy(
                model, images.test, images.test_labels),
            'images': {
                name: {
                    'n': len(x),
                    'frechet_distance': self.distance(x),
                    'accuracy': accuracy(model, x, labels),
                } for name, (x, labels) in samples.items()},
        }


def make_table(scores: dict[str, Any]) -> Table:
    """Returns a table of what ``Scorer.scores`` returns."""
    table = Table(
        title=f'Frechet distance to {scores["n_held_out"]} real, held-out '
              f'images, on {scores["n_features"]} features of a classifier')
    table.add_column('images')
    table.add_column('number', justify='right')
    table.add_column('distance', justify='right')
    table.add_column('in their class, for the classifier', justify='right')
    for name, row in scores['images'].items():
        table.add_row(name, str(row['n']), f'{row["frechet_distance"]:.2f}',
                      f'{row["accuracy"]:.1%}')
    table.add_row('real, held out', str(scores['n_held_out']), '-',
                  f'{scores["accuracy_held_out"]:.1%}')
    return table


def _apply(model: Classifier, function: Any, x: numpy.ndarray) -> Any:
    cpu = chainer.get_device('@numpy')
    with chainer.using_config('train', False), chainer.no_backprop_mode():
        return numpy.concatenate([
            cpu.send(function(model.device.send(x[i:i + 256])).array)
            for i in range(0, len(x), 256)])
