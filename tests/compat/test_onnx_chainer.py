"""Chainer's exporter, repaired, beside Chainer itself: in onnxruntime."""
import importlib.util
import os
import pathlib
import subprocess
import sys
import textwrap

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks

from sn_function import (
    ChainSpectralNormalization,
    SpectralNormalization,
    _compat,
    errors,
    functions,
)
from sn_function._compat import onnx_chainer as repaired
from sn_function.bake import bake
from tests.compat.test_compat import OLD_STACK

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
import onnx_chainer  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
OPSETS = range(onnx_chainer.MINIMUM_OPSET_VERSION,
               onnx_chainer.MAXIMUM_OPSET_VERSION + 1)


def run(model, *args):
    """Outputs of an ONNX model, by onnxruntime."""
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=['CPUExecutionProvider'])
    return session.run(
        None, {f'Input_{i}': x for i, x in enumerate(args)})


def check(model, *args, rtol=1e-6, atol=1e-6, **kwargs):
    exported = onnx_chainer.export(model, list(args), **kwargs)
    with chainer.using_config('train', False):
        expected = model(*args)
    if not isinstance(expected, (tuple, list)):
        expected = expected,
    actual = run(exported, *args)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        b = chainer.as_variable(b).array
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
    return exported


class Function(chainer.Chain):
    """A function, or a link, as a model."""

    def __init__(self, f):
        super().__init__()
        self.f = f
        if isinstance(f, chainer.Link):
            self.add_link('link', f)

    def forward(self, *xs):
        return self.f(*xs)


def x(*shape):
    seed = sum(shape)
    return np.random.RandomState(seed).uniform(.1, .9, shape).astype('f')


def ints(*values):
    return np.array(values, 'i')


