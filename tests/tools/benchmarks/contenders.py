"""What is timed on one weight: forward and backward of its normalization.

PyTorch and JAX are imported only when they are measured.
"""
from __future__ import annotations

import functools
import importlib
import math
from typing import Any, Callable, NamedTuple, Sequence

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import link_hooks

from tests.tools.benchmarks.report import BUILT_IN, DTYPES, text_of

# The package of each peer.
PEERS = {'PyTorch': 'torch', 'torch.compile': 'torch', 'JAX': 'jax'}


class Case(NamedTuple):
    """What is normalized, the vector it starts from, and gY."""

    W: Any
    u: Any
    gY: Any
    n_power_iteration: int = 1


class Contender(NamedTuple):
    """What is timed; ``backward`` takes what ``forward`` returns."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]
    clear: Callable[[], Any]
    is_traced: bool = True

    def step(self) -> Any:
        """Returns the gradient with respect to the weight, or a list."""
        self.clear()
        return self.backward(self.forward())


def case_of(
        shape: Sequence[int], dtype: str = 'float32',
        n_power_iteration: int = 1) -> Case:
    """A weight as an initializer draws it."""
    random = np.random.RandomState(0)
    W, u, gY = (random.standard_normal(size).astype(DTYPES[dtype])
                for size in (shape, shape[:1], shape))
    W *= math.sqrt(shape[0] / math.prod(shape))
    return Case(W, u, gY, n_power_iteration)


# Chainer

def differentiated(
        forward: Callable[[], Any], W: chainer.Parameter, gY: Any
) -> Contender:
    def backward(Y: Any) -> Any:
        Y.grad = gY
        Y.backward()
        return W.grad

    return Contender(forward, backward, W.cleargrad)


class Use(chainer.FunctionNode):
    """``(x, W) -> x``, whose gradient with respect to W is given."""

    def __init__(self, gY: Any) -> None:
        super().__init__()
        self.gY = gY

    def forward(self, inputs: Any) -> Any:
        self.retain_inputs((1,))  # as a convolution does
        return inputs[0],

    def backward(self, indexes: Any, grad_outputs: Any) -> Any:
        return tuple(grad_outputs[0] if i == 0 else chainer.Variable(self.gY)
                     for i in indexes)


class Weight(L.Linear):
    """A layer without a cost of its own; the hook of a chain takes it."""

    def __init__(self, W: Any, gY: Any) -> None:
        super().__init__(None, len(W), nobias=True)
        self.gY = gY
        with self.init_scope():
            # An array of its own, on memory that others may share.
            self.W = chainer.Parameter(W[...])

    def forward(self, x: Any) -> Any:
        return Use(self.gY).apply((x, self.W))[0]


def hooked_link(hook: Any, case: Case) -> Weight:
    """With either hook."""
    link = Weight(case.W, case.gY)
    link.add_hook(hook)
    link.W_u[...] = case.u
    return link


def hooked(hook: Any, case: Case) -> Contender:
    link = hooked_link(hook, case)
    return differentiated(
        lambda: hook.normalize_weight(link), link.W, case.gY)


def built_in(n_power_iteration: int) -> Any:
    return link_hooks.SpectralNormalization(n_power_iteration)


def ours(n_power_iteration: int, **settings: Any) -> Any:
    return sn_function.SpectralNormalization(
        n_power_iteration, n_warmup=0, **settings)


def composition(case: Case) -> Contender:
    """What one writes without a hook; the gradient passes through it all."""
    parameter = chainer.Parameter(case.W)
    state = case.u.copy()

    def unit(x: Any) -> Any:
        return x / F.broadcast_to(F.sqrt(F.sum(x * x)), x.shape)

    def forward() -> Any:
        W = F.reshape(parameter, (len(case.W), -1))
        u = chainer.as_variable(state.copy())
        for _ in range(case.n_power_iteration):
            t = F.matmul(W, unit(F.matmul(u, W)))
            u = unit(t)
        state[...] = u.array
        sigma = F.matmul(u, t)
        return parameter / F.broadcast_to(sigma, parameter.shape)

    return differentiated(forward, parameter, case.gY)


class Identity(chainer.FunctionNode):
    """A node, and one more for its gradient, as ours has."""

    def forward(self, inputs: Any) -> Any:
        return inputs

    def backward(self, indexes: Any, grad_outputs: Any) -> Any:
        return Identity().apply(grad_outputs)


def identity(case: Case) -> Contender:
    W = chainer.Parameter(case.W)
    return differentiated(lambda: Identity().apply((W,))[0], W, case.gY)


def copy(case: Case) -> Contender:
    target = np.empty_like(case.W)

    def forward() -> Any:
        np.copyto(target, case.W)
        return target

    return Contender(forward, lambda Y: Y, lambda: None)


# PyTorch

def torch_module(case: Case) -> Any:
    """A layer that has that weight, with PyTorch's parametrization."""
    import torch

    m, n, *ksize = case.W.shape
    kinds: list[Any] = [
        torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d]
    module = kinds[len(ksize)](
        n, m, *[tuple(ksize)][:len(ksize)], bias=False)
    module.weight.data = torch.from_numpy(case.W.copy())
    torch.nn.utils.parametrizations.spectral_norm(
        module, n_power_iterations=case.n_power_iteration)
    return module


