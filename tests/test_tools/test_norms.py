"""What tests.tools.norms draws: the norms of one layer, of both hooks."""
import pytest

from tests.tools import estimates, norms


def test_picture(capsys, monkeypatch, tmp_path):
    pytest.importorskip('matplotlib')
    trained = []

    def watched(settings, seed, n_iterations, n_first):
        trained.append((settings, seed, n_iterations, n_first))
        excess = 10 if settings == {'hook': 'chainer'} else 1
        # Two calls in a step, of which the first is drawn.
        return {'excess': {'convs/1': [excess, 0, 3 * excess, 0], 'embed': []}}

    monkeypatch.setattr(estimates, 'watched', watched)
    path = tmp_path / 'norms.png'
    norms.main(['--seed', '3', '--iterations', '10', '--out', str(path)])
    assert trained == [({'hook': 'chainer'}, 3, 10, 0),
                       ({'n_vectors': 16}, 3, 10, 0)]
    assert capsys.readouterr().out.splitlines() == [
        "Chainer's hook: median 1.2000, most 1.3000",
        'sn_function, n_vectors=16: median 1.0200, most 1.0300']
    assert path.read_bytes().startswith(b'\x89PNG')
