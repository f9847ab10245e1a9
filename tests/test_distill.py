"""The training stage: its loss against the plain computation, its resume, and its processes."""

import contextlib
import math
import signal
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from together import together
from upq.core.errors import UPQError
from upq.core.progress import Silent
from upq.core.scheme import QuantScheme
from upq.core.signals import Stop, Stopped
from upq.distill.config import Distill
from upq.distill.objective import Objective, _relative_error
from upq.distill.student import make_student, norms, trained_linears
from upq.distill.trainer import Training, confidence, distill, learning_rate_factor, make_loss, skipped_steps
from upq.files.tensors import load_tensors, save_tensors
from upq.grids import search_scale
from upq.losses import LOSSES
from upq.nn.blocks import model_weights
from upq.nn.fake_quant import Solution

VOCAB, T = 50, 12


@dataclass(frozen=True)
class Random:
    """Batches of random tokens as a pure function of the step, some of them masked."""

    masked: bool = True

    def batch(self, step, size):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCAB, (size, T), generator=generator)
        mask = torch.rand(size, T, generator=generator) < 0.7
        return tokens, mask if self.masked else torch.ones_like(mask)


class StopsAt(Random):
    def __init__(self, step):
        super().__init__()
        object.__setattr__(self, "stop", step)

    def batch(self, step, size):
        if step == self.stop:
            raise KeyboardInterrupt
        return super().batch(step, size)


class Losses(Silent):
    def __init__(self):
        self.values = []

    def advance(self, units=1, **figures):
        self.values.append(figures["loss"])


def make_teacher(seed=0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCAB, hidden_size=32, intermediate_size=44, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def make(teacher, *, train_norms=False, grid="seq"):
    scheme = QuantScheme(bits=2, grid=grid)
    weights = {path: teacher.get_submodule(path).weight for path in model_weights(teacher)}
    start = {path: Solution(w, search_scale(w, scheme), scheme) for path, w in weights.items()}
    return make_student(teacher, start, train_norms=train_norms)


def make_config(**changes):
    values = {"loss": "gjs", "tokens": 1, "batch_size": 6, "micro_batch_size": 6, "lr": 1e-2, "scale_lr": 1e-3}
    return Distill(**{**values, "checkpoint_every": 3, **changes})


def train(student, teacher, config, checkpoint, steps=6, data=None, progress=None, sharded=False):
    return distill(
        student,
        teacher,
        data or Random(),
        config,
        total_steps=steps,
        checkpoint=checkpoint,
        progress=progress or Silent(),
        sharded=sharded,
    )


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("name", LOSSES.names())
def test_objective_is_the_loss_on_the_whole_logits(name, chunk):
    teacher = make_teacher()
    student = make(teacher, train_norms=True)
    loss = make_loss(make_config(loss=name), teacher, Random())
    tokens, mask = Random().batch(0, 5)

    z, p = (m(tokens).logits[:, :-1].reshape(-1, VOCAB) for m in (student, teacher))
    value, grad = loss(z.detach(), p, tokens[:, 1:].reshape(-1), mask[:, 1:].reshape(-1))
    z.backward(grad)
    expected = {n: q.grad.clone() for n, q in student.named_parameters() if q.grad is not None}
    student.zero_grad()

    total = Objective(student, teacher, loss, chunk=chunk)(tokens, mask)
    total.backward()
    assert total.item() == pytest.approx(value.item(), rel=1e-5)
    found = {n: q.grad for n, q in student.named_parameters() if q.grad is not None}
    assert found.keys() == expected.keys()
    for n, gradient in found.items():
        torch.testing.assert_close(gradient, expected[n], rtol=1e-3, atol=1e-5)


def test_a_state_that_is_massive_in_the_student_alone_counts_as_one_token():
    """Over the teacher's size alone it would count as 30,000, and the step be about nothing else."""
    teacher_TH = torch.tensor([[3.0, 4.0], [3.0, 4.0], [300.0, 400.0]])
    student_TH = torch.tensor([[300.0, -400.0], [3.0, 0.0], [3.0, 4.0]], requires_grad=True)
    errors_T = _relative_error(student_TH, teacher_TH)
    assert errors_T.tolist() == pytest.approx([(297**2 + 404**2) / 500**2, 16 / 25, (297**2 + 396**2) / 500**2])
    errors_T.sum().backward()
    assert student_TH.grad[0].norm() < 0.02 * student_TH.grad[1].norm()


def test_the_rate_that_is_left_open_falls_with_the_width():
    auto = make_config(lr=None)
    assert [auto.learning_rate(width) for width in (64, 256, 576, 8192)] == [1e-3, 1e-3, 2e-4, 2e-4]
    between = [auto.learning_rate(width) for width in (256, 320, 384, 448, 512, 576)]
    assert between == sorted(set(between), reverse=True)
    assert make_config(lr=3e-3).learning_rate(8192) == 3e-3


def test_each_kind_has_its_rate():
    """Weights `lr` in units of their RMS (here a narrow model's), norms `scale_lr` in theirs, grid parameters alone."""
    teacher = make_teacher()
    student = make(teacher, train_norms=True)
    training = Training(student, teacher, Random(), make_config(lr=None, scale_lr=5e-3, train_norms=True))
    rates = {id(p): group["lr"] for group in training.optimizer.param_groups for p in group["params"]}
    for layer in trained_linears(student).values():
        assert rates[id(layer.weight)] == pytest.approx(1e-3 * layer.weight.square().mean().sqrt().item())
        assert {rates[id(p)] for p in layer.grid_params.values()} == {5e-3}
    for norm in norms(student).values():
        assert rates[id(norm.weight)] == pytest.approx(5e-3 * norm.weight.square().mean().sqrt().item())


@pytest.mark.parametrize("name", ["gjs", "ce"])
def test_hidden_adds_the_relative_error_of_what_each_block_writes(name):
    teacher = make_teacher()
    student = make(teacher)
    tokens, mask = Random().batch(0, 5)
    written = {}
    for model in (teacher, student):
        for i, part in enumerate((model.model.layers[0], model.model.norm)):  # two blocks, the last after the norm
            part.register_forward_hook(lambda _m, _in, out, key=(model, i): written.__setitem__(key, out))
    loss = make_loss(make_config(loss=name), teacher, Random())

    def run(hidden):
        student.zero_grad()
        total = Objective(student, teacher, loss, chunk=7, hidden=hidden)(tokens, mask)
        total.backward()
        return total.item(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}

    plain, gradients = run(0.0)
    total, found = run(0.3)
    student.zero_grad()
    student(tokens)
    expected = 0

    def size(s, t):
        return torch.maximum(s.detach().norm(dim=-1), t.norm(dim=-1))

    for i in range(2):
        s, t = (written[model, i][:, :-1][mask[:, 1:]] for model in (student, teacher))
        expected = expected + 0.3 / 2 * ((s - t).norm(dim=-1) / size(s, t)).square().sum()
    expected.backward()
    assert total == pytest.approx(plain + expected.item(), rel=1e-5)
    for n, p in student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[n], gradients[n] + p.grad, rtol=1e-3, atol=1e-4)


