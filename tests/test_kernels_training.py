"""The compiled parts of a training step against torch: weights bit for bit, sums as near to float64's as torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from upq.core.scheme import QuantScheme
from upq.grids import GRIDS
from upq.kernels import computing, cpu, training
from upq.losses import LOSSES

ISAS = cpu.instruction_sets()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    monkeypatch.setattr(cpu, "instruction_set", lambda: name)
    return name


def weights(rows: int, columns: int) -> Tensor:
    """Some far outside of all levels, some on the edges between levels."""
    w_OI = torch.randn(rows, columns) * torch.logspace(-3, 1, rows)[:, None]
    w_OI[0, :5] = torch.tensor([0.0, -0.0, 0.5, -0.5, 1e30])
    return w_OI


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 24])
def test_fake_weights_and_gradients_are_those_of_torch(isa: str, bits: int, group_size: int) -> None:
    torch.manual_seed(0)
    grid, scheme = GRIDS.get("seq"), QuantScheme(bits=bits, group_size=group_size)
    w_OI, grad_OI = weights(7, 72), torch.randn(7, 72)
    params = grid.init(w_OI.clamp(-3, 3), scheme)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        latent = w_OI.clone().requires_grad_()
        log_delta = params["log_delta"].clone().requires_grad_()
        fake_OI = grid.fake(latent, {"log_delta": log_delta}, scheme)
        fake_OI.backward(grad_OI)
        assert latent.grad is not None
        assert log_delta.grad is not None
        return fake_OI.detach(), latent.grad, log_delta.grad

    found = run()
    with computing("reference"):
        expected = run()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-6)


def test_nan_stays_nan(isa: str) -> None:
    w_OI = torch.tensor([[float("nan"), 0.3, -0.2, 0.1, 0.0, 0.0, 0.0, 0.0]])
    scheme = QuantScheme(bits=2)
    fake_OI = GRIDS.get("seq").fake(w_OI, {"log_delta": torch.zeros(1, 1)}, scheme)
    assert fake_OI.isnan().tolist()[0] == [True] + [False] * 7
    logits = torch.randn(3, 50)
    logits[1, 7] = float("nan")
    value_T, grad_TV = training.gjs(logits, torch.randn(3, 50), 0.5)
    assert value_T.isnan().tolist() == [False, True, False]
    assert grad_TV[1].isnan().any()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_is_that_of_float64(isa: str, beta: float, spread: float, dtype: torch.dtype) -> None:
    """As near to it as torch's float32, up to a factor; the vocabulary is no multiple of any vector."""
    torch.manual_seed(1)
    student, teacher = ((spread * torch.randn(5, 5003)).to(dtype) for _ in range(2))
    loss = LOSSES.get("gjs")(LOSSES.get("gjs").Config(beta=beta))
    expected = loss.per_token(*(z.double().log_softmax(-1) for z in (student, teacher)))
    own = loss.per_token(*(z.float().log_softmax(-1) for z in (student, teacher)))
    found = training.gjs(student, teacher, beta)
    for which, scale in enumerate((1.0, 5003**-0.5)):
        off = (found[which] - expected[which]).abs().max()
        torchs = (own[which] - expected[which]).abs().max()
        assert off <= 2 * torchs + 1e-7 * scale, (which, off, torchs)


def test_a_student_that_is_the_teacher(isa: str) -> None:
    logits = 5 * torch.randn(4, 999)
    value_T, grad_TV = training.gjs(logits, logits.clone(), 0.5)
    assert value_T.abs().max() < 1e-6
    assert grad_TV.abs().max() < 1e-7


def test_instruction_sets_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    w_OGS, scale_OG, grad = torch.randn(5, 2, 333), torch.rand(5, 2) + 0.1, torch.randn(5, 2, 333)
    logits, found = (3 * torch.randn(4, 4097), 3 * torch.randn(4, 4097)), list[tuple[Tensor, ...]]()
    for name in ISAS:
        monkeypatch.setattr(cpu, "instruction_set", lambda name=name: name)
        gradients = training.seq_gradient(grad, w_OGS, scale_OG, 2, bound=1.98, factor=1.0)
        found.append((training.fake_seq(w_OGS, scale_OG, 2), *gradients, *training.gjs(*logits, 0.5)))
    for name, other in zip(ISAS[1:], found[1:], strict=True):
        assert all(map(torch.equal, found[0], other)), name


def test_threads_change_no_bit() -> None:
    torch.manual_seed(2)
    w_OGS, scale_OG, grad = torch.randn(64, 3, 4096), torch.rand(64, 3) + 0.1, torch.randn(64, 3, 4096)
    logits = torch.randn(33, 20_000), torch.randn(33, 20_000)
    before, found = torch.get_num_threads(), list[tuple[Tensor, ...]]()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                (
                    training.fake_seq(w_OGS, scale_OG, 2),
                    *training.seq_gradient(grad, w_OGS, scale_OG, 2, bound=1.98, factor=1.0),
                    *training.gjs(*logits, 0.5),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_what_it_does_not_take_goes_through_torch() -> None:
    plain = torch.randn(4, 8)
    assert training.takes(plain, torch.nn.Parameter(plain))
    for other in (plain.double(), plain.t(), plain.to("meta"), plain.bfloat16()):
        assert not training.takes(plain, other)
    assert training.takes_logits(plain.bfloat16())
    assert not training.takes_logits(plain.half())
    with computing("reference"):
        assert not training.takes(plain)
