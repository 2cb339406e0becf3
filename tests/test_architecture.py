"""The package is as its map says: no circle, and imports that go down.

Read from the syntax trees, so imports inside of functions count, too.
"""
import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'sn_function'
MAP = (ROOT / 'docs/architecture.rst').read_text(encoding='utf-8')
# Of the picture in the map: before it, words on what a floor sees.
MARGIN = 20


def name_of(path):
    """The name within the package, such as ``_links.call``, or ``_links``."""
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    return '.'.join(parts).replace('.__init__', '')


# The package itself is left out: Python imports it before its modules.
MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob('*.py'))
           if path != PACKAGE / '__init__.py'}
SOURCES = {name: path.read_text(encoding='utf-8')
           for name, path in MODULES.items()}


def floors(text):
    """The modules on each floor of a picture, the lowest floor first."""
    picture = re.search(r'(?m)^\.\. code-block:: text\n\n((?: {4}.*\n|\n)*)',
                        text)[1]
    found = [set()]
    wing = ''
    for line in picture.rstrip().splitlines():
        if not line:
            found.append(set())
            continue
        names = line[MARGIN:]
        if not names.startswith(' '):  # else it goes on with a wing
            wing = ''
        for name in names.split():
            if name.endswith('/'):
                found[-1].add(name[:-1])
                wing = name[:-1] + '.'
            else:
                found[-1].add(wing + name)
    return found[::-1]


def statements(tree):
    """All nodes of a syntax tree, but for what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.dump(node.test):
            continue
        yield node
        yield from statements(node)


def imports(source):
    """The modules of the package that a source imports anywhere."""
    found = set()
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, 'a relative import'
            names = [f'{node.module}.{alias.name}' for alias in node.names]
        else:
            continue
        for name in names:
            name = name.replace('sn_function.', '', 1)
            # Of `_links.call.original`, a function, the module.
            found.add(name if name in MODULES else name.rpartition('.')[0])
    return found & set(MODULES)


GRAPH = {name: imports(source) - {name} for name, source in SOURCES.items()}


def in_circles(graph):
    """The modules of circles, and those on a way from one to another."""
    left = set(graph)
    while True:
        importing = {name for name in left if graph[name] & left}
        imported = {name for each in left for name in graph[each] & left}
        if importing & imported == left:
            return sorted(left)
        left &= importing & imported


def upwards(graph, levels):
    """The imports, as pairs, that go to a higher floor."""
    floor = {name: i for i, names in enumerate(levels) for name in names}
    return [(name, other) for name in graph for other in sorted(graph[name])
            if floor.get(other, 0) > floor.get(name, 0)]


def repairs(source):
    """The names of the loans and repairs that a source declares."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (
                getattr(node.func, 'id', None) == 'Repair'):
            yield node.args[0].value
        if isinstance(node, ast.Assign) and (
                getattr(node.targets[0], 'id', None) == 'REASONS'):
            yield from (key.value for key in node.value.keys)


def test_map_shows_every_module():
    shown = set().union(*floors(MAP))
    assert (shown - set(MODULES), set(MODULES) - shown) == (set(), set())


def test_map_names_no_other_module():
    named = {f'{wing}.{module}' for wing, module in re.findall(
        r'``(_[a-z]+)/(\w+)``', MAP)}
    assert named
    assert named - set(MODULES) == set()


def test_map_names_no_other_attribute():
    named = set(re.findall(r'_sn_\w+', MAP))
    assert named
    assert {name for name in named
            if not any(name in source for source in SOURCES.values())} == set()


def test_map_explains_every_wing():
    wings = {name for name, path in MODULES.items()
             if path.name == '__init__.py'}
    assert wings - set(re.findall(r'(?m)^``(\w+)``$', MAP)) == set()


def test_no_circle():
    assert in_circles(GRAPH) == []


def test_imports_go_down():
    assert upwards(GRAPH, floors(MAP)) == []


def test_map_names_every_repair():
    declared = {name for source in SOURCES.values()
                for name in repairs(source)}
    table = MAP.split('\nloan or repair')[1].split('\n\n')[0]
    assert declared == set(re.findall(r'(?m)^``([\w.]+)`` ', table))


# Can these tests fail?

def test_picture_is_read():
    text = ('.. code-block:: text\n\n'
            '    links           link_hooks  _models\n'
            '                    _links/         call\n'
            '                                    scope\n'
            '\n'
            '    ground          errors\n'
            '\nText\n')
    assert floors(text) == [
        {'errors'}, {'link_hooks', '_models', '_links', '_links.call',
                     '_links.scope'}]


@pytest.mark.parametrize(('source', 'expected'), [
    ('import sn_function.chain', {'chain'}),
    ('from sn_function import chain, errors', {'chain', 'errors'}),
    ('from sn_function._links import call', {'_links.call'}),
    ('from sn_function._links.call import original', {'_links.call'}),
    ('def f():\n    from sn_function import chain', {'chain'}),
    ('if TYPE_CHECKING:\n    from sn_function import chain', set()),
    ('import chainer\nimport sn_function', set()),
])
def test_imports_are_found(source, expected):
    assert imports(source) == expected


def test_circles_and_ways_up_are_found():
    graph = {'a': {'b'}, 'b': {'c'}, 'c': {'b'}, 'd': {'a'}, 'e': set()}
    assert in_circles(graph) == ['b', 'c']
    assert upwards(graph, [{'c', 'e'}, {'b'}, {'a', 'd'}]) == [('c', 'b')]
