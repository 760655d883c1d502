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


def window_ratio(windows):
    """F from the list of per-tensor arrays of shape (T, d_l), size-weighted."""
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
