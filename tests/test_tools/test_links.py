"""A link that leads nowhere is found, and one that leads somewhere is not."""
from tests.tools import links


def test_links_are_followed(tmp_path, monkeypatch, capsys):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'style.css').touch()
    (tmp_path / 'index.html').write_text(
        '<link href="style.css?v=1"><a href="a/b.html#c">x</a>'
        '<a href="#">x</a><a href="#top" id="top">x</a>'
        '<a href="https://example.org">x</a>')
    page = tmp_path / 'a' / 'b.html'
    page.write_text('<p id="c"><a href="../index.html#top">x</a>')
    monkeypatch.setattr('sys.argv', ['links', str(tmp_path)])
    assert links.main() == 0
    assert capsys.readouterr().out == 'https://example.org\n'

    page.write_text('<img src="d.png"><a href="../index.html#d">x</a>'
                    '<script src="//example.org/x.js"></script>')
    assert links.main() == 1
    assert capsys.readouterr().err.splitlines() == [
        'a/b.html: ../index.html#d has no such anchor',
        'a/b.html: //example.org/x.js is loaded from elsewhere',
        'a/b.html: d.png does not exist',
        'index.html: a/b.html#c has no such anchor']
