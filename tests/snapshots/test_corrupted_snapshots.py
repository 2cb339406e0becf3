"""A thousand damaged snapshots, through every command.

Each is refused with a message, or does not matter: then the output is that of
the good one.  There is never a traceback, nor a part of a file.
"""
import os
import pathlib
import struct
import zipfile

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import serializers

pytest.importorskip('click')
pytest.importorskip('rich')

from click.testing import CliRunner

from sn_function import SpectralNormalization, _commands

COMMANDS = [
    ['inspect', 'in.npz', '--json'], ['bake', 'in.npz', 'out.npz'],
    ['convert', 'in.npz', 'out.npz', '--to', 'torch'],
    ['convert', 'in.npz', 'out.npz', '--to', 'sngan-projection'],
    ['repair', 'in.npz', 'out.npz', '--all']]
# Of each damage, half of them of a compressed file: 1,008 in all.
N_FILES = 112


def make_good(compressed):
    """The bytes of a good snapshot."""
    chain = chainer.Chain(
        l1=L.Linear(5, 4).add_hook(SpectralNormalization()),
        l2=L.Convolution2D(2, 3, 3).add_hook(SpectralNormalization()),
        bn=L.BatchNormalization(3))
    serializers.save_npz('good.npz', chain, compressed)
    return pathlib.Path('good.npz').read_bytes()


def truncate(data, rng):
    return data[:rng.randint(len(data))]


def flip_bits(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 8])):
        data[rng.randint(len(data))] ^= 1 << rng.randint(8)
    return bytes(data)


def overwrite_a_part(data, rng):
    start = rng.randint(len(data))
    length = min(rng.randint(1, 200), len(data) - start)
    return data[:start] + rng.bytes(length) + data[start + length:]


def remove_a_part(data, rng):
    start = rng.randint(len(data))
    return data[:start] + data[start + rng.randint(1, 100):]


def _rewritten(data, change):
    pathlib.Path('arrays.npz').write_bytes(data)
    with np.load('arrays.npz') as file:
        arrays = dict(file)
    change(arrays)
    np.savez('arrays.npz', **arrays)
    return pathlib.Path('arrays.npz').read_bytes()


SHAPES = [(), (0,), (1,), (3,), (5,), (1, 4), (0, 5), (4, 6), (2, 2, 2, 2)]


def wrong_shape(data, rng):
    def change(arrays):
        key = rng.choice(sorted(arrays))
        arrays[key] = np.ones(SHAPES[rng.randint(len(SHAPES))], 'f')
    return _rewritten(data, change)


def wrong_key(data, rng):
    def change(arrays):
        key = rng.choice(sorted(arrays))
        new = rng.choice(['l1/X', 'l1/u', 'W', 'l2/W_u', 'a.weight_u', '',
                          'l1/W_gamma', 'l1/gamma', '/', '../../etc/x'])
        arrays[str(new)] = arrays.pop(key)
    return _rewritten(data, change)


def wrong_value(data, rng):
    def change(arrays):
        key = rng.choice(sorted(arrays))
        value = [np.nan, np.inf, 0, 1e38, 1e-45][rng.randint(5)]
        arrays[key] = np.full(np.shape(arrays[key]), value, 'f')
    return _rewritten(data, change)


def wrong_type(data, rng):
    def change(arrays):
        key = rng.choice(sorted(arrays))
        array = arrays[key]
        arrays[key] = [
            array.astype('i4'), array.astype('c8'), array.astype('S4'),
            array.astype('U4'), array.astype(object), np.asarray(None),
            array > 0, array.astype('f2'), array.astype('>f8'),
            np.asfortranarray(array)][rng.randint(10)]
    return _rewritten(data, change)


def sizes_in_the_directory(data, rng):
    """Claims other sizes, methods and flags in the list of members."""
    data = bytearray(data)
    positions = []
    at = data.find(b'PK\x01\x02')
    while at >= 0:
        positions.append(at)
        at = data.find(b'PK\x01\x02', at + 1)
    at = positions[rng.randint(len(positions))]
    field, form = [(8, '<H'), (10, '<H'), (16, '<L'), (20, '<L'), (24, '<L'),
                   (28, '<H'), (30, '<H'), (42, '<L')][rng.randint(8)]
    value = rng.randint(1 << 16) if rng.randint(2) else rng.randint(8)
    struct.pack_into(form, data, at + field, value)
    return bytes(data)


DAMAGES = [truncate, flip_bits, overwrite_a_part, remove_a_part, wrong_shape,
           wrong_key, wrong_value, wrong_type, sizes_in_the_directory]
RAW = [truncate, flip_bits, overwrite_a_part, remove_a_part,
       sizes_in_the_directory]


def entries(path):
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        return {name: file.read(name) for name in file.namelist()}


