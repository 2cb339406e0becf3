import sn_function  # isort: skip  # before chainer, which it repairs

import numpy as np
import pytest
from chainer.backends import cuda

assert sn_function  # it is imported for what it does


def _has_device():
    if not cuda.available:
        return False
    return cuda.cupy.cuda.runtime.getDeviceCount() > 0


def pytest_collection_modifyitems(items):
    if not _has_device():
        skip = pytest.mark.skip(reason='no CUDA device')
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    np.random.seed(0)
