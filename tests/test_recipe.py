"""Recipes are strict: a typo is an error that says where it is and what could stand there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import yaml

from upq.blockwise import METHODS
from upq.core.config import Plugin, Strict, decode, digest
from upq.core.errors import UPQError
from upq.grids import GRIDS
from upq.losses import LOSSES
from upq.run.recipe import Recipe, names


def load(*overrides: str, recipe: str = "default") -> Recipe:
    return Recipe.load(recipe, list(overrides))


@pytest.mark.parametrize("name", names())
def test_every_packaged_recipe_loads(name: str) -> None:
    recipe = load(recipe=name)
    assert recipe.name == name
    for stage in (stage for stage in recipe.stages.values() if stage.kind == "blockwise"):
        assert stage.scheme().grid in GRIDS.names()
        stage.method.options(METHODS.get(stage.method.name).Config, name)
    loss = recipe.stages["distill"].loss
    loss.options(LOSSES.get(loss.name).Config, name)
    solved = [stage.scheme() for stage in recipe.stages.values() if stage.solves]
    assert solved[-1].bits == (4 if name == "roste" else 2)


def test_the_recipes_of_the_readme_are_there() -> None:
    assert {"default", "paper"} <= set(names())


@pytest.mark.parametrize("name", names())
def test_dump_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = load("distill.lr=2e-4", "embeddings.bits=8", recipe=name)
    file = tmp_path / "run.yaml"
    file.write_text(recipe.dump())
    assert Recipe.load(str(file)) == recipe
    assert digest(Recipe.load(str(file))) == digest(recipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("int3.bits=3", r"default: --set int3\.bits: no stage and no key 'int3'; stages here: generate, int2, distill"),
        (
            "int4={bits: 4, method: rtn}",
            r"no stage and no key 'int4'; .*a new stage goes into a recipe",
        ),
        ("generate.weigth=2", r"unknown key 'generate\.weigth'; keys here: tokens, weight"),
        ("data.generated.weigth=2", r"unknown key 'generate\.weigth'; keys here: tokens, weight"),
        (
            "int2.group=32",
            r"unknown key 'int2\.group'; keys here: bits, grid, group_size, scale_dtype, method, samples",
        ),
        (
            "int2={stage: blockwise, bits: 4, bit: 3, method: rtn}",
            r"unknown key 'int2\.bit'; keys here: bits, grid",
        ),
        (
            "int2={bits: 4, method: rtn}",
            r"int2: unknown kind of stage 'int2'; give stage: one of blockwise",
        ),
        ("distill.learning_rate=1", r"unknown key 'distill\.learning_rate'; keys here: loss, .*lr, scale_lr"),
        ("data.sources=[{path: a, weigth: 2}]", r"unknown key 'data\.sources\.0\.weigth'; keys here: path, weight"),
        ("distill.tokens=many", r"distill\.tokens: input should be a valid integer.* \(got 'many'\)"),
        ("distill.tokens=1.5", r"distill\.tokens: .*integer.*1\.5"),
        ("distill.tokens=-1", r"distill\.tokens: .*greater than or equal to 0.*-1"),
        ("distill.lr=0", r"distill\.lr: .*greater than 0"),
        ("distill.lr=fast", r"distill\.lr: .*valid number.*fast"),
        ("distill.train_norms=perhaps", r"distill\.train_norms: .*boolean.*perhaps"),
        ("embeddings.bits=3", r"embeddings\.bits: input should be 4 or 8 \(got 3\)"),
        ("data.loss_on=nobody", r"data\.loss_on: .*'all' or 'assistant'.*nobody"),
        ("data.sources=text.txt", r"data\.sources: .*tuple.*text\.txt"),
        ("int2=null", "distill trains what a block-wise stage has solved; put one before it"),
        ("int2.method=null", r"int2\.method: .*got None"),
        ("data=3", "data: .*got 3"),
        ("int2.grid=mxfp4", "int2.bits=2: grid mxfp4 has 4"),
        (
            "int2={stage: blockwise, bits: 4, grid: nvfp4, method: rtn}",
            "int2.group_size=-1: grid nvfp4 has groups of 16",
        ),
        ("int2.scale_dtype=e4m3", "int2.scale_dtype=e4m3: grid seq stores scales in float16 or bfloat16 or float32"),
    ],
)
def test_what_does_not_fit_names_its_place(override: str, message: str) -> None:
    with pytest.raises(UPQError, match=message) as caught:
        load(override)
    assert "\n" not in str(caught.value)


def test_a_training_that_has_nothing_to_learn_is_an_error() -> None:
    mx = "int2={stage: blockwise, bits: 4, grid: mxfp4, group_size: 32, method: rtn}"
    with pytest.raises(
        UPQError, match=r"distill: the scales of grid mxfp4 do not learn; set distill\.train_weights=true"
    ):
        load(mx, "distill.train_weights=false", "distill.train_norms=false")
    load(mx)


@pytest.mark.parametrize("item", ["distill.lr", "=3", "", "distill.lr:1"])
def test_an_override_needs_key_and_value(item: str) -> None:
    with pytest.raises(UPQError, match=r"expected key=value, for example distill\.lr=1e-4"):
        load(item)


def test_an_override_that_is_no_yaml() -> None:
    with pytest.raises(UPQError, match=r"--set 'data\.sources=\[a': the value is not valid YAML"):
        load("data.sources=[a")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4", ".0001", "100e-6"])
def test_numbers_in_any_spelling_are_the_same_recipe(text: str) -> None:
    """YAML 1.1 reads `1e-4` as text: a run resumed with `0.0001` must still be the same run."""
    plain = load("distill.lr=0.0001", "int2.method.lr=0.0001")
    recipe = load(f"distill.lr={text}", f"int2.method.lr={text}")
    assert recipe.stages["distill"].lr == 1e-4
    assert recipe == plain
    assert digest(recipe) == digest(plain)
    assert recipe.stages["int2"].method.options(METHODS.get("block_ap").Config, "").lr == 1e-4


def test_overrides_reach_every_form_of_value() -> None:
    recipe = load(
        "seed=7",
        "int2={stage: blockwise, bits: 4, method: rtn}",
        "data.sources=[{path: a.txt, weight: 2}, {path: b}]",
        "data.seq_len=1_024",
        "int2.group_size=-1",
        "distill.train_norms=true",
        "embeddings.bits=8",
    )
    assert recipe.seed == 7
    assert recipe.stages["int2"].method == Plugin(name="rtn")
    assert [(s.path, s.weight) for s in recipe.data.sources] == [("a.txt", 2.0), ("b", 1.0)]
    assert recipe.data.seq_len == 1024
    assert recipe.stages["int2"].group_size == -1
    assert recipe.stages["distill"].train_norms is True
    assert recipe.embeddings.bits == 8
    assert load("embeddings.bits=8", "embeddings.bits=null").embeddings.bits is None


def test_null_drops_a_stage() -> None:
    assert list(load("int4=null", recipe="paper").stages) == ["int2", "distill"]
    assert list(load("int4=null", "data.generated=null").stages) == ["int2", "distill"]  # one that is not there
    assert list(load("distill=null").stages) == ["generate", "int2"]


FORMER = """
name: mine
seed: 3
data: {seq_len: 64, generated: {weight: 2}}
distill: {loss: gjs, tokens: 1000, lr: 1e-3, scale_lr: 1e-3}
int2: {bits: 2, method: rtn}
int4: {bits: 4, method: {name: flexround, iterations: 3}}
"""
PRESENT = """
name: mine
seed: 3
data: {seq_len: 64}
stages:
  generate: {weight: 2}
  int4: {stage: blockwise, bits: 4, method: {name: flexround, iterations: 3}}
  int2: {stage: blockwise, bits: 2, method: rtn}
  distill: {loss: gjs, tokens: 1000, lr: 1e-3, scale_lr: 1e-3}
