"""Naive float64 forms of the risk statistics and of F: double loops over examples."""

import numpy as np


def pair_sum(g):
    """(1/(b(b-1))) sum over i != j of <g_i, g_j>."""
    b = len(g)
    total = 0.0
    for i in range(b):
        for j in range(b):
            if i != j:
                total += float(g[i] @ g[j])
    return total / (b * (b - 1))


def whitened_ratio(windows, passes=1.0):
    """F, every coordinate in units of its own variance, from the list of (T, d_l) arrays."""
    found = []
    for g in windows:
        t = len(g)
        for k in range(g.shape[1]):
            if np.any(g[:, k] != 0):
                variance = np.var(g[:, k], ddof=1)
                signal = t * np.mean(g[:, k]) ** 2
                found.append(min(signal / variance, 100.0) * (t - 3) / (t - 1))
    return float(np.mean(found)) / passes


def agreement_terms(windows):
    """Product of consecutive gradients in units of the noise, size-weighted, for t = 2, 3, ..."""
    sizes = [g.shape[1] for g in windows]
    noises = [sum(np.var(g[:, k], ddof=1) for k in range(g.shape[1])) for g in windows]
    return [
        sum(
            size * float(g[t] @ g[t - 1]) / noise
            for g, size, noise in zip(windows, sizes, noises, strict=True)
        )
        / sum(sizes)
        for t in range(1, len(windows[0]))
    ]


def window_ratio(windows):
    """F, pooled per tensor, from the list of per-tensor arrays of shape (T, d_l), size-weighted."""
    num = den = 0.0
    for g in windows:
        t, d = g.shape
        a = g.sum(0)
        cov = np.cov(g, rowvar=False, ddof=1).reshape(d, d)
        s = np.trace(cov)
        if s > 0:
            num += d * float(a @ a) / (t * s)
            den += d
    return num / den


def window_ratio_error(windows):
    """Standard error of F under pure noise, from the list of (T, d_l) arrays."""
    sizes, shares = [], []
    for g in windows:
        s = sum(np.var(g[:, k], ddof=1) for k in range(g.shape[1]))
        if s > 0:
            sizes.append(g.shape[1])
            shares.append([float(row @ row) / s for row in g])
    pooled = np.average(np.array(shares), axis=0, weights=sizes)
    return float(np.std(pooled, ddof=1))


def displacement_decrease(weights, grads):
    """P_t for t = 2, 3, ...: weights[t] are those that the gradient grads[t] was taken at."""
    terms = []
    for t in range(1, len(weights)):
        total = 0.0
        for k in range(len(weights[t])):
            total -= (weights[t][k] - weights[t - 1][k]) * grads[t][k]
        terms.append(total)
    return terms


def bartlett_error(values, lags):
    """Newey-West standard error of the mean, over its value for iid data of variance 1."""
    count, mean = len(values), sum(values) / len(values)

    def weight(lag):
        return 1 - lag / (lags + 1)

    found = expected = 0.0
    for i in range(count):
        for j in range(count):
            if abs(i - j) <= lags:
                k = weight(abs(i - j))
                found += k * (values[i] - mean) * (values[j] - mean) / count**2
                # E (e_i - e_bar)(e_j - e_bar) of independent e; c_j alone is biased like it
                expected += k * ((i == j) - 1 / count) / count
    return (found / expected) ** 0.5
