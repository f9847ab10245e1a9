"""The plan of a run: closed forms against tensors that are counted, and the settings that make it fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import upq.cli
from counted import counted
from tiny import byte_tokenizer, tiny_model
from upq import decoding
from upq.blockwise import METHODS, BlockStore, walk
from upq.core.progress import Silent
from upq.core.signals import Stop
from upq.data.generated import continued
from upq.distill.student import frozen, load_student, make_student
from upq.distill.teacher import CachedTeacher, StreamedTeacher, write_cache
from upq.distill.trainer import Training, steps
from upq.grids import GRIDS
from upq.model.activations import allocator
from upq.model.loading import load_config
from upq.model.sizes import sizes_of
from upq.model.source import Source
from upq.nn.blocks import model_weights
from upq.nn.fake_quant import Solution
from upq.nn.fixed_codes import Coded, Start
from upq.run import plan as planning
from upq.run import run as pipeline
from upq.run.frame import Frame
from upq.run.plan import needs, plan
from upq.run.recipe import Recipe
from upq.stages._need import generate_need, writing_need
from upq.stages._sizes import Machine, Need, Speed
from upq.stages.on_policy import OnPolicy
from upq.text.generation import Request, Sampling

T = 32
LAW = 0.15  # of what is counted
CPU, GPU = Machine(10**12), Machine(10**12, gpus=1)
QUICK = (
    f"data.seq_len={T}", "data.validation=4", "int2.samples=4", "int2.method=rtn", "distill.tokens=1024",
    "distill.chunk_tokens=40",
)  # fmt: skip
INT4 = {"int4": {"stage": "blockwise", "bits": 4, "method": {"name": "rtn"}, "samples": 4}}


def recipe(*settings: str, first: dict[str, Any] | None = None) -> Recipe:
    """`default` for tiny models, without conversations unless they are set; `first`: stages before its own."""
    dropped = () if any(setting.startswith("generate") for setting in settings) else ("generate=null",)
    raw = Recipe.load("default", [*dropped, *QUICK, *settings]).model_dump(mode="json")
    return Recipe.of({**raw, "stages": {**(first or {}), **raw["stages"]}}, "test")


def config(layers: int, **sizes: Any) -> Any:
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 600, "max_position_embeddings": 64, "dtype": "bfloat16", "tie_word_embeddings": True}
    return AutoConfig.for_model("llama", num_hidden_layers=layers, **{**shape, **sizes})


def saved(folder: Path, shape: Any) -> Path:
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _int2(chosen: Recipe) -> Any:
    return chosen.stages["int2"]


def _distill(chosen: Recipe) -> Any:
    return chosen.stages["distill"]


def needed(shape: Any, chosen: Recipe, machine: Machine = CPU) -> dict[str, Need]:
    return needs(sizes_of(shape), chosen, machine)


# ---- sizes


def test_peak_and_flops_are_those_counted_by_hand() -> None:
    with counted() as tally:
        a = torch.zeros(100, 50)  # 20,000 bytes
        b = a @ a.T  # 40,000 and 2 · 100 · 50 · 100 operations
        c = b[:10].exp()  # a view is no memory; 4,000
        del a, b
        out = torch.cat([c, c])  # 8,000
        del c
        assert (tally.live, tally.peak, tally.flops) == (8_000, 64_000, 1_000_000)
        tally.restart()
        del out
        assert (tally.live, tally.peak) == (0, 8_000)


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_are_those_of_the_model(tied: bool) -> None:
    shape = config(3, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(shape)
    sizes = sizes_of(shape)
    assert sizes.all == sum(p.numel() for p in model.parameters())
    assert sizes.coded == sum(model.get_submodule(path).weight.numel() for path in model_weights(model))
    assert sizes.tied == tied
    assert sizes.dtype.itemsize == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_probe_is_what_a_block_of_the_student_keeps_and_computes(family: str, precision: str) -> None:
    """At another length than the probe's, with products that multiply."""
    model = tiny_model(family).float()
    bf16, rows, tokens = precision == "bf16", 3, 48
    student = make_student(model, _starts(model, recipe(), latents=True), train_norms=True)
    probe = sizes_of(model.config).probe(bf16=bf16)
    block = student.get_submodule("model.layers.0")
    kept: dict[int, torch.Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    )
    hidden_BTH = torch.zeros(rows, tokens, model.config.hidden_size, requires_grad=True)
    with counted() as tally, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        block.register_forward_pre_hook(lambda *_: hooks.__enter__())
        block.register_forward_hook(lambda *_: hooks.__exit__())
        block.register_forward_pre_hook(lambda *_: setattr(tally, "flops", 0.0))
        flops: list[float] = []
        block.register_forward_hook(lambda *_: flops.append(tally.flops))
        student.model(inputs_embeds=hidden_BTH, use_cache=False)
    found = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own)
    assert probe.kept(rows, tokens) == pytest.approx(found, rel=LAW)
    assert probe.flops(rows, tokens) == pytest.approx(flops[0], rel=LAW)


