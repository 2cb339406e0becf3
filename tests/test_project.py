"""What stands in several files of the project is the same in all of them."""
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKFLOWS = sorted(ROOT.glob('.github/workflows/*.yml'))
ADDRESS = 'https://example.org/a/b'


def read(name):
    return (ROOT / name).read_text(encoding='utf-8')


@pytest.fixture
def setup(monkeypatch):
    """Runs setup.py: the names in it, with `given`, what it gives setup()."""
    # The real setuptools changes things that Chainer looks at.
    modules = {name: types.ModuleType(name) for name in (
        'setuptools', 'setuptools.command', 'setuptools.command.build')}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    modules['setuptools'].find_packages = lambda **kwargs: []
    modules['setuptools.command.build'].build = object
    monkeypatch.delenv('SN_FUNCTION_URL', raising=False)

    def run(root=ROOT):
        given = {}
        modules['setuptools'].setup = given.update
        return {**runpy.run_path(str(root / 'setup.py')), 'given': given}

    return run


@pytest.fixture
def copy(tmp_path):
    """A copy of what a wheel is made of, where one can be made."""
    # Not here: the real setuptools changes things that Chainer looks at.
    if subprocess.run([sys.executable, '-W', 'ignore', '-c', (
            'from setuptools import Distribution as D; '
            'D().get_command_class("bdist_wheel")')],
            stderr=subprocess.DEVNULL).returncode:
        pytest.skip('no setuptools that makes wheels, as in make matrix')
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(str(ROOT / name), str(tmp_path))
    shutil.copytree(str(ROOT / 'sn_function'), str(tmp_path / 'sn_function'),
                    ignore=shutil.ignore_patterns('__pycache__'))
    return tmp_path


def run_setup(path, *args):
    subprocess.run(
        [sys.executable, '-W', 'ignore', 'setup.py', '-q', *args],
        cwd=path, check=True, stdout=subprocess.PIPE)


def jobs(path):
    return yaml.safe_load(read(path))['jobs'].values()


class TestMetadata:

    def test_python_versions(self, setup):
        given = setup()['given']
        versions = [each.rpartition(' ')[2] for each in given['classifiers']
                    if re.search(r':: 3\.\d+$', each)]
        test, *_ = jobs('.github/workflows/test.yml')
        assert test['strategy']['matrix']['python'] == versions
        assert given['python_requires'] == f'>={versions[0]}'

    def test_systems(self, setup):
        systems = [each for each in setup()['given']['classifiers']
                   if each.startswith('Operating System')]
        assert systems == ['Operating System :: POSIX :: Linux']
        for path in WORKFLOWS:
            assert {job['runs-on'] for job in jobs(path)} == {'ubuntu-24.04'}

    def test_extras_are_documented(self, setup):
        table = read('docs/install.rst').partition('* - extra\n')[2]
        named = re.findall(r'(?m)^   \* - ``(\w+)``$', table)
        extras = setup()['given']['extras_require']
        assert sorted(named[:len(extras)]) == sorted(extras)

    def test_citation(self, setup):
        given = setup()['given']
        citation = yaml.safe_load(read('CITATION.cff'))
        assert citation['version'] == given['version']
        assert citation['license'] == given['license']
        assert citation['keywords'] == given['keywords']
        assert citation['authors'] == [{'name': given['author']}]
        assert 'MIT License' in read('LICENSE')
        assert given['author'] in read('LICENSE')


