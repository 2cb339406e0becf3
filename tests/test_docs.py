"""Every example in the documentation runs; what it points to exists."""
import doctest
import importlib
import pathlib
import re
import warnings

import sn_function  # isort: skip  # before chainer, which it repairs

import pytest

from tests.tools import defects

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = sorted(ROOT.glob('docs/*.rst'))
MARKDOWN = [*sorted(ROOT.glob('*.md')), *sorted(ROOT.glob('.github/*.md'))]
MODULES = sorted(ROOT.glob('sn_function/**/*.py'))

# The least number of examples in a file: none is lost without a word.
LEAST = {
    'README.md': 22,
    'docs/accuracy.rst': 2,
    'docs/examples.rst': 22,
    'docs/index.rst': 12,
    'docs/install.rst': 3,
    'docs/mathematics.rst': 32,
    'docs/models.rst': 27,
    'docs/monitoring.rst': 60,
    'docs/migration.rst': 38,
    'docs/old_code.rst': 4,
    'docs/performance.rst': 13,
    'docs/shipping.rst': 33,
    'docs/training.rst': 50,
    'sn_function/bake.py': 8,
    'sn_function/chain.py': 11,
    'sn_function/extensions.py': 8,
    'sn_function/functions.py': 19,
    'sn_function/link_hooks.py': 8,
    'sn_function/optimizer_hooks.py': 16,
    'sn_function/snapshot.py': 19,
}

# What comes with an extra of its own.
NEEDS = {'docs/shipping.rst': ['onnx', 'onnxruntime']}


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


def check(tests, least):
    """Runs the tests and raises an AssertionError unless all is well."""
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
    assert count >= least, f'{count} examples, where {least} are expected'


@pytest.mark.parametrize('name', sorted(
    {name_of(path) for path in [*DOCS, *MARKDOWN, *MODULES]} | set(LEAST)))
def test_examples(name):
    for package in NEEDS.get(name, []):
        pytest.importorskip(package)
    check(collect(name), LEAST.get(name, 0))


@pytest.mark.parametrize('text', [
    '>>> 1 + 1\n3\n',
    '>>> 1 / 0\n',
    '>>> import warnings\n>>> warnings.warn("so")\n',
    '```python\n>>> 1 + 1\n3\n```\n',
], ids=['value', 'exception', 'warning', 'markdown'])
def test_a_wrong_example_is_noticed(text):
    with pytest.raises(AssertionError, match='Failed example'):
        check([parse(text, 'text')], 1)


def test_a_lost_example_is_noticed():
    check([parse('```python\n>>> 1 + 1\n2\n```\n', 'text')], 1)
    with pytest.raises(AssertionError, match='1 examples, where 2'):
        check([parse('>>> 1 + 1\n2\n', 'text')], 2)
    with pytest.raises(AssertionError, match='skipped'):
        check([parse('>>> 1 + 1  # doctest: +SKIP\n3\n', 'text')], 1)


@pytest.mark.parametrize('path', [*DOCS, *MARKDOWN], ids=name_of)
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


@pytest.mark.parametrize('path', [*DOCS, *MARKDOWN], ids=name_of)
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


@pytest.mark.parametrize('path', [*DOCS, *MARKDOWN], ids=name_of)
def test_make_targets_exist(path):
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    targets = set(re.findall(r'(?m)^([a-z]+):', makefile))
    text = path.read_text(encoding='utf-8')
    named = re.findall(r'(?m)(?:`|^ {4}|\$ |PYTHON=\S+ )make ([a-z]+)', text)
    assert set(named) - targets == set()


def test_readme_has_every_defect_with_its_test():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    text = text.split('## What it does better')[1].split('Beyond that')[0]
    rows = [line.strip('| ').split(' | ') for line in text.splitlines()
            if line.startswith('| ') and not line.startswith('| ---')]
    assert {(row[0], row[-1].strip('`')) for row in rows[1:]} == {
        (case.name, case.run.__name__) for case in defects.CASES}
