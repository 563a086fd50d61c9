"""The watch over interpreted kernels: it sees what a mask forgot, and knows pointers in tables."""

import pytest
import torch

from securetune_kernels import ParameterTable, noisy_sgd_step

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if torch.cuda.is_available():
    pytest.skip("the interpreter is off where there is a GPU", allow_module_level=True)


@triton.jit
def _copy_kernel(x_ptr, out_ptr, stride, size, bound, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    values = tl.load(x_ptr + index * stride, mask=index < bound, other=0.0)
    tl.store(out_ptr + index, values, mask=index < size)


def copy(x, out, *, bound, size):
    _copy_kernel[(1,)](x, out, x.stride(0), size, bound, BLOCK=8)


def test_kernel_that_stays_in_its_tensors_runs(kernel_device):
    out = torch.zeros(5)
    copy(torch.arange(10.0)[::2], out, bound=5, size=5)
    assert out.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_one_element_too_many_is_seen(kernel_device):
    memory = torch.zeros(16)  # of one allocation, so that nothing crashes
    with pytest.raises(Exception, match="reads 1 elements outside"):
        copy(memory[:5], memory[8:13], bound=6, size=5)
    with pytest.raises(Exception, match="writes 1 elements outside"):
        copy(memory[:5], memory[8:13], bound=5, size=6)


def test_gap_of_a_strided_tensor_is_outside(kernel_device):
    memory, out = torch.zeros(16), torch.zeros(5)
    with pytest.raises(Exception, match="reads 2 elements outside"):
        _copy_kernel[(1,)](memory[:10:2], out, 1, 5, 5, BLOCK=8)


def test_wrong_pointer_of_a_table_is_seen(kernel_device):
    params = [torch.zeros(5), torch.zeros(2000)]
    table = ParameterTable(params)
    key, step = torch.zeros(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    options = {"stddev": 1.0, "divisor": 1.0, "learning_rate": 1.0, "backend": "triton"}
    noisy_sgd_step(table, torch.zeros(2005), key=key, step=step, **options)
    table.chunks[2] += 1  # each chunk one entry longer, the last beyond the sum
    with pytest.raises(Exception, match="elements outside"):
        noisy_sgd_step(table, torch.zeros(2005), key=key, step=step, **options)
