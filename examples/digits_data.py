"""The image sets of the example: scikit-learn's digits, MNIST and CIFAR-10."""
from __future__ import annotations

import socket
from typing import Callable, NamedTuple

import chainer
import numpy
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NAMES = ('digits', 'mnist', 'cifar10')
TIMEOUT = 30  # seconds without an answer from a server


class Images(NamedTuple):
    """Images (N, C, H, W), float32 in [-1, 1], with labels (N,), int32."""

    train: numpy.ndarray
    train_labels: numpy.ndarray
    test: numpy.ndarray
    test_labels: numpy.ndarray


class DatasetUnavailableError(RuntimeError):

    def __init__(self, name: str, cause: Exception) -> None:
        super().__init__(
            f'Cannot get the dataset {name!r}: {type(cause).__name__}: '
            f'{cause}. It is downloaded once, by '
            f'chainer.datasets.get_{name}(), and kept below '
            f'{chainer.dataset.get_dataset_root()} (the environment variable '
            f'CHAINER_DATASET_ROOT moves it), where it was not found. Run '
            f'this again with a network connection, copy that directory from '
            f'a machine that has the dataset, or use --dataset digits, which '
            f'comes with scikit-learn.')


def load(name: str) -> Images:
    """Returns the training and the held-out images of a dataset.

    Raises:
        DatasetUnavailableError: The dataset is not on this machine and cannot
            be downloaded.
    """
    if name == 'digits':
        return _load_digits()
    return _download(name, getattr(chainer.datasets, f'get_{name}'))


def _load_digits() -> Images:
    digits = load_digits()
    images = (digits.images[:, None] / 8 - 1).astype(numpy.float32)  # 0..16
    labels = digits.target.astype(numpy.int32)
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=1 / 3, stratify=labels, random_state=0)
    return Images(train, train_labels, test, test_labels)


def _download(name: str, get: Callable) -> Images:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # Chainer's download has none
    try:
        train, test = get(ndim=3, scale=2.)
    # OSError: URLError, time-outs, directories that cannot be written to.
    # RuntimeError: Chainer, where it cannot make its directory.
    except (OSError, RuntimeError) as e:
        raise DatasetUnavailableError(name, e) from e
    finally:
        socket.setdefaulttimeout(timeout)
    return Images(*_unzip(train), *_unzip(test))


def _unzip(dataset: chainer.dataset.DatasetMixin) -> tuple:
    images, labels = chainer.dataset.concat_examples(dataset[:])
    return images - 1, labels