# The least opset of each, what is converted, and inputs.
CASES = {
    'clipped_relu': (7, F.clipped_relu, x(2, 3)),
    'elu': (7, F.elu, x(2, 3) - .5),
    'hard_sigmoid': (7, F.hard_sigmoid, x(2, 3)),
    'leaky_relu': (7, F.leaky_relu, x(2, 3) - .5),
    'log_softmax': (7, F.log_softmax, x(2, 3)),
    'prelu': (7, L.PReLU(), x(2, 3) - .5),
    'relu': (7, F.relu, x(2, 3) - .5),
    'selu': (7, F.selu, x(2, 3) - .5),
    'sigmoid': (7, F.sigmoid, x(2, 3)),
    'softmax': (7, F.softmax, x(2, 3)),
    'softplus': (7, F.softplus, x(2, 3)),
    'tanh': (7, F.tanh, x(2, 3)),
    'cast': (7, lambda a: F.cast(a, 'd'), x(2, 3)),
    'concat': (7, lambda *xs: F.concat(xs), x(2, 3), x(2, 2)),
    'copy': (7, lambda a: F.copy(a, -1), x(2, 3)),
    'depth2space': (7, lambda a: F.depth2space(a, 2), x(1, 12, 6, 6)),
    'dstack': (7, lambda *xs: F.dstack(xs), x(3, 2, 2), x(3, 2, 1)),
    'expand_dims': (7, lambda a: F.expand_dims(a, -2), x(3)),
    'get_item': (7, lambda a: a[0, None, ..., :2], x(2, 2, 3)),
    'gather': (7, lambda a: a[:, [[0, 1], [1, 2]], :], x(2, 3, 4)),
    'gathernd': (11, lambda a: a[[0, 1], [1, 2]], x(2, 3, 4)),
    'hstack': (7, lambda *xs: F.hstack(xs), x(3, 2), x(3, 4)),
    'moveaxis': (7, lambda a: F.moveaxis(a, (0, 3), (2, 0)), x(2, 3, 4, 5)),
    'pad': (7, lambda a: F.pad(a, ((0, 0), (1, 2)), 'constant',
                               constant_values=-1), x(2, 3)),
    'permutate': (9, F.permutate, x(3, 2), ints(1, 0, 2)),
    'repeat': (7, lambda a: F.repeat(a, 2, axis=1), x(2, 3)),
    'reshape': (7, lambda a: F.reshape(a, (1, 2, -1)), x(1, 6)),
    'rollaxis': (7, lambda a: F.rollaxis(a, 2, 0), x(2, 3, 4)),
    'select_item': (9, F.select_item, x(3, 3), ints(2, 1, 0)),
    'separate': (7, lambda a: F.separate(a, 1), x(2, 3)),
    'space2depth': (7, lambda a: F.space2depth(a, 2), x(1, 12, 6, 6)),
    'split_axis': (7, lambda a: F.split_axis(a, [1, 2], 1), x(1, 6)),
    'squeeze': (7, lambda a: F.squeeze(a, (2, 4)), x(1, 3, 1, 2, 1)),
    'stack': (7, lambda *xs: F.stack(xs, axis=1), x(3, 4), x(3, 4)),
    'swapaxes': (7, lambda a: F.swapaxes(a, -3, -1), x(2, 3, 4)),
    'tile': (7, lambda a: F.tile(a, (1, 2)), x(1, 5)),
    'transpose': (7, F.transpose, x(2, 3)),
    'transpose_sequence': (
        7, lambda *xs: F.transpose_sequence(xs), x(3, 4), x(3, 4)),
    'vstack': (7, lambda *xs: F.vstack(xs), x(3), x(3)),
    'where': (9, F.where, np.array([[True, False]]), x(1, 2), x(1, 2)),
    'convolution': (7, L.Convolution2D(2, 3, 3, 2, 1), x(2, 2, 5, 5)),
    'convolution, groups': (
        7, L.Convolution2D(4, 6, 3, groups=2, nobias=True), x(2, 4, 5, 5)),
    'convolution, dilated': (
        7, L.Convolution2D(2, 3, 3, dilate=2), x(2, 2, 7, 7)),
    'convolution, 1D': (7, L.Convolution1D(2, 3, 3), x(2, 2, 5)),
    'convolution, 1D, dilated': (
        7, L.Convolution1D(2, 3, 3, dilate=2), x(2, 2, 7)),
    'convolution, 3D': (7, L.Convolution3D(2, 3, 2), x(2, 2, 3, 3, 3)),
    'deconvolution': (7, L.Deconvolution2D(2, 3, 4, 2, 1), x(2, 2, 5, 5)),
    'deconvolution, groups': (
        7, L.Deconvolution2D(4, 6, 3, groups=2), x(2, 4, 5, 5)),
    'deconvolution, dilated': (
        7, L.Deconvolution2D(2, 3, 3, pad=1, dilate=(2, 1)), x(2, 2, 5, 5)),
    'deconvolution, 1D, dilated': (
        7, L.Deconvolution1D(2, 3, 3, dilate=2), x(2, 2, 5)),
    'deconvolution, 3D': (7, L.Deconvolution3D(2, 3, 2), x(2, 2, 3, 3, 3)),
    'embed_id': (7, L.EmbedID(5, 3), ints([0, 3], [4, 1])),
    'linear': (7, L.Linear(4, 3), x(2, 4)),
    'linear, no bias': (7, L.Linear(4, 3, nobias=True), x(2, 4)),
    'mean_absolute_error': (
        7, F.mean_absolute_error, x(2, 3), x(2, 3) - .5),
    'softmax_cross_entropy': (
        9, F.softmax_cross_entropy, x(2, 3), ints(0, 2)),
    'absolute': (7, F.absolute, x(2, 3) - .5),
    'add': (7, lambda a, b: a + b, x(2, 3), x(2, 3)),
    'add constant': (7, lambda a: a + 1, x(2, 3)),
    'arccos': (7, F.arccos, x(2, 3)),
    'arcsin': (7, F.arcsin, x(2, 3)),
    'arctan': (7, F.arctan, x(2, 3)),
    'argmax': (7, lambda a: F.argmax(a, axis=1), x(2, 3)),
    'argmin': (7, lambda a: F.argmin(a, axis=1), x(2, 3)),
    'broadcast_to': (8, lambda a: F.broadcast_to(a, (2, 2, 3)), x(2, 3)),
    'clip': (7, lambda a: F.clip(a, .2, .5), x(2, 3)),
    'cos': (7, F.cos, x(2, 3)),
    'cosh': (9, F.cosh, x(2, 3)),
    'div': (7, lambda a, b: a / b, x(2, 3), x(2, 3)),
    'div from constant': (7, lambda a: 2 / a, x(2, 3)),
    'exp': (7, F.exp, x(2, 3)),
    'identity': (7, F.identity, x(2, 3)),
    'linear_interpolate': (
        7, F.linear_interpolate, x(2, 3), x(2, 3), x(2, 3)),
    'log': (7, F.log, x(2, 3)),
    'logsumexp': (7, lambda a: F.logsumexp(a, axis=1), x(2, 3)),
    'matmul': (7, lambda a, b: F.matmul(a, b, transb=True), x(2, 3), x(4, 3)),
    'max': (7, lambda a: F.max(a, axis=0), x(2, 3)),
    'maximum': (7, F.maximum, x(2, 3), x(2, 3)),
    'mean': (7, lambda a: F.mean(a, axis=1, keepdims=True), x(2, 3)),
    'min': (7, F.min, x(2, 3)),
    'minimum': (7, F.minimum, x(2, 3), x(2, 3)),
    'mul': (7, lambda a, b: a * b, x(2, 3), x(2, 3)),
    'mul constant': (7, lambda a: a * 2, x(2, 3)),
    'neg': (7, lambda a: -a, x(2, 3)),
    'pow of constant': (7, lambda a: 2 ** a, x(2, 3)),
    'pow by constant': (7, lambda a: a ** 2, x(2, 3)),
    'pow': (7, lambda a, b: a ** b, x(2, 3), x(2, 3)),
    'prod': (7, lambda a: F.prod(a, axis=1), x(2, 3)),
    'rsqrt': (7, F.rsqrt, x(2, 3)),
    'sign': (9, lambda a: F.sign(a), x(2, 3) - .5),
    'sin': (7, F.sin, x(2, 3)),
    'sinh': (9, F.sinh, x(2, 3)),
    'sqrt': (7, F.sqrt, x(2, 3)),
    'square': (7, F.square, x(2, 3)),
    'sub': (7, lambda a, b: a - b, x(2, 3), x(2, 3)),
    'sub from constant': (7, lambda a: 2 - a, x(2, 3)),
    'sum': (7, lambda a: F.sum(a, axis=1, keepdims=True), x(2, 3)),
    'tan': (7, F.tan, x(2, 3)),
    'dropout': (7, F.dropout, x(2, 3)),
    'batch_normalization': (7, L.BatchNormalization(3), x(2, 3, 4, 4)),
    'group_normalization': (7, L.GroupNormalization(2, 4), x(2, 4, 3, 3)),
    'local_response_normalization': (
        7, F.local_response_normalization, x(2, 6, 3, 3)),
    'average_pooling': (
        7, lambda a: F.average_pooling_2d(a, 2), x(1, 2, 4, 4)),
    'average_pooling, 3D': (
        7, lambda a: F.average_pooling_nd(a, 2), x(1, 2, 4, 4, 4)),
    'max_pooling': (
        7, lambda a: F.max_pooling_2d(a, 3, 2), x(1, 2, 6, 6)),
    'max_pooling, 3D': (
        7, lambda a: F.max_pooling_nd(a, 2), x(1, 2, 4, 4, 4)),
    'unpooling': (7, lambda a: F.unpooling_2d(a, 2, cover_all=False),
                  x(1, 2, 3, 3)),
}


