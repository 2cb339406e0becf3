"""Names of the package: each is documented once, at its public home."""
import re

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


def without_arguments(app, what, name, obj, options, signature, returned):
    """What an error is built from is of no use to who catches it."""
    return ('', None) if what == 'exception' and signature else None


def from_the_top(app, what, name, obj, options, lines):
    """Docstrings name pages as seen from docs/, wherever they are shown."""
    lines[:] = [re.sub(r':doc:`(?=\w)', ':doc:`/', line) for line in lines]


def setup(app):
    app.setup_extension('sphinx.ext.autodoc')
    app.connect('missing-reference', resolve)
    app.connect('autodoc-process-signature', without_arguments)
    app.connect('autodoc-process-docstring', from_the_top)
    return {'parallel_read_safe': True}