# ---- stages: need() is within 15 % of what is counted


def _starts(model: Any, chosen: Recipe, *, latents: bool) -> dict[str, Start]:
    scheme, starts = _int2(chosen).scheme(), dict[str, Start]()
    for path in model_weights(model):
        weight = model.get_submodule(path).weight
        solution = Solution(weight.detach(), GRIDS.get("seq").init(weight, scheme), scheme)
        starts[path] = solution if latents else Coded.of(solution.qtensor(), solution.params)
    return starts


class Rows:
    """Training rows of zeros."""

    def batch(self, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros((size, T), dtype=torch.long), torch.ones((size, T), dtype=torch.bool)

    def rows(self, step: int, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.long)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("distill.hidden=0", "distill.batch_size=2"),  # a single micro-batch
        ("distill.gradient_checkpointing=true", "distill.teacher=offloaded", "distill.precision=bf16"),
        ("distill.train_weights=false",),
        ("distill.train_weights=false", "distill.teacher=offloaded", "distill.chunk_tokens=1024"),
        ("distill.loss=ce", "distill.hidden=0", "distill.optimizer=adamw8bit"),
    ],
)
def test_training(settings: tuple[str, ...], tmp_path: Path) -> None:
    folder, chosen = saved(tmp_path / "m", config(4)), recipe("distill.micro_batch_size=2", *settings)
    latents, streamed = _distill(chosen).train_weights, Source(folder)
    with counted() as tally:
        original = AutoModelForCausalLM.from_config(config(4), dtype=torch.float32).eval().requires_grad_(False)
        starts = _starts(original, chosen, latents=latents)
        teacher: Any = original
        if _distill(chosen).teacher == "offloaded":

            def of_block(index: int) -> dict[str, Start]:
                prefix = f"model.layers.{index}."
                return {path.removeprefix(prefix): starts.pop(path) for path in list(starts) if prefix in path}

            student, frame = load_student(streamed, of_block, train_norms=True)
            teacher = StreamedTeacher.of(streamed, frame)
            del frame
        else:
            student = make_student(original, starts, train_norms=True)
        del original
        starts.clear()
        training = Training(student, teacher, Rows(), _distill(chosen))
        training.step(0, 1.0, Stop())
        flops = tally.flops
        tally.restart()
        training.step(1, 1.0, Stop())
    need = needed(config(4), chosen, GPU if _distill(chosen).precision == "bf16" else CPU)["distill"]
    assert need.memory == pytest.approx(tally.peak, rel=LAW)
    assert need.flops / steps(_distill(chosen), T) == pytest.approx(tally.flops - flops, rel=LAW)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("{name: rtn, scale: mse}", ("int2.samples=20",)),
        ("{name: rtn, scale: hessian}", ("int2.samples=20",)),
        ("{name: gptq}", ("int2.samples=8", "memory.activations=disk")),
        ("{name: flexround, iterations: 3, batch_size: 2}", ("int2.samples=20", "memory.activations=disk")),
        ("{name: flexround, iterations: 1, scale: max}", ("int2.samples=4",)),
        ("{name: block_ap, iterations: 3, batch_size: 2}", ("int2.samples=20",)),
        ("{name: adaround, iterations: 3, batch_size: 2}", ("int2.samples=20",)),
        ("{name: lora_round, iterations: 3, batch_size: 2}", ("int2.samples=20", "int2.window=2")),
        ("{name: block_ap, iterations: 3, batch_size: 2, start: gptq, scale: hessian}", ("int2.samples=20",)),
        ("{name: block_ap, iterations: 3, batch_size: 16}", ("int2.samples=40", "int2.precision=bf16")),
    ],
)
def test_blockwise(method: str, settings: tuple[str, ...], tmp_path: Path) -> None:
    folder, chosen = saved(tmp_path / "m", config(2)), recipe(f"int2.method={method}", *settings)
    stage, on_disk = _int2(chosen), chosen.memory.activations == "disk"
    cls = METHODS.get(stage.method.name)
    with counted() as tally:
        walk(
            Source(folder), torch.randint(600, (stage.samples, T)),
            cls(stage.method.options(cls.Config, "")), BlockStore(tmp_path / "s", stage.scheme()), given=None,
            precision=stage.precision, seed=0, progress=Silent(), activations=allocator(tmp_path if on_disk else None),
            order=stage.order,
        )  # fmt: skip
    need = needed(config(2), chosen)["int2"]
    assert need.memory == pytest.approx(tally.peak, rel=LAW)
    assert need.flops == pytest.approx(tally.flops, rel=LAW)
    stored = sum(file.stat().st_size for file in (tmp_path / "s").iterdir())
    streams = 2 * stage.samples * T * 128 * 4 if on_disk else 0
    assert need.disk == pytest.approx(stored + streams, rel=LAW)


