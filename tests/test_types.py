"""What type checkers make of the public names in the code of a user."""
import importlib.util
import inspect
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from chainer import serializers

import sn_function
from tests import user_code

needs_mypy = pytest.mark.skipif(
    importlib.util.find_spec('mypy') is None, reason='mypy is not installed')

ROOT = pathlib.Path(__file__).resolve().parents[1]
CODE = '''
from typing import Tuple
import numpy as np
from chainer import Variable
from chainer import links as L
import sn_function
from sn_function import functions as F

W, u = np.ones((3, 4), 'f'), np.ones(3, 'f')
flag = bool(W.size)

a: Variable = sn_function.spectral_normalize(W, u)
b = F.spectral_normalize(W, u).array
c = F.spectral_normalize(W, u, return_sigma=False).array
d = F.spectral_norm(W, u).array
e: Tuple[Variable, Variable] = F.spectral_normalize(W, u, return_sigma=True)
f = e[1].array
g: Tuple[Variable, ...] = F.spectral_normalize_all([W], [u])
Ys, sigmas = F.spectral_normalize_all([W], [u], return_sigma=True)
h = Ys[0].array, sigmas[0].array
hook = sn_function.SpectralNormalization(use_gamma=True, cap=None)
C, x_0 = np.ones((3, 4, 3, 3), 'f'), np.ones((4, 8, 8), 'f')
k = F.conv_spectral_normalize(C, x_0, 1, (1, 1)).array
m, n = F.conv_spectral_normalize(C, x_0, pad=1, return_sigma=True)
layer = L.Convolution2D(4, 3, 3).add_hook(
    sn_function.SpectralNormalization(norm='operator', insize=(8, 8)))
hi: float = sn_function.certify(layer, 1e-2, insize=8).hi
model = sn_function.bake(layer, certified=True)

F.spectral_normalize(W, u, return_sigma=True).array     # wrong
F.spectral_normalize(W, u, return_sigma=flag).array     # wrong
F.spectral_normalize_all([W], [u])[0][0].array          # wrong
x: int = F.spectral_norm(W, u)                          # wrong
sn_function.SpectralNormalization(use_gama=True)        # wrong
sn_function.spectral_normalise                          # wrong
F.conv_spectral_normalize(C, x_0, insize=8)             # wrong
sn_function.certify(layer).high                         # wrong
sn_function.ChainSpectralNormalization(use_gama=True)   # wrong
sn_function.ChainSpectralNormalization(cap='1')         # wrong
sn_function.norms(model)[0].sigmas                      # wrong
sn_function.summary(model).all_normalised               # wrong
'''


def run_mypy(path):
    # Outside of the checkout, whose settings are not those of a user.
    return subprocess.run(
        [sys.executable, '-m', 'mypy', '--follow-imports', 'silent',
         '--cache-dir', str(path.parent / 'cache'), path.name],
        cwd=path.parent, capture_output=True, text=True,
        env={**os.environ, 'MYPYPATH': str(ROOT)})


@pytest.mark.slow
@needs_mypy
def test_mistakes(tmp_path):
    path = tmp_path / 'user.py'
    path.write_text(textwrap.dedent(CODE))
    done = run_mypy(path)
    lines = CODE.splitlines()
    wrong = {i for i, line in enumerate(lines, 1) if line.endswith('# wrong')}
    found = {int(number) for number in re.findall(
        r'(?m)^user\.py:(\d+): error:', done.stdout)}
    assert found == wrong, done.stdout + done.stderr


# A program without mistakes

STRICT = '''
strict = True
# Chainer's modules do not say what they export, and few functions have types.
untyped_calls_exclude = chainer
[mypy-chainer.*]
implicit_reexport = True
'''


def copy_of_program(tmp_path):
    return pathlib.Path(shutil.copy(user_code.__file__, tmp_path))


@pytest.mark.slow
@needs_mypy
@pytest.mark.parametrize('settings', ['', STRICT], ids=['default', 'strict'])
def test_program_passes_mypy(tmp_path, settings):
    (tmp_path / 'mypy.ini').write_text(f'[mypy]\n{settings}')
    done = run_mypy(copy_of_program(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which('pyright') is None, reason='pyright is not on the PATH')
def test_program_passes_pyright(tmp_path):
    path = copy_of_program(tmp_path)
    (tmp_path / 'pyrightconfig.json').write_text(
        json.dumps({'extraPaths': [str(ROOT)]}))
    done = subprocess.run(
        ['pyright', '--pythonpath', sys.executable, path.name],
        cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_program_names_all_that_is_public():
    source = pathlib.Path(user_code.__file__).read_text(encoding='utf-8')
    modules = [
        value for name in sn_function.__all__ if name != 'errors'
        and inspect.ismodule(value := getattr(sn_function, name))]
    assert len(modules) >= 6
    names = {*sn_function.__all__, *(
        name for module in modules
        for name in getattr(module, '__all__', ()))}
    assert {name for name in names
            if not re.search(rf'\b{name}\b', source)} == set()


def test_program_runs(tmp_path):
    model, x = user_code.Model(), np.ones((2, 4), 'f')
    path = str(tmp_path / 'model.npz')
    assert len(user_code.use_functions()) == 6
    model(x)
    serializers.save_npz(path, model)
    assert user_code.look(model, x)[0] == '/first/W'
    assert sn_function.certify(user_code.train(model, x).last).hi <= 2
    assert user_code.ship(path, str(tmp_path / 'out.npz'))[:2] == [
        'first/W', 'first/W']
