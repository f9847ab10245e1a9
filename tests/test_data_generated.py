"""Conversations that a model writes itself: whole ones only, the same after an interruption, and part of a run."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tiny import byte_tokenizer
from together import together
from upq.artifact.manifest import read_manifest
from upq.core.errors import UPQError
from upq.core.processes import ALONE, Processes
from upq.core.progress import Silent
from upq.data import generated
from upq.data.config import Generated, TextSource
from upq.data.generated import Words, sample, write_conversations
from upq.decoding import batch
from upq.model.loading import check_finite, generation_config, load_model
from upq.model.sharding import load_original, make_mesh
from upq.model.source import Source
from upq.run.recipe import Recipe
from upq.run.run import quantize
from upq.text.generation import Sampling

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
TOKENIZER = byte_tokenizer(bos="<s>", eos="</s>", chat_template=TEMPLATE)
SECTION = Generated(tokens=600, max_new_tokens=40, batch_size=4)


def tiny(end: float) -> PreTrainedModel:
    """A random model in which the end token has `end` times the usual weight in every place."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        initializer_range=1e-3,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # constant input to the head: the same distribution everywhere
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[TOKENIZER.eos_token_id] = torch.tensor(end).log() / 32
        model.lm_head.weight[TOKENIZER.bos_token_id] = -10.0
    return model


def various() -> PreTrainedModel:
    """What it writes depends on all that came before, and ends after some ten tokens."""
    model, end = tiny(1), TOKENIZER.eos_token_id
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        model.model.embed_tokens.weight[:, 0] = 2.0  # so that the head can favour the end token
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[end, 0] = 2.0
    return model


def total_of(work: Path) -> int:
    (file,) = (work / "generate").glob("conversations-*.jsonl")
    talks = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    return sum(len(TOKENIZER.apply_chat_template(talk, return_dict=True)["input_ids"]) for talk in talks)