def test_teacher(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", config(3))
    chosen = recipe("distill.teacher=cached", "distill.hidden=0", "distill.micro_batch_size=4")
    rows = steps(_distill(chosen), T) * _distill(chosen).batch_size
    cache = CachedTeacher(tmp_path / "t", range(rows))
    with counted() as tally:
        model = Source(folder)
        teacher = StreamedTeacher.of(model)
        write_cache(cache, teacher, torch.randint(600, (rows, T)), _distill(chosen), progress=Silent())
    need = needed(config(3), chosen)["distill.teacher"]
    assert need.memory == pytest.approx(tally.peak, rel=LAW)
    assert need.flops == pytest.approx(tally.flops, rel=LAW)
    assert need.disk == cache.bytes(_distill(chosen).teacher_top_k, 600, T)


@pytest.mark.parametrize("sizes", [{}, {"vocab_size": 6000}])
def test_conversations(sizes: dict[str, int]) -> None:
    rows, limit, shape = 8, 24, config(6, **sizes)
    settings = f"generate.tokens={rows * limit}", f"generate.batch_size={rows}", f"generate.max_new_tokens={limit}"
    with counted() as tally:
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()
        prompts_BT = torch.randint(600, (rows, limit))
        model.generate(
            prompts_BT, attention_mask=torch.ones_like(prompts_BT), do_sample=True, max_new_tokens=limit,
            min_new_tokens=limit, top_k=0, pad_token_id=0,
        )  # fmt: skip
    stage: Any = recipe(*settings).stages["generate"]
    need = generate_need(stage, sizes_of(shape), CPU, tokens=rows * limit, sharded=False)
    assert need.memory == pytest.approx(tally.peak, rel=LAW)


@pytest.mark.parametrize("sizes", [{}, {"vocab_size": 6000}, {"num_key_value_heads": 4}])
def test_conversations_of_the_compiled_decoder(sizes: dict[str, int]) -> None:
    """Its own memory is not torch's: weights, and the cache as it says it is when all texts are at their longest."""
    rows, limit, shape = 16, 256, config(6, **{"max_position_embeddings": 1024, **sizes})
    settings = f"generate.tokens={rows * limit}", f"generate.batch_size={rows}", f"generate.max_new_tokens={limit}"
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()
    texts = decoding.batch(model, size=rows)
    weights = sum(p.numel() for p in model.parameters()) * 4
    for n in range(rows):
        texts.add(Request(n, tuple(range(2 * limit - 1)), 1, lambda _: False))
    with counted() as tally:
        while texts.busy:
            list(texts.step())
    need = needed(shape, recipe(*settings))["generate"]
    assert need.memory == pytest.approx(weights + texts.cached_bytes + tally.peak, rel=LAW)
    small = needed(shape, recipe(*settings, "generate.batch_size=1"))["generate"]
    assert small.flops == need.flops  # the same tokens
    assert small.moved > 4 * need.moved  # but each reads all weights for itself


def test_answers_of_a_student() -> None:
    """By transformers, beside teacher, latents and their moments."""
    shape, prompt, limit, rows = config(6), 12, 24, 8
    stage = OnPolicy(
        steps=1, scale_lr=1e-3, batch_size=rows, prompt_tokens=prompt, max_new_tokens=limit, written_at_once=rows
    )
    scheme = _int2(recipe()).scheme()
    with counted() as tally:
        original = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval().requires_grad_(False)
        student = make_student(original, _starts(original, recipe(), latents=True), train_norms=False)
        moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in student.parameters() if p.requires_grad]
        prompts = torch.randint(600, (rows, prompt)).tolist()
        continued(frozen(student), byte_tokenizer(), prompts, [Sampling(1.0, n) for n in range(rows)], limit, [])
    assert moments
    need = writing_need(
        stage, sizes_of(shape), CPU, answers=rows, prompt=prompt, limit=limit, at_once=rows, scheme=scheme
    )
    assert need.memory == pytest.approx(tally.peak, rel=LAW)
    assert need.flops == pytest.approx(tally.flops / 2, rel=0.35)  # half as long on average; a prompt is read whole


