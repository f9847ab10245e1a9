"""The whole way on a tiny random model: resumed, refused, and repeated. Faults of all kinds: tests/faults."""

import gc
import json
import os
import shutil
import signal
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import upq
import upq.blockwise._store
import upq.distill.teacher
import upq.distill.trainer
import upq.stages._training
from tiny import byte_tokenizer
from together import alone, together
from upq.blockwise import BlockStore
from upq.core.errors import UPQError
from upq.core.progress import Silent
from upq.kernels import computing
from upq.run.frame import Frame
from upq.run.recipe import Recipe
from upq.run.run import quantize

BLOCKS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=300,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer(bos="<s>", eos="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(f"Story {i}: the {i}th fox saw {i * 7} geese and {i % 5} bears." for i in range(200)))
    return file


STAGES = {
    "int4": {
        "stage": "blockwise",
        "bits": 4,
        "samples": 8,
        "method": {"name": "flexround", "scale": "max", "iterations": 4},
    },
    "int2": {
        "stage": "blockwise",
        "bits": 2,
        "samples": 8,
        "method": {
            "name": "block_ap",
            "scale": "max",
            "relative": True,
            "iterations": 4,
            "batch_size": 2,
            "lr": 3e-3,
            "scale_lr": 3e-3,
        },
    },
    "distill": {
        "loss": "gjs",
        "hidden": 1.0,
        "tokens": 1024,
        "batch_size": 4,
        "micro_batch_size": 2,
        "lr": 1e-3,
        "scale_lr": 1e-3,
        "train_norms": True,
        "checkpoint_every": 2,
    },
}


def make_recipe(text, *overrides):
    sources = [{"path": str(text), "separator": "blank_line"}]
    data = {"seq_len": 32, "validation": 8, "sources": sources}
    file = Path(text).parent / f"recipe-{abs(hash(str(text)))}.yaml"
    file.write_text(yaml.safe_dump({"data": data, "stages": STAGES}, sort_keys=False))
    return Recipe.load(str(file), overrides)


@pytest.fixture(scope="module")
def finished(model, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    quantize(model, make_recipe(text), out)
    return out


def in_a_child(model, recipe, out, victim, count):
    """A run that is killed as soon as it has written the file `victim` so many times."""
    seen = 0

    def wrapped(original):
        def save(path, *args):
            nonlocal seen
            original(path, *args)
            seen += path.name == victim
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

        return save

    for module in (upq.blockwise._store, upq.distill.trainer):
        module.save_tensors = wrapped(module.save_tensors)
    quantize(model, recipe, out)


def run_child(model, out, recipe, victim, count):
    return alone(in_a_child, model, recipe, out, victim, count)


def shared(_, model, recipe, out):
    """What each of several processes does."""
    quantize(model, recipe, out)


def test_what_cannot_change_the_result_may_change_later(model, text, finished, tmp_path):
    """Skipping bad steps is how a run that met one goes on; where it met none, it is the same run."""
    assert quantize(model, make_recipe(text, "distill.skip_bad_steps=3"), finished).skipped_steps == []


def test_a_work_directory_that_outlived_its_run_goes(model, text, finished, tmp_path):
    """Killed between the last file of the artefact and the end."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / ".work").mkdir()
    (out / ".work" / "distill.safetensors").write_bytes(b"large")
    quantize(model, make_recipe(text), out, keep_work=True)
    assert (out / ".work").exists()
    quantize(model, make_recipe(text), out)
    assert {path.name for path in out.iterdir()} == {path.name for path in finished.iterdir()}


def test_where_activations_lie_may_change_at_any_time(model, text, finished, tmp_path):
    """Killed with activations on disk and resumed with them in memory: the bytes of a run that was always in memory."""
    out, on_disk = tmp_path / "out", make_recipe(text, "memory.activations=disk")
    killed = run_child(model, out, on_disk, "block-0001.safetensors", 1)
    assert killed.returncode == -signal.SIGKILL, killed.output
    known = {"run.json", "tokens.safetensors", "int4"}
    assert {path.name for path in (out / ".work").iterdir()} == known  # the activations are gone
    quantize(model, make_recipe(text), out)
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    manifest = quantize(model, on_disk, out)  # and a finished run is finished
    assert manifest.recipe["memory"]["activations"] == "memory"


def test_a_second_run_does_nothing(model, text, finished):
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    manifest = quantize(model, make_recipe(text), finished)
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before
    assert manifest.metrics["artifact"]["kld"] > 0


def test_the_artefact_is_what_was_trained(model, text, finished):
    """The manifest's figures are those of the files: measured again from the directory alone."""
    manifest = json.loads((finished / "upq.json").read_text())
    loaded, source = upq.load(finished), upq.load(model)
    tokens = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(0))
    with computing("reference"):
        packed, dense = loaded(tokens).logits, upq.load(finished, dequantize=True)(tokens).logits
    torch.testing.assert_close(packed, dense, rtol=0, atol=1e-5)
    assert not torch.allclose(packed, source(tokens).logits, atol=1e-2)
    layers = {layer["name"]: layer for layer in manifest["layers"]}
    assert len(layers) == BLOCKS * 7
    assert all(layer["bits"] == 2 and 0 < layer["error"] < 1 for layer in layers.values())
    assert manifest["metrics"]["artifact"]["bits_per_weight"] < 2.6  # 2 bits and a scale for rows of 32


def test_training_brings_the_student_closer(model, text, tmp_path):
    few = quantize(model, make_recipe(text, "distill.tokens=0"), tmp_path / "none")
    many = quantize(model, make_recipe(text, "distill.tokens=2048", "distill.lr=1e-2"), tmp_path / "some")
    assert many.metrics["artifact"]["kld"] < 0.9 * few.metrics["artifact"]["kld"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.lr=0.5", r"out.*distill\.lr was .* and is now 0\.5.*another --out"),
        ("seed=7", r"seed was 0 and is now 7"),
        ("int4=null", r"int4"),
    ],
)
def test_another_recipe_never_overwrites(model, text, finished, override, message):
    before = (finished / "model.safetensors").read_bytes()
    with pytest.raises(UPQError, match=message):
        quantize(model, make_recipe(text, override), finished)
    assert (finished / "model.safetensors").read_bytes() == before


