"""Networks of their shapes alone: nothing is filled, and only inside."""

import torch
from torch import nn

from csm_core.empty_weights import empty_weights


def test_modules_have_shapes_and_no_memory() -> None:
    with empty_weights():
        layer = nn.Linear(3, 5)
    assert (layer.weight.shape, layer.weight.device.type) == ((5, 3), "meta")
    layer.load_state_dict({"weight": torch.ones(5, 3), "bias": torch.zeros(5)}, assign=True)
    assert torch.equal(layer(torch.ones(1, 3)), torch.full((1, 5), 3.0))


def test_nothing_is_initialised_inside_and_everything_outside() -> None:
    weight = torch.zeros(4)
    with empty_weights():
        assert torch.nn.init.uniform_(weight) is weight
        assert torch.nn.init.normal_(tensor=weight) is weight
    assert torch.equal(weight, torch.zeros(4))
    torch.nn.init.constant_(weight, 1.0)
    assert torch.equal(weight, torch.ones(4))
    assert nn.Linear(2, 2).weight.device.type == "cpu"
