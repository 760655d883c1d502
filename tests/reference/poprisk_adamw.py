"""Float64 twin of the optimizer, written from the equations with numpy; imports nothing of ours."""

import numpy as np
from scipy.stats import chi2


class Twin:
    """Population-risk gated AdamW on one array, one scalar formula per line."""

    def __init__(
        self,
        p,
        *,
        lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        gate="soft",
        alpha=None,
        false_open_rate=0.3173,
        lambda_pop=None,
        rho=0.99,
        blend=1.0,
        warmup=0,
        raw_mean=False,
        gate_eps=0.0,
        moments=False,
        grain=None,
    ):
        self.p = np.array(p, dtype=np.float64)
        self.m = np.zeros_like(self.p)
        self.v = np.zeros_like(self.p)
        self.s = np.zeros_like(self.p)
        self.t = 0
        self.k = 0
        self.lr, (self.b1, self.b2), self.eps, self.wd = lr, betas, eps, weight_decay
        self.gate, self.rho, self.blend, self.warmup = gate, rho, blend, warmup
        self.raw_mean, self.gate_eps = raw_mean, gate_eps
        self.moments, self.grain = moments, grain  # s = v - m^2; one gate per row or tensor
        self.alpha = (1 - self.b1) / 2 * chi2.isf(false_open_rate, 1) if alpha is None else alpha
        default = self.alpha if gate == "soft" else 1.0
        self.lam = default if lambda_pop is None else lambda_pop

    def q(self, mh, sh):
        if self.gate == "none":
            return np.ones_like(mh)
        a, lam = self.alpha, self.lam
        if self.gate == "hard":
            return (mh**2 > a * sh).astype(np.float64)
        if self.gate == "soft":
            num = np.maximum(mh**2 - a * sh, 0)
            den = num + lam * sh + self.gate_eps
        else:
            num = mh**2
            den = num + lam * a * sh + self.gate_eps
        return np.divide(num, den, out=np.zeros_like(num), where=den > 0)

    def step(self, g):
        g = np.array(g, dtype=np.float64)
        self.t += 1
        if self.moments:
            pass
        elif self.raw_mean:
            self.s = self.rho * self.s + (1 - self.rho) * (g - self.m) ** 2
            self.k += 1
        elif self.t > 1:
            mean = self.m / (1 - self.b1 ** (self.t - 1))
            self.s = self.rho * self.s + (1 - self.rho) * (g - mean) ** 2
            self.k += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        mh = self.m / (1 - self.b1**self.t)
        vh = self.v / (1 - self.b2**self.t)
        if self.t <= self.warmup or (not self.raw_mean and self.t == 1):
            q = np.ones_like(mh)
        else:
            if self.moments:
                sh = vh - mh**2
            else:
                sh = mh**2 if self.raw_mean and self.t == 1 else self.s / (1 - self.rho**self.k)
            signal = np.abs(mh)
            if self.grain is not None and mh.size:
                axes = tuple(range(1 if self.grain == "row" else 0, mh.ndim))
                signal = np.sqrt((mh**2).mean(axis=axes, keepdims=True))
                sh = sh.mean(axis=axes, keepdims=True)
            sh = np.maximum(sh, 0)
            q = self.blend * self.q(signal, sh) + (1 - self.blend)
        update = q * mh / (np.sqrt(vh) + self.eps)
        self.p = self.p - self.lr * self.wd * self.p - self.lr * update
        return q
