"""The gradient of every op, as autograd functions outside the ops: cheaper per call than registering them inside."""

import torch

from .declarations import RAW
from .dispatch import without_autocast
from .kernels.codes import exact_product


class FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero, *grid):
        ctx.save_for_backward(x, scale, zero)
        ctx.grid = grid
        return RAW.fake_quant(x, scale, zero, *grid)

    @staticmethod
    def backward(ctx, grad):
        gradients = RAW.fake_quant_backward(grad, *ctx.saved_tensors, *ctx.grid)
        return *_needed(ctx.needs_input_grad[:3], gradients), *(None,) * 4


class PerturbedFakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero, spread, seed, *grid):
        ctx.save_for_backward(x, scale, zero, spread, seed)
        ctx.grid = grid
        return RAW.perturbed_fake_quant(x, scale, zero, spread, seed, *grid)

    @staticmethod
    def backward(ctx, grad):
        gradients = RAW.perturbed_fake_quant_backward(grad, *ctx.saved_tensors, *ctx.grid)
        return *_needed(ctx.needs_input_grad[:3], gradients), *(None,) * 6


class PrologueFakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, gain, shift, scale, zero, before, eps, observe, *grid):
        ctx.set_materialize_grads(False)
        y, u, seen = RAW.prologue_fake_quant(x, residual, gain, shift, scale, zero, before, eps, observe, *grid)
        ctx.save_for_backward(x if residual is None else u, gain, shift, scale, zero)
        ctx.grid = (before, eps, *grid)
        ctx.mark_non_differentiable(*((seen,) if residual is not None else (u, seen)))
        return y, u, seen

    @staticmethod
    def backward(ctx, grad, du, _):
        u, gain, shift, scale, zero = ctx.saved_tensors
        grad = torch.zeros_like(u) if grad is None else grad
        dx, dgain, dshift, dscale, dzero = RAW.prologue_fake_quant_backward(
            grad, du, u, gain, shift, scale, zero, *ctx.grid
        )
        return *_needed(ctx.needs_input_grad[:6], (dx, dx, dgain, dshift, dscale, dzero)), *(None,) * 6


class Log2FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, *grid):
        ctx.save_for_backward(x, scale)
        ctx.grid = grid
        return RAW.log2_fake_quant(x, scale, *grid)

    @staticmethod
    def backward(ctx, grad):
        gradients = RAW.log2_fake_quant_backward(grad, *ctx.saved_tensors, *ctx.grid)
        return *_needed(ctx.needs_input_grad[:2], gradients), None, None


class SoftRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, v, scale, zero, beta, qmax, axis, group, conv_groups):
        ctx.save_for_backward(w, v, scale, zero, beta)
        ctx.grid = (0, qmax, axis, group, conv_groups)
        return RAW.soft_round(w, v, scale, zero, beta, *ctx.grid)

    @staticmethod
    def backward(ctx, grad, dpenalty, denergy):
        dv = RAW.soft_round_backward(grad, dpenalty, denergy, *ctx.saved_tensors, *ctx.grid)
        return None, dv, *(None,) * 7


class PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits, token, moments):
        entering, x_scale, x_zero, nonfinite = entering_codes(x, x_scale, x_zero, x_bits, token)
        ctx.save_for_backward(x, words, scale, zero, x_scale, x_zero)
        ctx.widths = (bits, group, x_bits)
        y, seen, _ = RAW.packed_linear(
            entering, words, scale, zero, bias, bits, group, x_scale, x_zero, x_bits, x.dtype, moments=moments
        )
        return _observed(ctx, y, nonfinite, seen if moments else None)

    @staticmethod
    def backward(ctx, grad, *_):
        x, words, scale, zero, x_scale, x_zero = ctx.saved_tensors
        bits, group, x_bits = ctx.widths
        dx = dx_scale = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[7]:
            dx = RAW.packed_linear_backward(grad, words, scale, zero, bits, group, x.shape[-1])
            dx, dx_scale = _through_codes(ctx.needs_input_grad, dx, x, x_scale, x_zero, x_bits)
        dbias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[4] else None
        return dx, *(None,) * 3, dbias, None, None, dx_scale, *(None,) * 4


class PackedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, words, scale, zero, bias, bits, x_scale, x_zero, x_bits, moments, *geometry):
        ctx.save_for_backward(x, words, scale, zero, x_scale, x_zero)
        ctx.widths, ctx.geometry = (bits, x_bits), geometry
        entering, *_, nonfinite = entering_codes(x, x_scale, x_zero, x_bits)
        y, seen, _ = RAW.packed_conv2d(
            entering, words, scale, zero, bias, bits, x_scale, x_zero, x_bits, *geometry, x.dtype, moments=moments
        )
        return _observed(ctx, y, nonfinite, seen if moments else None)

    @staticmethod
    def backward(ctx, grad, *_):
        x, words, scale, zero, x_scale, x_zero = ctx.saved_tensors
        bits, x_bits = ctx.widths
        needs = ctx.needs_input_grad
        dx = dx_scale = None
        if needs[0] or needs[6]:
            dx = RAW.packed_conv2d_backward(grad, words, scale, zero, bits, list(x.shape), *ctx.geometry)
            dx, dx_scale = _through_codes((needs[0], *needs[1:7], needs[6]), dx, x, x_scale, x_zero, x_bits)
        dbias = grad.sum((0, 2, 3)) if needs[4] else None
        return dx, None, None, None, dbias, None, dx_scale, *(None,) * 8


class QuantizedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, a_scale, a_zero, b_scale, b_zero, a_bits, b_bits):
        ctx.save_for_backward(a, b, a_scale, a_zero, b_scale, b_zero)
        ctx.widths = (a_bits, b_bits)
        left = entering_codes(a, a_scale, a_zero, a_bits)[0].float() - a_zero
        right = entering_codes(b, b_scale, b_zero, b_bits)[0].float() - b_zero
        with without_autocast(a.device.type):
            sums = exact_product(torch.matmul, left, right, a.shape[-1], a_bits, b_bits)
            return (sums * (a_scale * b_scale)).to(a.dtype)

    @staticmethod
    def backward(ctx, grad):
        a, b, a_scale, a_zero, b_scale, b_zero = ctx.saved_tensors
        a_grid, b_grid = ((0, (1 << bits) - 1, None, 0) for bits in ctx.widths)
        da = grad @ RAW.fake_quant(b, b_scale, b_zero, *b_grid).transpose(-1, -2).to(grad.dtype)
        db = RAW.fake_quant(a, a_scale, a_zero, *a_grid).transpose(-1, -2) @ grad
        da, db = da.sum_to_size(a.shape), db.sum_to_size(b.shape).to(b.dtype)
        da, da_scale, _ = RAW.fake_quant_backward(da, a, a_scale, a_zero, *a_grid)
        db, db_scale, _ = RAW.fake_quant_backward(db, b, b_scale, b_zero, *b_grid)
        return da, db, da_scale, None, db_scale, None, None, None


def _needed(needs, gradients):
    """Give the gradients that something asks for, and None for the others."""
    return tuple(g if needed else None for g, needed in zip(gradients, needs, strict=True))


def entering_codes(x, x_scale, x_zero, x_bits, token=False):
    """Give (what enters a packed product, its scale, its zero, the count of bad inputs); codes stay as they are."""
    if token:
        codes, x_scale, x_zero, _, nonfinite = RAW.activation_codes(x, None, None, x_bits, False, False)
        return codes, x_scale, x_zero, nonfinite
    if x_scale is None or x.dtype == torch.uint8:
        return x, x_scale, x_zero, None
    codes, nonfinite = RAW.quantize_codes(x, *_entering(x, x_scale, x_zero, x_bits))
    return codes, x_scale, x_zero, nonfinite


def _through_codes(needs, dx, x, x_scale, x_zero, x_bits):
    if x_scale is None:
        return dx, None
    dx, dx_scale, _ = RAW.fake_quant_backward(dx, x, *_entering(x, x_scale, x_zero, x_bits))
    return dx, dx_scale.reshape(x_scale.shape) if needs[7] else None


def _entering(x, x_scale, x_zero, x_bits):
    """Give the (scale, zero, qmin, qmax, axis, group) of an activation: one scale, or one a token."""
    qmax = (1 << x_bits) - 1
    if x_scale.ndim == 0:
        return x_scale, x_zero, 0, qmax, None, 0
    return x_scale.unsqueeze(-1), x_zero.unsqueeze(-1), 0, qmax, None, x.shape[-1]


def _observed(ctx, y, *seen):
    """Return `y` and what is seen beside it, which has no gradient."""
    held = [t for t in seen if t is not None]
    if held:
        ctx.mark_non_differentiable(*held)
    return y, *seen
