"""The plan of a run: what is imagined against what is counted, and the settings that make it fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM
from upq.model.streaming import StreamedModel

import upq.cli
from tiny import byte_tokenizer, tiny_model
from upq.artifact.transformers import block_linears
from upq.blockwise import METHODS, BlockStore, walk
from upq.core.progress import Silent
from upq.core.signals import Stop
from upq.distill.student import make_student
from upq.distill.trainer import Training
from upq.grids import GRIDS
from upq.model.activations import allocator
from upq.model.loading import load_config
from upq.nn.fake_quant import Solution
from upq.nn.fixed_codes import Coded, Start
from upq.run import plan as planning
from upq.run import run as pipeline
from upq.run.answers import Answers
from upq.run.imagined import counted, imagined
from upq.run.plan import Machine, Need, Speed, needs, plan, with_setting
from upq.run.recipe import Recipe

T = 32
QUICK = (
    "data.generated=null", f"data.seq_len={T}", "data.validation=4", "int4=null", "int2.samples=4", "int2.method=rtn",
    "distill.tokens=1024", "distill.chunk_tokens=40",
)  # fmt: skip


def recipe(*settings: str) -> Recipe:
    return Recipe.load("default", [*QUICK, *settings])


def config(layers: int, **sizes: Any) -> Any:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 300, "max_position_embeddings": 64, "dtype": "bfloat16", "tie_word_embeddings": True}
    return AutoConfig.for_model("llama", num_hidden_layers=layers, **{**shape, **sizes})


# ---- tensors without memory


def work() -> torch.Tensor:
    a = torch.zeros(100, 50)  # 20,000 bytes
    b = a @ a.T  # 40,000 and 2 · 100 · 50 · 100 operations
    c = b[:10].exp()  # a view is no memory; 4,000
    del a, b
    return torch.cat([c, c])  # 8,000


@pytest.mark.parametrize("mode", [imagined, counted])
def test_peak_and_work_are_those_counted_by_hand(mode: Any) -> None:
    with mode() as tally:
        out = work()
        assert (tally.live, tally.peak, tally.flops) == (8_000, 64_000, 1_000_000)
        assert tally.moved == 20_000 + (4_000 + 4_000) + (4_000 + 4_000 + 8_000)
        tally.restart()
        del out
        assert (tally.live, tally.peak) == (0, 8_000)


def test_what_has_no_value_is_one_and_a_mask_picks_everything() -> None:
    with imagined():
        mask = torch.rand(3, 4) < 0.5
        assert float(torch.zeros(())) == 1
        assert mask.all()
        assert torch.zeros(3, 4, 5)[mask].shape == (12, 5)
        assert [len(index) for index in mask.nonzero(as_tuple=True)] == [12, 12]


class Forgetful(Answers):
    """Nothing is told; all is found out."""

    def known(self, question: object) -> None: ...


def seen(outs: list[Any], *arguments: torch.Tensor) -> list[Any]:
    """All that is there to see of tensors without values, and of which arguments they are views."""
    found = []
    for out in outs:
        shared = [out.untyped_storage()._cdata == x.untyped_storage()._cdata for x in arguments]
        kept = out.untyped_storage().nbytes(), out.storage_offset(), out.stride(), out.is_contiguous()
        found.append((out.shape, out.dtype, out.device, out.requires_grad, out.is_inference(), shared, *kept))
    return found


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_is_told_is_what_would_be_found_out(mode: Any) -> None:
    def operations() -> list[Any]:
        leaf = torch.nn.Parameter(torch.zeros(5, 6))
        with mode():
            a, c, d = (torch.zeros(6, 8)[1:, 2:] for _ in range(3))  # views with an offset
            b = torch.zeros(5, 6, dtype=torch.bfloat16)
            outs = [
                a @ b.float().T, a[1:, ::2], a.T, a.add_(1), a * 1.0, (a > 0) * 1, a.view(torch.int32), leaf * a,
                leaf.detach(), leaf[1:], *a.split(2), *a.max(-1), torch.cat([a, b]), torch.empty_like(b.T),
                torch.mul(a, a, out=torch.empty(5, 6)), a.as_strided((2, 2), (1, 1), 3), a[a > 0], a.expand(3, 5, 6),
                torch.zeros(3, device="meta") + 1, a.add_(a), a.add_(c), c.add_(d),
                *(torch.ops.aten.mul.out(a, x, out=out) for x, out in ((a, a), (c, a), (a, c), (c, c), (c, d))),
            ]  # fmt: skip
        found = seen(outs, a, b, c, d, leaf)
        if mode is torch.enable_grad:
            (leaf * outs[0].sum() * a).square().sum().backward()
            assert leaf.grad is not None
            found += seen([leaf.grad], a, b, c, d, leaf)
        return found

    with imagined(Forgetful()) as tally:
        expected, work_done = operations(), (tally.live, tally.peak, tally.flops, tally.moved)
    answers = Answers()
    for _ in range(2):  # learning, and told
        with imagined(answers) as tally:
            assert operations() == expected
            assert (tally.live, tally.peak, tally.flops, tally.moved) == work_done


@pytest.mark.parametrize("settings", [(), ("distill.optimizer=adamw8bit", "distill.teacher=offloaded")])
def test_a_training_that_is_told_is_the_one_that_is_found_out(settings: tuple[str, ...]) -> None:
    answers = Answers()
    found, learnt, told = (
        planning._training(config(2), recipe(*settings), 2, known, train=True, many=True, gpu=False)
        for known in (Forgetful(), answers, answers)
    )
    assert found == learnt == told


# ---- stages


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("distill.gradient_checkpointing=true", "distill.teacher=offloaded"),
        ("distill.train_weights=false", "distill.teacher=offloaded"),
    ],
)
def test_training_at_any_depth_is_the_training_at_that_depth(settings: tuple[str, ...]) -> None:
    def run(shallow: Any) -> planning.Figures:
        return planning._training(shallow, recipe(*settings), 2, train=True, many=True, gpu=False)

    assert planning._at_depth(config(5), run) == pytest.approx(run(config(5)), rel=1e-6)


@pytest.mark.parametrize("latents", [True, False])
def test_a_training_step_needs_what_it_was_planned_to(latents: bool) -> None:
    """Real tensors, real values, the same counting."""
    small = config(2)
    chosen = recipe("distill.micro_batch_size=2", "distill.batch_size=4", f"distill.train_weights={latents}")
    planned = planning._training(small, chosen, 2, train=True, many=True, gpu=False)
    data = planning._Rows(T)
    with counted() as tally:
        teacher = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval().requires_grad_(False)
        scheme, starts = chosen.int2.scheme(), dict[str, Start]()
        for path in block_linears(teacher):
            weight = teacher.get_submodule(path).weight
            solution = Solution(weight, GRIDS.get("seq").init(weight, scheme), scheme)
            starts[path] = solution if latents else Coded.of(solution.qtensor(), solution.params)
        student = make_student(teacher, starts, train_norms=True)
        del starts, solution, weight
        training = Training(student, teacher, data, chosen.distill)
        training.step(0, 1.0, Stop())
        kept, before = tally.live, (tally.flops, tally.moved)
        tally.restart()
        training.step(1, 1.0, Stop())
    assert kept == pytest.approx(planned[1], rel=0.03)
    assert tally.peak == pytest.approx(planned[2], rel=0.04)
    assert tally.flops - before[0] == pytest.approx(planned[7], rel=0.01)
    assert tally.moved - before[1] == pytest.approx(planned[9], rel=0.05)


@pytest.mark.parametrize("activations", ["memory", "disk"])
def test_a_block_wise_stage_needs_what_it_was_planned_to(activations: str, tmp_path: Path) -> None:
    tiny_model("llama", hidden_size=64, intermediate_size=96, head_dim=16).bfloat16().save_pretrained(tmp_path / "m")
    chosen = recipe(
        f"memory.activations={activations}",
        "int2.method={name: block_ap, iterations: 3, batch_size: 2, scale: mse}",
        "int2.samples=20",
    )
    options = chosen.int2.method.options(METHODS.get("block_ap").Config, "")
    tokens_NT = torch.randint(67, (20, T))
    with counted() as tally:
        walk(
            StreamedModel(tmp_path / "m", precision="bf16"), tokens_NT, METHODS.get("block_ap")(options),
            BlockStore(tmp_path / "s", chosen.int2.scheme()), source=None, seed=0, progress=Silent(),
            activations=allocator(tmp_path if activations == "disk" else None),
        )  # fmt: skip
    # of a GPU, where nothing is added for the C library
    need = needs(load_config(tmp_path / "m"), chosen, gpu=True, only=frozenset({"int2"}))["int2"]
    assert need.memory == pytest.approx(tally.peak, rel=0.05)
    assert need.flops == pytest.approx(tally.flops, rel=0.1)
    stored = sum(file.stat().st_size for file in (tmp_path / "s").iterdir())
    streams = 2 * 20 * T * 64 * 4 if activations == "disk" else 0
    assert need.disk == pytest.approx(stored + streams, rel=0.1)  # headers and reports are not counted


@pytest.mark.parametrize("settings", [(), ("int4={bits: 4, method: rtn, samples: 4}", "memory.activations=disk")])
@pytest.mark.parametrize("sizes", [{"vocab_size": 6000}, {"hidden_size": 256, "intermediate_size": 1024}])
def test_the_check_needs_what_it_was_planned_to(
    sizes: dict[str, int], settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are most of one, weights of the other."""
    shape = config(8, **sizes)
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    # In another type than the file's, so that what is read is counted too.
    stated = json.loads((tmp_path / "m" / "config.json").read_text()) | {"dtype": "float32"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(stated))
    byte_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "text.txt").write_text("\n".join(f"Line {i} of {i * i}." for i in range(400)))
    source = f"data.sources=[{{path: {tmp_path / 'text.txt'}}}]"
    chosen = recipe(source, "distill.tokens=0", *settings)
    peaks: dict[str, int] = {}

    def count(name: str) -> None:
        original = getattr(pipeline._Run, name)

        def run(self: Any, data: Any, *trained: Any) -> Any:
            with counted() as tally:
                found = original(self, data, *trained)
            peaks[name] = tally.peak  # with the codes, which were made before: a view of what is not known counts it
            return found

        monkeypatch.setattr(pipeline._Run, name, run)

    count("write")
    count("finish")
    pipeline.quantize(tmp_path / "m", chosen, tmp_path / "out", device="cpu")
    for gpu, peak in ((False, max(peaks.values())), (True, peaks["finish"])):
        planned = planning._check(load_config(tmp_path / "m"), chosen, gpu=gpu)
        assert planned.memory == pytest.approx(peak, rel=0.03), (gpu, peaks)


