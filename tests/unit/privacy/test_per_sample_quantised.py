"""Adapters of frozen layers whose weights are no ordinary floats, against one sample at a time."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from securetune.privacy.per_sample import PerSampleGradients
from tests.per_sample_oracle import (
    assert_exact,
    one_by_one,
    random_parameters,
    relative_error,
    square_losses,
)


def test_adapter_of_a_frozen_layer_that_holds_no_floats():
    class Quantised(nn.Linear):
        """Holds int8 numbers and a scale, and makes its weight of them in each forward pass."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__(linear.in_features, linear.out_features, dtype=torch.float64)
            scale = linear.weight.detach().abs().max() / 127
            self.register_buffer("scale", scale)
            numbers = (linear.weight.detach() / scale).round().to(torch.int8)
            self.weight = nn.Parameter(numbers, requires_grad=False)

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(Quantised(nn.Linear(6, 8).double()), nn.GELU(), Quantised(nn.Linear(8, 3).double()))
    lora = LoraConfig(r=3, target_modules=["0", "2"])
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.double()
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_exact(random_parameters(model), x)


class Int8(torch.Tensor):
    """Numbers stored as int8 with a scale, which know ``linear`` alone, as torchao's do."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            x, weight, bias = args
            return func(x, weight.numbers * weight.scale, bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Int8(args[0].numbers, args[0].scale)
        raise NotImplementedError(func)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adapter_of_a_frozen_layer_whose_weight_is_a_tensor_of_another_class(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)
    for layer in (model[0], model[2]):
        scale = layer.weight.detach().abs().max() / 127
        layer.weight = nn.Parameter(
            Int8((layer.weight.detach() / scale).round().to(torch.int8), scale), requires_grad=False
        )
    model = get_peft_model(
        model, LoraConfig(r=3, target_modules=["0", "2"]), autocast_adapter_dtype=False
    ).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)
    random_parameters(model)
    expected = one_by_one(model, x)
    engine = PerSampleGradients(model)
    found = engine.backward(square_losses(model, x)).materialize()
    assert relative_error(found, expected) < (1e-12 if dtype == torch.float64 else 1e-5)