def test_a_key_that_came_later_is_at_its_default(model, text, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    manifest = json.loads((out / "upq.json").read_text())
    del manifest["recipe"]["stages"]["int2"]["precision"]
    (out / "upq.json").write_text(json.dumps(manifest))
    quantize(model, make_recipe(text), out)  # finished already
    with pytest.raises(UPQError, match=r"int2\.precision was 'auto' and is now 'fp32'"):
        quantize(model, make_recipe(text, "int2.precision=fp32"), out)
    manifest["recipe"]["stages"]["int2"]["colour"] = "red"  # and one that has gone since
    (out / "upq.json").write_text(json.dumps(manifest))
    with pytest.raises(UPQError, match=r"int2\.colour was 'red' and is now None"):
        quantize(model, make_recipe(text), out)


def test_another_model_never_overwrites(model, text, finished, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UPQError, match="belongs to another model"):
        quantize(other, make_recipe(text), finished)


def test_a_directory_of_something_else_is_left_alone(model, text, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UPQError, match="not empty, and no UPQ run is in it"):
        quantize(model, make_recipe(text), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.seq_len=4096"], r"data\.seq_len=4096 is more than the model's 128"),
        (["int2.group_size=24"], r"in_features 32 is not a multiple of group_size 24; try group_size=8"),
        (["distill.backward=nvfp4"], r"backward=nvfp4 rounds whole blocks of 16, and mlp.gate_proj has 44 outputs"),
        (["int4.group_size=32"], r"in_features 44 is not a multiple of group_size 32"),
        (["distill.tokens=16"], r"distill\.tokens=16 is less than one step of 128 tokens"),
        (["distill.loss.name=hinge"], r"unknown loss 'hinge': choose one of cakld, ce"),
        (["distill.teacher=cached"], r"teacher=cached keeps no hidden states.*set distill\.hidden=0"),
        (["int4.method.iteration=3"], r"method block_ap|method flexround.*unknown key 'iteration'"),
    ],
)
def test_bad_requests_are_one_line(model, text, tmp_path, overrides, message):
    with pytest.raises(UPQError, match=message) as caught:
        quantize(model, make_recipe(text, *overrides), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / ".work" / "int4").exists()  # before any work