# Chainer tells that group normalization is converted by its own formula.
@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('name', CASES)
def test_functions_of_chainer(name):
    least, f, *args = CASES[name]
    for opset in OPSETS:
        if opset >= least:
            check(Function(f), *args, rtol=3e-6, opset_version=opset)


class TestRepairs:

    def test_nothing_stays_broken(self):
        for repair in repaired.REPAIRS:
            repair.attempt()
            assert not repair.is_needed()

    def test_every_name_is_explained(self):
        for repair in repaired.REPAIRS:
            fault, needed = _compat.explain(repair.name)
            assert len(fault) > 15
            assert needed.startswith(('with onnx', 'with Chainer 7.8.1'))

    def test_ir_version(self):
        model = onnx_chainer.export(Function(F.relu), [x(1)])
        assert model.ir_version == 6

    def test_parameters_are_no_inputs(self):
        """And those that nothing uses are left out."""
        model = Function(L.Linear(2, 3))
        model.add_link('unused', L.Linear(2, 3))
        graph = onnx_chainer.export(model, x(1, 2)).graph
        assert [each.name for each in graph.input] == ['Input_0']
        assert [each.name for each in graph.initializer] == [
            'param_link_W', 'param_link_b']
        graph = onnx_chainer.export(
            model, x(1, 2), export_params=False).graph
        assert len(graph.input) == 5
        assert not graph.initializer

    def test_a_parameter_that_only_a_loop_uses_stays(self):
        helper = onnx.helper
        body = helper.make_graph(
            [helper.make_node('Add', ['W', 'W'], ['y'])], 'body', [], [])
        node = helper.make_node('If', ['x'], ['z'], then_branch=body)
        tensors = [onnx.numpy_helper.from_array(x(1), name)
                   for name in ('W', 'V')]
        graph = sys.modules['onnx_chainer.export'].helper.make_graph(
            [node], 'graph', [], [], initializer=tensors)
        assert [each.name for each in graph.initializer] == ['W']

    def test_shared_parameters(self):
        """The exporter lists them twice, and its own check refuses that."""
        first, norm = L.Linear(3, 3), L.BatchNormalization(3)
        second = L.Linear(3, 3)
        second.W = first.W
        model = chainer.Sequential(
            first, norm, F.relu, first, norm, F.relu, second)
        with chainer.using_config('train', False):
            expected = model(x(2, 3)).array
        model_ = onnx_chainer.export(model, x(2, 3))
        names = [each.name for each in model_.graph.initializer]
        assert len(names) == len(set(names)) == 7
        y, = run(model_, x(2, 3))
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        graph = onnx_chainer.export(
            model, x(2, 3), export_params=False).graph
        assert {each.name for each in graph.input} == {*names, 'Input_0'}

    def test_a_parameter_that_is_an_argument(self):
        """It is an input, not a constant."""
        link = L.Linear(3, 3)
        model = Function(lambda W: F.matmul(link(x(2, 3)), W))
        model.add_link('link_', link)
        model = onnx_chainer.export(model, link.W)
        assert [each.name for each in model.graph.input] == ['Input_0']
        assert 'Input_0' not in {
            each.name for each in model.graph.initializer}
        y, = run(model, 0 * x(3, 3))
        np.testing.assert_array_equal(y, np.zeros((2, 3)))

    def test_outputs_are_in_order(self):
        model = Function(lambda x: (2 * x, F.relu(x) - 1, F.sigmoid(x)))
        check(model, x(2, 3))
        check(model, x(2, 3), output_names=['c', 'b', 'a'])

    def test_onnxruntime_warns_of_nothing(self):
        done = self.python('''
            import sn_function, numpy, chainer
            import chainer.functions as F, chainer.links as L
            import onnx_chainer, onnxruntime
            x = numpy.ones((2, 3, 8, 8), 'f')
            layers = [
                L.Convolution2D(3, 4, 3), L.BatchNormalization(4), F.relu,
                L.Deconvolution2D(4, 4, 3, groups=2), F.dropout,
                L.BatchNormalization(4, use_gamma=False), L.PReLU(),
                L.Linear(256, 5)]
            model = chainer.Sequential(*layers).add_hook(
                sn_function.ChainSpectralNormalization(use_gamma=True))
            model(x)
            embed = L.EmbedID(5, 3)
            for model, x in ((sn_function.bake(model), x), (
                    chainer.Sequential(embed, L.Linear(3, 2)),
                    numpy.array([0, 3], 'i'))):
                model = onnx_chainer.export(model, x)
                session = onnxruntime.InferenceSession(
                    model.SerializeToString(),
                    providers=['CPUExecutionProvider'])
                session.run(None, {'Input_0': x})
        ''')
        assert done.returncode == 0, done.stderr
        # Elsewhere it may tell of a GPU that it does not find.
        assert 'nitializer' not in done.stderr

    def test_onnx_is_left_alone(self):
        done = self.python('''
            import sys
            import onnx
            before = set(vars(onnx)), onnx.IR_VERSION
            import sn_function, onnx_chainer
            # Submodules that the exporter imports apart.
            more = {name for name in set(vars(onnx)) - before[0]
                    if 'onnx.' + name not in sys.modules}
            assert not more, more
            assert onnx.IR_VERSION == before[1]
            module = sys.modules.get('onnx.mapping')
            assert module is None or module.__spec__
        ''')
        assert done.returncode == 0, done.stderr

    def test_without_the_repairs_it_fails(self):
        done = self.python('''
            import onnx, sys
            from sn_function import _compat
            sys.meta_path[:] = [
                each for each in sys.meta_path
                if not isinstance(each, _compat._ExporterFinder)]
            import chainer, numpy
            import onnx_chainer
            model = onnx_chainer.export(
                chainer.Sequential(chainer.functions.relu),
                numpy.zeros(1, 'f'))
            assert model.ir_version <= 6, model.ir_version
            from onnx.mapping import NP_TYPE_TO_TENSOR_TYPE
            NP_TYPE_TO_TENSOR_TYPE[numpy.dtype('f')]
        ''')
        of_onnx = {'onnx.mapping', 'onnx.IR_VERSION'} & set(repaired.applied)
        assert bool(done.returncode) == bool(of_onnx), done.stderr

    def test_onnx_is_not_imported_without_the_exporter(self):
        done = self.python('''
            import sys
            import sn_function
            assert 'onnx' not in sys.modules
            assert 'onnx_chainer' not in sys.modules
        ''')
        assert done.returncode == 0, done.stderr

    def test_exporter_without_onnx(self):
        done = self.python('''
            import sys
            sys.modules['onnx'] = None
            import sn_function, numpy, chainer, onnx_chainer
            try:
                onnx_chainer.export(chainer.Chain(), numpy.zeros(1, 'f'))
            except ImportError as error:
                assert 'ONNX is not installed' in str(error)
        ''')
        assert done.returncode == 0, done.stderr

    def test_exporter_of_its_own_time(self):
        """With what onnx 1.6 had, only the exporter itself is repaired."""
        done = self.python('''
            import sys, types
            import numpy, onnx
            mapping = types.ModuleType('onnx.mapping')
            mapping.NP_TYPE_TO_TENSOR_TYPE = {numpy.dtype('f'): 1}
            mapping.STORAGE_TENSOR_TYPE_TO_FIELD = {1: 'float_data'}
            sys.modules['onnx.mapping'] = onnx.mapping = mapping
            onnx.IR_VERSION = 6
            import sn_function, onnx_chainer
            from sn_function._compat import onnx_chainer as repaired
            assert repaired.applied == [
                'graph_inputs', 'graph_outputs', 'convert_Unpooling2D',
                'convert_MeanAbsoluteError', 'dilations']
            for name in 'export', 'context':
                assert sys.modules['onnx_chainer.' + name].onnx is onnx
            assert sys.modules['onnx.mapping'] is mapping
        ''')
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize('imports', [
        'sn_function, chainer, onnx_chainer',
        *[pytest.param(text, marks=pytest.mark.slow) for text in (
            'sn_function.link_hooks, onnx_chainer',
            'chainer, onnx_chainer, sn_function',
            'onnx_chainer, sn_function.link_hooks',
            'chainer, sn_function, onnx_chainer')]])
    def test_hooks_are_refused_in_any_order_of_imports(self, imports):
        done = self.python(OLD_STACK + f'''
import onnx
mapping = module('onnx.mapping', NP_TYPE_TO_TENSOR_TYPE={{
    numpy.dtype('f'): 1}}, STORAGE_TENSOR_TYPE_TO_FIELD={{1: 'float_data'}})
onnx.mapping = mapping
import {imports}
import chainer
link = chainer.links.Linear(2, 2)
onnx_chainer.export(link, numpy.zeros((1, 2), 'f'))
link.add_hook(sn_function.SpectralNormalization())
try:
    onnx_chainer.export(link, numpy.zeros((1, 2), 'f'))
except sn_function.errors.HookedExportError:
    pass
else:
    raise AssertionError('it is exported')
''')
        assert done.returncode == 0, done.stderr

    def test_mapping_that_announces_its_end(self):
        # As that of onnx 1.13 to 1.18 does.
        done = self.python('''
            import sys, types, warnings
            import onnx

            class Deprecated(dict):
                def __getitem__(self, key):
                    warnings.warn('so', DeprecationWarning)
                def get(self, key, default=None):
                    return self[key]

            mapping = types.ModuleType('onnx.mapping')
            mapping.NP_TYPE_TO_TENSOR_TYPE = Deprecated()
            mapping.STORAGE_TENSOR_TYPE_TO_FIELD = Deprecated()
            sys.modules['onnx.mapping'] = onnx.mapping = mapping
            import sn_function, onnx_chainer, chainer, numpy
            from sn_function._compat import onnx_chainer as repaired
            assert 'onnx.mapping' in repaired.applied
            x = numpy.zeros((1, 2), 'f')
            onnx_chainer.export(chainer.Sequential(
                lambda x: chainer.functions.clip(x, 0, 1)), x)
            assert sys.modules['onnx.mapping'] is onnx.mapping is mapping
        ''')
        assert done.returncode == 0, done.stderr

    def test_reload_changes_nothing(self):
        done = self.python('''
            import importlib, sys
            from sn_function import _compat
            from sn_function._compat import onnx_chainer as repaired
            before = list(sys.meta_path)
            importlib.reload(_compat)
            assert sys.meta_path == before
            import onnx_chainer
            module = sys.modules['onnx_chainer.export']
            before = module._export, module.onnx, list(repaired.applied)
            importlib.reload(_compat)
            assert before == (
                module._export, module.onnx, repaired.applied)
        ''')
        assert done.returncode == 0, done.stderr

    @staticmethod
    def python(source):
        return subprocess.run(
            [sys.executable, '-W', 'error', '-c', textwrap.dedent(source)],
            capture_output=True, text=True,
            env={**os.environ, 'PYTHONPATH': os.pathsep.join(
                [str(ROOT), os.environ.get('PYTHONPATH', '')])})


