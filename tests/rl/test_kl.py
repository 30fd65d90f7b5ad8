import math
from collections.abc import Callable

import pytest
import torch

from minigpt_ray.rl.kl import KL_ESTIMATORS, next_kl_coef

P, Q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.5, 0.3]])
KL = float((P * (P / Q).log()).sum())


def test_estimates_by_hand() -> None:
    """log p = -1, log q = -2."""
    estimates = {name: float(k(torch.tensor([[-1.0]]), torch.tensor([[-2.0]]))) for name, k in KL_ESTIMATORS.items()}
    assert estimates == pytest.approx({"k1": 1.0, "k2": 0.5, "k3": math.exp(-1)})


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_the_expectation_under_p_is_the_kl(name: str) -> None:
    assert float((P * KL_ESTIMATORS[name](P.log(), Q.log())).sum()) == pytest.approx(KL, abs=1e-6)


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_an_estimate_is_never_negative(name: str) -> None:
    assert (KL_ESTIMATORS[name](P.log(), Q.log()) > 0).all()


def test_all_estimators_agree_where_p_and_q_are_close() -> None:
    close = (P + torch.tensor([[0.001, -0.001, 0.0]])).log()
    exact = float((P * (P.log() - close)).sum())
    assert all(float((P * k(P.log(), close)).sum()) == pytest.approx(exact, rel=0.02) for k in KL_ESTIMATORS.values())


def test_estimators_of_equal_distributions_are_zero() -> None:
    assert not any(k(P.log(), P.log()).any() for k in KL_ESTIMATORS.values())


# ------------------------------------------------------------------------------------------------------ in a loss


def mean_gradient(name: str) -> torch.Tensor:
    """Exact mean, over what p draws, of the estimate's gradient in p's logits, the draw itself held fixed."""
    logits = P.log().requires_grad_()
    logprobs = logits.log_softmax(1)
    (P * KL_ESTIMATORS[name](logprobs, Q.log())).sum().backward()
    assert logits.grad is not None
    return logits.grad


def gradient_of(divergence: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    logits = P.log().requires_grad_()
    divergence(logits.softmax(1)).backward()
    assert logits.grad is not None
    return logits.grad


def test_differentiated_k2_has_the_gradient_of_the_kl_k3_that_of_its_reverse_and_k1_none() -> None:
    assert torch.allclose(mean_gradient("k2"), gradient_of(lambda p: (p * (p / Q).log()).sum()), atol=1e-6)
    assert torch.allclose(mean_gradient("k3"), gradient_of(lambda p: (Q * (Q / p).log()).sum()), atol=1e-6)
    assert torch.allclose(mean_gradient("k1"), torch.zeros(1, 3), atol=1e-6)


# ------------------------------------------------------------------------------------------------------- adaptive


def test_the_coefficient_by_hand() -> None:
    """Horizon 10: an error of 10 % counts as it is, one of 100 % as 20 %, the other way alike."""
    assert next_kl_coef(0.5, kl=0.11, target=0.1, horizon=10.0) == pytest.approx(0.5 * 1.01)
    assert next_kl_coef(0.5, kl=0.2, target=0.1, horizon=10.0) == pytest.approx(0.5 * 1.02)
    assert next_kl_coef(0.5, kl=-3.0, target=0.1, horizon=10.0) == pytest.approx(0.5 * 0.98)


def test_a_kl_on_target_or_without_a_token_leaves_the_coefficient() -> None:
    assert next_kl_coef(0.3, kl=0.1, target=0.1, horizon=1.0) == next_kl_coef(0.3, kl=math.nan, target=0.1, horizon=1.0) == 0.3


@pytest.mark.parametrize("first", [0.001, 0.02, 1.0])
def test_the_kl_moves_to_its_target(first: float) -> None:
    """A policy whose KL goes halfway to 0.002 / coefficient in a step: the target of 0.1 wants a coefficient of 0.02."""
    coefficient, kl = first, 0.0
    for _ in range(40):
        kl += (0.002 / coefficient - kl) / 2
        coefficient = next_kl_coef(coefficient, kl, target=0.1, horizon=1.0)
    assert kl == pytest.approx(0.1, rel=0.05) and coefficient == pytest.approx(0.02, rel=0.05)
