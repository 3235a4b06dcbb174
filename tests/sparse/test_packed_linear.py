"""A layer with a packed weight, in the place of a linear one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leap_pl.errors import UserError
from leap_pl.sparse import building
from leap_pl.sparse.packed_linear import PackedLinear, worth_packing
from leap_pl.sparse.packed_weight import PackedWeight


def packed_linear(*, int8: bool = False) -> PackedLinear:
    torch.manual_seed(0)
    weight = torch.randn(24, 72).bfloat16()
    return PackedLinear(PackedWeight.pack(weight, weight > 0, int8=int8), torch.randn(24).bfloat16())


def test_it_is_a_linear_layer() -> None:
    layer, x = packed_linear(), torch.randn(2, 3, 72).bfloat16()
    torch.testing.assert_close(layer(x), F.linear(x, layer.packed.unpack(), layer.bias))
    many = torch.randn(40, 72).bfloat16()  # unpacked, and multiplied dense
    assert torch.equal(layer(many), F.linear(many, layer.packed.unpack(), layer.bias))
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert "in_features=72, out_features=24, density=0.5" in repr(layer)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("int8", [False, True])
def test_a_type_that_the_kernels_have_not_is_multiplied_dense(int8: bool) -> None:
    layer, x = packed_linear(int8=int8).double(), torch.randn(3, 72, dtype=torch.float64)
    assert layer.weight.dtype == torch.float64
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("rows", [4, 40])  # multiplied packed, and unpacked
@pytest.mark.parametrize("int8", [False, True])
def test_gradients_are_those_of_the_dense_weight(rows: int, int8: bool) -> None:
    layer = packed_linear(int8=int8).float()
    layer.bias.requires_grad_()
    dense = layer.weight.clone()
    bias = layer.bias.detach().clone().requires_grad_()
    x = torch.randn(rows, 2, 72, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    (x[..., :24] + layer(x)).square().sum().backward()
    (y[..., :24] + F.linear(y, dense, bias)).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)
    with torch.no_grad():
        assert not layer(x).requires_grad
    typed = packed_linear(int8=int8).to(torch.bfloat16)
    few = torch.randn(rows, 72).bfloat16().requires_grad_()
    typed(few).float().sum().backward()
    torch.testing.assert_close(few.grad, typed.weight.sum(0).expand(rows, 72), rtol=0.02, atol=0.1)


def test_its_weight_has_the_type_that_the_model_computes_in() -> None:
    layer = packed_linear(int8=True)
    assert layer.weight.dtype == torch.float32  # that of the scales
    typed = PackedLinear(layer.packed, layer.bias, dtype=torch.bfloat16)
    assert torch.equal(typed.weight, layer.weight.bfloat16())
    assert typed.float().weight.dtype == torch.float32
    assert packed_linear().weight.dtype == torch.bfloat16
    scale = layer.packed.scale
    assert scale is not None
    for dtype in (torch.float16, torch.bfloat16):  # to which scales would be rounded
        moved = copy.deepcopy(layer).to(dtype)
        assert moved.weight.dtype == dtype
        assert moved.scale is not None
        assert torch.equal(moved.scale, scale)


def test_a_state_dict_of_another_mask_with_as_many_weights() -> None:
    """Where each row starts follows from the bitmap, and is not in the state."""
    weight, x = torch.randn(24, 72).bfloat16(), torch.randn(2, 72).bfloat16()
    above = torch.arange(24)[:, None] < 12
    first, second = (PackedLinear(PackedWeight.pack(weight, kept.expand(24, 72))) for kept in (above, ~above))
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))
    assert not first(x)[:, :12].any()


@pytest.mark.parametrize("int8", [False, True])
def test_a_state_dict_holds_it(int8: bool) -> None:
    layer, x = packed_linear(int8=int8), torch.randn(1, 72).bfloat16()
    stored = copy.deepcopy(layer.state_dict())
    assert set(stored) == {"bitmap", "values", "bias"} | ({"scale"} if int8 else set())
    other = copy.deepcopy(layer)
    other.bitmap.zero_()
    other.load_state_dict(stored)
    assert torch.equal(other(x), layer(x))


def test_a_state_dict_that_disagrees_is_refused_before_a_kernel_reads_it() -> None:
    layer = packed_linear()
    stored = copy.deepcopy(layer.state_dict())
    stored["bitmap"][3, 0] ^= 1
    with pytest.raises(UserError, match="the bitmap keeps"):
        layer.load_state_dict(stored)


def test_torch_compile_takes_it_as_one_graph() -> None:
    model = nn.Sequential(packed_linear(), nn.ReLU(), nn.Linear(24, 3, dtype=torch.bfloat16))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for count in (1, 5, 30):
            x = torch.randn(count, 72).bfloat16()
            assert torch.equal(compiled(x), model(x))


@pytest.mark.skipif(not building.has_kernels(), reason="no C++ compiler")
def test_only_what_has_been_measured_is_worth_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, here = torch.device("cpu"), torch.ops.leap_pl.packed_paths()[0] != "portable"
    assert worth_packing(2048, 2048, 0.5, torch.bfloat16, cpu) == here
    assert not worth_packing(2048, 2048, 0.9, torch.bfloat16, cpu)
    assert not worth_packing(16, 16, 0.5, torch.bfloat16, cpu)
    assert not worth_packing(2048, 2048, 0.5, torch.float32, cpu)
    assert not worth_packing(2048, 2048, 0.5, torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr("leap_pl.sparse.packed_linear.has_kernels", lambda: False)
    assert not worth_packing(2048, 2048, 0.5, torch.bfloat16, cpu)
