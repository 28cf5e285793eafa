"""Solving with second moments: equal to the general solver, and NaN where a matrix is not positive definite."""

from __future__ import annotations

import torch

from se_prune.gates.moments import definite_factor, solve_definite


def test_solutions_equal_those_of_the_general_solver():
    x = torch.randn(3, 40, 12, dtype=torch.float64)
    matrices, targets = x.mT @ x, torch.randn(3, 12, 2, dtype=torch.float64)
    for i, one in enumerate(solve_definite(matrices, targets)):
        torch.testing.assert_close(one, torch.linalg.solve(matrices[i], targets[i]))


def test_a_matrix_that_is_not_positive_definite_gives_nan_and_leaves_the_others():
    matrices = torch.stack([torch.eye(3), torch.full((3, 3), torch.nan), -torch.eye(3)]).double()
    factors = definite_factor(matrices)
    assert torch.equal(factors[0], matrices[0])
    assert factors[1:].isnan().all(dim=(1, 2)).all()
