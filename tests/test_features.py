"""FID and KID against closed forms, and the shape of the network whose features they compare."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assets.recipe_inception import Inception
from tenuto.errors import TenutoError
from tenuto.measure.metrics import frechet_distance, kernel_distance


def normal(count: int, mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """Features (count, D) whose mean and covariance are these exactly."""
    x = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed)).double()
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_that_commute() -> None:
    a, b = torch.tensor([4.0, 1.0, 9.0]).double(), torch.tensor([1.0, 1.0, 0.25]).double()
    shift = torch.tensor([1.0, -2.0, 0.5]).double()
    one, two = normal(50, 0 * shift, a.diag(), 0), normal(70, shift, b.diag(), 1)
    wanted = float(shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(one, two) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(two, one) == pytest.approx(wanted, rel=1e-9)


def test_frechet_distance_of_gaussians_that_do_not_commute() -> None:
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    b = torch.tensor([[5.0, -1.0], [-1.0, 1.0]]).double()
    # in two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M))
    product = a @ b
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    wanted = float(a.trace() + b.trace() - 2 * root)
    zero = torch.zeros(2).double()
    found = frechet_distance(normal(40, zero, a, 0), normal(40, zero, b, 1))
    assert found == pytest.approx(wanted, rel=1e-9)


def test_equal_sets_have_no_distance_even_where_the_covariance_is_singular() -> None:
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    assert abs(frechet_distance(x, x.clone())) < 1e-5
    assert frechet_distance(x, x + 1) == pytest.approx(64, abs=1e-4)


def test_kernel_distance_of_few_features_written_out() -> None:
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [3.0], [1.0]])

    def k(x: float, y: float) -> float:
        return (x * y + 1) ** 3

    inside = (k(0, 3) + k(0, 1) + k(3, 1)) / 3
    across = sum(k(x, y) for x in (1, 2) for y in (0, 3, 1)) / 6
    assert kernel_distance(a, b) == pytest.approx(k(1, 2) + inside - 2 * across)


def test_kernel_distance_is_unbiased() -> None:
    draw = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 30, 4, generator=draw) for _ in range(400)]
    found = torch.tensor([kernel_distance(a, b) for a, b in pairs])
    error = float(found.std()) / len(found) ** 0.5
    assert float(found.min()) < 0 < float(found.max())
    assert abs(float(found.mean())) < 3 * error
    apart = torch.tensor([kernel_distance(a, b + 0.5) for a, b in pairs[:50]])
    assert float(apart.mean()) > 10 * error


def test_sets_that_do_not_fit_are_refused() -> None:
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(TenutoError, match="of one width"):
            distance(torch.zeros(4, 3), torch.zeros(4, 2))
        with pytest.raises(TenutoError, match="two or more"):
            distance(torch.zeros(1, 3), torch.zeros(4, 3))


def test_the_network_gives_2048_features_at_its_usual_size() -> None:
    with torch.device("meta"):
        network = Inception().eval()
        features = network(torch.zeros(2, 3, 299, 299))
    assert tuple(features.shape) == (2, 2048)
    assert sum(p.numel() for p in network.parameters()) == 21_785_568 - 17_216  # scales folded in