class TestAddress:

    @pytest.mark.parametrize('remote', [
        'git@example.org:a/b.git', 'git@example.org:a/b', 'example.org:a/b',
        'ssh://git@example.org/a/b.git', 'ssh://git@example.org:22/a/b.git',
        ADDRESS, f'{ADDRESS}/', f'{ADDRESS}.git',
        'https://token@example.org/a/b.git',
        'https://user:password@example.org/a/b',
        'ssh://user:password@example.org:22/a/b.git/'])
    def test_of_a_remote(self, setup, remote):
        assert setup()['web_address'](remote) == ADDRESS

    def test_of_a_remote_with_a_port(self, setup):
        assert setup()['web_address']('http://example.org:8/a/b.git') == (
            'http://example.org:8/a/b')

    @pytest.mark.parametrize('remote', [
        '', '../b.git', './a.b/c', '/srv/example.org/b.git', 'server:a/b',
        'file:///srv/b.git', 'git@example.org:/srv/b.git', 'C:\\a\\b',
        'C:/a/b', 'git://example.org/a/b.git', 'https://[::1]:8/a/b', 'gh:a/b',
        'git@example.org-work:a/b.git', 'ssh://git@server/a/b.git',
        'https://example.org/a/b?token=c', 'https://example.org/a b',
        'user.name:token@example.org/a/b', 'https://user:1/2@example.org/a'])
    def test_of_a_remote_that_has_no_page(self, setup, remote):
        assert setup()['web_address'](remote) == ''

    def test_in_the_metadata(self, setup, monkeypatch):
        monkeypatch.setenv('SN_FUNCTION_URL', f'{ADDRESS}.git')
        given = setup()['given']
        assert given['project_urls']['Source'] == ADDRESS
        assert all(url.startswith(ADDRESS)
                   for url in given['project_urls'].values())
        links = re.findall(r'\[[^]]*\]\(([^)]*)\)', given['long_description'])
        assert links
        assert [link for link in links if not link.startswith('https:')] == []

    def test_links_of_the_readme(self, setup, monkeypatch):
        monkeypatch.setenv('SN_FUNCTION_URL', ADDRESS)
        text = """\
[a](b.md#c) ![c
d](e.png) [![f](g.svg)](h.rst) [i][j] <a href="k"><img src="l.png">
[n](https://o) [p](#q) [r](mailto:s@t) [u](//v) `w[x](y)` <https://z>

[j]: a/b.rst
[k]: https://l

    a[0](b)

```python
a[0](b), href="c"
```
"""
        blob, raw = f'{ADDRESS}/blob/HEAD', f'{ADDRESS}/raw/HEAD'
        assert setup()['with_links'](text) == f"""\
[a]({blob}/b.md#c) ![c
d]({raw}/e.png) [![f]({raw}/g.svg)]({blob}/h.rst) [i][j] """ f"""\
<a href="{blob}/k"><img src="{raw}/l.png">
[n](https://o) [p](#q) [r](mailto:s@t) [u](//v) `w[x](y)` <https://z>

[j]: {blob}/a/b.rst
[k]: https://l

    a[0](b)

```python
a[0](b), href="c"
```
"""

    def test_comes_from_the_remote(self, setup, copy):
        # A repository around the copy is another's.
        git = ['git', '-C', str(copy.parent)]
        for directory, address in ((copy.parent, 'git@example.org:c/d'),
                                   (copy, 'git@example.org:a/b')):
            assert setup(copy)['given']['project_urls'] == {}
            git = ['git', '-C', str(directory)]
            subprocess.run([*git, 'init', '-q'], check=True)
            subprocess.run([*git, 'remote', 'add', 'origin', address],
                           check=True)
        assert setup(copy)['URL'] == ADDRESS

    def test_that_an_sdist_was_made_with(self, setup, copy):
        (copy / 'PKG-INFO').write_text(
            f'Name: sn_function\nProject-URL: Issues, {ADDRESS}/issues\n'
            f'Project-URL: Source, {ADDRESS}\n')
        assert setup(copy)['URL'] == ADDRESS
        (copy / 'PKG-INFO').write_text('Name: sn_function\n')
        assert setup(copy)['given']['project_urls'] == {}