def torch_contender(cases: Sequence[Case]) -> Contender:
    import torch

    modules = list(map(torch_module, cases))
    Ws = [module.parametrizations.weight.original for module in modules]
    return _of_torch(
        torch, cases, Ws, lambda: [module.weight for module in modules])


def compiled_contender(cases: Sequence[Case]) -> Contender:
    """The same arithmetic as a function, by ``torch.compile``."""
    import torch

    def normalize(Ws: Any, us: Any) -> Any:
        Ys, new = [], []
        for W, u, case in zip(Ws, us, cases):
            A = W.flatten(1)
            with torch.no_grad():
                for _ in range(case.n_power_iteration):
                    v = torch.nn.functional.normalize(A.T @ u, dim=0)
                    u = torch.nn.functional.normalize(A @ v, dim=0)
            Ys.append(W / torch.dot(u, A @ v))
            new.append(u)
        return Ys, new

    torch.compiler.reset()  # or it gives up after some number of shapes
    compiled: Any = torch.compile(normalize)
    Ws = [torch.nn.Parameter(torch.from_numpy(case.W.copy()))
          for case in cases]
    us = [torch.from_numpy(case.u.copy()) for case in cases]

    def forward() -> Any:
        Ys, us[:] = compiled(Ws, us)
        return Ys

    return _of_torch(torch, cases, Ws, forward)


def _of_torch(
        torch: Any, cases: Sequence[Case], Ws: Any,
        forward: Callable[[], Any]) -> Contender:
    gYs = [torch.from_numpy(case.gY) for case in cases]

    def backward(Ys: Any) -> Any:
        torch.autograd.backward(Ys, gYs)
        return [W.grad.numpy() for W in Ws]

    def clear() -> None:
        for W in Ws:
            W.grad = None

    return Contender(forward, backward, clear, False)


# JAX

def jax_contender(cases: Sequence[Case]) -> Contender:
    """Forward and backward in one function, by ``jax.jit``."""
    import jax

    def normalize(W: Any, u: Any, n_power_iteration: int) -> Any:
        A = W.reshape(len(W), -1)
        constant = jax.lax.stop_gradient(A)
        for _ in range(n_power_iteration):
            v = constant.T @ u
            v /= jax.numpy.linalg.norm(v)
            u = constant @ v
            u /= jax.numpy.linalg.norm(u)
        return W / (u @ (A @ v)), u

    def step(Ws: Any, us: Any, gYs: Any) -> Any:
        found = []
        for W, u, gY, case in zip(Ws, us, gYs, cases):
            _, vjp, new = jax.vjp(
                lambda W, u=u, case=case: normalize(
                    W, u, case.n_power_iteration), W, has_aux=True)
            found.append((*vjp(gY), new))
        return [gW for gW, _ in found], [u for _, u in found]

    compiled = jax.jit(step)
    Ws, us, gYs = (
        [jax.numpy.asarray(x) for x in xs] for xs in zip(
            *[case[:3] for case in cases]))

    def backward(_: Any) -> Any:
        gWs, us[:] = compiled(Ws, us, gYs)
        return [np.asarray(gW) for gW in jax.block_until_ready(gWs)]

    return Contender(lambda: None, backward, lambda: None, False)


def why_not(peer: str) -> str | None:
    """Why a peer cannot be measured, or ``None``."""
    try:
        importlib.import_module(PEERS[peer])
    except Exception as error:
        return text_of(error)
    return None


OF_PEERS: dict[str, Callable[[Sequence[Case]], Contender]] = {
    'PyTorch': torch_contender, 'torch.compile': compiled_contender,
    'JAX': jax_contender}

# The function that makes each; it may raise anything.
CONTENDERS: dict[str, Callable[[Case], Contender]] = {
    BUILT_IN: lambda case: hooked(built_in(case.n_power_iteration), case),
    'exact': lambda case: hooked(ours(case.n_power_iteration), case),
    'detached': lambda case: hooked(
        ours(case.n_power_iteration, detach_uv=True), case),
    'composition': composition, 'identity': identity, 'copy': copy,
    **{name: lambda case, make=make: make([case])  # type: ignore
       for name, make in OF_PEERS.items()}}


def makers(case: Case) -> dict[str, Callable[[], Contender]]:
    return {name: functools.partial(make, case)
            for name, make in CONTENDERS.items()
            if name not in PEERS or why_not(name) is None}