def hooked():
    return chainer.Sequential(
        L.Linear(4, 3).add_hook(SpectralNormalization()), F.relu,
        L.Linear(3, 2).add_hook(SpectralNormalization()), L.Linear(2, 1))


class TestHookedModel:

    def test_is_refused(self):
        with pytest.raises(errors.HookedExportError, match='/0, /2') as info:
            onnx_chainer.export(hooked(), x(2, 4))
        assert 'sn_function.bake' in str(info.value)
        assert isinstance(info.value, errors.SpectralNormalizationError)

    def test_each_link_is_named_once(self):
        link = L.Linear(4, 4).add_hook(SpectralNormalization())
        with pytest.raises(errors.HookedExportError, match=r': /0\. '):
            onnx_chainer.export(chainer.Sequential(link, link), x(2, 4))

    def test_is_refused_by_export_testcase(self, tmp_path):
        with pytest.raises(errors.HookedExportError, match='/0, /2'):
            onnx_chainer.export_testcase(
                hooked(), [x(2, 4)], str(tmp_path / 'out'))

    def test_hook_of_a_chain(self):
        model = chainer.Sequential(L.Linear(4, 3)).add_hook(
            ChainSpectralNormalization())
        with pytest.raises(errors.HookedExportError, match='/0'):
            onnx_chainer.export(model, x(2, 4))

    def test_is_not_called_and_not_changed(self):
        model = hooked()
        u = model[0].W_u.copy()
        with pytest.raises(errors.HookedExportError):
            onnx_chainer.export(model, x(2, 4), train=True)
        np.testing.assert_array_equal(model[0].W_u, u)
        assert isinstance(model[0].W, chainer.Parameter)

    def test_link_that_is_not_in_the_model(self):
        link = hooked()
        with pytest.raises(errors.HookedExportError, match='not among'):
            onnx_chainer.export(chainer.Sequential(lambda x: link(x)), x(2, 4))

    def test_function(self):
        def f(W):
            return functions.spectral_normalize(W, np.ones(2, 'f'))

        with pytest.raises(errors.HookedExportError, match='without a link'):
            onnx_chainer.export(chainer.Sequential(f), x(2, 4))

    def test_hook_of_chainer_is_exported_at_the_u_of_the_last_call(self):
        """As without this package; docs/shipping.rst tells."""
        link = L.Linear(4, 3).add_hook(link_hooks.SpectralNormalization())
        with pytest.raises(AttributeError):
            onnx_chainer.export(link, x(2, 4))
        for _ in range(200):
            link(x(2, 4))
        check(link, x(2, 4))