def read(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def test_given_questions_are_answered_and_no_others(tmp_path: Path) -> None:
    """Each once before any comes again, by the compiled decoder and by transformers."""
    asked = [[{"role": "system", "content": "Be."}, {"role": "user", "content": f"{n}?"}] for n in range(3)]
    model = various()
    found = read(side_by_side(tmp_path / "a", model, size=3, questions=asked))
    talks = [json.loads(line)["messages"] for text in found.values() for line in text.splitlines()]
    assert {talk[-1]["role"] for talk in talks} == {"assistant"}
    assert all(talk[:-1] in asked for talk in talks)
    assert len({talk[-2]["content"] for talk in talks}) == 3
    alone = write_conversations(tmp_path / "b", model, TOKENIZER, SECTION, seed=1, progress=Silent(), questions=asked)
    assert read(alone) == found


def test_a_batch_that_is_there_stays_and_the_rest_is_the_same(tmp_path: Path) -> None:
    model = tiny(20)
    first = read(write_conversations(tmp_path / "a", model, TOKENIZER, SECTION, seed=1, progress=Silent()))
    assert len(first) > 1
    (tmp_path / "b").mkdir()
    name = min(first)
    (tmp_path / "b" / name).write_text(first[name])
    torch.manual_seed(99)  # torch's random state has no say
    again = read(write_conversations(tmp_path / "b", model, TOKENIZER, SECTION, seed=1, progress=Silent()))
    assert again == first
    assert read(write_conversations(tmp_path / "c", model, TOKENIZER, SECTION, seed=2, progress=Silent())) != first


def side_by_side(folder: Path, model: PreTrainedModel, tokenizer: Any = TOKENIZER, *, size: int, **options: Any) -> Any:
    """By the compiled decoder."""
    texts = batch(model, size=size)
    return write_conversations(folder, model, tokenizer, SECTION, seed=1, progress=Silent(), texts=texts, **options)


def test_side_by_side_they_are_those_of_batches(tmp_path: Path) -> None:
    """Whatever is written beside them, and from whatever batch on; up to the rounding of float32 in what draws them."""
    model = various()
    alone = read(write_conversations(tmp_path / "a", model, TOKENIZER, SECTION, seed=1, progress=Silent()))
    assert len(alone) > 2
    for size in (1, 3, 16):
        assert read(side_by_side(tmp_path / f"{size}", model, size=size)) == alone
    (tmp_path / "resumed").mkdir()
    for name in sorted(alone)[1::2]:
        (tmp_path / "resumed" / name).write_text(alone[name])
    assert read(side_by_side(tmp_path / "resumed", model, size=3)) == alone


def test_answers_that_were_cut_off_are_kept_where_a_run_asks_for_it(tmp_path: Path) -> None:
    """Beside those that ended, which are the same; by the compiled decoder and by transformers."""
    model, keep = various(), SECTION.model_copy(update={"max_new_tokens": 12, "cut": "keep"})
    texts = batch(model, size=3)
    kept = read(write_conversations(tmp_path / "a", model, TOKENIZER, keep, seed=1, progress=Silent(), texts=texts))
    alone = read(write_conversations(tmp_path / "b", model, TOKENIZER, keep, seed=1, progress=Silent()))
    assert alone == kept
    drop = keep.model_copy(update={"cut": "drop"})
    whole = read(write_conversations(tmp_path / "c", model, TOKENIZER, drop, seed=1, progress=Silent()))
    lines = {name: [json.loads(line)["messages"] for line in text.splitlines()] for name, text in kept.items()}
    assert any(talk[-1].get("cut") for talks in lines.values() for talk in talks)
    for name, talks in lines.items():
        ended = [talk for talk in talks if "cut" not in talk[-1]]
        expected = [json.loads(line)["messages"] for line in whole.get(name, "").splitlines()]
        assert ended == expected, name


def test_side_by_side_an_error_is_that_of_its_batch(tmp_path: Path) -> None:
    """Not of a later one that has begun, and with the files of those before."""
    found = []
    for size in (1, 16):
        with pytest.raises(UPQError, match="no V"):
            side_by_side(tmp_path / f"{size}", various(), REFUSING, size=size)
        found.append(read(tmp_path / f"{size}"))
    assert found[0] == found[1]
    with pytest.raises(UPQError, match="ends none of its answers"):
        side_by_side(tmp_path / "none", tiny(1e-9), size=4)


class Counting(Silent):
    """Ends the writing after `batches` of them."""

    def __init__(self, batches: int = -1) -> None:
        self.units, self.batches = 0, batches

    def advance(self, units: int = 1, **figures: float) -> None:
        self.units += units
        self.batches -= 1
        if not self.batches:
            raise KeyboardInterrupt


def test_conversations_are_whole_and_as_many_as_asked_for(tmp_path: Path) -> None:
    progress = Counting()
    folder = write_conversations(tmp_path / "a", tiny(20), TOKENIZER, SECTION, seed=1, progress=progress)
    talks = [json.loads(line)["messages"] for text in read(folder).values() for line in text.splitlines()]
    assert [[m["role"] for m in talk] for talk in talks] == [["user", "assistant"]] * len(talks)
    assert all(m["content"] and "</s>" not in m["content"] and len(m["content"]) <= 40 for talk in talks for m in talk)
    assert sum(len(TOKENIZER.apply_chat_template(talk, return_dict=True)["input_ids"]) for talk in talks) >= 600
    assert progress.units == 600


def test_samples_follow_the_models_own_distribution() -> None:
    """With the end token at weight 20 among 257 others of weight 1, an answer is empty with probability 20/277."""
    drawn = [Sampling(1.0, seed) for seed in range(4000)]
    answers = sample(tiny(20), TOKENIZER, [[5, 6]] * 4000, drawn, 1)
    assert {answer.text for answer in answers if answer.ended} == {""}
    assert sum(answer.ended for answer in answers) / 4000 == pytest.approx(20 / 277, rel=0.2)
    found = sample(tiny(20), TOKENIZER, [[5, 6, 7], [5]] * 1000, drawn[:2000], 200)
    lengths = [len(answer.text) for answer in found if answer.ended and answer.text]
    assert sum(lengths) / len(lengths) == pytest.approx(276 / 20, rel=0.15)  # geometric, without the empty ones


def test_at_temperature_0_it_is_the_likeliest_token_each_time() -> None:
    model = tiny(1)
    torch.manual_seed(1)
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        torch.nn.init.normal_(weight)
    ids = [5, 6]
    with torch.no_grad():
        while len(ids) < 12:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    model.generation_config.eos_token_id = next(token for token in ids[6:] if token not in ids[2:6])
    end = ids.index(model.generation_config.eos_token_id, 2)
    assert (
        sample(model, TOKENIZER, [[5, 6]] * 2, [Sampling()] * 2, 40)
        == [Words(TOKENIZER.decode(ids[2:end]).strip(), ended=True)] * 2
    )


@pytest.mark.parametrize(
    ("end", "tokenizer", "words"),
    [(1e-9, TOKENIZER, "ends none of its answers"), (20, byte_tokenizer(eos="</s>"), "no chat template")],
)
def test_a_model_that_cannot_is_one_line(tmp_path: Path, end: float, tokenizer: object, words: str) -> None:
    with pytest.raises(UPQError, match=words) as raised:
        write_conversations(tmp_path / "a", tiny(end), tokenizer, SECTION, seed=1, progress=Silent())  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("tokens", "least"), [("800", 800), ("null", 0)])