def run(args):
    """Runs a command; returns its exit code and what it made."""
    if os.path.exists('out.npz'):
        os.unlink('out.npz')
    before = set(os.listdir('.'))
    result = CliRunner().invoke(_commands.cli, args)
    assert isinstance(result.exception, (SystemExit, type(None))), (
        args, result.exc_info)
    assert 'Traceback' not in result.output
    new = set(os.listdir('.')) - before
    if result.exit_code == 0:
        assert new == ({'out.npz'} if args[0] != 'inspect' else set())
        return 0, (entries('out.npz') if new else result.output)
    assert new == set(), new
    if result.exit_code == 1:
        assert result.output.startswith('Error: '), result.output
        assert result.output.count('\n') == 1
    else:
        assert (args[0], result.exit_code) == ('inspect', 3)
    return result.exit_code, result.output


@pytest.mark.filterwarnings('ignore:Duplicate name')
# Each takes seconds: two that damage the file, and one that damages an array.
@pytest.mark.parametrize('damage', [
    pytest.param(damage, marks=[] if damage in (
        truncate, remove_a_part, wrong_shape) else pytest.mark.slow)
    for damage in DAMAGES], ids=lambda x: x.__name__)
def test_damaged(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # They are not waited for until they are on the disk.
    monkeypatch.setattr(os, 'fsync', lambda handle: None)
    rng = np.random.RandomState(DAMAGES.index(damage))
    refused = 0
    for compressed in (True, False):
        good = make_good(compressed)
        pathlib.Path('in.npz').write_bytes(good)
        expected = {tuple(args): run(args) for args in COMMANDS}
        assert all(code == 0 for code, _ in expected.values())
        for _ in range(N_FILES // 2):
            pathlib.Path('in.npz').write_bytes(damage(good, rng))
            for args in COMMANDS:
                code, made = run(args)
                refused += code != 0
                if damage in RAW and code == 0:
                    # Whatever was damaged, it is no part of the data.
                    assert made == expected[tuple(args)][1]
    assert refused > 0


OTHER_LAYOUTS = {
    'torch-0.4': {'weight_orig': (4, 5), 'weight_u': (4,), 'weight': (4, 5)},
    'torch-wrapper': {'module.weight_bar': (4, 5), 'module.weight_u': (4,),
                      'module.weight_v': (5,), 'module.bias': (4,)},
    'biggan': {'weight': (4, 5), 'u0': (1, 4), 'sv0': (1,)}}


@pytest.mark.slow
@pytest.mark.parametrize('layout', OTHER_LAYOUTS)
def test_other_layouts(layout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # They are not waited for until they are on the disk.
    monkeypatch.setattr(os, 'fsync', lambda handle: None)
    rng = np.random.RandomState(0)
    np.savez('in.npz', **{
        f'module.l{i}.{name}': rng.normal(size=shape).astype('f')
        for i in range(2) for name, shape in OTHER_LAYOUTS[layout].items()})
    good = pathlib.Path('in.npz').read_bytes()
    assert [run(args)[0] for args in COMMANDS] == [0] * len(COMMANDS)
    refused = 0
    for damage in wrong_shape, wrong_key_of_torch, wrong_value, wrong_type:
        for _ in range(15):
            pathlib.Path('in.npz').write_bytes(damage(good, rng))
            for args in COMMANDS:
                refused += run(args)[0] != 0
    assert refused > 0


def wrong_key_of_torch(data, rng):
    def change(arrays):
        key = rng.choice(sorted(arrays))
        stem = 'module.l0.'
        new = rng.choice([
            'weight', 'u0', 'l.weight_u', stem + 'weight', stem + 'u0',
            stem + 'sv0', stem + 'weight_v', stem + 'weight_orig',
            stem + 'module.weight_bar', stem + 'module.weight_orig', 'module',
            '.', 'module..', '_orig_mod.module.l0.weight_u', 'l0/W_u'])
        arrays[str(new)] = arrays.pop(key)
    return _rewritten(data, change)


@pytest.mark.parametrize('kind', [
    pytest.param('h5', marks=pytest.mark.slow), 'safetensors', 'pt'])
def test_other_kinds(kind, tmp_path, monkeypatch):
    """A .pt has checksums.  The others have none, so what is damaged may be
    taken for data."""
    if kind == 'pt':
        pytest.importorskip('torch')
    monkeypatch.chdir(tmp_path)
    # They are not waited for until they are on the disk.
    monkeypatch.setattr(os, 'fsync', lambda handle: None)
    rng = np.random.RandomState(0)
    make_good(True)
    name = f'in.{kind}'
    layout = 'torch' if kind == 'pt' else 'chainer'
    assert CliRunner().invoke(_commands.cli, [
        'convert', 'good.npz', name, '--to', layout]).exit_code == 0
    good = pathlib.Path(name).read_bytes()
    commands = [[args[0], name, *args[2:]] for args in COMMANDS]
    expected = [run(args) for args in commands]
    assert all(code == 0 for code, _ in expected)
    for damage in truncate, flip_bits, overwrite_a_part, remove_a_part:
        for _ in range(15):
            pathlib.Path(name).write_bytes(damage(good, rng))
            for args, result in zip(commands, expected):
                code, made = run(args)
                assert damage is not truncate or code != 0
                if kind == 'pt' and code == 0:
                    assert made == result[1]