def test_every_stage_of_every_recipe_has_its_row() -> None:
    found = needs(
        config(2), Recipe.load("default", [f"data.seq_len={T}", "int4={bits: 4, method: rtn}", "int2.method=rtn"])
    )
    assert list(found) == ["generate", "data", "int4", "int2", "distill", "check"]
    cached = needs(config(2), recipe("distill.teacher=cached", "distill.hidden=0"))
    assert list(cached) == ["data", "int2", "teacher", "distill", "check"]
    assert cached["distill"].memory < needs(config(2), recipe("distill.hidden=0"))["distill"].memory
    untrained = needs(config(2), recipe("distill.tokens=0"))["distill"]
    assert untrained.tokens == untrained.flops == 0 < untrained.memory


def test_shards_and_shares_of_a_batch_need_less() -> None:
    one, chosen = config(2), recipe("distill.batch_size=8", "memory.weights=sharded")
    alone, shared = (needs(one, chosen, processes=n, only=frozenset({"distill"}))["distill"] for n in (1, 4))
    assert shared.memory < alone.memory
    assert shared.flops == pytest.approx(alone.flops / 4, rel=0.01)


def test_conversations_are_shared_out_by_whole_batches() -> None:
    settings = "data.generated={tokens: 640, batch_size: 4, max_new_tokens: 16}"  # in ten batches
    alone, two, four = (needs(config(2), recipe(settings), processes=n)["generate"] for n in (1, 2, 4))
    for need, rounds in ((two, 5), (four, 3)):
        assert need.flops == pytest.approx(alone.flops * rounds / 10)
        assert need.moved == pytest.approx(alone.moved * rounds / 10)
        assert (need.memory, need.disk, need.tokens) == (alone.memory, alone.disk, alone.tokens)


