"""What the shell offers before a file is opened, without imports."""

# The layouts that are written; see :mod:`.layouts`.
LAYOUTS = 'chainer', 'sngan-projection', 'torch', 'torch-parametrized'
# That of the hook, where it is not given.
N_WARMUP = 15
