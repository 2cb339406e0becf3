"""Every example in the documentation runs; what it points to exists."""
import codeop
import doctest
import importlib
import inspect
import pathlib
import re
import warnings

import sn_function  # isort: skip  # before chainer, which it repairs

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Without what Sphinx writes.
DOCS = [path for path in sorted(ROOT.glob('docs/**/*.rst'))
        if not {'_build', 'generated', '_templates'} & set(path.parts)]
MARKDOWN = [*sorted(ROOT.glob('*.md')), *sorted(ROOT.glob('.github/*.md'))]
PAGES = [*DOCS, *MARKDOWN]
MODULES = sorted(ROOT.glob('sn_function/**/*.py'))

# What comes with an extra of its own.
NEEDS = {
    'docs/shipping.rst': ['onnx', 'onnxruntime'],
    'docs/tutorials/builtin.rst': ['matplotlib'],
    'docs/tutorials/digits.rst': ['matplotlib', 'sklearn'],
    'docs/tutorials/shipping.rst': [
        'matplotlib', 'onnx', 'onnxruntime', 'sklearn'],
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def parse(text, name):
    """The examples in a text; each file is one namespace."""
    # The fence that ends a block of Markdown is not expected output.
    text = re.sub(r'(?m)^```.*$', '', text)
    return doctest.DocTestParser().get_doctest(
        text, {'sn_function': sn_function, '__name__': '__main__'},
        name, name, 0)


def collect(name):
    path = ROOT / name
    if path.suffix != '.py':
        return [parse(path.read_text(encoding='utf-8'), name)]
    dotted = name[:-len('.py')].replace('/', '.')
    module = importlib.import_module(dotted.replace('.__init__', ''))
    return doctest.DocTestFinder().find(
        module, extraglobs={'sn_function': sn_function})


def check(tests, text):
    """Runs the tests and raises an AssertionError unless all is well.

    They are all the examples in the text: none is overlooked.
    """
    report = []
    runner = doctest.DocTestRunner(verbose=False)
    count = sum(len(test.examples) for test in tests)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for test in tests:
            runner.run(test, out=report.append)
    assert not runner.failures, ''.join(report)
    # Python 3.13 counts the skipped ones among the tries, too.
    skipped = count - runner.tries + getattr(runner, 'skips', 0)
    assert not skipped, f'{skipped} examples are skipped'
    written = len(re.findall(r'(?m)^ *>>> (?!#)', text))
    assert count == written, f'{count} of {written} examples are run'


@pytest.mark.parametrize('path', [*PAGES, *MODULES], ids=name_of)
def test_examples(path):
    name = name_of(path)
    for package in NEEDS.get(name, []):
        pytest.importorskip(package)
    check(collect(name), path.read_text(encoding='utf-8'))


@pytest.mark.parametrize('text', [
    '>>> 1 + 1\n3\n',
    '>>> 1 / 0\n',
    '>>> import warnings\n>>> warnings.warn("so")\n',
    '```python\n>>> 1 + 1\n3\n```\n',
], ids=['value', 'exception', 'warning', 'markdown'])
def test_a_wrong_example_is_noticed(text):
    with pytest.raises(AssertionError, match='Failed example'):
        check([parse(text, 'text')], text)


def test_a_lost_example_is_noticed():
    text = '```python\n>>> 1 + 1\n2\n```\n'
    check([parse(text, 'text')], text)
    with pytest.raises(AssertionError, match='0 of 1 examples'):
        check([], text)
    text = '>>> 1 + 1  # doctest: +SKIP\n3\n'
    with pytest.raises(AssertionError, match='skipped'):
        check([parse(text, 'text')], text)


def endless(text):
    """Lines at which Python's prompt waits for the end of a statement."""
    lines = text.split('\n')
    return [end for example in doctest.DocTestParser().get_examples(text)
            for end in [example.lineno + example.source.count('\n')]
            if lines[end].strip() not in ('', '...')
            and codeop.compile_command(
                example.source[:-1], symbol='single') is None]


# In pieces as the button copies them: a blank line ends a piece.
@pytest.mark.parametrize('path', [*PAGES, *MODULES], ids=name_of)
def test_examples_can_be_pasted(path):
    assert endless(path.read_text(encoding='utf-8')) == []


def test_what_cannot_be_pasted_is_noticed():
    block = '>>> for _ in range(2):\n...     x = 1\n'
    assert endless(block + '>>> x\n1\n') == [2]
    assert endless(block + '...\n>>> x\n1\n') == []
    assert endless(block + '\n>>> x\n1\n') == []
    assert endless(block.replace('x = 1', 'x') + '1\n1\n') == [2]


@pytest.mark.parametrize('path', PAGES, ids=name_of)
def test_python_is_an_example_that_runs(path):
    text = path.read_text(encoding='utf-8')
    blocks = re.findall(
        r'(?m)^(?:```python|\.\. code(?:-block)?:: python.*)\n+(.*)', text)
    assert [line for line in blocks if not line.startswith('>>>')] == []


# References

def links(text):
    """Targets of the links of a Markdown text within the repository."""
    targets = re.findall(r'\]\(([^)\s]+)\)', text)
    return [target.split('#')[0] for target in targets
            if not re.match(r'[a-z]+:|#', target)]


def paths(text):
    """Files and directories of the repository that are named as code."""
    return re.findall(
        r'`((?:sn_function|tests|docs|examples|\.github)/[\w./-]*'
        r'|[A-Z]+\.md|LICENSE|Makefile|setup\.py|pyproject\.toml)(?=[ `])',
        text)


@pytest.mark.parametrize('path', PAGES, ids=name_of)
def test_links_and_paths_exist(path):
    text = path.read_text(encoding='utf-8')
    missing = [target for target in links(text)
               if not (path.parent / target).exists()]
    missing += [name for name in paths(text) if not (ROOT / name).exists()]
    assert missing == []


def test_links_and_paths_are_found():
    text = ('[a](docs/a.rst#b) [c](https://c.org) [d](#d) `docs/e.rst` '
            '`CHANGELOG.md` `W` `setup.py` `tests/f.py -k g`')
    assert links(text) == ['docs/a.rst']
    assert paths(text) == [
        'docs/e.rst', 'CHANGELOG.md', 'setup.py', 'tests/f.py']
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert len(links(readme)) >= 8


@pytest.mark.parametrize('path', PAGES, ids=name_of)
def test_make_targets_exist(path):
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    targets = set(re.findall(r'(?m)^([a-z]+):', makefile))
    text = path.read_text(encoding='utf-8')
    named = re.findall(r'(?m)(?:`|^ {4}|\$ |PYTHON=\S+ )make ([a-z]+)', text)
    assert set(named) - targets == set()


def test_pictures_are_shown():
    pictures = [path.name for path in ROOT.glob('docs/**/*.png')
                if '_build' not in path.parts]
    text = '\n'.join(path.read_text(encoding='utf-8') for path in PAGES)
    assert len(pictures) >= 6
    assert [name for name in pictures if f'/{name}' not in text] == []


@pytest.mark.parametrize('name', [
    'sn_function', 'sn_function.distributed', 'sn_function.extensions',
    'sn_function.optimizer_hooks', 'sn_function.snapshot'])
def test_reference_has_every_public_name(name):
    text = (ROOT / 'docs/reference/index.rst').read_text(encoding='utf-8')
    below = text.split(f'automodule:: {name}\n')[1].split('automodule::')[0]
    module = importlib.import_module(name)
    public = {key for key in module.__all__ if not key.startswith('__')
              and not inspect.ismodule(getattr(module, key))}
    assert public - set(re.findall(r'(?m)^ {4}(\w+)$', below)) == set()


def test_inventories_have_what_is_used():
    text = '\n'.join(path.read_text(encoding='utf-8')
                     for path in [*DOCS, *MODULES])
    text = re.sub(r'\\\n *', '', text)     # of names in two lines
    entries = [line.split()[0] for path in ROOT.glob('docs/inventories/*.txt')
               for line in path.read_text(encoding='utf-8').splitlines()[3:]]
    assert len(entries) >= 20
    assert [name for name in entries if not re.search(
        rf'\b{re.escape(name)}\b', text)] == []


# Tables

RULE = ' *=+(?: +=+)+ *'
TERM = r'[^\s`]+|(?:``[^`]+``(?:, |$))+'


def broken_rows(text):
    """Rows of simple tables that may be the second half of another row.

    A line without a first cell goes on with the row above it, but a first cell
    that goes on in the next line is one more row.  So the first cells are one
    word, or literals, or the others are numbers.  The rest are list-tables.
    """
    found = []
    for table in re.findall(f'(?m)^{RULE}\\n(?:.+\\n)+', text):
        above, *lines = table.splitlines()
        starts = [match.start() for match in re.finditer('=+', above)]
        rules = [i for i, line in enumerate(lines) if re.fullmatch(RULE, line)]
        for line in lines[rules[0] + 1 if rules[1:] else 0:rules[-1]]:
            first, *others = (line[a:b].strip() for a, b in zip(
                starts, [*starts[1:], None]))
            if first and not (all(others) and (
                    re.fullmatch(TERM, first)
                    or all(re.match(r'[-<>]?\d|n/a', x) for x in others))):
                found.append(line)
    return found


def accidental_lists(text):
    """Lines that begin a list where a dash or a name is meant.

    As the only text of a cell, a dash begins an empty one.  An initial is a
    number, unless the next line goes on with the item.
    """
    return [match.group(0) for match in re.finditer(
        r'(?m)^ .*(?:, |- )"?[-+*]"?(?:,.*)?$'
        r'|^( *)(?:[*-] +)+[A-Za-z]\. .*(?!\n\1 +\S)$', text)]


@pytest.mark.parametrize('path', DOCS, ids=name_of)
def test_a_row_of_a_table_is_one_row(path):
    text = path.read_text(encoding='utf-8') + '\n'
    assert broken_rows(text) == []
    assert accidental_lists(text) == []


@pytest.mark.parametrize(('rows', 'broken'), [
    (['``a``, ``b``  text', '              goes on', 'c             on'], []),
    (['a long text   1', 'b             -0.5'], []),
    (['long text     other text', 'goes on       likewise'], [0, 1]),
    (['``a``         text', '``b``'], [1]),
], ids=['terms', 'numbers', 'texts', 'empty'])
def test_a_broken_row_of_a_table_is_noticed(rows, broken):
    rule = '============  =========='
    table = [rule, 'head          head', rule, *rows, rule]
    assert broken_rows('\n'.join(['x', '', *table, '', 'x'])) == [
        rows[i] for i in broken]


@pytest.mark.parametrize(('line', 'found'), [
    ('    a, -, b', True), ('    a, "-", b', True), ('    a, -', True),
    ('      - -', True), ('      - \\-', False), ('    a, -1, b', False),
    ('* G. H. Golub: Matrix Computations', True),
    ('      - T. Miyato: cGANs', True),
    ('* \\G. H. Golub: Matrix Computations', False),
    ('* J. Kuczynski: Estimating\n  the Largest Eigenvalue', False),
])
def test_an_accidental_list_is_noticed(line, found):
    assert bool(accidental_lists(f'x\n\n{line}\n\nx\n')) is found