def test_only_latents_scales_and_asked_for_norms_learn():
    teacher = make_teacher()
    learned = {n for n, p in make(teacher).named_parameters() if p.requires_grad}
    assert learned == {
        f"{path}.{leaf}" for path in model_weights(teacher) for leaf in ("weight", "grid_params.log_delta")
    }
    student = make(teacher, train_norms=True)
    assert {n for n, p in student.named_parameters() if p.requires_grad} - learned == {
        f"{n}.weight" for n in norms(student)
    }
    assert "model.norm" in norms(student)


def test_the_student_shares_what_it_does_not_train(tmp_path):
    teacher = make_teacher()
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    student = make(teacher, train_norms=True)
    assert student.model.embed_tokens.weight.data_ptr() == teacher.model.embed_tokens.weight.data_ptr()
    train(student, teacher, make_config(train_norms=True), tmp_path / "c.safetensors")
    for n, p in teacher.named_parameters():
        assert torch.equal(p, before[n]), n  # training the student never moves its teacher


@pytest.mark.parametrize("grid", ["seq", "affine"])
def test_freeze_is_what_the_forward_pass_computes_with(tmp_path, grid):
    teacher = make_teacher()
    student = make(teacher, grid=grid)
    train(student, teacher, make_config(), tmp_path / "c.safetensors")
    codes = {path: layer.freeze() for path, layer in trained_linears(student).items()}
    assert codes.keys() == set(model_weights(teacher))
    for path, layer in trained_linears(student).items():
        assert torch.equal(codes[path].dequantize(), layer.fake())


def test_training_lowers_the_loss(tmp_path):
    class Same(Random):
        def batch(self, step, size):
            return super().batch(0, size)

    teacher = make_teacher()
    losses = train(make(teacher), teacher, make_config(), tmp_path / "c.safetensors", steps=40, data=Same())
    assert losses[-1] < 0.7 * losses[0]


def test_training_lowers_the_loss_with_backward_products_in_nvfp4_too(tmp_path):
    teacher, losses = make_teacher(), {}
    for backward in (None, "nvfp4"):
        config = make_config(micro_batch_size=3, backward=backward)
        losses[backward] = train(make(teacher), teacher, config, tmp_path / f"{backward}.safetensors", steps=30)
    assert losses["nvfp4"][0] == losses[None][0]
    assert losses["nvfp4"][1:] != losses[None][1:]
    assert sum(losses["nvfp4"][-5:]) < 0.9 * sum(losses["nvfp4"][:5])


