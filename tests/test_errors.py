"""All exceptions together; each is tested where it is raised."""
import inspect
import pathlib
import re

import pytest

from sn_function import errors

CLASSES = [c for c in vars(errors).values() if inspect.isclass(c)
           and issubclass(c, errors.SpectralNormalizationError)
           and c is not errors.SpectralNormalizationError]
TESTS = '\n'.join(path.read_text(encoding='utf-8') for path in
                  pathlib.Path(__file__).parent.rglob('*.py'))


@pytest.mark.parametrize('cls', CLASSES)
def test_is_what_a_user_may_already_catch(cls):
    """Of the kinds that are raised elsewhere in Chainer and NumPy."""
    assert issubclass(cls, (
        ValueError, TypeError, RuntimeError, KeyError))


@pytest.mark.parametrize(
    'cls', [c for c in CLASSES if not c.__subclasses__()])
def test_is_tested(cls):
    assert re.search(rf'\b{cls.__name__}\b', TESTS)