def test_changed_data_is_refused_on_resume(model, text, tmp_path):
    source = tmp_path / "text.txt"
    source.write_text(text.read_text())
    recipe, out = make_recipe(source), tmp_path / "out"
    killed = run_child(model, out, recipe, "block-0000.safetensors", 1)
    assert killed.returncode == -signal.SIGKILL
    source.write_text(text.read_text().replace("fox", "dog"))
    with pytest.raises(UPQError, match="the data has changed since this run began"):
        quantize(model, recipe, out)


@pytest.mark.parametrize(
    ("weights", "train_weights"),
    [("replicated", True), ("sharded", True), pytest.param("replicated", False, marks=pytest.mark.nightly)],
)
def test_two_processes_share_the_work(model, text, finished, tmp_path, weights, train_weights):
    """Two processes make the artefact of one, up to the rounding of the summed gradients."""
    learns = f"distill.train_weights={train_weights}"
    out, recipe = tmp_path / "out", make_recipe(text, f"memory.weights={weights}", learns)
    if not train_weights:
        finished = tmp_path / "alone"
        quantize(model, make_recipe(text, learns), finished)
    together(2, shared, model, recipe, out)
    two, one = (json.loads((folder / "upq.json").read_text()) for folder in (out, finished))
    figures = [made["metrics"]["int4"] for made in (two, one)]
    assert [each.pop("dtype") for each in figures] == ["float32", "float32"]
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)
    kld = one["metrics"]["artifact"]["kld"]
    assert two["metrics"]["artifact"]["kld"] == pytest.approx(kld, rel=0.02)
    assert not (out / ".work").exists()


def test_a_run_that_failed_on_its_data_can_be_mended(model, text, tmp_path):
    """Nothing was solved yet, so the same directory takes the corrected command."""
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe\x00 no text")
    with pytest.raises(UPQError, match=r"bad\.txt"):
        quantize(model, make_recipe(bad), tmp_path / "out")
    assert quantize(model, make_recipe(text, "distill.tokens=0"), tmp_path / "out").layers


@pytest.mark.parametrize("bits", [8, 4])
def test_embeddings_can_be_packed_too(model, text, tmp_path, bits):
    manifest = quantize(model, make_recipe(text, f"embeddings.bits={bits}", "distill.tokens=0"), tmp_path / "out")
    names = {layer.name: layer.bits for layer in manifest.layers}
    assert names["model.embed_tokens"] == bits
    assert names["lm_head"] == bits


def test_a_packed_model_is_no_source(finished, text, tmp_path):
    with pytest.raises(UPQError, match="already quantised"):
        quantize(Path(finished), make_recipe(text), tmp_path / "out")


def test_exports_follow_the_artefact(model, text, tmp_path):
    out = tmp_path / "out"
    quantize(model, make_recipe(text, "export=[dense]", "distill.tokens=0"), out)
    report = json.loads((out / "exports" / "dense" / "export.json").read_text())
    assert report["exact"]
    assert report["format"] == "dense"
    tokens = torch.arange(20)[None]
    dense = AutoModelForCausalLM.from_pretrained(out / "exports" / "dense")
    with computing("reference"):
        assert torch.equal(dense(tokens).logits, upq.load(out)(tokens).logits)


FITS = ("int4=null", "int2.method=rtn", "distill.gradient_checkpointing=true")


class Notes(Silent):
    def __init__(self):
        self.text, self.units = [], {}

    def note(self, text):
        self.text.append(text)

    def plan(self, stages):
        self.planned = {name: units for name, (units, _) in stages.items()}

    def start(self, stage, *, done=0):
        self.stage = stage
        self.units[stage] = done

    def advance(self, units=1, **figures):
        self.units[self.stage] += units


