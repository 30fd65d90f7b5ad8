import math

import pytest
import torch

from minigpt_ray.rl.kl import KL_ESTIMATORS

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
