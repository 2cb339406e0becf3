"""Sphinx settings.  `make docs` builds, without a network."""
import os
import pathlib
import sys
from importlib import metadata

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / '_ext'))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import sn_function  # before chainer, which it makes importable

project = 'sn_function'
author = copyright = 'the sn_function developers'
version = release = sn_function.__version__

extensions = [
    'matplotlib.sphinxext.plot_directive',
    'myst_parser',
    'public_names',
    'sphinx.ext.autodoc',
    'sphinx.ext.autosummary',
    'sphinx.ext.intersphinx',
    'sphinx.ext.mathjax',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
    'sphinx_copybutton',
]
# Markdown is only included, by changelog.rst.
source_suffix = {'.rst': 'restructuredtext'}
exclude_patterns = ['_build', 'benchmarks']
templates_path = ['_templates']
nitpicky = True

# Types and shapes are in the "Args" of the docstrings.
autodoc_typehints = 'none'
autodoc_member_order = 'bysource'
# Files of these names would be one where case makes no difference.
autosummary_filename_map = {'sn_function.Summary': 'sn_function.Summary-type'}
napoleon_numpy_docstring = False
# Else an attribute of both docstring and class is described twice.
napoleon_use_ivar = True
# Beyond this a signature has one argument a line.
maximum_signature_line_length = 72

# The names in use, each with its page, are kept as inventories of version 1,
# which are plain text: nothing is fetched.
intersphinx_mapping = {
    name: (url, f'inventories/{name}.txt') for name, url in {
        'chainer': 'https://docs.chainer.org/en/stable/',
        'numpy': 'https://numpy.org/doc/stable/',
        'python': 'https://docs.python.org/3/',
    }.items()}

# MathJax of the package sphinx-mathjax-offline; its one file for SVG loads no
# fonts, nor anything else.
mathjax_path = 'tex-svg.js'
html_static_path = ['_static', *(
    str(file.locate()) for file in metadata.files('sphinx-mathjax-offline')
    if file.name == mathjax_path)]

plot_formats = [('png', 144)]
plot_html_show_formats = plot_html_show_source_link = False
plot_rcparams = {
    'axes.spines.right': False,
    'axes.spines.top': False,
    'figure.constrained_layout.use': True,
    'figure.figsize': (7, 3.5),
    'savefig.facecolor': 'white',
}
plot_apply_rcparams = True

# Prompts are not copied, nor what is printed.
copybutton_prompt_text = r'>>> |\.\.\.(?: |$)|\$ '
copybutton_prompt_is_regexp = True

html_theme = 'furo'
html_title = f'sn_function {version}'
html_css_files = ['custom.css']
html_favicon = '_static/favicon.svg'
pygments_dark_style = 'github-dark'
html_show_sourcelink = False
html_copy_source = False
# No page leads to them; the reference has all names.
html_use_index = html_domain_indices = False


def repository():
    """Address of the repository, where it is known."""
    try:
        urls = metadata.metadata('sn_function').get_all('Project-URL') or []
    except metadata.PackageNotFoundError:
        urls = []
    urls = dict(url.split(', ', 1) for url in urls)
    return os.environ.get('SN_FUNCTION_URL') or urls.get('Source', '')


# Those whose pages to edit Furo knows.
if repository().startswith((
        'https://github.com/', 'https://gitlab.com/',
        'https://bitbucket.org/')):
    html_theme_options = {
        'source_repository': repository(),
        'source_branch': 'main',
        'source_directory': 'docs/',
    }
