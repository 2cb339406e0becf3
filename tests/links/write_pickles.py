"""Writes pickles and a snapshot of hooked links, and what these compute.

    PYTHONPATH=<a checkout of version 0.1> python tests/links/write_pickles.py

`tests/links/test_pickles.py` reads them with the version at hand.  They are
written as NumPy 1 does, which NumPy 2 reads, too.
"""
import sn_function  # isort: skip  # before chainer, which it repairs

import copy
import pathlib
import pickle

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import serializers

DATA = pathlib.Path(__file__).parent / 'data'


def make_link(n_in=5):
    return L.Linear(n_in, 6).add_hook(
        sn_function.SpectralNormalization(use_gamma=True))


def make_chain():
    """With both output axes, and a lazy link until the first call."""
    return chainer.Sequential(
        L.Convolution2D(2, 3, 2), F.tanh, L.Deconvolution2D(3, 4, 2), F.tanh,
        L.Linear(None, 6)).add_hook(sn_function.ChainSpectralNormalization(
            use_gamma=True, n_power_iteration=2))


def input_of(name):
    shape = (2, 2, 4, 4) if name == 'chain' else (2, 5)
    return np.random.RandomState(1).normal(size=shape).astype('f')


def make():
    """The objects, by name."""
    np.random.seed(0)
    objects = {'link': make_link(), 'chain': make_chain()}
    for name, target in objects.items():
        target(input_of(name))
    objects['lazy link'] = make_link(None)
    # It remembers the weight, which may be initialized again.
    objects['copy'] = copy.deepcopy(objects['link'])
    return objects


def compute(name, target):
    """Results of two calls, with the parameters and vectors after them."""
    np.random.seed(2)
    if name == 'copy':
        target.W.array[...] = np.random.normal(size=target.W.shape)
    results = {f'y{i}': target(input_of(name)).array for i in range(2)}
    state = serializers.DictionarySerializer()
    state.save(target)
    return dict(results, **{
        key: np.array(value) for key, value in state.target.items()})


def main():
    objects = make()
    written = pickle.dumps(objects, protocol=2)
    (DATA / 'objects.pickle').write_bytes(written.replace(
        b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n'))
    serializers.save_npz(DATA / 'chain.npz', objects['chain'])
    np.savez_compressed(DATA / 'expected.npz', **{
        f'{name}:{key}': value for name, target in objects.items()
        for key, value in compute(name, target).items()})


if __name__ == '__main__':
    main()
