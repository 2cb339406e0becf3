"""Names of the package: each is documented once, at its public home."""
import re
from html import escape

from docutils import nodes
from sphinx.domains.python import PyObject

import sn_function


def resolve(app, env, node, contnode):
    """A reference by the module that defines a name, not by the package.

    ``sn_function.functions.spectral_norm`` is ``sn_function.spectral_norm``.
    """
    target = node.get('reftarget', '')
    name = target.rpartition('.')[2]
    if (node.get('refdomain') != 'py' or name not in sn_function.__all__
            or not target.startswith('sn_function.')):
        return None
    return env.domains['py'].resolve_xref(
        env, node['refdoc'], app.builder, node['reftype'],
        f'sn_function.{name}', node, contnode)


def readable(app, what, name, obj, options, signature, returned):
    if not signature:
        return None
    # What an error is built from is of no use to who catches it.
    if what == 'exception':
        return '', None
    # iter, not <built-in function iter>
    return re.sub(r'<.*?function (\w+).*?>', r'\1', signature), returned


def from_the_top(app, what, name, obj, options, lines):
    """Docstrings name pages as seen from docs/, wherever they are shown."""
    lines[:] = [re.sub(r':doc:`(?=\w)', ':doc:`/', line) for line in lines]


def skip_fields(app, what, name, obj, skip, options):
    """Fields of a named tuple are described by its docstring, if at all."""
    return type(obj).__name__ == '_tuplegetter' or None


def without_source(app, pagename, templatename, context, doctree):
    """The page of a name is generated: there is nothing to edit."""
    if pagename.startswith('reference/generated/'):
        context['page_source_suffix'] = ''


def describe(app, pagename, templatename, context, doctree):
    """The first paragraph of a page is what search engines show of it."""
    text = next((paragraph.astext() for paragraph in
                 doctree.findall(nodes.paragraph)), '') if doctree else ''
    if text:
        text = escape(' '.join(text.split()))
        context['metatags'] += f'<meta name="description" content="{text}">'


def setup(app):
    # "Variables" would be those of Chainer.
    for field in PyObject.doc_field_types:
        if field.name == 'variable':
            field.label = 'Attributes'
    app.setup_extension('sphinx.ext.autodoc')
    app.connect('missing-reference', resolve)
    app.connect('autodoc-process-signature', readable)
    app.connect('autodoc-process-docstring', from_the_top)
    app.connect('autodoc-skip-member', skip_fields)
    app.connect('html-page-context', without_source)
    app.connect('html-page-context', describe)
    return {'parallel_read_safe': True}