def test_a_run_learns_from_what_its_model_wrote(tmp_path: Path, tokens: str, least: int) -> None:
    torch.manual_seed(0)
    tiny(20).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Story {i}: the {i}th fox saw {i * 7} geese." for i in range(300)))
    recipe = Recipe.load(
        "default",
        [
            *("data.seq_len=32", "data.validation=4", "int2={stage: blockwise, bits: 2, samples: 20, method: rtn}"),
            *("distill.tokens=0", f"generate={{tokens: {tokens}, max_new_tokens: 40, batch_size: 8, weight: 3}}"),
        ],
    )
    recipe = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(
                update={"sources": (TextSource(path=str(tmp_path / "text.txt"), separator="blank_line"),)}
            )
        }
    )
    quantize(tmp_path / "model", recipe, tmp_path / "out", keep_work=True)
    text, written = read_manifest(tmp_path / "out").data[:2]
    assert written["tokens"] > text["tokens"]
    # 20 rows to calibrate with and 4 held out, of 32 tokens each, three quarters written; and the batch that ends it.
    wanted = max(least, 24 * 32 * 3 // 4)
    assert wanted <= total_of(tmp_path / "out" / ".work") < wanted + 8 * 90
    (file,) = (tmp_path / "out" / ".work" / "generate").glob("conversations-*.jsonl")
    assert str(file) == written["path"]


def test_a_missing_file_shows_before_anything_is_written(tmp_path: Path) -> None:
    tiny(20).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    recipe = Recipe.load("default", ["generate={tokens: 800}", "data.seq_len=32"])
    recipe = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"sources": (TextSource(path="no.txt"),)})}
    )
    with pytest.raises(UPQError, match="no such file"):
        quantize(tmp_path / "model", recipe, tmp_path / "out")
    assert not (tmp_path / "out" / ".work" / "generate").exists()


# ---- several processes

NONE, FAILS = 0, -1  # of a batch: without a finished conversation; the template refuses one


@dataclass(frozen=True)
class Written:
    """What is to be seen of a call of `write_conversations`."""

    files: dict[str, str]
    units: int
    error: str


