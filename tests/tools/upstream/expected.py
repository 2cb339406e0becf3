"""The failures of Chainer's tests that are expected, with their reasons.

Whose they are: Chainer's, where its code is at fault and is not repaired;
ours, where this package is; the test's, where the test could not pass with any
code.
"""
from __future__ import annotations

from tests.tools.upstream import Expected

CHAINER, OURS, TEST = "Chainer's", 'ours', "the test's"

UNSIGNED = 'test_pad_sequence.py::*dtype=uint*pad=-1*::test_forward_cpu'
NUMBER = 'test_det.py::*::test_det_scaling_cpu'

EXPECTED = (
    Expected(
        CHAINER, 'Maxout sets the shape of an array, which NumPy 2.5 '
        'deprecates',
        ["test_maxout.py::*initializer='callable'}::test_param_cpu"],
        error='Setting the shape on a NumPy array', needs=['numpy>=2.5']),
    Expected(
        TEST, 'it makes an unsigned number of -1, which NumPy 1.24 deprecates',
        [UNSIGNED], error='conversion of out-of-bound Python integers',
        needs=['numpy>=1.24,<2']),
    Expected(
        TEST, 'it makes an unsigned number of -1, which NumPy 2 refuses',
        [UNSIGNED], error='Python integer -1 out of bounds for uint',
        needs=['numpy>=2']),
    Expected(
        TEST, 'it sums 300,000 numbers in float16, where NumPy 1 took float64',
        ["test_softmax_cross_entropy.py::*dtype=float16, *reduce='mean', "
         'shape_ignore=((300000, 2), None), weight_apply=True}*'],
        error='overflow encountered in scalar subtract', needs=['numpy>=2']),
    Expected(
        TEST, 'it makes a float of an array of shape (1,), which NumPy 1.25 '
        'deprecates',
        [NUMBER],
        error='Conversion of an array with ndim > 0 to a scalar is deprecated',
        needs=['numpy>=1.25,<2.4']),
    Expected(
        TEST, 'it makes a float of an array of shape (1,), which NumPy 2.4 '
        'refuses',
        [NUMBER], error='only 0-dimensional arrays can be converted',
        needs=['numpy>=2.4']),
    Expected(
        TEST, 'it calls np.fix, which NumPy 2.5 deprecates',
        ['test_fix.py::*::test_forward'],
        error='numpy.fix is deprecated', needs=['numpy>=2.5']),
    Expected(
        TEST, 'it returns a SkipTest in place of raising it, which Python '
        '3.11 deprecates',
        [f'test_optimizers_by_linear_model.py::*{dtype}*loss_scaling='
         f"'{scaling}'*::test_initialize"
         for dtype in ('float32', 'float64')
         for scaling in ('static', 'dynamic')],
        error='deprecated to return a value', needs=['python>=3.11']),
    Expected(
        TEST, 'it compares with SciPy, and SciPy 1.7 and 1.8 compute '
        'bernoulli of float32 wrongly',
        [*(f'test_bernoulli.py::*extreme_values=False*::test_{name}_cpu'
           for name in ('mean', 'prob', 'stddev', 'variance')),
         'test_bernoulli.py::*extreme_values=True*, shape=(3, 2)}::'
         'test_mean_cpu',
         'test_bernoulli.py::*extreme_values=True*, shape=(3, 2)}::'
         'test_prob_cpu',
         'test_bernoulli.py::*extreme_values=True*, sample_shape=(3, 2), '
         'shape=(1,)}::test_prob_cpu'],
        error='Not equal to tolerance', needs=['scipy>=1.7,<1.9']),
    Expected(
        TEST, 'it compares with SciPy, and SciPy 1.7 and 1.8 compute beta of '
        'float32 wrongly',
        [f'test_beta.py::*::test_{name}_cpu' for name in ('mean', 'variance')],
        error='encountered in _beta_', needs=['scipy>=1.7,<1.9']),
)
