"""Variables: the nodes of Chainer's graph."""
