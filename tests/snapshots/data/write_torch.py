"""Writes state dicts of real PyTorch modules, and what they compute.

    python tests/snapshots/data/write_torch.py

needs torch and safetensors.  `tests/test_snapshot.py` reads what it writes,
so that the tests need no PyTorch.  The vectors have not converged.
"""
import pathlib

import numpy
import safetensors.torch
import torch
from torch import nn

HERE = pathlib.Path(__file__).parent
SPECTRAL_NORMS = {
    'torch': nn.utils.spectral_norm,
    'torch-parametrized': nn.utils.parametrizations.spectral_norm,
}


def make(spectral_norm):
    """Modules of each kind, after two calls in training mode."""
    torch.manual_seed(0)
    modules = nn.ModuleDict({
        'linear': spectral_norm(nn.Linear(5, 7)),
        'block': nn.Sequential(
            spectral_norm(nn.Conv2d(3, 6, 3, bias=False)),
            nn.BatchNorm2d(6)),
        'deconv': spectral_norm(nn.ConvTranspose2d(4, 6, 3)),
        'square': spectral_norm(nn.ConvTranspose2d(5, 5, 3)),
        'embed': spectral_norm(nn.Embedding(8, 4)),
        'plain': nn.Linear(3, 2),
    })
    for _ in range(2):
        modules['linear'](torch.randn(2, 5))
        modules['block'](torch.randn(2, 3, 4, 4))
        modules['deconv'](torch.randn(2, 4, 3, 3))
        modules['square'](torch.randn(2, 5, 3, 3))
        modules['embed'](torch.tensor([1, 2]))
    return modules


def normalized(modules):
    """The weights in test mode, by the path of their module."""
    modules.eval()
    modules['linear'](torch.randn(2, 5))
    modules['block'](torch.randn(2, 3, 4, 4))
    modules['deconv'](torch.randn(2, 4, 3, 3))
    modules['square'](torch.randn(2, 5, 3, 3))
    modules['embed'](torch.tensor([1, 2]))
    return {
        name: modules.get_submodule(name).weight.detach().numpy()
        for name in ('linear', 'block.0', 'deconv', 'square', 'embed')}


def main():
    for name, spectral_norm in SPECTRAL_NORMS.items():
        modules = make(spectral_norm)
        state = modules.state_dict()
        safetensors.torch.save_file(state, HERE / f'{name}.safetensors')
        numpy.savez_compressed(HERE / f'{name}.npz', **{
            key: value.numpy() for key, value in state.items()})
        numpy.savez_compressed(
            HERE / f'{name}-normalized.npz', **normalized(modules))


if __name__ == '__main__':
    main()
