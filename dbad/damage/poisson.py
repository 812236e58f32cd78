"""Seamless pasting and filling by the Poisson equation: Perez et al., SIGGRAPH 2003, as NSA (arXiv:2109.15222) does."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu


def solve_poisson(target: np.ndarray, guide: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The target (h, w, 3) with `region` (h, w) bool filled: gradients of the guide, continuous with the target around.

    Perez et al. 2003, Eq. 7: for every p of the region, with q its up to four neighbours in the window,
        sum_q (f_p - f_q) = sum_q (g_p - g_q),   f_q = target_q where q is not in the region.
    With a constant guide this is Laplace's equation. Each part of the region needs a pixel of the target beside it.
    """
    rows, columns = np.nonzero(region)
    index = np.full(region.shape, -1)
    index[rows, columns] = np.arange(len(rows))
    degree, right = np.zeros(len(rows)), np.zeros((len(rows), 3))
    pairs = []
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        y, x = rows + dy, columns + dx
        there = np.flatnonzero((y >= 0) & (y < region.shape[0]) & (x >= 0) & (x < region.shape[1]))
        y, x, p = y[there], x[there], there
        degree[p] += 1
        right[p] += guide[rows[p], columns[p]] - guide[y, x]
        known = index[y, x] < 0
        right[p[known]] += target[y[known], x[known]]
        pairs.append((p[~known], index[y, x][~known]))
    p, q = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    matrix = sparse.coo_matrix((-np.ones(len(p)), (p, q)), (len(rows),) * 2) + sparse.diags(degree)
    solution = splu(matrix.tocsc(), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}).solve(right)
    filled = target.copy()
    filled[rows, columns] = solution
    return filled