def test_conversations_of_a_model_in_shards_take_a_share_of_it_and_two_blocks() -> None:
    """And the time of a whole model's."""
    deep, settings = config(6), "data.generated={tokens: 640, batch_size: 4, max_new_tokens: 16}"
    layers = AutoModelForCausalLM.from_config(deep, dtype=torch.bfloat16).model.layers
    cut, block = (sum(p.nbytes for p in module.parameters()) for module in (layers, layers[0]))
    for n in (2, 3, 4):
        whole, sharded = (
            needs(deep, recipe(settings, f"memory.weights={weights}"), processes=n, gpu=True)["generate"]
            for weights in ("replicated", "sharded")
        )
        assert whole.memory - sharded.memory == pytest.approx(cut * (1 - 1 / n) - 2 * block, abs=2)
        assert (sharded.flops, sharded.moved, sharded.disk) == (whole.flops, whole.moved, whole.disk)


# ---- what fits


def test_settings_are_tried_in_order_and_only_those_that_help_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(_config: Any, chosen: Recipe, *, only: Any = None, **_: Any) -> dict[str, Need]:
        saved = 10 * (chosen.distill.chunk_tokens == 256) + 20 * chosen.distill.gradient_checkpointing
        saved = saved if chosen.distill.train_weights else saved + 45
        made = {"int2": Need("int2", 1, 10, 0), "distill": Need("distill", 1, 100 - saved, 0)}
        return {name: need for name, need in made.items() if only is None or name in only}

    monkeypatch.setattr(planning, "needs", found)
    monkeypatch.setattr(planning, "resident_bytes", lambda: 0)
    monkeypatch.setattr(planning, "_RESERVE", 0.0)
    chunk, checkpointing = "distill.chunk_tokens=256", "distill.gradient_checkpointing=true"
    scales = ("distill.train_weights=false", "distill.scale_lr=5e-3")
    for memory, settings, fits in (
        (100, (), True),
        (90, (chunk,), True),
        (70, (chunk, checkpointing), True),
        (69, scales, True),  # and what was tried before is not needed
        (54, (chunk, *scales), True),
        (35, (checkpointing, *scales), True),
        (25, (chunk, checkpointing, *scales), True),
        (24, (chunk, checkpointing, *scales), False),
    ):
        made = plan(config(1), recipe(), Machine(memory))
        assert (made.settings, made.fits) == (settings, fits)
    monkeypatch.setattr(planning, "_RESERVE", 0.1)
    for memory, settings in ((112, ()), (105, (chunk,)), (72, (chunk, checkpointing)), (69, scales)):
        made = plan(config(1), recipe(), Machine(memory))  # no other artefact, only to leave a tenth free
        assert (made.settings, made.fits) == (settings, True)


