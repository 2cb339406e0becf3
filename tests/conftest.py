import sn_function  # isort: skip  # before chainer, which it repairs

import numpy as np
import pytest
from chainer.backends import cuda

from tests import cuda_on_host
from tests.cuda_on_host import array

assert sn_function  # it is imported for what it does


def _has_device():
    if not cuda.available:
        return False
    try:
        return cuda.cupy.cuda.runtime.getDeviceCount() > 0
    except cuda.cupy.cuda.runtime.CUDARuntimeError:  # no driver
        return False


HAS_DEVICE = _has_device()


def pytest_collection_modifyitems(items):
    if HAS_DEVICE:
        return
    needs = ['cuda', 'cudnn']
    reason = 'no CUDA device'
    if not cuda_on_host.available():
        needs.append('gpu')
        reason += ', and no compiler to do without'
    for item in items:
        if any(map(item.get_closest_marker, needs)):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed():
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _cuda_on_host(request):
    """Where there is no device, the host stands in for it."""
    if HAS_DEVICE or not request.node.get_closest_marker('gpu'):
        yield
        return
    with array.installed():
        yield