def test_a_cached_teacher_killed_and_resumed_is_never_killed(model, text, tmp_path, monkeypatch):
    """Stopped in the pass of the teacher and in the training: the same bytes, and no target is computed twice."""
    monkeypatch.setattr(upq.distill.teacher, "ROWS_A_SHARD", 12)  # 32 rows: three shards
    recipe = make_recipe(text, *FITS, "distill.teacher=cached", "distill.teacher_top_k=8", "distill.hidden=0")
    seen = Notes()
    quantize(model, recipe, tmp_path / "whole", progress=seen)
    assert seen.units["distill.teacher"] == seen.planned["distill.teacher"] == 32
    # 8 tokens of 2 + 2 bytes and the rest in 4, at 31 positions of 32 rows
    assert seen.text[1:] == ["teacher: the 8 likeliest of 300 tokens at each position of 32 rows, 0.04 MB on disk"]

    def stops(module, count):
        original, left = module.save_tensors, [count]

        def save(*args):
            original(*args)
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        return original, save

    out = tmp_path / "out"
    for module, count in ((upq.distill.teacher, 2), (upq.distill.trainer, 1)):
        original, save = stops(module, count)
        monkeypatch.setattr(module, "save_tensors", save)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, recipe, out)
        monkeypatch.setattr(module, "save_tensors", original)
    shards = {path: path.stat().st_mtime_ns for path in sorted((out / ".work" / "distill" / "teacher").iterdir())}
    assert [path.name for path in shards] == [f"targets-0000{i}.safetensors" for i in range(3)]
    resumed = Notes()
    quantize(model, recipe, out, keep_work=True, progress=resumed)
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert resumed.units["distill.teacher"] == 32
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("train_weights", ["true", "false"])
def test_an_offloaded_teacher_gives_the_same_bytes(model, text, tmp_path, train_weights):
    for teacher in ("resident", "offloaded"):
        settings = (*FITS, f"distill.teacher={teacher}", f"distill.train_weights={train_weights}")
        quantize(model, make_recipe(text, *settings), tmp_path / teacher)
    files = [(tmp_path / teacher / "model.safetensors").read_bytes() for teacher in ("resident", "offloaded")]
    assert files[0] == files[1]


def test_without_weights_to_train_codes_are_the_block_wise_stages(model, text, tmp_path):
    """And scales are not: they have learned. Killed in its training and run again, it ends in the same bytes."""
    recipe, files = make_recipe(text, *FITS, "distill.train_weights=false", "distill.scale_lr=1e-2"), {}
    quantize(model, recipe, tmp_path / "whole", keep_work=True)
    killed = run_child(model, tmp_path / "killed", recipe, "checkpoint.safetensors", 2)
    assert killed.returncode == -signal.SIGKILL
    quantize(model, recipe, tmp_path / "killed")
    start = BlockStore(tmp_path / "whole" / ".work" / "int2", recipe.stages["int2"].scheme(), latents=False)
    for name in ("whole", "killed"):
        loaded = upq.load(tmp_path / name)
        files[name] = (tmp_path / name / "model.safetensors").read_bytes()
        for index in range(BLOCKS):
            for linear, q in start.qtensors(index).items():
                found = loaded.get_submodule(f"model.layers.{index}.{linear}").qtensor()
                assert torch.equal(found.codes_OI, q.codes_OI)
                assert not torch.equal(found.scale_OG, q.scale_OG)
    assert files["whole"] == files["killed"]


