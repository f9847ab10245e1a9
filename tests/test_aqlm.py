"""AQLM: code books as levels, their products, the search for codes, and whole runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import upq
from schemes import fitting
from tiny import byte_tokenizer, tiny_artifact, tiny_model
from upq import kernels
from upq.blockwise import METHODS, BlockStore, BlockTask
from upq.blockwise._base import ORIGINAL
from upq.blockwise._books import Sums, fit, searched_rows, solved_books, solved_scales
from upq.blockwise.gptq import gptq
from upq.core.errors import UPQError
from upq.core.levels import Books
from upq.core.scheme import QTensor, QuantScheme
from upq.exports import export
from upq.grids import GRIDS, search_scale
from upq.grids._vectors import better_rows, greedy_rows, kmeans, nearest, sum_of
from upq.kernels import cpu
from upq.model import walker
from upq.model.source import Source
from upq.nn.fixed_codes import Coded
from upq.nn.packed import PackedLinear
from upq.run.recipe import Recipe
from upq.run.run import quantize

GRID, SCHEME = GRIDS.get("books"), QuantScheme(bits=2, grid="books")
SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_books(rows: int, columns: int, bits: int = 2, *, seed: int = 0) -> QTensor:
    """A weight of random codes and books, as stored."""
    generator = torch.Generator().manual_seed(seed)
    codes_OI = torch.randint(1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale_O1 = (0.5 + torch.rand(rows, 1, generator=generator)).half()
    books_MKV = torch.randn(bits, 256, 8, generator=generator).half().float()
    return QTensor(codes_OI, scale_O1, Books(books_MKV), QuantScheme(bits=bits, grid="books"))


def hessian(columns: int, *, seed: int = 1) -> Tensor:
    """Of inputs that depend on one another and differ in size."""
    x_NI = gaussian(4 * columns, columns, seed=seed) @ (torch.eye(columns) + 0.3 * gaussian(columns, columns, seed=2))
    x_NI = x_NI * (0.2 + gaussian(columns, seed=3).square())
    return x_NI.T @ x_NI / len(x_NI)


def quadratic(weight_OI: Tensor, w_OI: Tensor, h_II: Tensor) -> float:
    d_OI = (weight_OI - w_OI).double()
    return float(((d_OI @ h_II.double()) * d_OI).sum())


class TestLevels:
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_a_weight_is_the_scaled_sum_of_the_rows_that_its_bytes_name(self, bits: int) -> None:
        q = random_books(3, 24, bits)
        assert isinstance(q.levels, Books)
        stored = PackedLinear.from_qtensor(q).state_dict()
        bytes_OJM = stored["weight_packed"].view(3, 3, bits).tolist()
        for o, j, v in itertools.product(range(3), range(3), range(8)):
            rows = [q.levels.values[m, bytes_OJM[o][j][m], v].item() for m in range(bits)]
            exact = sum(rows) * q.scale_OG[o, 0].item()
            assert q.dequantize()[o, 8 * j + v].item() == pytest.approx(exact, rel=1e-6, abs=1e-6)

    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_codes_and_rows_are_the_same_bits(self, bits: int) -> None:
        q = random_books(5, 40, bits)
        assert isinstance(q.levels, Books)
        rows_OJM = q.levels.rows_of(q.codes_OI)
        assert rows_OJM.shape == (5, 5, bits)
        assert torch.equal(rows_OJM.flatten(1), kernels.pack(q.codes_OI, bits))
        assert torch.equal(q.levels.codes_of(rows_OJM), q.codes_OI)

    def test_golden_bytes(self) -> None:
        books = Books(torch.zeros(2, 256, 8))
        codes_OI = books.codes_of(torch.tensor([[[1, 2], [255, 0]]]))
        q = QTensor(codes_OI, torch.tensor([[0.5]], dtype=torch.float16), books, SCHEME)
        tensors = PackedLinear.from_qtensor(q).state_dict()
        assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
            "weight_packed": ((1, 4), torch.uint8),
            "weight_scale": ((1, 1), torch.float16),
            "weight_books": ((2, 256, 8), torch.float16),
        }
        assert tensors["weight_packed"].tolist() == [[1, 2, 255, 0]]
        assert tensors["weight_scale"].view(torch.uint8).tolist() == [[0x00, 0x38]]

    @pytest.mark.parametrize("bits", [2, 3])
    def test_what_is_stored_is_what_comes_back(self, bits: int, tmp_path: Path) -> None:
        q = random_books(6, 48, bits)
        packed = PackedLinear.from_qtensor(q)
        with torch.device("meta"):
            loaded = PackedLinear(48, 6, q.scheme)
        loaded.load_state_dict(packed.state_dict(), assign=True)
        loaded.to(torch.bfloat16)  # casts nothing that is stored
        store = BlockStore(tmp_path, q.scheme, latents=False)
        params = {"log_scale": q.scales().log(), "books": q.levels.values}  # type: ignore[union-attr]
        store.save(0, {"linear": Coded.of(q, params)}, {})
        for back in (loaded.qtensor(), store.qtensors(0)["linear"]):
            assert torch.equal(back.dequantize(), q.dequantize())
            assert torch.equal(back.codes_OI, q.codes_OI)
            assert back.scheme == q.scheme
        assert torch.equal(loaded.dequantize(), q.dequantize())

    def test_a_row_that_is_no_multiple_of_eight_is_refused(self) -> None:
        with pytest.raises(UPQError, match="in_features 44 is not a multiple of 8"), torch.device("meta"):
            PackedLinear(44, 6, SCHEME)


class TestGrid:
    @pytest.mark.parametrize("bits", [2, 3])
    def test_fake_equals_frozen(self, bits: int) -> None:
        scheme, w_OI = fitting("books", bits=bits), 0.02 * gaussian(48, 64)
        params = GRID.init(w_OI, scheme)
        frozen = GRID.freeze(w_OI, params, scheme)
        assert torch.equal(GRID.fake(w_OI, params, scheme), frozen.dequantize())
        assert params["books"].shape == (bits, 256, 8)

    def test_weight_books_and_scales_get_their_gradient(self) -> None:
        w_OI, g_OI = gaussian(48, 64).requires_grad_(), gaussian(48, 64, seed=1)
        params = {k: v.requires_grad_() for k, v in GRID.init(w_OI.detach(), SCHEME).items()}
        (GRID.fake(w_OI, params, SCHEME) * g_OI).sum().backward()
        assert torch.equal(w_OI.grad, g_OI)
        q = GRID.freeze(w_OI.detach(), params, SCHEME)
        # Of a row of a book: the sum of the gradient, times the scale, over the vectors that chose it.
        rows_OJM = q.levels.rows_of(q.codes_OI).long()  # type: ignore[union-attr]
        wanted = torch.zeros(2, 256, 8, dtype=torch.float64)
        scaled = (g_OI.double() * q.scales()).view(48, 8, 8)
        for o, j, m in itertools.product(range(48), range(8), range(2)):
            wanted[m, rows_OJM[o, j, m]] += scaled[o, j]
        torch.testing.assert_close(params["books"].grad.double(), wanted, rtol=1e-4, atol=1e-5)
        exact = (g_OI * q.dequantize()).sum(-1, keepdim=True)
        torch.testing.assert_close(params["log_scale"].grad, exact, rtol=1e-3, atol=1e-4)  # float16 scales

    def test_rows_of_zeros_and_of_any_size_stay_finite(self) -> None:
        w_OI = gaussian(48, 64)
        w_OI[0], w_OI[1], w_OI[2] = 0, 1e-12 * w_OI[1], 1e4 * w_OI[2]
        q = GRID.freeze(w_OI, search_scale(w_OI, SCHEME), SCHEME)
        assert q.dequantize().isfinite().all()
        assert (q.scales() > 0).all()
        assert q.dequantize()[:2].abs().max() <= 2.0**-15


class TestVectors:
    def test_an_iteration_of_k_means_never_raises_the_distance(self) -> None:
        x_NV = gaussian(700, 8) ** 3
        found = [kmeans(x_NV, 32, n, torch.Generator().manual_seed(0))[1] for n in range(12)]
        assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(found))
        assert found[-1] < 0.8 * found[0]

    def test_k_means_of_few_vectors_holds_them_all(self) -> None:
        x_NV = gaussian(10, 8)
        assert kmeans(x_NV, 32, 5, torch.Generator().manual_seed(0))[1] == pytest.approx(0, abs=1e-12)

    def test_one_book_and_no_metric_give_the_nearest_row(self) -> None:
        x_NV, book_KV = gaussian(300, 8), gaussian(64, 8, seed=1)
        found = better_rows(book_KV[None], torch.zeros(300, 1, dtype=torch.long), x_NV)
        by_definition = [min(range(64), key=lambda k: float((x - book_KV[k]).square().sum())) for x in x_NV]
        assert found[:, 0].tolist() == by_definition == nearest(x_NV, book_KV).tolist()

    @pytest.mark.parametrize("beam", [1, 3])
    def test_no_vector_gets_worse_and_two_books_come_near_the_best_pair(self, beam: int) -> None:
        x_NV, books_MKV, pull_NV = gaussian(200, 8), gaussian(2, 16, 8, seed=1), gaussian(200, 8, seed=2)
        metric_VV = hessian(8)

        def cost(d_NV: Tensor) -> Tensor:
            return ((d_NV @ metric_VV) * d_NV).sum(-1) + 2 * (d_NV * pull_NV).sum(-1)

        start_NM = greedy_rows(x_NV, books_MKV)
        found = better_rows(books_MKV, start_NM, x_NV, metric_VV=metric_VV, pull_NV=pull_NV, beam=beam)
        before, after = (cost(sum_of(books_MKV, rows) - x_NV) for rows in (start_NM, found))
        assert (after <= before + 1e-5).all()
        pairs = books_MKV[0][:, None] + books_MKV[1][None]
        best = torch.stack([cost(pair - x_NV) for pair in pairs.flatten(0, 1)]).amin(0)
        gap = (after - best).mean() / (before - best).mean()
        assert (after >= best - 1e-4).all()
        assert gap < (0.45 if beam == 1 else 0.15)


class TestFit:
    def start(self, w_OI: Tensor) -> Sums:
        params = GRID.init(w_OI, SCHEME)
        q = GRID.freeze(w_OI, params, SCHEME)
        assert isinstance(q.levels, Books)
        return Sums(q.levels.values, q.levels.rows_of(q.codes_OI).long(), q.scales())

    @pytest.mark.parametrize("beam", [1, 3])
    def test_the_search_never_raises_the_objective(self, beam: int) -> None:
        w_OI, h_II = gaussian(40, 96), hessian(96)
        now, costs = self.start(w_OI), list[float]()
        for seed in range(3):
            order_J = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
            costs.append(quadratic(now.weight(), w_OI, h_II))
            now = Sums(now.books_MKV, searched_rows(now, w_OI, h_II, order_J, beam=beam), now.scale_O1)
        costs.append(quadratic(now.weight(), w_OI, h_II))
        assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(costs))
        assert costs[1] < 0.9 * costs[0]

    def test_books_are_those_of_the_normal_equations(self) -> None:
        """In float64, unknown by unknown, for the codes and scales as they are."""
        w_OI, h_II = gaussian(30, 32).double(), hessian(32).double()
        start = self.start(w_OI.float())
        now = Sums(start.books_MKV[:, :4].double(), start.rows_OJM % 4, start.scale_O1.double())
        found = solved_books(now, w_OI, h_II, 200)
        # A weight is linear in the 2·4·8 numbers of the books.
        units = torch.eye(64, dtype=torch.float64).view(64, 2, 4, 8)
        effects = torch.stack([Sums(u, now.rows_OJM, now.scale_O1).weight() for u in units])
        normal = torch.einsum("aoi,ij,boj->ab", effects, h_II, effects)
        # What one book gains in all its rows another can lose: the solution of least size of those that there are.
        inverse = torch.linalg.pinv(normal, rtol=1e-10, hermitian=True)
        wanted = inverse @ torch.einsum("aoi,ij,oj->a", effects, h_II, w_OI)
        best = Sums(wanted.view(2, 4, 8), now.rows_OJM, now.scale_O1).weight()
        ours = Sums(found, now.rows_OJM, now.scale_O1).weight()
        torch.testing.assert_close(ours, best, rtol=1e-5, atol=1e-6)

    def test_scales_are_those_of_least_squares(self) -> None:
        w_OI, h_II = gaussian(30, 32), hessian(32)
        now = self.start(w_OI)
        found = solved_scales(now, w_OI, h_II)
        best = quadratic(Sums(now.books_MKV, now.rows_OJM, found).weight(), w_OI, h_II)
        for factor in (0.99, 1.01):
            moved = Sums(now.books_MKV, now.rows_OJM, factor * found).weight()
            assert quadratic(moved, w_OI, h_II) > best

    def test_rounds_never_raise_the_objective_and_two_books_beat_gptq(self) -> None:
        w_OI, h_II = 0.02 * gaussian(128, 128), hessian(128)
        codes_OI, params, found = fit(w_OI, h_II, SCHEME, beam=1, rounds=6, tolerance=0.01, steps=8, seed=0)
        assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(found))
        ours = quadratic(GRID.qtensor(codes_OI, params, SCHEME).dequantize(), w_OI, h_II)
        wanted = found[-1] * float(h_II.diagonal().mean())
        assert ours == pytest.approx(wanted, rel=2e-3)  # books and scales are rounded
        seq = QuantScheme(bits=2, group_size=32)
        rounded = gptq(w_OI, h_II, search_scale(w_OI, seq, h_II.diagonal()), seq)
        assert ours < 0.8 * quadratic(rounded, w_OI, h_II)

    def test_gaussian_error(self) -> None:
        """2×8 books on N(0, 1): between SEQ's 0.1163 and the bound of 2 bits, 0.0625 (docs/log/methods.md)."""
        w_OI = gaussian(128, 256)
        q = GRID.freeze(w_OI, GRID.init(w_OI, SCHEME), SCHEME)
        error = float((q.dequantize() - w_OI).square().mean() / w_OI.square().mean())
        assert 0.0625 < error < 0.0925


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(2, 67, (16, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def task(tmp_path: Path, ids: Tensor) -> BlockTask:
    tiny_model("llama", **SIZES).save_pretrained(tmp_path / "model")
    model = Source(tmp_path / "model")
    block, step = model.block(0), next(iter(walker.walk(model, ids, streams=2)))
    with torch.no_grad():
        step.advance(block, stream=ORIGINAL)
    return BlockTask(step, block, seed=0)


def solve(task: BlockTask, scheme: QuantScheme = SCHEME, **options: Any) -> dict[str, Any]:
    cls = METHODS.get("aqlm")
    return dict(cls(cls.Config(**{"rounds": 3, "iterations": 0, **options})).solve(task, scheme))


def dense(found: dict[str, Any]) -> dict[str, Tensor]:
    return {name: solution.qtensor().dequantize() for name, solution in found.items()}


class TestMethod:
    def test_it_beats_its_start_and_tuning_beats_the_fit(self, task: BlockTask) -> None:
        original = {name: w_OI.clone() for name, w_OI in task.weights().items()}
        start = {name: GRID.fake(w_OI, GRID.init(w_OI, SCHEME), SCHEME) for name, w_OI in original.items()}
        fitted = solve(task)
        errors = [task.error(start), task.error(dense(fitted))]
        for name, w_OI in original.items():
            task.matrices[name].write(task.block, w_OI)
        tuned = solve(task, iterations=40)
        errors.append(task.error(dense(tuned)))
        assert list(tuned) == list(task.matrices)
        assert errors[1] < 0.9 * errors[0]
        assert errors[2] < 0.95 * errors[1]
        assert all(torch.equal(tuned[name].packed_OB, fitted[name].packed_OB) for name in tuned)  # codes stay

    def test_each_weight_has_the_bits_that_were_chosen_for_it(self, task: BlockTask) -> None:
        object.__setattr__(task, "widths", {"mlp.up_proj": 3})
        found = solve(task, rounds=1)
        assert {name for name, each in found.items() if each.scheme.bits == 3} == {"mlp.up_proj"}
        assert found["mlp.up_proj"].params["books"].shape == (3, 256, 8)


class TestProducts:
    @pytest.mark.parametrize("isa", cpu.instruction_sets())
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_equal_to_the_reference_up_to_sums(self, bits: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu, "instruction_set", lambda: isa)
        for rows, columns, dtype in ((37, 8, torch.float32), (5, 200, torch.bfloat16), (130, 136, torch.float16)):
            q = random_books(rows, columns, bits)
            bias_O = gaussian(rows).to(dtype)
            layer = PackedLinear.from_qtensor(q, bias_O)
            x = gaussian(19, columns, seed=4).to(dtype)
            exact = x.double() @ q.dequantize().double().T + bias_O.double()
            with torch.no_grad():
                found = layer(x)
                assert found.dtype == dtype
                unit = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
                assert (found.double() - exact).norm() <= unit * exact.norm()
                # An output depends on its token and its row alone, whatever the batch and the threads.
                alone = torch.cat([layer(x[i : i + 1]) for i in range(19)])
                assert torch.equal(alone, found)
                assert torch.equal(torch.cat([layer(x[:3]), layer(x[3:])]), found)

    def test_threads_change_no_bit(self) -> None:
        layer, x = PackedLinear.from_qtensor(random_books(1100, 512)), gaussian(2, 512)
        before = torch.get_num_threads()
        try:
            with torch.no_grad():
                found = list[Tensor]()
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    found.append(layer(x))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(found[0], each) for each in found)

    def test_the_reference_is_used_where_it_is_asked_for_and_a_change_is_seen(self) -> None:
        q = random_books(16, 64)
        layer, x = PackedLinear.from_qtensor(q), gaussian(2, 64)
        with torch.no_grad():
            with kernels.computing("reference"):
                assert torch.equal(layer(x), torch.nn.functional.linear(x, q.dequantize()))
            before = layer(x)
            layer.get_buffer("weight_books").mul_(2)
            torch.testing.assert_close(layer(x), 2 * before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", **SIZES, vocab_size=300, eos_token_id=257, max_position_embeddings=128).save_pretrained(folder)
    byte_tokenizer(bos="<s>", eos="</s>").save_pretrained(folder)
    return folder


INT2 = {"stage": "blockwise", "bits": 2, "grid": "books", "samples": 4}
METHOD = {"name": "aqlm", "rounds": 1, "book_steps": 2, "iterations": 2, "batch_size": 2}
TRAIN = {"loss": "fkl", "tokens": 128, "batch_size": 2, "micro_batch_size": 2, "scale_lr": 1e-2}


def recipe(folder: Path, stages: dict[str, Any]) -> Recipe:
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Story {i}: the {i}th fox saw {i * 7} geese." for i in range(60)))
    data = {"sources": [{"path": str(text)}], "seq_len": 32, "validation": 2}
    return Recipe.of({"data": data, "stages": stages}, "r")


class TestRuns:
    def test_runs_leave_what_they_say_and_codes_stay_while_books_and_scales_train(
        self, model: Path, tmp_path: Path
    ) -> None:
        stages = {"int2": {**INT2, "method": METHOD}}
        quantize(model, recipe(tmp_path, stages), tmp_path / "plain")
        trained = {**stages, "distill": {**TRAIN, "train_weights": False}}
        manifest = quantize(model, recipe(tmp_path, trained), tmp_path / "trained")
        before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("plain", "trained"))
        moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
        assert moved == {"weight_scale", "weight_books"}
        layer = next(each for each in manifest.layers if each.name.endswith("0.mlp.up_proj"))
        assert (layer.grid, layer.bits) == ("books", 2)
        exact = 2 + 16 / 64 + 2 * 256 * 8 * 16 / (96 * 64)  # codes, scales, books
        assert layer.bits_per_weight == pytest.approx(exact)
        ids = torch.arange(2, 14)[None]
        with kernels.computing("reference"):
            packed, dense = upq.load(tmp_path / "trained"), upq.load(tmp_path / "trained", dequantize=True)
            assert torch.equal(packed(ids).logits, dense(ids).logits)
        compiled = upq.load(tmp_path / "trained")
        torch.testing.assert_close(compiled(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-4)
        assert compiled.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 16)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (
                {"grid": "seq"},
                r"int2: aqlm does not solve grid seq, .* a code; .*int2.grid=books",
            ),
            ({"method": "gptq"}, r"int2: gptq does not solve grid books, .*; set int2.method to one of aqlm$"),
            ({"group_size": 64}, r"int2.group_size=64: grid books has groups of a whole row \(-1\)"),
            ({"bits": 5}, "int2.bits=5: grid books has 2 or 3 or 4"),
            ({"window": 2}, "int2: aqlm does not learn on a block's output, so window"),
        ],
    )
    def test_what_does_not_fit_is_one_line(self, changed: Any, message: str, model: Path, tmp_path: Path) -> None:
        with pytest.raises(UPQError, match=message):
            quantize(model, recipe(tmp_path, {"int2": {**INT2, "method": METHOD, **changed}}), tmp_path / "out")

    def test_training_single_weights_is_refused(self, tmp_path: Path) -> None:
        stages = {"int2": {**INT2, "method": METHOD}, "distill": TRAIN}
        with pytest.raises(UPQError, match=r"distill\.train_weights: the codes of grid books belong to vectors"):
            recipe(tmp_path, stages)
        recipe(tmp_path, {**stages, "distill": {**TRAIN, "tokens": 0}})  # which trains nothing

    @pytest.mark.parametrize(
        ("family", "sizes", "message"),
        [
            ("llama", {**SIZES, "intermediate_size": 44}, "in_features 44 is not a multiple of 8"),
            ("qwen3_moe", {"moe_intermediate_size": 48, "num_experts": 4}, "holds experts, and grid books"),
        ],
    )
    def test_models_that_do_not_fit_are_refused(
        self, family: str, sizes: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        tiny_model(family, **sizes, vocab_size=300, eos_token_id=257).save_pretrained(tmp_path / "model")
        byte_tokenizer(bos="<s>", eos="</s>").save_pretrained(tmp_path / "model")
        with pytest.raises(UPQError, match=message):
            quantize(tmp_path / "model", recipe(tmp_path, {"int2": {**INT2, "method": METHOD}}), tmp_path / "out")


class TestExport:
    def artifact(self, folder: Path, **options: Any) -> Path:
        return tiny_artifact(folder / "artifact", scheme=SCHEME, **{**SIZES, "attention_bias": True, **options})

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_exact_and_named_as_transformers_expects(self, dtype: torch.dtype, tmp_path: Path) -> None:
        artifact = self.artifact(tmp_path, dtype=dtype)
        report = export(artifact, "aqlm", tmp_path / "out")
        assert report.exact
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["quantization_config"] == {
            "quant_method": "aqlm",
            "in_group_size": 8,
            "out_group_size": 1,
            "num_codebooks": 2,
            "nbits_per_codebook": 8,
            "linear_weights_not_to_quantize": ["lm_head"],
        }
        stored, own = load_file(tmp_path / "out" / "model.safetensors"), load_file(artifact / "model.safetensors")
        path = "model.layers.1.mlp.down_proj"
        assert stored[f"{path}.codes"].dtype == torch.int8
        assert stored[f"{path}.codes"].shape == (64, 12, 2)
        assert torch.equal(stored[f"{path}.codes"].view(torch.uint8).flatten(1), own[f"{path}.weight_packed"])
        assert torch.equal(stored[f"{path}.codebooks"][:, :, 0].half(), own[f"{path}.weight_books"])
        assert torch.equal(stored[f"{path}.scales"].flatten(1).half(), own[f"{path}.weight_scale"])
        assert config["dtype"] == {torch.float32: "float32", torch.bfloat16: "float32"}[dtype] or report.exact

    def test_equal_to_aqlms_own_dequantisation(self, tmp_path: Path) -> None:
        aqlm = pytest.importorskip("aqlm.utils", reason="aqlm is not installed: pip install aqlm")
        artifact = self.artifact(tmp_path)
        export(artifact, "aqlm", tmp_path / "out")
        stored, packed = load_file(tmp_path / "out" / "model.safetensors"), upq.load(artifact)
        for name in ("self_attn.k_proj", "mlp.up_proj"):
            path = f"model.layers.1.{name}"
            codes = aqlm.unpack_int_data(stored[f"{path}.codes"], 8)
            theirs = aqlm._dequantize_weight(
                codes, stored[f"{path}.codebooks"].float(), stored[f"{path}.scales"].float()
            )
            assert torch.equal(theirs, packed.get_submodule(path).dequantize())

    def test_transformers_loads_it_with_aqlm(self, tmp_path: Path) -> None:
        pytest.importorskip("aqlm", reason="aqlm is not installed: pip install aqlm[cpu]")
        pytest.importorskip("numba", reason="aqlm's products on CPUs need numba: pip install aqlm[cpu]")
        from transformers import AutoModelForCausalLM

        artifact, ids = self.artifact(tmp_path), torch.arange(2, 12)[None]
        export(artifact, "aqlm", tmp_path / "out")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        ours = upq.load(artifact, dequantize=True)
        with torch.no_grad():
            torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-3, atol=1e-4)

    def test_other_formats_refuse_books_and_this_one_refuses_others(self, tmp_path: Path) -> None:
        artifact = self.artifact(tmp_path)
        for name in ("humming", "compressed_tensors"):
            with pytest.raises(UPQError, match=f"{name} cannot hold grid books with scales in float16 .*; dense can"):
                export(artifact, name, tmp_path / "out")
        assert export(artifact, "dense", tmp_path / "dense").exact
        seq = tiny_artifact(tmp_path / "seq", **SIZES)
        with pytest.raises(UPQError, match=r"aqlm cannot hold grid seq \(.*\), it has code books alone"):
            export(seq, "aqlm", tmp_path / "seq-out")
        assert not (tmp_path / "seq-out").exists()