@pytest.mark.parametrize("settings", [(), ("memory.activations=disk",)])
@pytest.mark.parametrize("sizes", [{"vocab_size": 6000}, {"hidden_size": 256, "intermediate_size": 1024}])
def test_check(
    sizes: dict[str, int], settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are most of one, weights of the other."""
    folder = saved(tmp_path / "m", config(8, **sizes))
    if settings:  # in another type than the file's, so that what is read is counted too
        stated = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(stated))
    (tmp_path / "text.txt").write_text("\n".join(f"Line {i} of {i * i}." for i in range(400)))
    source = f"data.sources=[{{path: {tmp_path / 'text.txt'}}}]"
    chosen = recipe(source, "distill.tokens=0", *settings, first=INT4 if settings else None)
    peaks: dict[str, int] = {}

    def count(name: str) -> None:
        original = getattr(Frame, name)

        def run(self: Any, *arguments: Any) -> Any:
            with counted() as tally:
                found = original(self, *arguments)
            peaks[name] = tally.peak  # with the codes, which were made before: a view of what is not known counts it
            return found

        monkeypatch.setattr(Frame, name, run)

    count("pack")
    count("check")
    pipeline.quantize(folder, chosen, tmp_path / "out", device="cpu")
    for machine, peak in ((CPU, max(peaks.values())), (GPU, peaks["check"]))[: 2 if settings else 1]:
        assert needed(load_config(folder), chosen, machine)["check"].memory == pytest.approx(peak, rel=LAW), peaks


def test_every_stage_of_every_recipe_has_its_row() -> None:
    found = needed(config(2), recipe("generate.weight=1", first=INT4))
    assert list(found) == ["data", "int4", "generate", "int2", "distill", "check"]
    cached = needed(config(2), recipe("distill.teacher=cached", "distill.hidden=0"))
    assert list(cached) == ["data", "int2", "distill.teacher", "distill", "check"]
    assert cached["distill"].memory < needed(config(2), recipe("distill.hidden=0"))["distill"].memory
    raw = recipe("distill.hidden=0").model_dump(mode="json")
    policy = {
        "steps": 4,
        "scale_lr": 1e-3,
        "batch_size": 4,
        "micro_batch_size": 2,
        "chunk_tokens": 40,
        "written_at_once": 1,
    }
    policy |= {"prompt_tokens": 8, "max_new_tokens": 24}
    written = needed(config(2), Recipe.of({**raw, "stages": {**raw["stages"], "on_policy": policy}}, "test"))
    assert list(written) == ["data", "int2", "distill", "on_policy", "check"]
    assert written["on_policy"].memory == pytest.approx(written["distill"].memory, rel=0.1)  # rows of 32 tokens too
    untrained = needed(config(2), recipe("distill.tokens=0"))["distill"]
    assert untrained.tokens == untrained.flops == 0 < untrained.memory


def test_shards_and_shares_of_a_batch_need_less() -> None:
    one, chosen = config(8), recipe("distill.batch_size=8", "memory.weights=sharded")
    alone, shared = (needed(one, chosen, Machine(10**12, gpus=n))["distill"] for n in (1, 4))
    assert shared.memory < alone.memory
    assert shared.flops == pytest.approx(alone.flops / 4, rel=0.01)


def test_conversations_are_shared_out_by_whole_batches() -> None:
    settings = "generate.tokens=640", "generate.batch_size=4", "generate.max_new_tokens=16"  # in ten batches
    alone, two, four = (needed(config(2), recipe(*settings), Machine(10**12, gpus=n))["generate"] for n in (1, 2, 4))
    for need, rounds in ((two, 5), (four, 3)):
        assert need.flops == pytest.approx(alone.flops * rounds / 10)
        assert need.moved == pytest.approx(alone.moved * rounds / 10)
        assert (need.memory, need.disk, need.tokens) == (alone.memory, alone.disk, alone.tokens)


def test_conversations_of_a_sharded_model_hold_a_share_of_it_and_two_blocks() -> None:
    """They take the time of a whole model's."""
    deep = config(6)
    settings = "generate.tokens=640", "generate.batch_size=4", "generate.max_new_tokens=16"
    layers = AutoModelForCausalLM.from_config(deep, dtype=torch.bfloat16).model.layers
    cut, block = (sum(p.nbytes for p in module.parameters()) for module in (layers, layers[0]))
    for n in (2, 3, 4):
        whole, sharded = (
            needed(deep, recipe(*settings, f"memory.weights={weights}"), Machine(10**12, gpus=n))["generate"]
            for weights in ("replicated", "sharded")
        )
        assert whole.memory - sharded.memory == pytest.approx(cut * (1 - 1 / n) - 2 * block, abs=2)
        assert (sharded.flops, sharded.moved, sharded.disk) == (whole.flops, whole.moved, whole.disk)


# ---- what fits


def test_settings_are_tried_in_order_and_only_those_that_help_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(_sizes: Any, chosen: Recipe, _machine: Machine) -> dict[str, Need]:
        saved = 10 * (_distill(chosen).chunk_tokens == 256) + 20 * _distill(chosen).gradient_checkpointing
        saved = saved if _distill(chosen).train_weights else saved + 45
        return {"int2": Need(1, 10, 0), "distill": Need(1, 100 - saved, 0)}

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
        (25, 2, ("memory.weights=sharded", "generate.batch_size=32"), (15, 50)),
        (79, 0, ("generate.batch_size=32",), (65, 100)),
        (64, 0, ("generate.batch_size=8",), (62, 100)),
    ],
)
def test_shards_are_planned_for_all_stages_that_have_them(
    memory: int,
    gpus: int,
    settings: tuple[str, ...],
    needed: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(_sizes: Any, chosen: Recipe, _machine: Machine) -> dict[str, Need]:
        sharded = chosen.memory.weights == "sharded"
        writes = 60 - 50 * sharded + {128: 20, 32: 5, 8: 2}[chosen.stages["generate"].batch_size]
        return {"generate": Need(1, writes, 0), "distill": Need(1, 100 - 50 * sharded, 0)}

    monkeypatch.setattr(planning, "needs", found)
    monkeypatch.setattr(planning, "resident_bytes", lambda: 0)
    monkeypatch.setattr(planning, "GPU_CONTEXT", 0)
    monkeypatch.setattr(planning, "_RESERVE", 0.0)
    made = plan(config(1), recipe("generate.weight=1"), Machine(memory, gpus))
    assert made.settings == settings
    assert tuple(stage.memory for stage in made.stages) == needed


def test_what_is_suggested_fits_without_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "resident_bytes", lambda: 0)
    wide, chosen = (
        config(3, vocab_size=50_000, intermediate_size=1536),
        recipe("distill.chunk_tokens=1024", "data.seq_len=64", "distill.loss=fkl"),
    )
    plain = plan(wide, chosen, Machine(10**12))
    assert plain.settings == ()
    needed = {stage.name: stage.memory for stage in plain.stages}
    assert needed["check"] < 0.9 * needed["distill"]
    tight = plan(wide, chosen, Machine(needed["distill"] * 9 // 10))
    assert tight.fits
    assert tight.settings
    chosen = chosen.changed(tight.settings)
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
    settings = [word for setting in ("generate=null", *QUICK) for word in ("--set", setting)]
    code, shown, errors = run(monkeypatch, capsys, tmp_path, *settings, "--memory", 100, "--json", tmp_path / "p.json")
    assert code == 0, errors
    assert f"upq quantize {tmp_path} --out DIR --set generate=null" in shown
    saved = json.loads((tmp_path / "p.json").read_text())
    assert saved["fits"]
    assert [stage["name"] for stage in saved["stages"]] == ["data", "int2", "distill", "check"]
    assert saved["weights"] == 600 * 128 + 128 + 3 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 192 + 2 * 128)

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
        (("--set", "int2.group_size=40"), "in_features 128 is not a multiple of group_size 40"),
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
    (tmp_path / "config.json").write_text('{"model_type": "gpt7"}')
    code, _, errors = run(monkeypatch, capsys, tmp_path)
    assert code == 2
    assert "knows no model_type 'gpt7'" in errors


def test_a_stage_in_bf16_has_the_time_of_bf16() -> None:
    found = needed(config(2), recipe("int2.precision=fp32", "distill.precision=bf16"))
    assert (found["int2"].bf16, found["distill"].bf16) == (False, True)
    slow, fast = Speed(1e9, 1e9), Speed(1e9, 1e9, flops_bf16=4e9)
    assert fast.seconds(found["distill"]) < slow.seconds(found["distill"])
    assert fast.seconds(found["int2"]) == slow.seconds(found["int2"])
