"""What mypy makes of the public functions in the code of a user."""
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip('mypy')
pytestmark = pytest.mark.slow

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
'''


def test_code_of_a_user(tmp_path):
    path = tmp_path / 'user.py'
    path.write_text(textwrap.dedent(CODE))
    done = subprocess.run(
        [sys.executable, '-m', 'mypy', '--follow-imports', 'silent',
         '--cache-dir', str(tmp_path / 'cache'), path.name],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, 'MYPYPATH': str(ROOT)})
    lines = CODE.splitlines()
    wrong = {i for i, line in enumerate(lines, 1) if line.endswith('# wrong')}
    found = {int(number) for number in re.findall(
        r'(?m)^user\.py:(\d+): error:', done.stdout)}
    assert found == wrong, done.stdout + done.stderr
