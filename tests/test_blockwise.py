"""Laws every block method obeys on a random Llama block, and the walk over the blocks of a model on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pairwise import covering
from schemes import PLAIN, ROUNDING, SCALAR, fitting
from tiny import tiny_model
from upq.blockwise import METHODS, BlockStore, BlockTask, Method, Solution, walk
from upq.blockwise._base import ORIGINAL, QUANTISED, shuffled_batches, start_scales
from upq.blockwise._rounding import bracket
from upq.blockwise.flexround import _Divided
from upq.blockwise.gptq import gptq, objective
from upq.core.errors import UPQError
from upq.core.progress import Silent
from upq.core.scheme import PER_CHANNEL, QuantScheme
from upq.grids import GRIDS, Params, search_scale
from upq.model import walker
from upq.model.activations import allocator
from upq.model.source import Source

IDS = torch.randint(2, 67, (24, 12), generator=torch.Generator().manual_seed(0))
FAST = {
    "flexround": {"iterations": 60, "lr": 1e-2},
    "block_ap": {"iterations": 60},
    "adaround": {"iterations": 60, "lr": 1e-1},
    "lora_round": {"iterations": 60, "lr": 1e-1},
}
LEARNED = ("flexround", "block_ap", "adaround", "lora_round")  # what is judged by the block's output
# Blocks of 44 have no group of 8, 16, …; those of 48 have.
WIDTHS = {PER_CHANNEL: 44, 16: 48, 32: 64}

MakeTask = Callable[..., BlockTask]


def make(name: str, **options: Any) -> Method:
    cls = METHODS.get(name)
    return cls(cls.Config(**{**FAST.get(name, {}), **options}))


@pytest.fixture(scope="module")
def make_task(tmp_path_factory: pytest.TempPathFactory) -> MakeTask:
    """The second block of a random Llama, behind a first one that is quantised already. A fresh copy a call."""

    def build(width: int) -> BlockTask:
        path = tmp_path_factory.mktemp("model")
        tiny_model("llama", intermediate_size=width).save_pretrained(path)
        model = Source(path)
        steps = walker.walk(model, IDS, streams=2)
        first, second = model.block(0), model.block(1)
        step = next(steps)
        step.advance(first, stream=ORIGINAL)
        for matrix in model.matrices(0):
            weight = first.get_parameter(matrix.parameter)
            scheme = QuantScheme(bits=3)
            weight.copy_(GRIDS.get("seq").fake(weight, search_scale(weight, scheme), scheme))
        step.advance(first, stream=QUANTISED)
        step = next(steps)
        step.advance(second, stream=ORIGINAL)
        return RecordingTask(step, second, seed=0)

    built: dict[int, BlockTask] = {}

    def task(width: int = 44, seed: int = 0) -> BlockTask:
        if width not in built:
            with torch.no_grad():
                built[width] = build(width)
        fresh = copy.deepcopy(built[width])
        object.__setattr__(fresh, "seed", seed)
        return fresh

    return task


@dataclass(frozen=True)
class RecordingTask(BlockTask):
    """Keeps the weights and the figure of each evaluation."""

    seen: list[tuple[dict[str, Tensor], float]] = field(default_factory=list)

    def error(self, weights: dict[str, Tensor], *, relative: bool = False, batch_size: int = 8) -> float:
        value = super().error(weights, relative=relative, batch_size=batch_size)
        self.seen.append(({name: w.detach().clone() for name, w in weights.items()}, value))
        return value


def nearest(task: BlockTask, scales: dict[str, Params], scheme: QuantScheme) -> dict[str, Tensor]:
    grid = GRIDS.get(scheme.grid)
    return {name: grid.fake(w_OI, scales[name], scheme) for name, w_OI in task.weights().items()}


def dense(solutions: dict[str, Solution]) -> dict[str, Tensor]:
    return {name: solution.qtensor().dequantize() for name, solution in solutions.items()}


def own_objective(name: str, task: BlockTask, weights: dict[str, Tensor], inputs: BlockTask) -> dict[str, float]:
    """What the method promises to lower. `inputs`: the task whose block the moments are measured on."""
    if name in LEARNED:
        return {"block": task.error(weights)}
    if name == "gptq":
        original, costs = task.weights(), {}
        for group in task.groups():
            h_II = inputs.second_moments(group[:1], full=True)[group[0]].double()
            h_II += 0.01 * h_II.diagonal().mean() * torch.eye(len(h_II), dtype=h_II.dtype)
            costs |= {linear: objective(weights[linear], original[linear], h_II).sum().item() for linear in group}
        return costs
    return {linear: (weights[linear] - w_OI).square().sum().item() for linear, w_OI in task.weights().items()}


SCHEMES = [
    QuantScheme(bits=bits, group_size=group_size, grid=grid)
    for bits, group_size, grid in covering([2, 4], [PER_CHANNEL, 16], PLAIN)
] + [fitting("nvfp4"), fitting("mxfp4")]


@pytest.mark.parametrize("name", ROUNDING)
class TestLaws:
    @pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.grid}-{s.bits}-{s.group_size}")
    def test_never_worse_than_nearest_rounding(self, name: str, scheme: QuantScheme, make_task: MakeTask) -> None:
        if METHODS.get(name).between_levels and not GRIDS.get(scheme.grid).uniform:
            pytest.skip("it needs evenly spaced levels")
        untouched, task = make_task(WIDTHS[scheme.group_size]), make_task(WIDTHS[scheme.group_size])
        start = nearest(untouched, start_scales(untouched, scheme, "mse"), scheme)
        solutions = make(name, scale="mse").solve(task, scheme)
        assert list(solutions) == list(task.matrices)
        assert all(s.scheme == scheme for s in solutions.values())
        found = dense(solutions)
        before = own_objective(name, untouched, start, task)
        after = own_objective(name, untouched, found, task)
        for part, value in after.items():
            assert value <= before[part] * (1 + 1e-6), part
        if name == "rtn":
            assert all(torch.equal(found[linear], start[linear]) for linear in found)
        elif scheme.bits == 2:
            assert sum(after.values()) < 0.9 * sum(before.values())

    @pytest.mark.parametrize("start", ["max", "mse", "hessian"])
    def test_every_scale_start(self, name: str, start: str, make_task: MakeTask) -> None:
        scheme, untouched, task = QuantScheme(bits=2), make_task(), make_task()
        weights = nearest(untouched, start_scales(untouched, scheme, start), scheme)
        found = dense(make(name, scale=start).solve(task, scheme))
        before, after = (own_objective(name, untouched, w, task) for w in (weights, found))
        assert all(after[part] <= before[part] * (1 + 1e-6) for part in after)

    def test_the_same_seed_gives_the_same_codes(self, name: str, make_task: MakeTask) -> None:
        scheme, method = QuantScheme(bits=2), make(name)
        first, second, other = (method.solve(make_task(seed=seed), scheme) for seed in (3, 3, 4))
        for linear, solution in first.items():
            assert torch.equal(solution.latent_OI, second[linear].latent_OI)
            assert all(torch.equal(solution.params[key], value) for key, value in second[linear].params.items())
        same = all(torch.equal(solution.latent_OI, other[linear].latent_OI) for linear, solution in first.items())
        assert same == (name not in LEARNED)  # the seed decides the order of the rows, and nothing else

    def test_the_solution_needs_nothing_from_the_run(self, name: str, make_task: MakeTask) -> None:
        """Plain tensors: no gradients, and no memory of the block's."""
        task = make_task()
        solutions = make(name).solve(task, QuantScheme(bits=2))
        codes = {linear: s.qtensor().codes_OI for linear, s in solutions.items()}
        for solution in solutions.values():
            assert not solution.latent_OI.requires_grad
            assert not any(p.requires_grad for p in solution.params.values())
        if name != "rtn":  # whose latents are the block's weights themselves
            for weight in task.weights().values():
                weight.zero_()
        assert all(torch.equal(s.qtensor().codes_OI, codes[linear]) for linear, s in solutions.items())


