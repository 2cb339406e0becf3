"""The oracle: NumPy in float64 or complex128, without code of the package.

Everything is analytic (a norm is ``sqrt(sum(x * x))``, without ``abs``), so
that a complex step gives derivatives to rounding error.
"""
import numpy as np


def as_matrix(W, axis):
    return np.moveaxis(W, axis, 0).reshape(W.shape[axis], -1)


def _norm(x):
    return np.sqrt(np.sum(x * x))


# OpenBLAS may also compute with memory beyond the end of a vector, and drop
# the result; NumPy reports the floating point flag that this raises.
@np.errstate(invalid='ignore')
def settled(W, u, n_power_iteration=1, axis=0, limit=1e-3, n_warmup=15):
    """The vector that a hook starts from, as u may be of another weight.

    The default limit is that of test mode.
    """
    A, K = as_matrix(W, axis), n_power_iteration
    u = u / np.linalg.norm(u)
    for _ in range(-(-n_warmup // K)):
        t = A @ (A.T @ u)
        if u @ t >= (1 - limit) * np.linalg.norm(t):
            break
        limit = 1e-3
        u = power_iteration(W, u, K, axis)[0]
    return u


def power_iteration(W, u, n_power_iteration=1, axis=0):
    """Returns u_K, v_K and sigma."""
    A = as_matrix(W, axis)
    for _ in range(n_power_iteration):
        s = A.T @ u
        v = s / _norm(s)
        t = A @ v
        u = t / _norm(t)
    return u, v, _norm(t)


def spectral_normalize(W, u, n_power_iteration=1, gamma=1.0, factor=1.0,
                       eps=1e-6, axis=0, uv=None):
    """Returns Y and sigma; ``uv``, if given, are u and v as constants."""
    W = np.asarray(W)
    W = W.astype(np.result_type(W, np.float64))
    if uv is None:
        _, _, sigma = power_iteration(W, u, n_power_iteration, axis)
    else:
        sigma = uv[0] @ as_matrix(W, axis) @ uv[1]
    floored = sigma if sigma.real >= eps else eps
    return gamma * factor * W / floored, sigma


def span_norm(W, U, axis=0):
    """The norm of W on the span of the rows of U: u, v and sigma.

    Analytic in W, as a general complex matrix is decomposed.
    """
    Q = np.linalg.qr(np.asarray(U, dtype=np.float64).T)[0].T
    S = Q @ as_matrix(W, axis)
    values, vectors = np.linalg.eig(S @ S.T)
    i = np.argmax(values.real)
    c = vectors[:, i] / _norm(vectors[:, i])
    sigma = np.sqrt(values[i])
    return c @ Q, c @ S / sigma, sigma


def moved(W, U, axis=0):
    """A basis of the span that follows that of the rows of U."""
    A, Q = as_matrix(W, axis), np.linalg.qr(U.T)[0]
    return np.linalg.qr(A @ (A.T @ Q) - shift(A, Q) * Q)[0].T


def shift(A, Q):
    """0.45 times the least Ritz value of ``A A^T``, or nothing for one vector,
    less a little of the largest."""
    squares = np.linalg.svd(A.T @ Q, compute_uv=False) ** 2
    return 0.45 * squares[-1] * (len(squares) > 1) - 1e-4 * squares[0]


def complex_step(f, x):
    """The derivative of the scalar function ``f`` at the array ``x``."""
    g = np.empty(x.shape)
    for i in np.ndindex(*x.shape):
        z = x.astype(np.complex128)
        z[i] += 1e-200j
        g[i] = f(z).imag / 1e-200
    return g


def true_norm(W, axis=0):
    """The largest singular value, by a float64 SVD."""
    A = as_matrix(np.asarray(W, dtype=np.float64), axis)
    return np.linalg.svd(A, compute_uv=False)[0]
