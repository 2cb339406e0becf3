"""What users see: by ``dir``, ``help`` and ``from ... import *``."""
import importlib
import pathlib
import pydoc

import pytest

import sn_function

ROOT = pathlib.Path(sn_function.__file__).parent
MODULES = [
    'bake', 'chain', 'cli', 'distributed', 'doctor', 'errors', 'extensions',
    'functions', 'link_hooks', 'optimizer_hooks', 'snapshot']


def test_every_public_module_is_among_them():
    assert sorted(
        path.stem for path in ROOT.glob('*.py') if path.stem[0] != '_'
    ) == MODULES


def test_dir():
    assert {name for name in dir(sn_function)
            if not name.startswith('__')} == {
        name for name in sn_function.__all__ if name != '__version__'}


def test_all_is_sorted_and_there():
    assert list(sn_function.__all__) == sorted(sn_function.__all__)
    for name in sn_function.__all__:
        assert getattr(sn_function, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nomrs'"):
        sn_function.nomrs  # noqa: B018


@pytest.mark.parametrize('name', MODULES)
def test_modules_list_what_is_public(name):
    """``help`` shows what ``__all__`` has, and nothing else."""
    module = importlib.import_module(f'sn_function.{name}')
    namespace = {}
    exec(f'from sn_function.{name} import *', namespace)
    assert namespace.keys() - {'__builtins__'} == set(module.__all__)
    assert all(namespace[each].__doc__ for each in module.__all__)
    text = pydoc.plain(pydoc.render_doc(module))
    assert [each for each in module.__all__ if each not in text] == []
    for section in 'Sequence = ', 'Any = ', 'is_set_up(', 'printable(':
        assert section not in text