@pytest.mark.parametrize("grid", PLAIN)
@pytest.mark.parametrize("name", LEARNED)
class TestLearned:
    def test_codes_are_what_was_optimised(self, name: str, grid: str, make_task: MakeTask) -> None:
        """The last evaluation of the run saw exactly the weights that the codes stand for."""
        task = make_task()
        solutions = make(name, iterations=10).solve(task, QuantScheme(bits=2, grid=grid))
        (_, before), (weights, after) = task.seen[0], task.seen[-1]
        assert after < before  # so the end was kept, not the start
        found = dense(solutions)
        assert all(torch.equal(found[linear], weights[linear]) for linear in found)
        assert task.error(found) == after

    def test_each_error_has_its_own_winner(self, name: str, grid: str, make_task: MakeTask) -> None:
        """Never worse than the start by the error asked for, and better by it than what the other one finds."""
        scheme, task = QuantScheme(bits=2, grid=grid), make_task()
        task.targets_NTH[::2] *= 10  # tokens of different sizes
        start = nearest(task, start_scales(task, scheme, "mse"), scheme)
        found = {kind: dense(make(name, relative=kind).solve(task, scheme)) for kind in (False, True)}
        for kind in (False, True):
            assert task.error(found[kind], relative=kind) <= task.error(start, relative=kind)
            assert task.error(found[kind], relative=kind) < task.error(found[not kind], relative=kind)

    def test_a_run_that_diverges_leaves_the_start(self, name: str, grid: str, make_task: MakeTask) -> None:
        scheme, task = QuantScheme(bits=2, grid=grid), make_task()
        start = nearest(task, start_scales(task, scheme, "mse"), scheme)
        found = dense(make(name, iterations=5, lr=1e4).solve(task, scheme))
        assert not task.seen[-1][1] <= task.seen[0][1]
        assert all(torch.equal(found[linear], start[linear]) for linear in found)

    def test_weights_that_are_not_finite_are_an_error(self, name: str, grid: str, make_task: MakeTask) -> None:
        task = make_task()
        task.block.input_layernorm.weight.data.fill_(torch.nan)
        with pytest.raises(UPQError, match="block 1: the output is not finite"):
            make(name, iterations=1).solve(task, QuantScheme(bits=2, grid=grid))