def written(
    folder: Path,
    model: Any,
    tokenizer: Any,
    section: Generated,
    processes: Processes = ALONE,
    batches: int = -1,
    **options: bool,
) -> Written:
    """By `processes`, until the end or for so many batches."""
    progress, error = Counting(batches), ""
    try:
        write_conversations(
            folder, model, tokenizer, section, seed=0, progress=progress, processes=processes, **options
        )
    except UPQError as raised:
        error = str(raised)
    except KeyboardInterrupt:
        assert batches > 0
    if processes.world > 1:
        torch.distributed.barrier()  # the next call may not write yet
    return Written(read(folder), progress.units, error)


def script(seed: int) -> tuple[int, list[int]]:
    """Tokens that are asked for, and of each batch."""
    chance = random.Random(seed)
    empty, fails = chance.choice([(0.0, 0.0), (0.3, 0.15), (0.8, 0.0)])
    kinds = [chance.random() for _ in range(100)]
    sizes = [FAILS if k < fails else NONE if k < fails + empty else chance.randint(40, 90) for k in kinds]
    return chance.randint(1, 900), sizes


def scripted(seed: int, folder: Path, processes: Processes = ALONE, batches: int = -1) -> Written:
    """As `written`, by a model that follows the script."""
    tokens, sizes = script(seed)

    def conversations(*given: Any) -> Iterator[list[dict[str, str]]]:
        number = given[-1]
        if sizes[number] == FAILS:
            raise UPQError(f"batch {number} is refused")
        if sizes[number] != NONE:
            yield [{"role": "user", "content": f"{number:02}"}, {"role": "assistant", "content": "x" * sizes[number]}]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated, "_conversations", conversations)
        return written(folder, None, TOKENIZER, Generated(tokens=tokens), processes, batches)


SCRIPTS = range(40)
CANNOT = {"ends none": (1e-9, TOKENIZER), "no template": (20, byte_tokenizer(eos="</s>"))}


def shared(processes: Processes, folder: Path) -> dict[str, Any]:
    """What each of the processes does. What one process is to begin is there; what it is to go on with is left."""
    found: dict[str, Any] = {"scripted": {}, "begun": {}, "resumed": {}}
    for seed in SCRIPTS:
        found["scripted"][seed] = scripted(seed, folder / f"whole-{seed}", processes)
        found["begun"][seed] = scripted(seed, folder / f"begun-{seed}", processes, batches=1 + seed % 7)
        found["resumed"][seed] = scripted(seed, folder / f"resumed-{seed}", processes)
    for name in ("real", "real-resumed"):
        found[name] = written(folder / name, tiny(20), TOKENIZER, SECTION, processes)
    for name, (end, tokenizer) in CANNOT.items():
        found[name] = written(folder / name, tiny(end), tokenizer, SECTION, processes)
    found["apart"] = written(folder / f"apart-{processes.rank}", tiny(20), TOKENIZER, SECTION, processes)
    return found


@dataclass(frozen=True)
class Group:
    folder: Path
    found: list[dict[str, Any]]  # by rank


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=pytest.mark.nightly), 3, pytest.param(5, marks=pytest.mark.nightly)]
)
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Group:
    folder = tmp_path_factory.mktemp("group")
    for seed in SCRIPTS:
        scripted(seed, folder / f"resumed-{seed}", batches=1 + seed % 5)
    written(folder / "real-resumed", tiny(20), TOKENIZER, SECTION, batches=1)
    return Group(folder, together(request.param, shared, folder))


