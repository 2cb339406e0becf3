"""The errors of docs/troubleshooting.rst that no example of it raises."""
import pathlib
import re

from sn_function import errors

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'troubleshooting.rst'


def test_messages_that_are_not_raised():
    """The examples of the page raise the others: see tests/test_docs.py."""
    text = PAGE.read_text(encoding='utf-8')
    quoted = re.findall(
        r'(?m)^    (sn_function\.errors\.(?:.|\n    )+)', text)
    error = errors.HookedExportError(['/', '/l1', '/l2'])
    assert [' '.join(each.split()) for each in quoted] == [
        f'sn_function.errors.HookedExportError: {error}']