def test_micro_batches_make_no_difference(tmp_path):
    teacher = make_teacher()
    runs = [
        train(make(teacher), teacher, make_config(micro_batch_size=size), tmp_path / f"{size}.safetensors")
        for size in (1, 4, 6)
    ]
    for other in runs[1:]:
        assert other == pytest.approx(runs[0], rel=1e-4)


@pytest.mark.parametrize("backward", [None, "nvfp4"])
def test_resumed_training_is_bit_identical(tmp_path, device, backward):
    """Stopped after the first checkpoint by an error in the data, then gone on with a new student."""

    teacher = make_teacher().to(device)
    config = make_config(train_norms=True, precision="fp32", backward=backward)
    whole = make(teacher, train_norms=True)
    train(whole, teacher, config, tmp_path / "whole.safetensors")
    with pytest.raises(KeyboardInterrupt):
        train(make(teacher, train_norms=True), teacher, config, tmp_path / "c.safetensors", data=StopsAt(4))
    resumed = make(teacher, train_norms=True)
    losses = train(resumed, teacher, config, tmp_path / "c.safetensors")
    assert len(losses) == 3
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    teacher = make_teacher()
    student, checkpoint = make(teacher), tmp_path / "c.safetensors"
    train(student, teacher, make_config(), checkpoint, steps=3)
    kept = checkpoint.read_bytes()
    broken = make_teacher()
    broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UPQError, match=r"step 3: the loss is nan.*skip_bad_steps.*lower distill\.lr.*is kept in"):
        train(make(teacher), broken, make_config(), checkpoint, steps=6)
    assert checkpoint.read_bytes() == kept


def test_schedule_warms_up_and_falls_to_its_end():
    config = make_config(warmup=0.1, final_lr=0.2)
    factors = [learning_rate_factor(step, 100, config) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.2, abs=1e-3)
    assert factors[55] == pytest.approx(0.6)  # half way down the cosine


def test_cakld_measures_the_teachers_confidence():
    teacher = make_teacher()
    tokens, mask = Random().batch(0, 16)
    p = teacher(tokens).logits.double().softmax(-1)
    chosen = [p[b, t - 1, tokens[b, t]] for b in range(16) for t in range(1, T) if mask[b, t]]
    assert confidence(teacher, Random()) == pytest.approx(torch.stack(chosen).mean().item(), rel=1e-5)
    assert make_loss(make_config(loss="cakld"), teacher, Random()).gamma == pytest.approx(confidence(teacher, Random()))


def test_next_token_training_never_runs_the_teacher(tmp_path):
    teacher = make_teacher()
    student = make(teacher)
    teacher.model.forward = None
    assert len(train(student, teacher, make_config(loss="ce"), tmp_path / "c.safetensors", steps=2)) == 2


def ranked(_, folder, sharded):
    """One of two processes: the losses of a new training, and of one that goes on to step 7."""
    new = parallel(folder / "new.safetensors", sharded=sharded)
    return new, parallel(folder / "c.safetensors", stop=7, sharded=sharded)


def parallel(checkpoint, stop=-1, sharded=False):
    """The losses of a training of 8 steps that goes on from `checkpoint` and ends before step `stop`."""
    teacher, seen = make_teacher(), Losses()
    config = make_config(micro_batch_size=2, hidden=0.25, train_norms=True)
    student = make(teacher, train_norms=True)
    with contextlib.suppress(KeyboardInterrupt):
        train(student, teacher, config, checkpoint, 8, data=StopsAt(stop), progress=seen, sharded=sharded)
    return seen.values


@pytest.mark.parametrize("weights", ["replicated", "sharded"])
def test_two_processes_train_as_one_does(tmp_path, weights):
    """Two gloo processes: the losses of one, and each goes on from the other's checkpoint."""
    one, shared = parallel(tmp_path / "one.safetensors"), tmp_path / "c.safetensors"
    assert parallel(shared, stop=4) == one[:4]
    new, resumed = together(2, ranked, tmp_path, weights == "sharded")[0]
    assert new == pytest.approx(one, rel=1e-5)
    assert resumed == pytest.approx(one[3:7], rel=1e-5)  # there is a checkpoint every three steps
    assert parallel(shared) == pytest.approx(one[6:], rel=1e-5)


class BadAt(Random):
    """Batches at whose steps in `bad` the teacher's output is no number."""

    def __init__(self, teacher, *bad):
        super().__init__()
        weight = teacher.model.norm.weight
        object.__setattr__(self, "poison", (weight, weight.clone(), bad))

    def batch(self, step, size):
        weight, good, bad = self.poison
        weight.copy_(torch.full_like(good, float("nan")) if step in bad else good)
        return super().batch(step, size)


class Notes(Silent):
    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)