"""


def test_the_former_form_is_the_same_recipe(tmp_path: Path) -> None:
    (tmp_path / "former.yaml").write_text(FORMER)
    (tmp_path / "present.yaml").write_text(PRESENT)
    former, present = (Recipe.load(str(tmp_path / f"{form}.yaml")) for form in ("former", "present"))
    assert former.dump() == present.dump()
    assert list(former.stages) == ["generate", "int4", "int2", "distill"]


def test_stages_run_in_the_order_of_the_file() -> None:
    """Names are free, and one kind may come twice."""
    stages = {
        "first": {"stage": "blockwise", "bits": 4, "method": "rtn"},
        "second": {"stage": "blockwise", "bits": 2, "method": "rtn"},
    }
    assert list(Recipe.of({"stages": stages}, "here").stages) == ["first", "second"]
    assert list(Recipe.of({"stages": dict(reversed(stages.items()))}, "here").stages) == ["second", "first"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"stages": {"seed": {"stage": "blockwise"}}}, "'seed' cannot be the name of a stage"),
        ({"stages": {"artifact": {"stage": "blockwise"}}}, "'artifact' cannot be the name of a stage"),
        ({"stages": {"a-b": {"stage": "blockwise"}}}, "'a-b' cannot be the name of a stage"),
        ({"stages": {"one": {"stage": "magic"}}}, "one: unknown kind of stage 'magic'; give stage: one of blockwise"),
        ({"stages": {"distill": 3}}, r"distill: expected a mapping of settings \(got 3\)"),
        ({"stages": []}, "stages: expected a mapping of names to settings, got list"),
        ({"stages": {}}, "no stage quantises"),
        ({"stages": {"generate": {}}}, "no stage quantises"),
        ({"stages": {}, "int2": {"bits": 2, "method": "rtn"}}, "int2 stands beside stages; move it into stages"),
        ({"name": "mine"}, "stages: field required"),
    ],
)
def test_wrong_stages_are_one_line(raw: dict[str, object], message: str) -> None:
    with pytest.raises(UPQError, match=f"here: .*{message}") as caught:
        Recipe.of(raw, "here")
    assert "\n" not in str(caught.value)


def test_a_plugin_by_name_drops_the_options_of_the_one_before() -> None:
    assert load("int2.method=rtn").stages["int2"].method == Plugin(name="rtn")
    both = load("int2.method=rtn", "int2.method.scale=mse")
    assert both.stages["int2"].method.options(METHODS.get("rtn").Config, "").scale == "mse"
    assert load("distill.loss=gjs", "distill.loss.beta=0.25").stages["distill"].loss.model_extra == {"beta": 0.25}
    assert load("distill.loss={name: gjs, beta: 0.25}") == load("distill.loss=gjs", "distill.loss.beta=0.25")


@pytest.mark.parametrize("registry", [METHODS, LOSSES], ids=["methods", "losses"])
def test_plugin_options_are_strict(registry: object) -> None:
    for name in registry.names():
        config = registry.get(name).Config
        with pytest.raises(
            UPQError, match=rf"stage {name}: unknown key 'scael'; keys here: {'.*'.join(config.model_fields)}"
        ):
            Plugin(name=name, scael="mse").options(config, f"stage {name}")


def test_wrong_plugin_options_name_their_place() -> None:
    gptq = METHODS.get("gptq").Config
    with pytest.raises(UPQError, match=r"method gptq: damp: .*greater than 0 \(got 0\)"):
        Plugin(name="gptq", damp=0).options(gptq, "method gptq")
    with pytest.raises(UPQError, match=r"method gptq: scale: .*'max', 'mse' or 'hessian' \(got 'best'\)"):
        Plugin(name="gptq", scale="best").options(gptq, "method gptq")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", r"not valid YAML"),
        ("- a\n- b", "expected a mapping of sections, got list"),
        ("", "expected a mapping of sections, got NoneType"),
        ("int2: {bits: 2}", "int2.method: field required"),
    ],
)
def test_a_wrong_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UPQError, match=rf"recipe .*mine\.yaml: .*{message}") as caught:
        Recipe.load(str(file))
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(UPQError, match=r"recipe 'papers' is neither a file nor one of: .*default.*paper"):
        Recipe.load("papers")


class TestDigest:
    def test_is_a_promise_to_runs_already_on_disk(self) -> None:
        expected = hashlib.sha256(b'[{"a": 1, "b": [true, null]}, "x"]').hexdigest()[:16]
        assert digest({"b": [True, None], "a": 1}, "x") == expected

    def test_does_not_depend_on_the_order_of_keys(self, tmp_path: Path) -> None:
        raw = yaml.safe_load(load().dump())
        file = tmp_path / "reversed.yaml"
        file.write_text(yaml.safe_dump(dict(reversed(raw.items())), sort_keys=False))
        assert digest(Recipe.load(str(file))) == digest(load())

    @pytest.mark.parametrize("change", ["seed=1", "int2.group_size=32", "int2.method.lr=1e-4", "distill.tokens=0"])
    def test_sees_every_change(self, change: str) -> None:
        assert digest(load(change)) != digest(load())


def test_values_do_not_change() -> None:
    class Config(Strict):
        beta: float = 0.5

    config = decode(Config, {"beta": 1}, "here")
    with pytest.raises(ValueError, match="frozen"):
        config.beta = 2.0
