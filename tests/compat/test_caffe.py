"""Caffe models that Chainer writes and reads, beside Chainer itself."""
import hashlib
import os
import pathlib
import subprocess
import sys

import chainer
import numpy as np
import pytest

import sn_function
from sn_function._compat import caffe

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = '''
import pathlib, sys
import numpy as np
import sn_function
import chainer, chainer.functions as F, chainer.links as L


class Model(chainer.Chain):

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(2, 3, 3)
            self.bn = L.BatchNormalization(3)
            self.fc = L.Linear(12, 4)

    def forward(self, x):
        h = F.relu(self.bn(self.conv(x)))
        # Its outputs are a tuple or a list.
        return F.softmax(self.fc(F.max_pooling_2d(h, 2))),


def export(directory):
    from chainer.exporters import caffe
    np.random.seed(0)
    model = Model()
    x = chainer.Variable(np.random.normal(size=(1, 2, 6, 6)).astype('f'))
    with chainer.using_config('train', False):
        caffe.export(model, [x], directory, True)
        return x.array, model(x)[0].array
'''


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    names = {}
    exec(MODEL, names)
    directory = str(tmp_path_factory.mktemp('caffe'))
    return (directory, *names['export'](directory))


def test_model_computes_what_was_exported(exported):
    from chainer.links.caffe import CaffeFunction
    directory, x, y = exported
    path = os.path.join(directory, 'chainer_model.caffemodel')
    function = CaffeFunction(path)
    name, = [name for name in function.forwards if 'Softmax' in name]
    with chainer.using_config('train', False):
        result, = function(inputs={'data': x}, outputs=[name])
    np.testing.assert_allclose(result.array, y, rtol=1e-6)


def test_file_is_that_of_protobuf_in_python(exported, tmp_path):
    """That implementation reads the generated module as it is."""
    code = MODEL + '''
export(sys.argv[1])
from sn_function._compat import caffe
assert not caffe.applied
'''
    subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code, str(tmp_path)],
        check=True, env={
            **os.environ, 'PYTHONPATH': str(ROOT),
            'PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION': 'python'})
    digests = [
        hashlib.sha256(path.read_bytes()).hexdigest()
        for directory in (tmp_path, pathlib.Path(exported[0]))
        for path in sorted(directory.glob('chainer_model.caffemodel'))]
    assert len(digests) == 2
    assert digests[0] == digests[1]


def test_other_errors_are_raised(monkeypatch):
    monkeypatch.setitem(sys.modules, caffe.MODULE, sys)
    with pytest.raises(TypeError), caffe.reading_the_description():
        raise TypeError


def test_protobuf_is_not_imported_before():
    code = '''
import sys, sn_function, chainer
assert not [name for name in sys.modules if name.startswith('google.')]
'''
    subprocess.run([sys.executable, '-c', code], check=True,
                   env={**os.environ, 'PYTHONPATH': str(ROOT)})


def test_repair_is_explained():
    import chainer.links.caffe  # noqa: F401
    from google.protobuf.internal import api_implementation
    is_python = api_implementation.Type() == 'python'
    assert caffe.applied == ([] if is_python else ['caffe'])
    fault, needed = sn_function._compat.explain('caffe')
    assert 'caffe' in fault
    assert needed.startswith('with protobuf')
