"""Slow, readable twins of optimizers: one step after another of a published rule, on one tensor in float64.

Each takes the first weights, the gradient as a function of the weights, and the learning rate of each step; it yields
the weights after each step (schedule-free: those of the gradient and those of the average).
"""

import torch


def lion(w, gradient, rates, *, betas, decay):
    """Chen et al. 2023, algorithm 2."""
    m = torch.zeros_like(w)
    for rate in rates:
        g = gradient(w)
        w = w - rate * (torch.sign(betas[0] * m + (1 - betas[0]) * g) + decay * w)
        m = betas[1] * m + (1 - betas[1]) * g
        yield w


def sam(w, gradient, rates, *, rho, momentum, decay):
    """Foret et al. 2021, algorithm 1, on SGD with momentum."""
    v = torch.zeros_like(w)
    for rate in rates:
        g = gradient(w)
        v = momentum * v + gradient(w + rho * g / g.norm()) + decay * w
        w = w - rate * v
        yield w


def schedule_free_sgd(w, gradient, rates, *, beta, decay):
    """Defazio et al. 2024, equations 3 to 5, averaged with weights γ²; the decay is taken at y."""
    x = y = z = w
    total = 0.0
    for t, rate in enumerate(rates):
        g = gradient(y) + decay * y
        z = z - rate * g
        top = max(rates[: t + 1])
        total += top**2
        x = (1 - top**2 / total) * x + top**2 / total * z
        y = (1 - beta) * z + beta * x
        yield y, x


def schedule_free_adamw(w, gradient, rates, *, betas, decay, epsilon=1e-8):
    """The same, algorithm 1: the gradient divided by Adam's root mean square."""
    x = y = z = w
    squares, total = torch.zeros_like(w), 0.0
    for t, rate in enumerate(rates, start=1):
        g = gradient(y)
        squares = betas[1] * squares + (1 - betas[1]) * g**2
        step = g / ((squares / (1 - betas[1] ** t)).sqrt() + epsilon) + decay * y
        z = z - rate * step
        top = max(rates[:t])
        total += top**2
        x = (1 - top**2 / total) * x + top**2 / total * z
        y = (1 - betas[0]) * z + betas[0] * x
        yield y, x


def soap(w, gradient, rates, *, betas, decay, every, epsilon=1e-8):
    """Vyas et al. 2025, algorithm 3, for a matrix; the first step only measures, as in the authors' code."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    g = gradient(w)
    left, right = (1 - betas[1]) * g @ g.T, (1 - betas[1]) * g.T @ g
    ql, qr = (torch.linalg.eigh(matrix)[1].flip(1) for matrix in (left, right))
    yield w
    for t, rate in enumerate(rates[1:], start=1):
        g = gradient(w)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * (ql.T @ g @ qr) ** 2
        corrected = (m / (1 - betas[0] ** t), v / (1 - betas[1] ** t))
        small = epsilon / (1 - betas[1] ** t) ** 0.5  # added before the correction, in the authors' code
        w = w - rate * ql @ ((ql.T @ corrected[0] @ qr) / (corrected[1].sqrt() + small)) @ qr.T
        w = w * (1 - rate * decay)
        left = betas[1] * left + (1 - betas[1]) * g @ g.T
        right = betas[1] * right + (1 - betas[1]) * g.T @ g
        if t % every == 0:
            ql, v = _turned(left, ql, v)
            qr, v = _turned(right, qr, v.T)
            v = v.T
        yield w


def _turned(covariance, q, v):
    """One step of the power method, its columns from large to small; the rows of `v` go with them."""
    product = covariance @ q
    order = (q * product).sum(0).argsort(descending=True)
    return torch.linalg.qr(product[:, order])[0], v[order]


def shampoo(w, gradient, rates, *, decay, epsilon):
    """Gupta et al. 2018, algorithm 2: a tensor of order k, by the −1/2k-th power of each side's covariance."""
    sides = [epsilon * torch.eye(n, dtype=w.dtype) for n in w.shape]
    for rate in rates:
        g = step = gradient(w) + decay * w
        for i in range(w.ndim):
            unfolded = g.movedim(i, 0).reshape(w.shape[i], -1)
            sides[i] += unfolded @ unfolded.T
            values, vectors = torch.linalg.eigh(sides[i])
            power = vectors @ torch.diag(values ** (-1 / (2 * w.ndim))) @ vectors.T
            step = torch.tensordot(power, step, dims=([1], [i])).movedim(0, i)
        w = w - rate * step
        yield w
