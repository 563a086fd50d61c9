"""Random inputs and output gradients of a dense layer, for the tests of the ops on them."""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# tokens, inputs d, outputs p: one, a prime, a power of two, one past a block; few tokens and many, so that
# both ways of computing norms are taken
SHAPES = (
    (1, 1, 1),
    (1, 7, 5),
    (7, 61, 13),
    (32, 64, 64),
    (33, 65, 129),
    (129, 131, 130),
    (200, 17, 70),
    (67, 5, 3),
)
# 3, 0, 1, 64, 0, 35, 1 tokens
OFFSETS = (0, 3, 3, 4, 68, 68, 103, 104)


def factors(*lead, d, p, dtype=torch.float32, device="cpu", seed=0):
    """Return ``a [*lead, d]`` and ``g [*lead, p]``."""
    generator = torch.Generator().manual_seed(seed)
    a, g = torch.randn(*lead, d, generator=generator), torch.randn(*lead, p, generator=generator)
    return a.to(device=device, dtype=dtype), g.to(device=device, dtype=dtype)


def with_strides(x, order, steps):
    """Copy ``x`` into memory where its dimensions lie in ``order``, ``steps`` elements apart."""
    sizes = [x.shape[dim] * steps[dim] for dim in order]
    memory = x.new_full(sizes, float("nan") if x.is_floating_point() else 1)
    inverse = [order.index(dim) for dim in range(x.ndim)]
    view = memory.permute(inverse)[tuple(slice(None, None, step) for step in steps)]
    return view.copy_(x)


def sparse_memory(shape, strides, device, path, dtype=torch.float16):
    """Allocate zeros with large gaps; on a CPU in a sparse file, so that they take no memory."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if device.type == "cuda":
        storage = torch.zeros(reach, dtype=dtype, device=device)
    else:
        with path.open("wb") as file:
            file.truncate(dtype.itemsize * reach)
        storage = torch.from_file(str(path), shared=True, size=reach, dtype=dtype)
    return storage.as_strided(shape, strides)