class TestBakedModel:

    @pytest.mark.parametrize('opset', OPSETS)
    @pytest.mark.parametrize('use_gamma', [False, True])
    def test_networks_of_the_example(self, use_gamma, opset):
        sngan_models = example()
        shape = 1, 28, 28
        labels = ints(3, 1, 4)
        dis = sngan_models.Discriminator(shape, ch=8)
        dis.add_hook(ChainSpectralNormalization(use_gamma=use_gamma))
        gen = sngan_models.Generator(shape, ch=4)
        gen.add_hook(ChainSpectralNormalization(use_gamma=use_gamma))
        z, images = x(3, gen.n_hidden), x(3, *shape)
        gen(z, labels)      # statistics for batch normalization
        check(bake(gen), z, labels, opset_version=opset)
        check(bake(dis), images, labels, opset_version=opset)

    def test_outputs_are_those_of_the_hooked_model(self):
        model = hooked()
        exported = onnx_chainer.export(bake(model), x(2, 4))
        with chainer.using_config('train', False):
            expected = model(x(2, 4)).array
        np.testing.assert_allclose(
            run(exported, x(2, 4))[0], expected, rtol=1e-6, atol=1e-6)

    # Chainer says so of what its own export_testcase uses.
    @pytest.mark.filterwarnings('ignore:return_named_inout:FutureWarning')
    def test_testcase_on_disk(self, tmp_path):
        model = bake(hooked())
        onnx_chainer.export_testcase(model, [x(2, 4)], str(tmp_path))
        exported = onnx.load(str(tmp_path / 'model.onnx'))
        folder = tmp_path / 'test_data_set_0'
        given, expected = (
            onnx.numpy_helper.to_array(onnx.load_tensor(str(folder / name)))
            for name in ('input_0.pb', 'output_0.pb'))
        np.testing.assert_allclose(
            run(exported, given)[0], expected, rtol=1e-6, atol=1e-6)

    def test_of_chainers_hook(self):
        link = L.Linear(4, 3).add_hook(link_hooks.SpectralNormalization())
        check(bake(link), x(2, 4))


def example():
    path = ROOT / 'examples' / 'sngan_models.py'
    spec = importlib.util.spec_from_file_location('sngan_models', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmark(capsys, tmp_path):
    from tests.tools.benchmarks import shipping
    for network in shipping.networks((1, 8, 8), None):
        name = {'discriminator': 'dis', 'generator': 'gen'}[network.name]
        if name == 'gen':   # as the example leaves it
            network.hooked.delete_hook('ChainSpectralNormalization')
        chainer.serializers.save_npz(
            str(tmp_path / f'{name}.npz'), network.hooked)
    shipping.main(['--shape', '1x8x8', '--rounds', '1',
                   '--networks', str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert 'onnxruntime' in lines[0]
    rows = [line.rsplit(maxsplit=10) for line in lines[3:]]
    assert len(rows) == 6
    for name, size, difference, *_ in rows:
        assert int(size.replace(',', '')) > 100_000
        assert float(difference) <= (1e-6 if 'ONNX' in name else 0)
