"""Orthogonal wavelets: the 2 N taps h of their low-pass filters (Daubechies, Ten Lectures, 1992).

A filter's transform is sqrt(2) ((1 + e)/2)^N Q(e) with e = exp(-i w), where |Q|^2 is the polynomial
P(y), y = sin^2(w / 2), of coefficients binomial(N - 1 + k, k).  Each zero of P gives two of which Q
may have either, z or 1/z: Daubechies' wavelet has all on one side, a symlet is nearly symmetric.
A coiflet, whose scaling function has vanishing moments too, is no such choice: its taps are given.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

# for the zeros by their angle, real ones first: whether it is the one that Daubechies' wavelet has
_SYMLETS = {
    "sym2": "1",
    "sym3": "1",
    "sym4": "10",
    "sym5": "01",
    "sym6": "010",
    "sym7": "011",
    "sym8": "1010",
    "sym9": "1001",
    "sym10": "01010",
}
_COIFLETS = {
    "coif1": """
        -0.07273261951252645 0.3378976624574818 0.8525720202116004 0.3848648468648578
        -0.07273261951252645 -0.015655728135791993
    """,
    "coif2": """
        0.01638733646320364 -0.04146493678687178 -0.0673725547237256 0.3861100668227629
        0.8127236354494135 0.4170051844232391 -0.07648859907828076 -0.05943441864643109
        0.02368017194684777 0.005611434819368834 -0.0018232088709110323 -0.000720549445520347
    """,
    "coif3": """
        -0.003793512864380802 0.007782596425672746 0.023452696142077168 -0.06577191128146936
        -0.06112339000297255 0.40517690240911824 0.7937772226260872 0.42848347637737
        -0.07179982161915484 -0.08230192710629983 0.03455502757329774 0.015880544863669452
        -0.009007976136730624 -0.0025745176881367972 0.0011175187708306303 0.0004662169598204029
        -7.0983302506379e-05 -3.459977319727278e-05
    """,
}


@cache
def taps(wavelet: str) -> tuple[float, ...]:
    """Return h of "db1" to "db10", "sym2" to "sym10", or "coif1" to "coif3"."""
    if wavelet in _COIFLETS:
        return tuple(map(float, _COIFLETS[wavelet].split()))
    n = int(wavelet.lstrip("dbsym"))
    zeros = _zeros(n)
    angles = zeros.angle().abs()
    order = sorted({round(float(angle), 6) for angle in angles})
    e = torch.exp(-2j * math.pi * torch.arange(2 * n, dtype=torch.float64) / (2 * n))
    h = math.sqrt(2) * ((1 + e) / 2) ** n
    for z, angle in zip(zeros, angles, strict=True):
        outside = _SYMLETS.get(wavelet, "1" * n)[order.index(round(float(angle), 6))] == "1"
        z = 1 / z if outside else z
        h = h * (e - z) / (1 - z)
    return tuple(torch.fft.ifft(h).real.tolist())


def _zeros(n: int) -> Tensor:
    """Return the zeros z [N - 1] of Q, those inside the unit circle."""
    if n == 1:
        return torch.zeros(0, dtype=torch.complex128)
    p = torch.tensor([math.comb(n - 1 + k, k) for k in range(n)], dtype=torch.float64)
    companion = torch.diag(torch.ones(n - 2, dtype=torch.float64), -1)
    companion[:, -1] = -p[:-1] / p[-1]
    half = 1 - 2 * torch.linalg.eigvals(companion)  # (z + 1/z) / 2
    z = half + (half**2 - 1).sqrt()
    return torch.where(z.abs() > 1, 1 / z, z)
