import pytest
import torch

from grpo_lab.algorithm.logps import entropy, selected_logps

LOGITS = torch.tensor([[[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]], [[-1.0, 3.0, 0.1], [5.0, 1.0, 2.0]]], dtype=torch.float64)
IDS = torch.tensor([[1, 0], [2, 0]])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_selected_logps_are_the_log_softmax_at_the_ids(temperature):
    table = torch.log_softmax(LOGITS / temperature, dim=-1)
    expected = torch.tensor([[table[n, t, IDS[n, t]] for t in range(2)] for n in range(2)], dtype=torch.float64)
    torch.testing.assert_close(selected_logps(LOGITS, IDS, temperature=temperature), expected)


def test_a_uniform_choice_of_three_by_hand():
    assert selected_logps(LOGITS, IDS)[0, 1].item() == pytest.approx(-1.0986123)  # log(1/3)
    assert entropy(LOGITS)[0, 1].item() == pytest.approx(1.0986123)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[[10000.0, 9999.0], [-10000.0, -10000.0]]])
    logps = selected_logps(logits, torch.tensor([[0, 1]]))
    torch.testing.assert_close(logps, torch.tensor([[-0.3132617, -0.6931472]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(entropy(logits), torch.tensor([[0.5822031, 0.6931472]]), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "dtype, computed", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32)]
)
def test_half_precision_logits_are_computed_in_float32(dtype, computed):
    logits = LOGITS.to(dtype)
    logps = selected_logps(logits, IDS, temperature=0.7)
    assert logps.dtype == computed
    torch.testing.assert_close(logps, selected_logps(logits.double(), IDS, temperature=0.7).to(computed))
    assert entropy(logits).dtype == computed


def test_float64_is_kept():
    assert selected_logps(LOGITS, IDS).dtype == torch.float64
    assert entropy(LOGITS).dtype == torch.float64


def test_gradients_agree_with_finite_differences():
    logits = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: selected_logps(x, IDS, temperature=0.7), (logits,))
    assert torch.autograd.gradcheck(entropy, (logits,))


def test_entropy_of_a_certain_choice_is_zero_with_a_finite_gradient():
    logits = torch.tensor([[[500.0, 0.0, -torch.inf]]], requires_grad=True)
    value = entropy(logits)
    value.sum().backward()
    assert value.item() == 0.0
    assert logits.grad.tolist() == [[[0.0, 0.0, 0.0]]]


def test_entropy_follows_its_definition():
    p = torch.softmax(LOGITS, dim=-1)
    torch.testing.assert_close(entropy(LOGITS), -(p * p.log()).sum(-1))


def test_logits_are_not_written_to():
    logits = LOGITS.clone()
    selected_logps(logits, IDS, temperature=0.5)
    entropy(logits)
    assert logits._version == 0


def test_autograd_keeps_one_matrix_of_the_vocabularys_size():
    logits = torch.randn(2, 3, 50, requires_grad=True)
    kept = {}

    def pack(tensor):
        if tensor.numel() >= logits.numel():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selected_logps(logits, torch.zeros(2, 3, dtype=torch.long))
    assert list(kept) == [logits.untyped_storage().data_ptr()]


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_an_error(temperature):
    with pytest.raises(ValueError) as error:
        selected_logps(LOGITS, IDS, temperature=temperature)
    assert str(error.value) == f"selected_logps: temperature is {temperature}; it must be above 0"