def judged(alone: Written, each: list[Written], sizes: list[int]) -> str:
    """Files, progress and error are those of one process; with an error, there may be files of its round too.

    Where a batch fails in the round in which one process would end, the run ends with its error in all.
    """
    world = len(each)
    last = max((int(name[:6]) for name in alone.files), default=0)
    assert len({found.error for found in each}) == 1
    if "is refused" in each[0].error:
        assert alone.error or FAILS in sizes[: (last // world + 1) * world]
        return "is refused"
    assert all(found.error == alone.error for found in each)
    assert alone.error or all(found == alone for found in each)
    assert all(alone.files.values())  # a file without text would be an error of the data
    return alone.error and "ends none"


def test_any_number_of_processes_writes_as_one_does(group: Group, tmp_path: Path) -> None:
    """The same files and no more; from the start, and after one process that was stopped."""
    kinds = []
    for seed in SCRIPTS:
        alone, sizes = scripted(seed, tmp_path / f"{seed}"), script(seed)[1]
        for what in ("scripted", "resumed"):
            kinds.append(judged(alone, [each[what][seed] for each in group.found], sizes))
    for kind in ("", "is refused", "ends none"):
        assert kinds.count(kind) > 8


def test_one_process_goes_on_after_several(group: Group, tmp_path: Path) -> None:
    """Whenever they are stopped: each file that lies there then and is needed has its final bytes."""
    for seed in SCRIPTS:
        alone, begun = scripted(seed, tmp_path / f"{seed}"), group.found[0]["begun"][seed]
        assert all(begun.files[name] == alone.files[name] for name in begun.files.keys() & alone.files.keys())
        after = scripted(seed, group.folder / f"begun-{seed}")
        assert after.error == alone.error
        assert alone.error or after == alone


def test_the_models_own_words_are_the_same(group: Group, tmp_path: Path) -> None:
    alone = written(tmp_path / "alone", tiny(20), TOKENIZER, SECTION)
    assert len(alone.files) > 1
    assert not alone.error
    for each in group.found:
        assert each["real"] == each["real-resumed"] == alone


@pytest.mark.parametrize("name", CANNOT)
def test_what_a_model_cannot_is_the_same_line_in_all(name: str, group: Group, tmp_path: Path) -> None:
    end, tokenizer = CANNOT[name]
    alone = written(tmp_path / "alone", tiny(end), tokenizer, SECTION)
    assert alone.error
    assert all(each[name] == alone for each in group.found)


def test_directories_of_their_own_are_noticed(group: Group) -> None:
    for each in group.found:
        assert "--out must lie on a file system that all machines share" in each["apart"].error
        assert "\n" not in each["apart"].error


# ---- a model in shards: each process holds a part, so all have to run it as often

REFUSING = byte_tokenizer(
    bos="<s>",
    eos="</s>",
    chat_template="{% if 'V' in messages[0]['content'] %}{{ raise_exception('no V') }}{% endif %}" + TEMPLATE,
)
FEW = Generated(tokens=300, max_new_tokens=24, batch_size=2)
SHARDED = {
    "plain": (TOKENIZER, FEW),
    "likeliest": (TOKENIZER, FEW.model_copy(update={"tokens": 100, "answer_temperature": 0.0})),
    "no prompts": (TOKENIZER, FEW.model_copy(update={"tokens": 150, "batch_size": 1})),  # in some of the processes
    "refused": (REFUSING, FEW),  # in one of them, when the others answer
    "no template": (byte_tokenizer(eos="</s>"), FEW),
    "ends none": (TOKENIZER, FEW.model_copy(update={"max_new_tokens": 1})),
}
# Of the files of a longer run, those that are there already.
THERE = {
    "plain": [slice(0, 0), slice(None, None, 2), slice(1, None)],
    "no prompts": [slice(0, 0), slice(1, None, 2)],
}
CASES = [(name, number) for name in SHARDED for number in range(len(THERE.get(name, [slice(0, 0)])))]


def alone_as_sharded(folder: Path) -> dict[tuple[str, int], Written]:
    """What one process with the whole model leaves. What the others are to begin with is left below `folder`."""
    found, model = {}, load_model(folder / "model")
    for name, (tokenizer, section) in SHARDED.items():
        longer = section.model_copy(update={"tokens": 2 * (section.tokens or 0)})
        files = written(folder / f"longer {name}", model, tokenizer, longer).files
        for number, there in enumerate(THERE.get(name, [slice(0, 0)])):
            for place in ("alone", "sharded"):
                (folder / f"{place} {name} {number}").mkdir()
                for file in sorted(files)[there]:
                    (folder / f"{place} {name} {number}" / file).write_text(files[file])
            found[name, number] = written(folder / f"alone {name} {number}", model, tokenizer, section)
    return found


def sharded(processes: Processes, folder: Path) -> dict[str, Any]:
    mesh = make_mesh("cpu")
    model, whole = load_original(Source(folder / "model"), mesh), load_model(folder / "model")
    model.generation_config = generation_config(folder / "model")
    found: dict[str, Any] = {
        (name, number): written(
            folder / f"sharded {name} {number}", model, SHARDED[name][0], SHARDED[name][1], processes, sharded=True
        )
        for name, number in CASES
    }
    layers = model.model.layers.named_parameters()
    found["whole"] = [name for name, p in layers if not isinstance(p, DTensor)]
    found["different"] = [
        name
        for name, p in model.named_parameters()
        if not torch.equal(p.full_tensor() if isinstance(p, DTensor) else p, whole.get_parameter(name))
    ]
    with pytest.raises(UPQError) as raised:
        load_original(Source(folder / "damaged"), mesh)
    found["damaged"] = str(raised.value)
    return found


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, int], Written]]:
    folder = tmp_path_factory.mktemp("sharded")
    model = various()
    model.generation_config.prefill_chunk_size = 4  # by itself, a pass for each 4 tokens of a prompt
    model.save_pretrained(folder / "model")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(folder / "damaged")
    return folder, alone_as_sharded(folder)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.nightly)])
