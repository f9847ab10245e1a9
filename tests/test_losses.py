"""Laws every loss obeys, and its gradient against float64 autograd of the textbook definition."""

import itertools

import pytest
import torch

from upq.losses import LOSSES, Divergence, TopK, log_softmax

CONFIG = {"cakld": {"confidence": 0.3}}
DIVERGENCES = [name for name in LOSSES.names() if issubclass(LOSSES.get(name), Divergence)]


def make(name, **options):
    loss = LOSSES.get(name)
    return loss(loss.Config(**{**CONFIG.get(name, {}), **options}))


def data(t=13, v=41, dtype=torch.float32, scale=3.0):
    g = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(t, v, generator=g, dtype=dtype) for _ in range(2))
    return student, teacher, torch.randint(v, (t,), generator=g), torch.arange(t) % 3 > 0


def definition(name, z, teacher, target, mask, beta=0.5, gamma=0.3):
    """Straight from the papers, for autograd in float64."""
    logq, logp = z.log_softmax(-1)[mask], teacher.log_softmax(-1)[mask]
    q, p = logq.exp(), logp.exp()
    kl_pq, kl_qp = (p * (logp - logq)).sum(), (q * (logq - logp)).sum()
    m = beta * p + (1 - beta) * q
    return {
        "fkl": kl_pq,
        "rkl": kl_qp,
        "cakld": gamma * kl_qp + (1 - gamma) * kl_pq,
        "gjs": beta * (p * (logp - m.log())).sum() + (1 - beta) * (q * (logq - m.log())).sum(),
        "ce": -logq[torch.arange(len(q)), target[mask]].sum(),
    }[name]


@pytest.mark.parametrize("name", LOSSES.names())
class TestLaws:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
    def test_value_and_gradient_match_the_definition(self, name, dtype, tolerance, device):
        z, teacher, target, mask = (x.to(device) for x in data(dtype=torch.float64))
        z.requires_grad_()
        expected = definition(name, z, teacher, target, mask)
        (gradient,) = torch.autograd.grad(expected, z)
        value, grad = make(name)(z.detach().to(dtype), teacher.to(dtype), target, mask)
        assert value.item() == pytest.approx(expected.item(), rel=tolerance)
        torch.testing.assert_close(grad.double(), gradient, rtol=0, atol=tolerance)

    def test_zero_with_zero_gradient_at_the_teacher(self, name):
        _, teacher, target, mask = data()
        value, grad = make(name)(teacher, teacher, target, mask)
        if LOSSES.get(name).uses_teacher:
            assert abs(value.item()) < 1e-5
            assert grad.abs().max() < 1e-6
        else:
            assert value > 0

    def test_masked_tokens_get_exactly_no_gradient(self, name, device):
        z, teacher, target, mask = (x.to(device) for x in data())
        _, grad = make(name)(z, teacher, target, mask)
        assert (grad[~mask] == 0).all()
        assert (grad[mask].abs().sum(-1) > 0).all()

    def test_a_full_mask_is_the_sum_of_single_tokens(self, name):
        z, teacher, target, _ = data()
        whole = make(name)(z, teacher, target, torch.ones(len(z), dtype=torch.bool))
        parts = [make(name)(*(x[i : i + 1] for x in (z, teacher, target)), torch.ones(1).bool()) for i in range(len(z))]
        torch.testing.assert_close(whole.value, sum(p.value for p in parts))
        torch.testing.assert_close(whole.grad_TV, torch.cat([p.grad_TV for p in parts]))

    def test_chunks_add(self, name):
        z, teacher, target, mask = data()
        whole = make(name)(z, teacher, target, mask)
        chunks = zip(*(x.chunk(5) for x in (z, teacher, target, mask)), strict=True)
        parts = [make(name)(*chunk) for chunk in chunks]
        torch.testing.assert_close(whole.value, sum(p.value for p in parts))
        torch.testing.assert_close(whole.grad_TV, torch.cat([p.grad_TV for p in parts]))

    def test_ignores_a_shift_of_the_logits(self, name):
        z, teacher, target, mask = data()
        a, b = make(name)(z, teacher, target, mask), make(name)(z + 7, teacher - 3, target, mask)
        torch.testing.assert_close(a.value, b.value)
        torch.testing.assert_close(a.grad_TV, b.grad_TV, rtol=1e-4, atol=1e-5)

    def test_finite_where_probabilities_underflow(self, name):
        z, teacher, target, mask = data(scale=300.0)
        value, grad = make(name)(z, teacher, target, mask)
        assert value.isfinite()
        assert grad.isfinite().all()