@pytest.mark.parametrize("teacher", ["resident", "offloaded", "cached"])
def test_only_a_resident_teacher_is_in_memory_during_the_training(model, text, tmp_path, monkeypatch, teacher):
    weights, alive = [], []

    def load(*args, original=upq.stages._training.load_model, **options):
        loaded = original(*args, **options)
        weights.append(weakref.ref(loaded.model.layers[0].mlp.up_proj.weight))
        return loaded

    def training(*args, **options):
        alive.append(any(weight() is not None for weight in weights))
        raise KeyboardInterrupt

    monkeypatch.setattr(upq.stages._training, "load_model", load)
    monkeypatch.setattr(upq.stages._training, "distill", training)
    recipe = make_recipe(text, *FITS, f"distill.teacher={teacher}", "distill.hidden=0")
    with pytest.raises(KeyboardInterrupt):
        quantize(model, recipe, tmp_path / "out")
    assert alive == [teacher == "resident"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("teacher", ["resident", "offloaded"])
def test_the_whole_way_on_a_gpu(model, text, tmp_path, teacher):
    """Its artefact is packed, and closer to the original than without training. The tests above are this on a CPU."""
    few, many = (
        quantize(
            model, make_recipe(text, f"distill.tokens={tokens}", f"distill.teacher={teacher}"),
            tmp_path / str(tokens), device="cuda",
        )
        for tokens in (0, 8192)
    )  # fmt: skip
    assert many.metrics["artifact"]["kld"] < few.metrics["artifact"]["kld"]
    assert many.metrics["artifact"]["bits_per_weight"] < 2.6


def test_the_check_never_loads_the_original(model, text, tmp_path, monkeypatch):
    """Neither to write the artefact nor to compare with it."""
    loaded = []

    def load(path, *args, original=upq.model.loading.load_model, **options):
        loaded.append(Path(path))
        return original(path, *args, **options)

    def pack(self, *args, original=Frame.pack):
        monkeypatch.setattr(upq.artifact.transformers, "load_model", load)
        monkeypatch.setattr(upq.stages._training, "load_model", load)
        original(self, *args)

    monkeypatch.setattr(Frame, "pack", pack)
    manifest = quantize(model, make_recipe(text), tmp_path / "out")
    assert loaded == [tmp_path / "out" / ".work" / "artifact"]
    assert manifest.metrics.keys() == {"source", "int4", "artifact"}


def test_nothing_of_the_training_is_left_when_its_result_is_checked(model, text, tmp_path, monkeypatch):
    """A block that is checkpointed refers to itself; the student would wait for the garbage collector."""
    latents = []

    def made(*args, original=upq.stages._training.make_student, **options):
        student = original(*args, **options)
        latents.append(weakref.ref(student.model.layers[0].mlp.up_proj.weight))
        return student

    def check(self, *args, original=Frame.check):
        assert latents[0]() is None
        return original(self, *args)

    monkeypatch.setattr(upq.stages._training, "make_student", made)
    monkeypatch.setattr(Frame, "check", check)
    gc.disable()
    try:
        quantize(model, make_recipe(text, *FITS), tmp_path / "out")
    finally:
        gc.enable()


def test_a_failing_export_costs_neither_the_artefact_nor_the_other_exports(model, text, tmp_path, monkeypatch):
    from upq.exports import EXPORTS

    recipe, out = make_recipe(text, "export=[{name: dense, dtype: fp16}, gguf]", "distill.tokens=0"), tmp_path / "out"
    pytest.importorskip("gguf")
    with pytest.raises(UPQError, match=r"out is finished, but not its export dense \(.*cannot hold .*; mend it"):
        quantize(model, recipe, out)
    assert upq.load(out)
    assert not (out / "exports" / "dense").exists()
    made = (out / "exports" / "gguf.gguf").stat().st_mtime_ns
    with monkeypatch.context() as patched:  # the same command tries what is missing, and only that
        patched.setattr(EXPORTS.get("gguf"), "write", None)
        with pytest.raises(UPQError, match="not its export dense"):
            quantize(model, recipe, out)
    quantize(model, make_recipe(text, "export=[dense, gguf]", "distill.tokens=0"), out)
    assert (out / "exports" / "dense" / "export.json").is_file()
    assert (out / "exports" / "gguf.gguf").stat().st_mtime_ns == made


def test_an_export_with_other_options_is_not_taken_for_the_one_asked_for(model, text, tmp_path):
    out = tmp_path / "out"
    quantize(model, make_recipe(text, "export=[dense]", "distill.tokens=0"), out)
    with pytest.raises(UPQError, match=r"dense: is there with other options; delete it first"):
        quantize(model, make_recipe(text, "export=[{name: dense, dtype: fp32}]", "distill.tokens=0"), out)
    (out / "upq.json").write_text((out / "upq.json").read_text() + " ")
    with pytest.raises(UPQError, match=r"dense: was made of another artefact; delete it first"):
        quantize(model, make_recipe(text, "export=[dense]", "distill.tokens=0"), out)


def test_a_wrong_export_shows_before_any_work(model, text, tmp_path):
    wrong = {"export=[zip]": "unknown export format 'zip'", "export=[{name: dense, x: 1}]": "unknown key 'x'"}
    for override, message in wrong.items():
        with pytest.raises(UPQError, match=message):
            quantize(model, make_recipe(text, override), tmp_path / "out")
        assert not (tmp_path / "out").exists()