def in_shards(
    request: pytest.FixtureRequest,
    whole_model: tuple[Path, dict[tuple[str, int], Written]],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[Any, Any]]:
    """What each of the processes found, by rank."""
    folder = tmp_path_factory.mktemp("shards") / "copy"
    shutil.copytree(whole_model[0], folder)
    return together(request.param, sharded, folder)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_in_shards_writes_what_it_writes_whole(
    case: tuple[str, int],
    in_shards: list[dict[Any, Any]],
    whole_model: tuple[Path, dict[tuple[str, int], Written]],
) -> None:
    """Whatever is there already: the same files and progress. Whatever fails: one error in all, and no hang."""
    expected = whole_model[1][case]
    assert len({each[case].error for each in in_shards}) == 1
    assert all(each[case] == expected for each in in_shards) or case[0] == "refused"
    assert all(expected.error in each[case].error for each in in_shards)
    errors = {"refused": "no V", "no template": "no chat template", "ends none": "ends none of its answers"}
    assert errors.get(case[0], "") in expected.error
    assert bool(expected.error) == (case[0] in errors)


def test_cases_in_shards_are_what_they_are_meant_to_be(
    whole_model: tuple[Path, dict[tuple[str, int], Written]],
) -> None:
    found = whole_model[1]
    assert len(found["plain", 0].files) >= 3
    assert found["refused", 0].files
    numbers = [int(name[:6]) for name in found["no prompts", 0].files]
    assert len(numbers) <= max(numbers)  # a batch without a conversation


def test_a_model_in_shards_is_the_whole_one_and_stays_in_shards(in_shards: list[dict[Any, Any]]) -> None:
    for each in in_shards:
        assert each["different"] == []
        assert each["whole"] == []


def test_a_number_that_is_none_is_named_as_in_a_whole_model(
    in_shards: list[dict[Any, Any]], whole_model: tuple[Path, dict[tuple[str, int], Written]]
) -> None:
    path = whole_model[0] / "damaged"
    with pytest.raises(UPQError) as raised:
        check_finite(load_model(path), "PLACE")
    said = str(raised.value)
    assert "layers.1.mlp.up_proj.weight holds NaN" in said
    for each in in_shards:
        assert each["damaged"].partition(": ")[2] == said.partition(": ")[2]