def test_gptq_sees_the_error_of_the_linears_before(make_task: MakeTask) -> None:
    """Each group is rounded for what it will read: the output of the groups before it, rounded."""
    scheme, task = QuantScheme(bits=2), make_task()
    original, scales = task.weights(), start_scales(task, scheme, "mse")
    found = dense(make("gptq").solve(make_task(), scheme))
    for group in task.groups():
        h_II = task.second_moments(group[:1], full=True)[group[0]]
        for name in group:
            assert torch.equal(found[name], gptq(original[name], h_II, scales[name], scheme)), name
        for name in group:
            task.block.get_submodule(name).weight = torch.nn.Parameter(found[name], requires_grad=False)


def test_gptq_of_a_linear_without_input_is_nearest_rounding(make_task: MakeTask) -> None:
    """Behind a norm of zeros every rounding is as good; no damping would help."""
    scheme, task = QuantScheme(bits=2), make_task()
    task.block.input_layernorm.weight.data.zero_()
    scales, group = start_scales(task, scheme, "mse"), task.groups()[0]
    expected = nearest(task, scales, scheme)
    found = dense(make("gptq").solve(task, scheme))
    for name in group:
        assert torch.equal(found[name], expected[name]), name


def test_second_moments_are_those_of_the_inputs(make_task: MakeTask) -> None:
    task = make_task()
    seen: dict[str, Tensor] = {}
    for linear in tuple(task.matrices):
        task.block.get_submodule(linear).register_forward_pre_hook(
            lambda _module, args, linear=linear: seen.__setitem__(linear, args[0].flatten(0, 1).double())
        )
    task.step.run(task.block, slice(None), stream=QUANTISED)
    inputs = dict(seen)
    full = task.second_moments(tuple(task.matrices), full=True, batch_size=5)
    diagonal = task.second_moments(tuple(task.matrices), full=False)
    for linear, x_TI in inputs.items():
        expected_II = x_TI.T @ x_TI / len(x_TI)
        torch.testing.assert_close(full[linear].double(), expected_II, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(diagonal[linear].double(), expected_II.diagonal(), rtol=1e-4, atol=1e-5)


def test_second_moments_under_autocast_are_positive_definite(make_task: MakeTask) -> None:
    """Products of a block may be in bfloat16; the moments of its inputs, rounded so, could not be factored."""
    task = make_task()
    step = replace(task.step, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    for name, h_II in replace(task, step=step).second_moments(tuple(task.matrices), full=True).items():
        values = torch.linalg.eigvalsh(h_II.double())
        assert values[0] > -1e-6 * values[-1], name


def test_batches_are_epochs() -> None:
    drawn = torch.cat(list(shuffled_batches(10, 4, 5, seed=1)))
    for epoch in drawn.split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert torch.equal(drawn, torch.cat(list(shuffled_batches(10, 4, 5, seed=1))))
    assert not torch.equal(drawn, torch.cat(list(shuffled_batches(10, 4, 5, seed=2))))
    assert [len(b) for b in shuffled_batches(3, 3, 4, seed=0)] == [3, 3, 3, 3]


class Killed(Exception):
    pass


class Counting(Silent):
    """A run that is killed when `limit` blocks are done."""

    def __init__(self, limit: int = 99) -> None:
        self.limit, self.blocks = limit, 0

    def advance(self, units: int = 1, **figures: float) -> None:
        self.blocks += units
        if self.blocks == self.limit:
            raise Killed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama", num_hidden_layers=3).save_pretrained(path)
    return Source(path)


def stage(
    model: Source,
    method: Method,
    store: BlockStore,
    *,
    source: BlockStore | None = None,
    limit: int = 99,
    rows: int = 8,
    activations: Path | None = None,
) -> int:
    """Blocks solved in this walk."""
    progress, where = Counting(limit), allocator(activations)
    walk(model, IDS[:rows], method, store, given=source, seed=5, progress=progress, activations=where)
    return progress.blocks


def files(store: BlockStore) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.folder.iterdir()}


ZEROS = {"a block that was added": ("self_attn.o_proj", "mlp.down_proj"), "all": ("_proj", "layernorm")}


@pytest.mark.parametrize("name", ROUNDING)
@pytest.mark.parametrize("kind", ZEROS)
def test_weights_of_zeros_have_finite_figures(kind: str, name: str, tmp_path: Path) -> None:
    made = tiny_model("llama", num_hidden_layers=2)
    for path, parameter in made.named_parameters():
        if "layers.1." in path and path.removesuffix(".weight").endswith(ZEROS[kind]):
            parameter.data.zero_()
    made.save_pretrained(tmp_path / "model")
    store = BlockStore(tmp_path / "store", QuantScheme(bits=2))
    stage(Source(tmp_path / "model"), make(name, **({"iterations": 1} if name in LEARNED else {})), store, rows=2)
    figures = [value for found in store.report(1).values() for value in found.values()]
    assert all(0 <= value < 2 for value in figures), figures
    zeros = [value for path, value in store.weights(1).items() if path.endswith(ZEROS[kind])]
    assert all(value.abs().max() < 1e-5 for value in zeros)


class TestWalk:
    @pytest.mark.parametrize("name", ROUNDING)
    def test_killed_and_resumed_is_never_killed(self, name: str, model: Source, tmp_path: Path, device: str) -> None:
        model = Source(model.path, device=device)
        method = make(name, **({"iterations": 8} if name in LEARNED else {}))
        int4, int2 = QuantScheme(bits=4), QuantScheme(bits=2)
        source = BlockStore(tmp_path / "int4", int4, latents=False)
        stage(model, make("rtn"), source)
        whole = BlockStore(tmp_path / "whole", int2)
        assert stage(model, method, whole, source=source) == 3
        for done in (1, 2):
            store = BlockStore(tmp_path / f"killed-{done}", int2)
            with pytest.raises(Killed):
                stage(model, method, store, source=source, limit=done)
            assert store.done(3) == done
            assert stage(model, method, store, source=source) == 3 - done
            assert files(store) == files(whole)
        assert stage(model, method, whole, source=source) == 0

    @pytest.mark.parametrize("name", ROUNDING)
    def test_where_activations_lie_makes_no_difference(self, name: str, model: Source, tmp_path: Path) -> None:
        """In memory, on disk, killed on disk and resumed on disk or in memory: the same bytes, and no file left."""
        options = {"iterations": 4} if name in LEARNED else {"scale": "hessian"}
        method, int2, disk = make(name, **options), QuantScheme(bits=2), tmp_path / "disk"
        disk.mkdir()
        whole, on_disk = BlockStore(tmp_path / "memory", int2), BlockStore(tmp_path / "on-disk", int2)
        assert stage(model, method, whole, rows=11) == 3  # more than one batch
        assert stage(model, method, on_disk, rows=11, activations=disk) == 3
        assert files(on_disk) == files(whole)
        for first, then in ((disk, disk), (disk, None), (None, disk)):
            store = BlockStore(tmp_path / f"{first is None}-{then is None}", int2)
            with pytest.raises(Killed):
                stage(model, method, store, rows=11, limit=1, activations=first)
            assert stage(model, method, store, rows=11, activations=then) == 2
            assert files(store) == files(whole)
        assert not list(disk.iterdir())

    def test_hidden_states_are_held_twice_and_not_more(
        self, model: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each block's outputs take the place of its inputs: two tensors serve all blocks."""
        seen: list[tuple[int, int]] = []

        def solve(self: Any, task: BlockTask, scheme: QuantScheme) -> dict[str, Solution]:
            seen.append((task.inputs_NTH.data_ptr(), task.targets_NTH.data_ptr()))
            return original(self, task, scheme)

        original = METHODS.get("gptq").solve
        monkeypatch.setattr(METHODS.get("gptq"), "solve", solve)
        stage(model, make("gptq"), BlockStore(tmp_path, QuantScheme(bits=2)))
        assert len(seen) == 3
        assert len(set(seen)) == 1
        assert len(set(seen[0])) == 2

    def test_how_a_checkpoint_is_laid_out_makes_no_difference(self, tmp_path: Path) -> None:
        """One file, shards with an index, tied or not, without a head: the same blocks are the same bytes."""
        tied = tiny_model("llama", tie_word_embeddings=True)
        untied = tiny_model("llama", tie_word_embeddings=False)
        untied.load_state_dict(tied.state_dict())
        tied.save_pretrained(tmp_path / "tied")
        tied.save_pretrained(tmp_path / "tied-shards", max_shard_size="30KB")
        untied.save_pretrained(tmp_path / "untied")
        untied.save_pretrained(tmp_path / "untied-shards", max_shard_size="30KB")
        untied.save_pretrained(tmp_path / "headless")
        tensors = load_file(tmp_path / "headless/model.safetensors")
        del tensors["lm_head.weight"]  # which these stages never read
        save_file(tensors, tmp_path / "headless/model.safetensors")
        layouts = sorted(tmp_path.iterdir())
        assert {len(list(path.glob("*.safetensors"))) > 2 for path in layouts if "shards" in path.name} == {True}
        method, found = make("flexround", iterations=4), []
        for path in layouts:
            store = BlockStore(path / "blocks", QuantScheme(bits=2))
            stage(Source(path), method, store)
            found.append(files(store))
        assert len(found[0]) == 2
        assert all(each == found[0] for each in found)

    def test_blocks_are_solved_on_the_quantised_prefix(self, model: Source, tmp_path: Path) -> None:
        """Targets are the original's all the way; inputs are what the quantised blocks before it wrote."""

        class Spy(METHODS.get("rtn")):  # type: ignore[misc]
            needs_inputs = True
            tasks: list[BlockTask]

            def solve(self, task: BlockTask, scheme: QuantScheme) -> dict[str, Solution]:
                self.tasks.append(copy.deepcopy(task))
                return super().solve(task, scheme)

        spy, store = Spy(Spy.Config()), BlockStore(tmp_path, QuantScheme(bits=2))
        spy.tasks = []
        stage(model, spy, store)
        for index, (task, step) in enumerate(zip(spy.tasks, walker.walk(model, IDS[:8], streams=2), strict=True)):
            block, (fp_NTH, quantised_NTH) = model.block(index), step.states
            assert task.index == index
            assert torch.equal(task.inputs_NTH, quantised_NTH)
            step.advance(block, stream=ORIGINAL)
            assert torch.equal(task.targets_NTH, fp_NTH)
            for linear, weight in store.weights(index).items():
                block.get_submodule(linear).weight.copy_(weight)
            step.advance(block, stream=QUANTISED)
            relative = ((quantised_NTH - fp_NTH).norm() / fp_NTH.norm()).item()
            assert store.report(index)["mlp.up_proj"]["block"] == pytest.approx(relative, rel=1e-4)
        assert not torch.equal(spy.tasks[2].inputs_NTH, spy.tasks[1].targets_NTH)
        assert len({task.seed for task in spy.tasks}) == 3

    def test_the_source_gives_the_weights(self, model: Source, tmp_path: Path) -> None:
        source = BlockStore(tmp_path / "int4", QuantScheme(bits=4), latents=False)
        stage(model, make("rtn"), source)
        int2, grid = QuantScheme(bits=2), GRIDS.get("seq")
        for name, given in (("with", source), ("without", None)):
            store = BlockStore(tmp_path / name, int2)
            stage(model, make("rtn"), store, source=given)
            for index in range(3):
                original = model.block(index)
                for linear, q in store.qtensors(index).items():
                    w_OI = original.get_submodule(linear).weight
                    start_OI = w_OI if given is None else given.weights(index)[linear]
                    expected_OI = grid.fake(start_OI, grid.init(start_OI, int2), int2)
                    assert torch.equal(q.dequantize(), expected_OI)
                    error = ((expected_OI - w_OI).norm() / w_OI.norm()).item()  # against the original's, always
                    assert store.report(index)[linear]["weight"] == pytest.approx(error, rel=1e-5)

    def test_a_method_that_reads_no_inputs_needs_no_forward_pass(
        self, model: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Source, "skeleton", None)
        assert stage(model, make("rtn"), BlockStore(tmp_path, QuantScheme(bits=2))) == 3


@pytest.mark.parametrize("grid", SCALAR)
class TestStore:
    @pytest.mark.parametrize("bits", range(2, 9))
    def test_what_is_saved_comes_back(self, grid: str, bits: int, tmp_path: Path) -> None:
        scheme = fitting(grid, bits=bits)
        if scheme.bits != bits:
            pytest.skip("the grid has another width")
        torch.manual_seed(0)
        columns = (45, 7) if scheme.group_size == PER_CHANNEL else (3 * scheme.group_size, scheme.group_size)
        weights = {"mlp.down_proj": torch.randn(6, columns[0]), "self_attn.q_proj": torch.randn(3, columns[1])}
        solutions = {name: Solution(w_OI, search_scale(w_OI, scheme), scheme) for name, w_OI in weights.items()}
        report = {name: {"weight": 0.1, "block": 1 / 3} for name in weights}
        for latents in (True, False):
            store = BlockStore(tmp_path / str(latents), scheme, latents=latents)
            store.save(2, solutions, report)
            assert store.report(2) == report
            back = store.qtensors(2)
            assert back.keys() == solutions.keys()
            for name, solution in solutions.items():
                q = solution.qtensor()
                assert back[name].scheme == scheme
                for part in ("codes_OI", "scale_OG", *(("zero_OG",) if GRIDS.get(grid).uniform else ())):
                    assert torch.equal(getattr(back[name], part), getattr(q, part))
                    assert getattr(back[name], part).dtype == getattr(q, part).dtype
                assert torch.equal(store.weights(2)[name], q.dequantize())
        kept = BlockStore(tmp_path / "True", scheme).solutions(2)
        for name, solution in solutions.items():
            assert torch.equal(kept[name].latent_OI, solution.latent_OI)
            assert kept[name].params.keys() == solution.params.keys()
            assert all(torch.equal(kept[name].params[key], value) for key, value in solution.params.items())

    def test_done_counts_from_the_first_without_a_gap(self, grid: str, tmp_path: Path) -> None:
        store = BlockStore(tmp_path, fitting(grid))
        assert store.done(4) == 0
        for index in (0, 1, 3):
            store.save(index, {}, {})
        assert store.done(4) == 2
        store.save(2, {}, {})
        assert store.done(4) == 4

    def test_a_damaged_block_is_an_error_that_names_it(self, grid: str, tmp_path: Path) -> None:
        scheme = fitting(grid)
        w_OI, store = torch.randn(8, 64), BlockStore(tmp_path, scheme)
        store.save(0, {"x": Solution(w_OI, search_scale(w_OI, scheme), scheme)}, {})
        store.path(0).write_bytes(store.path(0).read_bytes()[:-8])
        with pytest.raises(UPQError, match=r"block-0000\.safetensors: damaged or truncated"):
            store.solutions(0)


def test_the_relative_error_is_of_each_token(make_task: MakeTask) -> None:
    task = make_task()
    weights = nearest(task, start_scales(task, QuantScheme(bits=2), "mse"), QuantScheme(bits=2))
    found_NTH = task.step.run(task.block, slice(None), weights=weights, stream=QUANTISED)
    wrong_NTH, exact_NTH = (found_NTH - task.targets_NTH).double(), task.targets_NTH.double()
    absolute = wrong_NTH.square().mean().item()
    size_NT = torch.maximum(exact_NTH.norm(dim=-1), task.inputs_NTH.double().norm(dim=-1))
    relative = (wrong_NTH.norm(dim=-1) / size_NT).square().mean().item()
    for batch_size in (5, 100):
        assert task.error(weights, batch_size=batch_size) == pytest.approx(absolute, rel=1e-5)
        assert task.error(weights, relative=True, batch_size=batch_size) == pytest.approx(relative, rel=1e-5)


def test_a_token_of_zeros_does_not_outweigh_the_others(make_task: MakeTask) -> None:
    task = make_task()
    weights = nearest(task, start_scales(task, QuantScheme(bits=2), "mse"), QuantScheme(bits=2))
    task.targets_NTH[0, 0] = 0
    assert task.error(weights, relative=True) < 1e6


def test_flexrounds_divisor_has_the_gradient_of_its_formula() -> None:
    torch.manual_seed(0)
    w_OI, s2_OI, s3_O1 = torch.randn(3, 5).double(), torch.randn(3, 5).double(), torch.randn(3, 1).double()
    learned = (s2_OI.requires_grad_(), s3_O1.requires_grad_())
    assert torch.equal(_Divided.apply(w_OI, *learned), w_OI * torch.exp(-(s2_OI + s3_O1)))
    assert torch.autograd.gradcheck(lambda s2, s3: _Divided.apply(w_OI, s2, s3), learned)


class TestFromGptq:
    """Block-AP that begins with GPTQ's latents."""

    OPTIONS: ClassVar[dict[str, Any]] = {"start": "gptq", "scale": "hessian", "relative": True}

    def test_it_begins_better_and_ends_better(self, make_task: MakeTask) -> None:
        scheme, task = QuantScheme(bits=2), make_task()
        few = [
            dense(make("block_ap", **{**self.OPTIONS, "start": start}, iterations=5).solve(make_task(), scheme))
            for start in ("nearest", "gptq")
        ]
        nearest_error, gptq_error = (task.error(weights, relative=True) for weights in few)
        assert gptq_error < 0.9 * nearest_error

    def test_the_latents_are_those_that_gptq_rounds(self, make_task: MakeTask) -> None:
        scheme = QuantScheme(bits=2)
        rounded = make("gptq", scale="hessian", relative=True).solve(make_task(), scheme)
        task = make_task()
        make("block_ap", **self.OPTIONS, iterations=1, lr=1e-9, scale_lr=1e-9).solve(task, scheme)
        first = task.seen[1][0]  # after nearest's
        for name, solution in rounded.items():
            torch.testing.assert_close(first[name], solution.qtensor().dequantize(), rtol=1e-3, atol=1e-6)

    def test_a_start_that_is_worse_than_nearest_rounding_is_left(
        self, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scheme, task = QuantScheme(bits=2), make_task()
        noise = {name: 100 * torch.randn_like(w_OI) for name, w_OI in task.weights().items()}
        monkeypatch.setattr("upq.blockwise.block_ap.compensated_block", lambda *_args, **_named: noise)
        start = nearest(task, start_scales(task, scheme, "hessian", relative=True), scheme)
        found = dense(make("block_ap", **self.OPTIONS, iterations=2).solve(task, scheme))
        assert all(torch.equal(found[name], start[name]) for name in start)


@pytest.mark.parametrize("harden", ["penalty", "progressive"])
@pytest.mark.parametrize("learn_scale", [False, True])
def test_learned_rounding_ends_on_one_of_two_levels(harden: str, learn_scale: bool, make_task: MakeTask) -> None:
    """The two around the original weight, with the scale it started with or another."""
    scheme, task, grid = QuantScheme(bits=2), make_task(), GRIDS.get("seq")
    options = {"harden": harden, "learn_scale": learn_scale, "iterations": 25}
    found = make("adaround", **options).solve(make_task(), scheme)
    moved = 0
    for name, params in start_scales(task, scheme, "mse").items():
        w_OI = task.weights()[name]
        q, nearest_q = found[name].qtensor(), grid.freeze(w_OI, params, scheme)
        up_OI = q.codes_OI.int() - bracket(w_OI, params, scheme).lower_OI
        assert set(up_OI.unique().tolist()) <= {0, 1}
        moved += int((q.codes_OI != nearest_q.codes_OI).sum())
        assert torch.equal(q.scale_OG, nearest_q.scale_OG) != learn_scale
    assert moved


def test_zero_points_have_a_rate_of_their_own(make_task: MakeTask) -> None:
    scheme = QuantScheme(bits=2, grid="affine")
    start = start_scales(make_task(), scheme, "mse")
    kept, same, plain = (
        make("block_ap", iterations=10, **options).solve(make_task(), scheme)
        for options in ({"zero_lr": 0.0}, {"zero_lr": 3e-3}, {})
    )
    for name, params in start.items():
        assert torch.equal(kept[name].params["zero"], params["zero"])
        assert not torch.equal(plain[name].params["zero"], params["zero"])
        assert torch.equal(same[name].latent_OI, plain[name].latent_OI)
