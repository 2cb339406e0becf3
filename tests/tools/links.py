"""Checks the links of the built documentation, without a network.

``python -m tests.tools.links docs/_build/html`` lists what is linked outside
of it, as ``make docs`` does.  The exit code is 1 if a page or an anchor inside
is missing, or if a browser would load anything from elsewhere.
"""
import argparse
import pathlib
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):

    def __init__(self, path):
        super().__init__()
        self.anchors = {''}
        self.links = []     # where to, and whether a browser loads it
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.update(attrs[key] for key in ('id', 'name')
                            if attrs.get(key))
        if attrs.get('href'):
            self.links.append((attrs['href'], tag == 'link'))
        if attrs.get('src'):
            self.links.append((attrs['src'], True))


def check(root):
    """Returns what is wrong, and the addresses outside of a directory."""
    root = root.resolve()
    pages = {path: Page(path) for path in sorted(root.rglob('*.html'))}
    faults, outside = [], set()
    for path, page in pages.items():
        name = path.relative_to(root).as_posix()
        for link, is_loaded in page.links:
            url = urlsplit(link)
            if url.scheme == 'data':
                continue
            if url.scheme or url.netloc:
                outside.add(link)
                if is_loaded:
                    faults.append(f'{name}: {link} is loaded from elsewhere')
                continue
            target = (path.parent / unquote(url.path)).resolve()
            if url.path in ('', '#'):
                target = path
            if not target.is_file():
                faults.append(f'{name}: {link} does not exist')
            elif target in pages and (
                    unquote(url.fragment) not in pages[target].anchors):
                faults.append(f'{name}: {link} has no such anchor')
    return sorted(set(faults)), sorted(outside)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('html', type=pathlib.Path)
    faults, outside = check(parser.parse_args().html)
    print(*outside, sep='\n')
    print(*faults, sep='\n', file=sys.stderr)
    return 1 if faults else 0


if __name__ == '__main__':
    sys.exit(main())
