"""What version 0.1 has pickled or saved goes on with the same numbers.

The files are written by `tests/links/write_pickles.py`.
"""
import pickle
import pickletools

import numpy as np
import pytest
from chainer import serializers

from tests.links.write_pickles import (
    DATA,
    compute,
    input_of,
    make_chain,
)

NAMES = ['link', 'chain', 'lazy link', 'copy']
PICKLE = DATA / 'objects.pickle'


def assert_as_before(name, target):
    if name == 'copy':
        # Its weight is drawn anew, so it does not have the same numbers: that
        # version went on with the old gamma.
        actual = compute(name, target)
        norm = np.linalg.norm(actual['W'].astype('d'), 2)
        assert actual['gamma'] == pytest.approx(norm, rel=2e-2)
        np.testing.assert_allclose(
            actual['y1'], input_of(name) @ actual['W'].T, rtol=2e-2)
        return
    with np.load(DATA / 'expected.npz') as file:
        expected = {key.partition(':')[2]: value
                    for key, value in file.items()
                    if key.startswith(name + ':')}
    actual = compute(name, target)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        np.testing.assert_allclose(
            actual[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize('name', NAMES)
def test_pickles(name):
    objects = pickle.loads(PICKLE.read_bytes())
    assert list(objects) == NAMES
    assert_as_before(name, objects[name])


@pytest.mark.parametrize('name', NAMES)
def test_written_again(name):
    """By this version, and so with its names."""
    objects = pickle.loads(PICKLE.read_bytes())
    assert_as_before(name, pickle.loads(pickle.dumps(objects[name])))


def test_the_hook_of_a_chain_knows_its_hooks():
    chain = pickle.loads(PICKLE.read_bytes())['chain']
    chain.delete_hook('ChainSpectralNormalization')
    assert not any(hasattr(link, 'W_u') or hasattr(link, 'gamma')
                   or link.local_link_hooks for link in chain.links())


def test_snapshot():
    chain = make_chain()
    serializers.load_npz(DATA / 'chain.npz', chain)
    assert_as_before('chain', chain)


def test_the_files_have_the_names_of_version_0_1():
    names = {arg for opcode, arg, _ in pickletools.genops(PICKLE.read_bytes())
             if opcode.name == 'GLOBAL'}
    assert names >= {
        'numpy.core.multiarray _reconstruct',
        'sn_function._state _unpickle',
        'sn_function.chain ChainSpectralNormalization',
        'sn_function.chain _HookOfLink',
        'sn_function.link_hooks SpectralNormalization',
        'sn_function.link_hooks _LargestSingularValue'}