def assert_same(a, b):
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("bad", [1, 3])
def test_a_skipped_step_is_one_that_never_was_and_the_schedule_goes_on(tmp_path, bad):
    """Against its definition: trained up to the step, then gone on behind it."""
    teacher, notes = make_teacher(), Notes()
    config = make_config(skip_bad_steps=1, checkpoint_every=1)
    skipping = make(teacher)
    losses = train(skipping, teacher, config, tmp_path / "a.safetensors", data=BadAt(teacher, bad), progress=notes)
    assert [step for step, loss in enumerate(losses) if not math.isfinite(loss)] == [bad]
    assert skipped_steps(tmp_path / "a.safetensors") == [bad]
    assert any(f"step {bad} is left out: the loss is nan (1 of 1)" in said for said in notes.said)

    with pytest.raises(KeyboardInterrupt):
        train(make(teacher), teacher, config, tmp_path / "b.safetensors", data=StopsAt(bad))
    tensors, metadata = load_tensors(tmp_path / "b.safetensors")
    save_tensors(tmp_path / "b.safetensors", tensors, {**metadata, "step": bad + 1})
    jumped = make(teacher)
    train(jumped, teacher, config, tmp_path / "b.safetensors")
    assert_same(skipping, jumped)


def test_a_run_that_begins_with_a_skipped_step_resumes(tmp_path):
    """There are no moments in its first checkpoint."""
    teacher = make_teacher()
    config, data = make_config(skip_bad_steps=1, checkpoint_every=1), BadAt(teacher, 0)
    whole, resumed = make(teacher), make(teacher)
    train(whole, teacher, config, tmp_path / "whole.safetensors", data=data)
    assert math.isnan(train(make(teacher), teacher, config, tmp_path / "c.safetensors", steps=1, data=data)[0])
    # A schedule of one step has another warm-up, but that step has changed nothing.
    train(resumed, teacher, config, tmp_path / "c.safetensors", data=data)
    assert_same(whole, resumed)


def test_one_bad_step_too_many_stops_and_the_count_outlives_it(tmp_path):
    teacher = make_teacher()
    data, checkpoint = BadAt(teacher, 1, 4), tmp_path / "c.safetensors"
    with pytest.raises(UPQError, match=r"step 4: the loss is nan; raise distill\.skip_bad_steps \(now 1\)"):
        train(make(teacher), teacher, make_config(skip_bad_steps=1), checkpoint, data=data)
    assert skipped_steps(checkpoint) == [1]
    assert load_tensors(checkpoint)[1]["step"] == 4  # and not the one of checkpoint_every
    with pytest.raises(UPQError, match="step 4"):  # the same again: the count is not begun anew
        train(make(teacher), teacher, make_config(skip_bad_steps=1), checkpoint, data=data)
    resumed, whole = make(teacher), make(teacher)
    train(resumed, teacher, make_config(skip_bad_steps=2), checkpoint, data=data)
    train(whole, teacher, make_config(skip_bad_steps=2), tmp_path / "whole.safetensors", data=data)
    assert skipped_steps(checkpoint) == [1, 4]
    assert_same(resumed, whole)


def test_a_gradient_that_is_not_finite_is_a_bad_step_too(tmp_path):
    """The loss is fine, its gradient is not: nothing learns from it."""

    class Overflowing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    teacher = make_teacher()
    student = make(teacher)
    before = [p.clone() for p in student.parameters()]
    student.model.layers[0].register_forward_hook(lambda _m, _args, out: Overflowing.apply(out))
    with pytest.raises(UPQError, match=r"step 0: the gradient's norm is (nan|inf); raise distill\.skip_bad_steps"):
        train(student, teacher, make_config(), tmp_path / "c.safetensors")
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), before, strict=True))
    assert not (tmp_path / "c.safetensors").exists()


def test_asked_to_stop_it_finishes_the_step_saves_and_stops(tmp_path):
    teacher, config, stop = make_teacher(), make_config(checkpoint_every=100), Stop()
    checkpoint, whole = tmp_path / "c.safetensors", make(teacher)
    train(whole, teacher, config, tmp_path / "whole.safetensors")

    class Asks(Random):
        def batch(self, step, size):
            if step == 2:
                stop.request(signal.SIGTERM)  # as its handler would, in the middle of things
            return super().batch(step, size)

    with pytest.raises(Stopped, match="SIGTERM") as caught, stop.held():
        distill(
            make(teacher), teacher, Asks(), config, total_steps=6, checkpoint=checkpoint, progress=Silent(), stop=stop
        )
    assert caught.value.exit_code == 143
    assert load_tensors(checkpoint)[1]["step"] == 3
    resumed = make(teacher)
    assert len(train(resumed, teacher, config, checkpoint)) == 3
    assert_same(resumed, whole)