@pytest.mark.parametrize("beta", [0.1, 0.25, 0.75, 0.9])
def test_gjs_for_every_beta(beta):
    z, teacher, target, mask = data(dtype=torch.float64)
    z.requires_grad_()
    expected = definition("gjs", z, teacher, target, mask, beta=beta)
    (gradient,) = torch.autograd.grad(expected, z)
    value, grad = make("gjs", beta=beta)(z.detach(), teacher, target, mask)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(grad, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("beta", "limit"), [(1e-6, "fkl"), (1 - 1e-6, "rkl")])
def test_gjs_tends_to_the_two_kl_directions(beta, limit):
    z, teacher, target, mask = data(dtype=torch.float64)
    scaled = make("gjs", beta=beta)(z, teacher, target, mask).value / min(beta, 1 - beta)
    assert scaled.item() == pytest.approx(make(limit)(z, teacher, target, mask).value.item(), rel=5e-3)


def test_gjs_is_bounded_by_log_2():
    z, teacher, target, mask = data(scale=300.0)
    assert make("gjs")(z, teacher, target, mask).value <= mask.sum() * torch.tensor(2.0).log() + 1e-4


def cut(teacher, k):
    return TopK.of(log_softmax(teacher), k)


@pytest.mark.parametrize("name", DIVERGENCES)
class TestTopK:
    """The teacher's k likeliest tokens in place of its logits: all others count as one."""

    @pytest.mark.parametrize("k", [1, 5, 40])
    def test_value_and_gradient_match_the_definition(self, name, k):
        """float64 autograd through the sums of probabilities; nothing of it is in logarithms."""
        z, teacher, target, mask = data(dtype=torch.float64)
        z.requires_grad_()
        index = teacher.topk(k).indices

        def coarse(logits):
            p = logits.softmax(-1)
            kept = p.gather(1, index)
            return torch.cat([kept, p.sum(1, keepdim=True) - kept.sum(1, keepdim=True)], 1).log()

        expected = definition(name, coarse(z), coarse(teacher), target * 0, mask)
        (gradient,) = torch.autograd.grad(expected, z)
        value, grad = make(name)(z.detach(), cut(teacher, k), target, mask)
        assert value.item() == pytest.approx(expected.item(), rel=1e-9)
        torch.testing.assert_close(grad, gradient, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_all_tokens_are_the_whole_loss(self, name, dtype):
        z, teacher, target, mask = data(dtype=dtype)
        whole, found = make(name)(z, teacher, target, mask), make(name)(z, cut(teacher, z.shape[1]), target, mask)
        torch.testing.assert_close(found.value, whole.value, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.grad_TV, whole.grad_TV, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("scale", [0.3, 3.0, 10.0])
    def test_more_tokens_come_nearer_from_below(self, name, scale):
        """Token by token, and not in the sum alone: to tell two rare tokens apart never lowers a divergence."""
        z, teacher, target, _ = data(t=12, dtype=torch.float64, scale=scale)
        everywhere = torch.ones(1, dtype=torch.bool)
        for at in range(len(z)):
            row = z[at : at + 1], teacher[at : at + 1], target[at : at + 1]
            whole = make(name)(*row, everywhere).value.item()
            values = [make(name)(row[0], cut(row[1], k), row[2], everywhere).value.item() for k in range(1, 42)]
            assert all(a <= b + 1e-12 for a, b in itertools.pairwise([*values, whole]))
            assert values[-1] == pytest.approx(whole, abs=1e-12)

    def test_zero_with_zero_gradient_at_the_teacher(self, name):
        _, teacher, target, mask = data()
        value, grad = make(name)(teacher, cut(teacher, 7), target, mask)
        assert abs(value.item()) < 1e-5
        assert grad.abs().max() < 1e-6

    def test_masked_tokens_get_exactly_no_gradient(self, name):
        z, teacher, target, mask = data()
        _, grad = make(name)(z, cut(teacher, 7), target, mask)
        assert (grad[~mask] == 0).all()
        assert (grad[mask].abs().sum(-1) > 0).all()

    @pytest.mark.parametrize("k", [1, 7, 41])
    def test_finite_where_probabilities_underflow(self, name, k):
        z, teacher, target, mask = data(scale=300.0)
        value, grad = make(name)(z, cut(teacher, k), target, mask)
        assert value.isfinite()
        assert grad.isfinite().all()
