"""The sample inputs of activation_codes, for cases.py."""

import torch
from packed_cases import FLOATS, Samples

WIDTHS = ((8, False), (4, True), (2, True), (3, False))  # bits, packed


def activation_codes() -> Samples:
    random = torch.Generator().manual_seed(18)
    for name, dtype in FLOATS.items():
        for at, (rows, x) in enumerate(_rows(random, dtype)):
            bits, packed = WIDTHS[at % len(WIDTHS)]
            for grid, (scale, zero) in _grids(random, x, bits).items():
                yield f"{rows}-{grid}-{_width(bits, packed)}-{name}", (x, scale, zero, bits, packed, at % 5 != 0)
        for bits, packed in (*((bits, False) for bits in range(2, 8)), (2, True), (4, True), (8, True)):
            x = torch.randn(3, 45, generator=random).to(dtype)
            yield f"{_width(bits, packed)}-{name}", (x, None, None, bits, packed, True)
        for rows, x in special_rows(dtype).items():
            yield f"{rows}-{name}", (x, None, None, 8, False, True)
            yield f"{rows}-4_bits-packed-{name}", (x, None, None, 4, True, True)
            yield f"{rows}-static-{name}", (x, torch.tensor(0.1), torch.tensor(7, dtype=torch.int32), 4, True, True)


def _width(bits, packed):
    return f"{bits}_bits" + ("-packed" if packed else "")


def _rows(random, dtype):
    """Yield (name, x): odd rows, whole tiles, rows longer than a tile, none, and memory that is not dense."""

    def draw(*shape):
        return (torch.randn(shape, generator=random) * 3).to(dtype)

    yield "odd", draw(2, 5, 77)
    yield "even", draw(2, 13, 48)
    yield "one_element", draw(1, 1)
    yield "columns_of_one", draw(7, 1)
    yield "vector", draw(13)
    yield "empty", draw(0, 5)
    yield "empty_rows", draw(3, 0)
    yield "tile", draw(5, 1024)
    yield "row_a_program", draw(2, 4100)
    yield "longest_whole", draw(1, 8192)
    yield "walked", draw(2, 8201)
    yield "walked_even", draw(1, 12288)
    yield "transposed", draw(20, 36).T
    yield "slice", draw(6, 40)[:, 3:20]
    yield "slice_of_tokens", draw(2, 6, 48)[..., 16:48]
    yield "every_other", draw(5, 34)[:, ::2]
    yield "expanded", draw(1, 9).expand(4, 9)
    yield "channels_last", draw(2, 4, 3, 8).to(memory_format=torch.channels_last)


def _grids(random, x, bits):
    """Give a measured grid, one for all rows, and one for each."""

    def draw(shape):
        scale = torch.rand(shape, generator=random) * 8 / (1 << bits) + 0.01
        return scale, torch.randint(0, 1 << bits, shape, dtype=torch.int32, generator=random)

    return {"measured": (None, None), "one_scale": draw(()), "scale_a_row": draw(x.shape[:-1])}


def special_rows(dtype) -> dict[str, torch.Tensor]:
    """Give rows at the edges of what a range can be, by name; what is not finite spoils its row alone."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    edges = [
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [-0.0, -0.0, 0.0, -0.0, -0.0],
        [2.5, 2.5, 2.5, 2.5, 2.5],
        [-2.5, -2.5, -2.5, -2.5, -2.5],
        [-1.0, -7.0, -0.25, -3.0, -1e-3],
        [1.0, 7.0, 0.25, 3.0, 1e-3],
        [smallest, -smallest, smallest / 8, 0.0, -smallest / 4],
        [largest, 0.0, largest / 2, 1.0, -1.0],
        [-largest, 0.0, -largest / 2, 1.0, -1.0],
        [1e-8, 2e-8, -1e-8, 0.0, 1e-7],
    ]
    nan, inf = torch.nan, torch.inf
    spoilt = torch.tensor(
        [
            [1.0, nan, -1.0, 0.0, 2.0],
            [1.0, 0.0, -1.0, 0.0, 2.0],
            [inf, 3.0, -1.0, 0.0, 2.0],
            [-inf, 3.0, -1.0, 0.0, 2.0],
            [-inf, 3.0, inf, 0.0, 2.0],
            [nan, 3.0, inf, -inf, 2.0],
            [nan, nan, nan, nan, nan],
            [largest, -largest, 1.0, 0.0, -1.0],
        ]
    )
    signed = spoilt.clone()
    signed[spoilt.isnan()] = -signed[spoilt.isnan()]  # a NaN whose sign bit is set
    ties = torch.arange(-8, 9).float() / 2
    return {
        "edges": torch.tensor(edges, dtype=dtype),
        "not_finite": spoilt.to(dtype),
        "not_finite-negative": signed.to(dtype),
        "ties": torch.stack([ties, ties + 8.5, -ties - 127.5]).to(dtype),
    }
