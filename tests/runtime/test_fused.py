"""The fused operators: torch expressions against autograd in fp64, GPU kernels against the expressions."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nf4.ops import fused

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}  # relative error of an element
ROWS = 5
EPS = 1e-5


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_rms_norm_and_its_gradient() -> None:
    x, weight, residual = doubles(ROWS, 24), doubles(24), doubles(ROWS, 24)
    grad, passed = doubles(ROWS, 24), doubles(ROWS, 24)
    total = (x + residual).requires_grad_()
    expected = F.rms_norm(total, (24,), weight, EPS)
    expected.backward(grad)

    out, kept = torch.empty_like(x), residual.clone()
    fused.rms_norm(x, weight, EPS, out=out, residual=kept)
    torch.testing.assert_close(out, expected.detach())
    assert torch.equal(kept, total.detach())
    fused.rms_norm(total.detach(), weight, EPS, out=out)
    torch.testing.assert_close(out, expected.detach())
    fused.rms_norm_backward(grad, total.detach(), weight, EPS, passed=passed, out=grad)
    assert total.grad is not None
    torch.testing.assert_close(grad, passed + total.grad)


def test_rotation_and_its_gradient() -> None:
    heads, size, positions = 3, 8, 4
    angles = doubles(positions, size // 2)
    cos, sin = (torch.cat((table, table), dim=1) for table in (angles.cos(), angles.sin()))
    x = doubles(2 * positions, heads * size).requires_grad_()
    first, second = x.view(2, positions, heads, size).chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1).view(x.shape)
    grad = doubles(*x.shape)
    expected.backward(grad)

    rotated = x.detach().clone()
    fused.rotate(rotated, cos, sin)
    torch.testing.assert_close(rotated, expected.detach())
    fused.rotate(grad, cos, sin, backward=True)
    torch.testing.assert_close(grad, x.grad)
    back = torch.empty_like(rotated)
    fused.rotate(rotated, cos, sin, out=back, backward=True)
    torch.testing.assert_close(back, x.detach())


def test_swiglu_and_its_gradient() -> None:
    gate_up = doubles(ROWS, 14).requires_grad_()
    gate, up = gate_up.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    grad = doubles(ROWS, 7)
    expected.backward(grad)
    out, inplace = torch.empty_like(expected), gate_up.detach().clone()
    fused.swiglu(inplace, out=out)
    torch.testing.assert_close(out, expected.detach())
    fused.swiglu_backward(inplace, grad)
    torch.testing.assert_close(inplace, gate_up.grad)


def test_cross_entropy_and_its_gradient() -> None:
    logits = (3 * doubles(ROWS, 11)).requires_grad_()
    targets = torch.randint(0, 11, (ROWS,))
    expected = F.cross_entropy(logits, targets, reduction="none")
    (0.25 * expected.sum()).backward()
    inplace = logits.detach().clone()
    torch.testing.assert_close(fused.cross_entropy(inplace, targets), expected.detach())
    assert torch.equal(inplace, logits.detach())
    torch.testing.assert_close(fused.cross_entropy(inplace, targets, gradient_scale=0.25), expected.detach())
    torch.testing.assert_close(inplace, logits.grad)


class Case:
    """Operands in one dtype, rows apart by `room` elements of poison, on both devices."""

    def __init__(self, dtype: torch.dtype, room: int) -> None:
        self.dtype, self.room = dtype, room
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def rows(self, *shape: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        values = (torch.randn(shape) * scale).to(self.dtype)
        memory = torch.full((shape[0], shape[1] + self.room), float("nan"), dtype=self.dtype)
        memory[:, : shape[1]] = values
        on_gpu = memory.cuda()
        self.pairs.append((memory, on_gpu))
        return memory[:, : shape[1]], on_gpu[:, : shape[1]]

    def check(self) -> None:
        """Everything that lies in memory now agrees, poison included."""
        for expected, got in self.pairs:
            tolerance = DTYPES[self.dtype]
            scale = expected.nan_to_num().float().abs().mean().item()
            torch.testing.assert_close(
                got.cpu(), expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True
            )


def norm_case(case: Case, size: int) -> Callable[[int], None]:
    x, out, residual, passed, grad = (case.rows(ROWS, size) for _ in range(5))
    weight = torch.randn(size).to(case.dtype)
    weights = (weight, weight.cuda())

    def run(i: int) -> None:
        fused.rms_norm(x[i], weights[i], EPS, out=out[i])
        fused.rms_norm(out[i], weights[i], EPS, out=out[i], residual=residual[i])
        fused.rms_norm_backward(grad[i], x[i], weights[i], EPS, passed=passed[i], out=grad[i])

    return run


def copy_case(case: Case, size: int) -> Callable[[int], None]:
    source, out = case.rows(ROWS, size), case.rows(ROWS, size)
    return lambda i: fused.copy_rows(source[i], out[i])


def rotary_case(case: Case, size: int) -> Callable[[int], None]:
    positions, heads = 3, 4
    x, out = case.rows(2 * positions, heads * 2 * size), case.rows(2 * positions, heads * 2 * size)
    cos, sin = case.rows(positions, 2 * size), case.rows(positions, 2 * size)

    def run(i: int) -> None:
        fused.rotate(x[i], cos[i], sin[i])
        fused.rotate(x[i], cos[i], sin[i], out=out[i], backward=True)

    return run


def swiglu_case(case: Case, size: int) -> Callable[[int], None]:
    gate_up, out = case.rows(ROWS, 2 * size, scale=3), case.rows(ROWS, size)

    def run(i: int) -> None:
        fused.swiglu(gate_up[i], out=out[i])
        fused.swiglu_backward(gate_up[i], out[i])

    return run


def cross_entropy_case(case: Case, size: int) -> Callable[[int], None]:
    logits = case.rows(ROWS, size, scale=4)
    target = torch.randint(0, size, (ROWS,))
    targets, losses = (target, target.cuda()), (torch.zeros(2, ROWS), torch.zeros(2, ROWS).cuda())
    case.pairs.append(losses)

    def run(i: int) -> None:
        losses[i][0] = fused.cross_entropy(logits[i], targets[i])
        losses[i][1] = fused.cross_entropy(logits[i], targets[i], gradient_scale=8.0)

    return run


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [copy_case, norm_case, rotary_case, swiglu_case, cross_entropy_case])
def test_kernels_equal_the_expressions(
    make: Callable[[Case, int], Callable[[int], None]], dtype: torch.dtype
) -> None:
    for size, room in itertools.product((5, 8, 64, 100, 2056, 5000), (0, 8, 3)):
        case = Case(dtype, room)
        run = make(case, size)
        run(0)
        run(1)
        case.check()


@pytest.mark.cuda
def test_a_target_outside_of_the_vocabulary_gives_nan() -> None:
    logits = torch.zeros(3, 16, device="cuda")
    losses = fused.cross_entropy(logits, torch.tensor([1, 16, -100], device="cuda"), gradient_scale=1.0)
    assert losses.isnan().tolist() == [False, True, True]
    assert logits.isnan().all(1).tolist() == [False, True, True]
