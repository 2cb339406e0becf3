"""Sphinx settings.  `make docs` builds; warnings are errors."""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import sn_function  # before chainer, which it makes importable

project = 'sn_function'
author = copyright = 'the sn_function developers'
version = release = sn_function.__version__

extensions = [
    'sphinx.ext.autodoc',
    'sphinx.ext.mathjax',
    'sphinx.ext.napoleon',
]
exclude_patterns = ['_build']
html_theme = 'furo'
html_title = f'sn_function {version}'
html_show_sourcelink = False

# Types and shapes are in the "Args" of the docstrings.
autodoc_typehints = 'none'
autodoc_member_order = 'bysource'
napoleon_numpy_docstring = False
# Else an attribute of both docstring and class is described twice.
napoleon_use_ivar = True
# References to Chainer's own classes stay plain text: to link them,
# sphinx.ext.intersphinx would fetch its documentation, and the build needs no
# network.