@pytest.mark.parametrize(
    ("memory", "gpus", "settings", "needed"),
    [
        (100, 2, (), (80, 100)),
        (90, 2, ("memory.weights=sharded",), (30, 50)),  # chosen for the training
        (40, 2, ("memory.weights=sharded",), (30, 50)),  # conversations are not made fewer where shards do
        (25, 2, ("memory.weights=sharded", "data.generated.batch_size=32"), (15, 50)),
        (79, 0, ("data.generated.batch_size=32",), (65, 100)),
        (64, 0, ("data.generated.batch_size=8",), (62, 100)),
    ],
)
def test_shards_are_planned_for_all_stages_that_have_them(
    memory: int,
    gpus: int,
    settings: tuple[str, ...],
    needed: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(_config: Any, chosen: Recipe, *, only: Any = None, **_: Any) -> dict[str, Need]:
        sharded = chosen.memory.weights == "sharded"
        assert chosen.data.generated is not None
        writes = 60 - 50 * sharded + {128: 20, 32: 5, 8: 2}[chosen.data.generated.batch_size]
        made = {"generate": Need("generate", 1, writes, 0), "distill": Need("distill", 1, 100 - 50 * sharded, 0)}
        return {name: need for name, need in made.items() if only is None or name in only}

    monkeypatch.setattr(planning, "needs", found)
    monkeypatch.setattr(planning, "resident_bytes", lambda: 0)
    monkeypatch.setattr(planning, "GPU_CONTEXT", 0)
    monkeypatch.setattr(planning, "_RESERVE", 0.0)
    made = plan(config(1), recipe("data.generated={}"), Machine(memory, gpus))
    assert made.settings == settings
    assert tuple(stage.memory for stage in made.stages) == needed


def test_what_is_suggested_fits_without_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "resident_bytes", lambda: 0)
    wide, chosen = config(3, vocab_size=50_000), recipe("distill.chunk_tokens=1024", "data.seq_len=64")
    plain = plan(wide, chosen, Machine(10**12))
    assert plain.settings == ()
    needed = {stage.name: stage.memory for stage in plain.stages}
    assert needed["check"] < 0.9 * needed["distill"]
    tight = plan(wide, chosen, Machine(needed["distill"] * 9 // 10))
    assert tight.fits
    assert tight.settings
    for setting in tight.settings:
        chosen = with_setting(chosen, setting)
    again = plan(wide, chosen, tight.machine)
    assert again == replace(tight, settings=())


# ---- the command


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["upq", "plan", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(planning, "this_speed", lambda: Speed(1e10, 1e9))
    with pytest.raises(SystemExit) as stopped:
        upq.cli.main()
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    config(3).save_pretrained(tmp_path)  # no weights
    settings = [word for setting in QUICK for word in ("--set", setting)]
    code, shown, errors = run(monkeypatch, capsys, tmp_path, *settings, "--memory", 100, "--json", tmp_path / "p.json")
    assert code == 0, errors
    assert f"upq quantize {tmp_path} --out DIR --set data.generated=null" in shown
    saved = json.loads((tmp_path / "p.json").read_text())
    assert saved["fits"]
    assert [stage["name"] for stage in saved["stages"]] == ["data", "int2", "distill", "check"]
    assert saved["weights"] == 300 * 64 + 64 + 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64)

    code, shown, errors = run(monkeypatch, capsys, tmp_path, *settings, "--set", "distill.tokens=0", "--memory", 0.1)
    assert code == 1, errors
    assert "does not fit in 100 MB" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", 1), "--gpus and --gpu-memory go together"),
        (("--gpu-tflops", 100), "--gpu-tflops and --gpu-bandwidth go together"),
        (("--set", "data.seq_len=65"), "data.seq_len=65 is more than the model's 64; lower it"),
        (("--set", "distill.tokens=1"), "distill.tokens=1 is less than one step"),
        (("--set", "int2.group_size=40"), "in_features 64 is not a multiple of group_size 40"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[object, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config(2).save_pretrained(tmp_path)
    seq_len = () if "65" in str(arguments) else ("--set", f"data.seq_len={T}")
    code, shown, errors = run(monkeypatch, capsys, tmp_path, *seq_len, *arguments)
    assert (code, shown) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1


def test_a_family_that_is_not_known_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    code, _, errors = run(monkeypatch, capsys, tmp_path)
    assert code == 2
    assert "model family 'gpt2' is not supported" in errors


def test_a_stage_in_bf16_has_the_time_of_bf16() -> None:
    chosen = recipe("int2.precision=fp32", "distill.precision=bf16")
    found = needs(tiny_model("llama").config, chosen, only=frozenset({"int2", "distill"}))
    assert (found["int2"].bf16, found["distill"].bf16) == (False, True)
    slow, fast = Speed(1e9, 1e9), Speed(1e9, 1e9, flops_bf16=4e9)
    assert fast.seconds(found["distill"]) < slow.seconds(found["distill"])
    assert fast.seconds(found["int2"]) == slow.seconds(found["int2"])


def test_a_plan_leaves_no_precision_behind() -> None:
    for precision in ("bf16", "fp32"):
        needs(config(2), recipe(f"distill.precision={precision}"), only=frozenset({"distill"}))
        Accelerator(mixed_precision="no", cpu=True)


def test_nearest_rounding_that_weighs_its_inputs_is_planned_with_them() -> None:
    method = "int2.method={{name: rtn, scale: {}}}".format
    found = {
        scale: needs(tiny_model("llama").config, recipe(method(scale)), only=frozenset({"int2"}))["int2"]
        for scale in ("mse", "hessian")
    }
    assert found["mse"].flops == 0 < found["hessian"].flops
