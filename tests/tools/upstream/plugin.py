"""The part of ``make upstream`` that is done in pytest.

`sn_function` is imported before Chainer.  What Chainer's tests miss is lent
to them, and to them alone: what Chainer misses is still seen.
"""
from __future__ import annotations

import configparser
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import random
import re
import sys
import unittest.mock

import sn_function  # isort: skip  # before chainer

import numpy
import pytest

# In the processes, too, that the tests start.
sn_function.install()

# It was a package of its own.  chainer.testing imports it, and a conftest.py
# imports that before pytest_configure.
sys.modules['mock'] = unittest.mock

ROOT = pathlib.Path(os.environ['SN_UPSTREAM_ROOT'])
OUT = pathlib.Path(os.environ['SN_UPSTREAM_OUT'])
TESTS = str(ROOT / 'tests') + os.sep

# What the tests read of NumPy 1.
NAMES = {'bool': bool, 'complex_': numpy.complex128, 'int': int,
         'object': object, 'product': numpy.prod}
# Their versions decide what is expected.
PACKAGES = ('chainer', 'numpy', 'scipy', 'h5py', 'protobuf', 'matplotlib',
            'pillow', 'pytest')


def lend_names():
    """Gives NumPy the names that it lacks, for readers in the tests."""
    own = vars(numpy).get('__getattr__')

    def read(name):
        reader = sys._getframe(1).f_globals.get('__file__') or ''
        if name in NAMES and reader.startswith(TESTS):
            return NAMES[name]
        if own is None:
            raise AttributeError(f"module 'numpy' has no attribute {name!r}")
        return own(name)

    numpy.__getattr__ = read


def configure(config):
    """Gives pytest Chainer's marks and its filters of warnings.

    Some of these name its classes.  pytest reads its configuration before its
    plugins, and so would import Chainer before `sn_function`.
    """
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / 'setup.cfg')
    for name in ('markers', 'filterwarnings'):
        for line in settings['tool:pytest'][name].splitlines():
            if line and not line.startswith('#'):
                config.addinivalue_line(name, line)
    # Those of NAMES that NumPy has, but deprecates.
    config.addinivalue_line(
        'filterwarnings', f'ignore:`(np.)?({"|".join(NAMES)})` is (a )?'
        'deprecated:DeprecationWarning')


def seed():
    random.seed(0)
    numpy.random.seed(0)


class Recorder:
    """Writes what became of each test, and the versions of the stack."""

    def __init__(self):
        self.outcomes = {}

    def note(self, report):
        # Some names have objects in them.
        name = re.sub(r' at 0x\w+', '', report.nodeid)
        # A test has three reports: setup, call and teardown.
        if report.failed:
            crash = getattr(report.longrepr, 'reprcrash', None)
            error = crash.message if crash else str(report.longrepr)
            # Chainer's parametrization puts its parameters before it.
            error = error.rsplit('(caused by)')[-1].strip()
            self.outcomes[name] = ['failed', error]
        elif report.skipped:
            self.outcomes.setdefault(name, ['skipped', ''])
        elif report.when == 'call':
            self.outcomes.setdefault(name, ['passed', ''])

    def pytest_runtest_logreport(self, report):
        self.note(report)

    def pytest_collectreport(self, report):
        if report.failed:
            self.note(report)

    def pytest_sessionfinish(self):
        versions = {'python': platform.python_version()}
        for name in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        OUT.write_text(json.dumps(
            {'versions': versions, 'outcomes': self.outcomes}), 'utf-8')


def pytest_configure(config):
    lend_names()
    configure(config)
    config.pluginmanager.register(Recorder())


def pytest_collectstart(collector):
    # The names of some tests have random numbers in them.
    if isinstance(collector, pytest.Module):
        seed()


def pytest_runtest_setup():
    seed()
