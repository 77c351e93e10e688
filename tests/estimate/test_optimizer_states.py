"""What an optimizer keeps is predicted to the byte, for every one that is installed here."""

import pytest
import torch
from torch import nn

from mlm_plugin.errors import UserError
from mlm_plugin.estimate.optimizer_states import COPIES, optimizer_bytes
from mlm_plugin.training.optimizers import OPTIMIZERS, create_optimizer

SHAPES = ((320, 16), (16, 768), (300, 320), (4095,), (4097,), (7,))
ALWAYS_THERE = ("AdamW", "SGDNesterov", "Adafactor", "torch.optim.RMSprop", "torch.optim.Adagrad")


def parameters():
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def real_states(name, **settings):
    """Bytes of the states after a step; tables that all parameters share are not among them."""
    trained = parameters()
    optimizer = create_optimizer(name, [{"params": trained}], learning_rate=1e-3, **settings)
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not key.startswith("qmap") and key != "step"
    )


@pytest.mark.parametrize("name", [*ALWAYS_THERE, *(n for n in OPTIMIZERS if "Paged" not in n)])
def test_states_are_those_of_a_real_step(name):
    try:
        real = real_states(name)
    except UserError as error:
        pytest.skip(str(error))
    assert optimizer_bytes(name, parameters()).states == real


def test_every_optimizer_of_another_package_is_described():
    others = {name.lower() for name, named in OPTIMIZERS.items() if named.package}
    assert others == set(COPIES)


def test_adamw_takes_eight_bytes_per_parameter_and_its_step_four_more():
    trained = parameters()
    size = sum(parameter.numel() for parameter in trained)
    assert optimizer_bytes("", trained) == (8 * size, 4 * size)


def test_eight_bit_states_take_about_two_bytes_where_tensors_are_large():
    large = [nn.Parameter(torch.empty(1024, 1024, device="meta"))]
    states = optimizer_bytes("AdamW8bit", large).states
    assert states / large[0].numel() == pytest.approx(2 + 8 / 256)


def test_large_paged_states_are_not_on_the_card():
    large = [nn.Parameter(torch.empty(1024, 1024, device="meta"))]
    assert optimizer_bytes("PagedAdamW8bit", large).states == 0


def test_an_optimizer_is_known_by_its_path_too():
    trained = parameters()
    by_name = optimizer_bytes("Prodigy", trained)
    assert optimizer_bytes("prodigyopt.Prodigy", trained) == by_name


def test_prodigy_keeps_less_with_slices():
    whole = optimizer_bytes("Prodigy", parameters()).states
    sliced = optimizer_bytes("Prodigy", parameters(), optimizer_args=["slice_p=4"]).states
    assert sliced == pytest.approx(whole * 2.5 / 4, rel=1e-3)


def test_an_optimizer_that_needs_values_is_refused_in_one_line():
    with pytest.raises(UserError, match="LBFGS.*its memory is not known") as error:
        optimizer_bytes("LBFGS", parameters())
    assert "\n" not in str(error.value)