class TestBuild:

    def test_what_builds_chainer(self):
        constraint = read('build-constraints.txt').strip()
        needed = f'build-constraint-dependencies = ["{constraint}"]'
        assert needed in read('pyproject.toml')
        assert needed in read('docs/install.rst')
        for name in ('docs/install.rst', 'Makefile', 'MANIFEST.in'):
            assert 'build-constraints.txt' in read(name)

    def test_first_commands_are_the_same(self):
        commands = []
        for name in ('README.md', 'docs/index.rst', 'docs/quickstart.rst'):
            block = re.search(r'(?m)^    (?:\$ )?git clone .*\n(?:    .*\n)+',
                              read(name))[0]
            commands.append([line.split('#')[0].strip(' $')
                             for line in block.splitlines()])
        assert commands[0] == commands[1] == commands[2]
        for command in commands[0]:
            assert f'    $ {command}' in read('docs/install.rst')

    def test_packs_no_module_that_was_deleted(self, copy):
        def packed():
            run_setup(copy, 'bdist_wheel')
            wheel, = (copy / 'dist').glob('*.whl')
            with zipfile.ZipFile(str(wheel)) as file:
                return set(file.namelist())

        (copy / 'sn_function' / '_gone.py').write_text('')
        assert 'sn_function/_gone.py' in packed()
        (copy / 'sn_function' / '_gone.py').unlink()
        names = packed()
        assert 'sn_function/_gone.py' not in names
        assert {'sn_function/py.typed', 'sn_function/__init__.py',
                'sn_function/_arithmetic/block.cuh'} <= names
        # Another build at the same time would find it there.
        assert not (copy / 'build').exists()

    def test_deletes_nothing_where_the_user_wants_it(self, copy):
        before = {path for path in copy.rglob('*') if path.is_file()}
        (copy / 'sn_function' / 'mine.txt').write_text('')
        run_setup(copy, 'build', '--build-lib', '.')
        assert (copy / 'sn_function' / 'mine.txt').exists()
        assert {path for path in before if not path.exists()} == set()
        run_setup(copy, 'build', '--build-base', 'there', 'bdist_wheel')
        assert (copy / 'there' / 'lib' / 'sn_function').exists()

    @pytest.mark.slow
    @pytest.mark.skipif(not (ROOT / '.git').exists(),
                        reason='this is what an sdist has, no repository')
    def test_sdist_has_every_file(self, tmp_path):
        listed = subprocess.run(
            ['git', 'ls-files', '-z'], cwd=str(ROOT), check=True,
            stdout=subprocess.PIPE, text=True).stdout.split('\0')
        files = [name for name in listed if name and (ROOT / name).exists()]
        for name in files:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(ROOT / name), str(tmp_path / name))
        run_setup(tmp_path, 'sdist')
        archive, = (tmp_path / 'dist').glob('*.tar.gz')
        with tarfile.open(str(archive)) as tar:
            packed = {name.partition('/')[2] for name in tar.getnames()}
        assert [name for name in files if name not in packed] == []


class TestYaml:

    @pytest.mark.parametrize('path', WORKFLOWS, ids=os.path.basename)
    def test_workflows(self, path):
        workflow = yaml.safe_load(read(path))
        targets = re.findall(r'(?m)^([\w-]+):', read('Makefile'))
        # YAML 1.1 reads `on` as true.
        assert {'name', True, 'permissions', 'jobs'} <= set(workflow)
        for job in workflow['jobs'].values():
            assert job['timeout-minutes'] <= 60
            assert job.get('needs', 'build') in workflow['jobs'] or (
                'needs' not in job)
            for step in job['steps']:
                assert ('uses' in step) != ('run' in step)
                for target in re.findall(r'make ([\w-]+)',
                                         step.get('run', '')):
                    assert target in targets

    @pytest.mark.parametrize('name', [
        'CONTRIBUTING.md', 'README.md', 'docs/install.rst'])
    def test_targets_that_are_named(self, name):
        named = re.findall(r'(?m)(?:^ +(?:\$ )?|`)make ([\w-]+)', read(name))
        targets = re.findall(r'(?m)^([\w-]+):', read('Makefile'))
        assert named
        assert set(named) <= set(targets)

    def test_bug_report_asks_the_doctor(self):
        form = yaml.safe_load(read('.github/ISSUE_TEMPLATE/bug_report.yml'))
        assert any('python -m sn_function doctor' in
                   each['attributes'].get('description', '')
                   for each in form['body'])

    @pytest.mark.parametrize('path', [
        *sorted(ROOT.glob('.github/ISSUE_TEMPLATE/*.yml')),
        ROOT / '.pre-commit-config.yaml'], ids=os.path.basename)
    def test_others_can_be_read(self, path):
        assert isinstance(yaml.safe_load(read(path)), dict)


class TestSortedImports:
    """Those that docs/install.rst shows stay as they are."""

    SORTED = '''\
import os

import sn_function{comment}
{line}import chainer
import numpy

print(os, sn_function, chainer, numpy)
'''

    def leaves_alone(self, path, text, *args):
        (path / 'program.py').write_text(text)
        return subprocess.run(
            [sys.executable, '-m', 'ruff', 'check', '--no-cache', '--select',
             'I', *args, 'program.py'], cwd=str(path),
            stdout=subprocess.PIPE).returncode == 0

    def test_by_a_comment(self, tmp_path):
        comment = '  # isort: split'
        assert f'import sn_function{comment}\n' in read('docs/install.rst')
        assert self.leaves_alone(
            tmp_path, self.SORTED.format(comment=comment, line='\n'))

    def test_by_a_setting(self, tmp_path):
        text = self.SORTED.format(comment='', line='')
        setting = '[tool.ruff.lint.isort]\nforce-to-top = ["sn_function"]\n'
        assert setting in re.sub('(?m)^    ', '', read('docs/install.rst'))
        assert not self.leaves_alone(tmp_path, text)
        (tmp_path / 'pyproject.toml').write_text(setting)
        assert self.leaves_alone(tmp_path, text)
