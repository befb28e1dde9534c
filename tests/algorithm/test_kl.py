import pytest
import torch

from grpo_lab.algorithm.kl import KL_ESTIMATORS, k1, k2, k3
from grpo_lab.algorithm.losses import grpo_loss

REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -1.0, 0.4], dtype=torch.float64)  # the policy: softmax of these


def logs(*probabilities):
    return torch.tensor([probabilities]).log()


def kl(p, q):
    return (p * (p / q).log()).sum()


def gradient(function_of_logits):
    logits = LOGITS.clone().requires_grad_()
    function_of_logits(logits).backward()
    return logits.grad


def expected_gradient(estimator):
    """E_{y ~ pi}[grad estimator(log pi(y), log ref(y))], exactly: the three symbols are a batch of T=3 tokens."""
    weights = LOGITS.softmax(0)  # the chance of each symbol, a constant as in sampling

    def expectation(logits):
        return (weights * estimator(logits.log_softmax(0)[None], REFERENCE.log()[None])).sum()

    return gradient(expectation)


@pytest.mark.parametrize("new, expected", [(0.9, 0.1433), (0.2, 0.5837), (0.7, 0.0508)])
def test_k3_against_a_reference_of_one_half(new, expected):
    assert k3(logs(new), logs(0.5)).item() == pytest.approx(expected, abs=5e-5)


def test_k1_and_k2_by_hand():
    # log(0.9 / 0.5) = 0.587787, squared and halved 0.172747
    assert k1(logs(0.9), logs(0.5)).item() == pytest.approx(0.587787, abs=1e-6)
    assert k2(logs(0.9), logs(0.5)).item() == pytest.approx(0.172747, abs=1e-6)


def test_an_unmoved_policy_has_no_kl():
    logps = logs(0.9, 0.1, 1e-30)
    for estimator in KL_ESTIMATORS.values():
        assert estimator(logps, logps).tolist() == [[0.0, 0.0, 0.0]]


def test_k1_and_k3_have_the_value_of_the_kl_on_average():
    policy = LOGITS.softmax(0)
    for estimator in (k1, k3):
        mean = (policy * estimator(policy.log()[None], REFERENCE.log()[None])).sum()
        torch.testing.assert_close(mean, kl(policy, REFERENCE))


def test_the_expected_gradient_of_k1_is_zero():
    torch.testing.assert_close(expected_gradient(k1), torch.zeros(3, dtype=torch.float64))


def test_the_expected_gradient_of_k2_is_that_of_kl_policy_to_reference():
    torch.testing.assert_close(expected_gradient(k2), gradient(lambda logits: kl(logits.softmax(0), REFERENCE)))


def test_the_expected_gradient_of_k3_is_that_of_kl_reference_to_policy():
    torch.testing.assert_close(expected_gradient(k3), gradient(lambda logits: kl(REFERENCE, logits.softmax(0))))


def test_the_two_directions_have_different_gradients():
    assert (expected_gradient(k2) - expected_gradient(k3)).abs().max() > 0.05


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_bias_correction_gives_the_gradient_of_kl_policy_to_reference_off_policy(estimator):
    old = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)  # the samples' policy, neither pi nor the reference

    def corrected(logits):
        output = grpo_loss(
            logits.log_softmax(0)[None],
            old.log()[None],
            REFERENCE.log()[None],
            torch.zeros(1, dtype=torch.float64),
            torch.ones(1, 3, dtype=torch.bool),
            old[None],
            surrogate=lambda ratio, advantages: 0 * ratio,
            ratio_level="token",
            beta=1.0,
            kl_estimator=estimator,
            kl_bias_correction=True,
        )
        return output.loss

    torch.testing.assert_close(gradient(corrected), gradient(lambda logits: kl(logits.softmax(0), REFERENCE)))


def test_k3_is_never_negative_and_keeps_small_values_in_float32():
    log_ratio = torch.tensor([[1e-3, -1e-3, 3e-5, 0.5, -20.0]])
    values = k3(torch.zeros(1, 5), log_ratio)
    assert (values >= 0).all()
    assert values[0, 0].item() == pytest.approx(5.0017e-7, rel=1e-3)  # x^2/2 + x^3/6; exp(x) - x - 1 gives 4.8e-7


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_gradients_agree_with_finite_differences(name):
    logps = torch.tensor([[-0.5, -2.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-0.9, -1.1]], dtype=torch.float64)
    assert torch.autograd.gradcheck(KL_ESTIMATORS[name], (logps, reference))
