"""lm-eval's own tasks over local files: prompts, scores, groups, and what goes wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tiny import byte_tokenizer, tiny_model
from upq.core.errors import UPQError
from upq.core.progress import Silent

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'upq[eval]'")
for package in ("nltk", "langdetect", "immutabledict"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'upq[eval]'")

from lm_eval.api.model import LM  # noqa: E402

from upq.decoding import Unsuitable  # noqa: E402
from upq.evals import evaluate_tasks, tasks  # noqa: E402
from upq.evals.kept import KeptAnswers  # noqa: E402
from upq.evals.tasks import _as_lm  # noqa: E402
from upq.kernels import computing  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared" / "data" / "eval"
PROMPTS = [
    ("punctuation:no_comma", {}, "Describe the sea without commas.", "The sea is blue.", "Blue, deep, cold."),
    (
        "length_constraints:number_sentences",
        {"relation": "at least", "num_sentences": 3},
        "Describe the sea in at least 3 sentences.",
        "It is blue. It is deep. It is cold.",
        "It is blue. It is deep.",
    ),
    ("detectable_format:title", {}, "Describe the sea under a <<title>>.", "<<The sea>>\nIt is blue.", "It is blue."),
]


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


class Oracle(LM):  # type: ignore[misc]
    """Answers by a function of the prompt, and remembers the prompts."""

    tokenizer_name = "oracle"

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__()
        self.answer = answer
        self.prompts: list[str] = []

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.prompts += [request.args[0] for request in requests]
        right = [request.args[1] == self.answer(request.args[0]) for request in requests]
        return [(0.0 if r else -1.0, r) for r in right]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        return [self.answer(request.args[0]) for request in requests]

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        return "".join(f"[{turn['role']}] {turn['content']}" for turn in chat_history)


def write_csv(
    path: Path, rows: list[list[str]], header: str = "question,choice0,choice1,choice2,choice3,answer"
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])


def question(subject: str, kind: str, number: int) -> list[str]:
    return [f"What, in {subject}, is {kind} {number}?", "one", "two, or 2", "three", "four", str(number % 4)]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    for subject, tests in (("abstract_algebra", 6), ("world_religions", 3)):
        write_csv(tmp_path / f"mmlu/dev/{subject}_dev.csv", [question(subject, "dev", n) for n in range(5)])
        write_csv(tmp_path / f"mmlu/test/{subject}_test.csv", [question(subject, "test", n) for n in range(tests)])
    rows = [
        {"key": 7 + n, "prompt": prompt, "instruction_id_list": [instruction], "kwargs": [kwargs]}
        for n, (instruction, kwargs, prompt, _, _) in enumerate(PROMPTS)
    ]
    (tmp_path / "ifeval.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    # NLTK's format, with nothing learned: enough to split at full stops
    punkt = tmp_path / "nltk_data/tokenizers/punkt_tab/english"
    punkt.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (punkt / name).write_text("")
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte level, so that no text is unknown to it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(["<eos>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")


def with_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    chatty = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    chatty.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    return chatty


def tiny(tokenizer: PreTrainedTokenizerFast, context: int, eos: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=context,
            bos_token_id=None,
            eos_token_id=eos,
        )
    )
    return model.eval()


def letter(prompt: str) -> str:
    """The right letter: the question's number is its answer modulo 4."""
    asked = prompt.rpartition("test ")[2]
    return " " + "ABCD"[int(asked.partition("?")[0]) % 4]


def test_mmlu_prompt_is_the_known_one(data_dir: Path, tokenizer: Any) -> None:
    oracle = Oracle(letter)
    evaluate_tasks(oracle, tokenizer, ["mmlu_abstract_algebra"], data_dir=data_dir, num_fewshot=2, limit=1)
    choices = "A. one\nB. two, or 2\nC. three\nD. four\nAnswer:"
    assert set(oracle.prompts) == {
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        f"What, in abstract_algebra, is dev 0?\n{choices} A\n\n"
        f"What, in abstract_algebra, is dev 1?\n{choices} B\n\n"
        f"What, in abstract_algebra, is test 0?\n{choices}"
    }
    bare = Oracle(letter)
    evaluate_tasks(bare, tokenizer, ["mmlu_abstract_algebra"], data_dir=data_dir, limit=1)
    assert "dev" not in bare.prompts[0]


def test_whoever_knows_gets_all_and_groups_weigh_questions(data_dir: Path, tokenizer: Any) -> None:
    notes = Notes()
    scores = evaluate_tasks(Oracle(letter), tokenizer, ["mmlu"], data_dir=data_dir, progress=notes)
    assert list(scores) == ["mmlu", "mmlu_stem", "mmlu_humanities"]
    assert scores["mmlu"] == {"acc": 1, "acc_stderr": 0, "samples": 9}
    assert notes.lines == [f"mmlu: 2 of 57 subjects are in {data_dir / 'mmlu'}; the means are over these"]

    always_a = evaluate_tasks(Oracle(lambda _: " A"), tokenizer, ["mmlu"], data_dir=data_dir)
    assert always_a["mmlu_stem"]["acc"] == pytest.approx(2 / 6)
    assert always_a["mmlu_humanities"]["acc"] == pytest.approx(1 / 3)
    assert always_a["mmlu"]["acc"] == pytest.approx(3 / 9)
    assert always_a["mmlu"]["acc_stderr"] > 0

    one = evaluate_tasks(Oracle(letter), tokenizer, ["mmlu"], data_dir=data_dir, limit=1)
    assert one["mmlu"] == {"acc": 1, "samples": 2}


def test_ifeval_passes_what_complies_and_fails_what_does_not(data_dir: Path, tokenizer: Any) -> None:
    good = {prompt: answer for _, _, prompt, answer, _ in PROMPTS}
    bad = {prompt: answer for _, _, prompt, _, answer in PROMPTS}
    names = [f"{level}_level_{kind}_acc" for level in ("prompt", "inst") for kind in ("strict", "loose")]
    for answers, score in ((good, 1), (bad, 0)):
        found = evaluate_tasks(Oracle(answers.__getitem__), tokenizer, ["ifeval"], data_dir=data_dir)["ifeval"]
        assert [found[name] for name in names] == [score] * 4
        assert found["samples"] == 3
    last_only = good | {prompt: bad[prompt] for prompt in list(bad)[:2]}
    found = evaluate_tasks(Oracle(last_only.__getitem__), tokenizer, ["ifeval"], data_dir=data_dir)["ifeval"]
    assert found["prompt_level_strict_acc"] == pytest.approx(1 / 3)


def test_chat_template_is_for_tasks_that_generate(data_dir: Path, tokenizer: Any) -> None:
    chatty = with_template(tokenizer)

    def first_prompt(task: str, chat: bool | None) -> str:
        oracle = Oracle(lambda prompt: " A")
        evaluate_tasks(oracle, chatty, [task], data_dir=data_dir, limit=1, chat=chat)
        return oracle.prompts[0]

    assert first_prompt("ifeval", None) == "[user] Describe the sea without commas."
    assert first_prompt("ifeval", False) == "Describe the sea without commas."
    assert first_prompt("mmlu_abstract_algebra", None).startswith("The following are")
    assert first_prompt("mmlu_abstract_algebra", True).startswith("[system] The following are")
    with pytest.raises(UPQError, match="no chat template"):
        evaluate_tasks(Oracle(letter), tokenizer, ["ifeval"], data_dir=data_dir, chat=True)


def test_a_transformers_model_runs_both(data_dir: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny(tokenizer, 2048, eos=0)
    state = torch.random.get_rng_state()
    scores = evaluate_tasks(model, tokenizer, ["mmlu", "ifeval"], data_dir=data_dir, limit=2, num_fewshot=1)
    assert scores["mmlu"]["samples"] == 4
    assert 0 <= scores["mmlu"]["acc"] <= 1
    assert 0 <= scores["ifeval"]["at_length_limit"] <= 1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert tokenizer.pad_token is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("first_token_ends", "share"), [(True, 0), (False, 1)])
def test_answers_at_the_length_limit(data_dir: Path, tokenizer: Any, first_token_ends: bool, share: int) -> None:
    model = tiny(tokenizer, 2048, eos=0 if first_token_ends else 1)
    # equal logits: greedy decoding takes token 0, the tokenizer's end of text
    torch.nn.init.zeros_(model.lm_head.weight)
    assert model.generation_config.eos_token_id == (0 if first_token_ends else 1)
    tokenizer = with_template(tokenizer)
    if not first_token_ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(1)
    scores = evaluate_tasks(model, tokenizer, ["ifeval"], data_dir=data_dir, batch_size=2)
    assert scores["ifeval"]["at_length_limit"] == share


def test_answers_side_by_side_are_lm_evals(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts and counts as by lm-eval's own loop over transformers."""
    write_rows(tmp_path, "gsm8k", *({**ROWS["gsm8k"][1], "context": f"{n} and {n * 'x'}?"} for n in range(5)))
    model = tiny(tokenizer, 700, eos=0)
    for weight in model.parameters():  # so that what it writes depends on the question
        torch.nn.init.normal_(weight)

    def answered(name: str) -> tuple[Any, list[str]]:
        file = tmp_path / f"{name}.jsonl"
        with monkeypatch.context() as patched:
            patched.setattr(tasks, "_SIDE_BY_SIDE", 3)  # fewer than questions
            if name == "transformers":
                patched.setattr(tasks, "batch", refuses)
            else:
                patched.setattr(type(model), "forward", None)
            options: dict[str, Any] = {"data_dir": tmp_path, "num_fewshot": 0, "answers": file, "batch_size": 2}
            scores = evaluate_tasks(model, tokenizer, ["gsm8k"], **options)
        return scores, sorted(file.read_text().splitlines())

    def refuses(*_: Any, **__: Any) -> Any:
        raise Unsuitable("for comparison")

    scores, texts = answered("compiled")
    assert (scores, texts) == answered("transformers")
    assert len({json.loads(line).get("answer") for line in texts}) > 3
    with computing("reference"):
        assert answered("reference") == (scores, texts)


def test_prompts_that_do_not_fit_are_counted(data_dir: Path, tokenizer: Any) -> None:
    notes, model = Notes(), tiny(tokenizer, 64, eos=0)
    evaluate_tasks(model, tokenizer, ["mmlu_world_religions"], data_dir=data_dir, progress=notes)
    cut = "mmlu_world_religions: 3 prompts are longer than the model's context and lost their beginning"
    assert cut in notes.lines
    with pytest.raises(UPQError, match="ifeval generates 1280 tokens, but the model's context is 64"):
        evaluate_tasks(model, tokenizer, ["ifeval"], data_dir=data_dir)


def test_what_the_data_lacks_is_named(data_dir: Path, tokenizer: Any) -> None:
    def run(*names: str) -> None:
        evaluate_tasks(Oracle(letter), tokenizer, names, data_dir=data_dir)

    with pytest.raises(UPQError, match=r"'mmlu_anatomy': no file for it in"):
        run("mmlu_anatomy")
    test = data_dir / "mmlu/test/abstract_algebra_test.csv"
    write_csv(test, [["Only?", "one", "two", "three", "four", "B"]])
    with pytest.raises(UPQError, match=r"abstract_algebra_test.csv:2: expected .* an answer from 0 to 3"):
        run("mmlu")
    write_csv(test, [], header="Find all c,0,1,2,3,B")
    with pytest.raises(UPQError, match=r"abstract_algebra_test.csv: the first row must be question,"):
        run("mmlu")
    write_csv(test, [])
    with pytest.raises(UPQError, match="no questions"):
        run("mmlu")
    (data_dir / "mmlu/dev/abstract_algebra_dev.csv").unlink()
    with pytest.raises(UPQError, match=r"abstract_algebra_dev.csv is missing, which mmlu \(abstract_algebra\) needs"):
        run("mmlu")
    test.rename(data_dir / "mmlu/test/alchemy_test.csv")
    with pytest.raises(UPQError, match="MMLU has no subject 'alchemy'"):
        run("mmlu")

    (data_dir / "ifeval.jsonl").write_text('{"key": 1, "prompt": "x", "kwargs": []}\n')
    with pytest.raises(UPQError, match=r"ifeval.jsonl:1: instruction_id_list missing"):
        run("ifeval")
    (data_dir / "ifeval.jsonl").write_text("\nnot json\n")
    with pytest.raises(UPQError, match=r"ifeval.jsonl:2: not a JSON object"):
        run("ifeval")
    (data_dir / "ifeval.jsonl").unlink()
    with pytest.raises(UPQError, match=r"ifeval.jsonl is missing, which ifeval needs; complete --data-dir"):
        run("ifeval")


def test_missing_punkt_and_missing_packages(
    data_dir: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    (data_dir / "nltk_data").rename(data_dir / "elsewhere")
    with pytest.raises(UPQError, match=r"nltk_data: tokenizers/punkt_tab is missing"):
        evaluate_tasks(Oracle(letter), tokenizer, ["ifeval"], data_dir=data_dir)
    assert nltk.data.path == []

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "langdetect" else name)
    with pytest.raises(UPQError, match=r"langdetect: pip install 'upq\[eval\]'"):
        evaluate_tasks(Oracle(letter), tokenizer, ["ifeval"], data_dir=data_dir)


def test_no_hub_no_local_files(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable:
        all_tasks = ("mmlu",)

        def __init__(self, include_path: list[str], include_defaults: bool) -> None:
            assert include_defaults

        def load(self, names: list[str]) -> None:
            raise ConnectionError("Couldn't reach 'cais/mmlu' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Unreachable)
    with pytest.raises(UPQError, match=r"task mmlu: .*cais/mmlu.* by --data-dir$"):
        evaluate_tasks(Oracle(letter), tokenizer, ["mmlu"])
    with pytest.raises(UPQError, match=r"unknown task 'mmmlu': see `lm-eval ls tasks`"):
        evaluate_tasks(Oracle(letter), tokenizer, ["mmmlu"])


# ---- tasks of one file each

# By task: its file, a row of it, the prompt (or prompts) and the right answer as lm-eval asks them.
ROWS: dict[str, tuple[str, dict[str, Any], list[str], str]] = {
    "arc_easy": (
        "choices/arc_easy.jsonl",
        {"query": "Question: What is wet?", "choices": ["Fire", "Water", "Sand"], "gold": 1},
        ["Question: What is wet?\nAnswer:"],
        " Water",
    ),
    "arc_challenge": (
        "choices/arc_challenge.jsonl",
        {"query": "Question: Why?", "choices": ["A.", "B."], "gold": 0},
        ["Question: Why?\nAnswer:"],
        " A.",
    ),
    "piqa": (
        "choices/piqa.jsonl",
        {"query": "Question: How do I boil water?\n", "choices": ["Heat it.", "Cool it."], "gold": 0},
        ["Question: How do I boil water?\nAnswer:"],
        " Heat it.",
    ),
    "openbookqa": (
        "choices/openbook_qa.jsonl",
        {"query": "To save money, people should", "choices": ["eat out", "quit eating out"], "gold": 1},
        ["To save money, people should"],
        " quit eating out",
    ),
    "winogrande": (
        "choices/winogrande.jsonl",
        {
            "context_options": ["Ann helped Sam_uel, so Ann", "Ann helped Sam_uel, so Sam"],
            "continuation": "was glad.",
            "gold": 1,
        },
        ["Ann helped Sam_uel, so Ann", "Ann helped Sam_uel, so Sam"],
        " was glad.",
    ),
    "hellaswag": (
        "choices/hellaswag.jsonl",
        {
            "activity_label": "Rowing",
            "ctx_a": "A boat.",
            "ctx_b": "two men",
            "endings": ["sink [x].", "row."],
            "label": 1,
        },
        ["Rowing: A boat. Two men"],
        " row.",
    ),
    "lambada_openai": (
        "generation/lambada_openai.jsonl",
        {"context": "He did not care about", "continuation": "signs"},
        ["He did not care about"],
        " signs",
    ),
    "gsm8k": (
        "generation/gsm8k.jsonl",
        {"context": "2 ducks and 3?", "chain_of_thought": "2 + 3 = 5.", "answer": "5"},
        ["[user] Question: 2 ducks and 3?\nAnswer:"],
        "It is 5.\n#### 5",
    ),
}


def write_rows(data_dir: Path, task: str, *rows: dict[str, Any]) -> Path:
    path = data_dir / ROWS[task][0]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("task", ROWS)
def test_prompts_and_answers_are_lm_evals(task: str, tmp_path: Path, tokenizer: Any) -> None:
    _, row, prompts, right = ROWS[task]
    write_rows(tmp_path, task, row, row)
    knows, errs = Oracle(lambda _: right), Oracle(lambda _: " something else")
    for oracle, share in ((knows, 1.0), (errs, 0.0)):
        options: dict[str, Any] = {"data_dir": tmp_path, "num_fewshot": 0}
        scores = evaluate_tasks(oracle, with_template(tokenizer), [task], **options)[task]
        assert sorted(set(oracle.prompts)) == sorted(prompts)
        metric = "exact_match,strict-match" if task == "gsm8k" else "acc"
        if task == "winogrande":  # both prompts have the same answer
            assert scores[metric] in (0.0, 1.0)
        elif share == 1.0 or "choices" not in ROWS[task][0]:  # without knowledge, the first choice
            assert scores[metric] == share
        assert scores["samples"] == 2


def test_whose_rows_are_broken(tmp_path: Path, tokenizer: Any) -> None:
    row = ROWS["arc_easy"][1]
    for broken, said in (
        (row | {"gold": 3}, "arc_easy.jsonl:2: gold must be an index from 0 to 2; mend the row"),
        (row | {"choices": "AB"}, "arc_easy.jsonl:2: choices must be a list of at least two texts"),
        ({"query": "x", "choices": []}, "arc_easy.jsonl:2: gold missing; rows of arc_easy hold query, choices, gold"),
    ):
        write_rows(tmp_path, "arc_easy", row, broken)
        with pytest.raises(UPQError, match=said):
            evaluate_tasks(Oracle(letter), tokenizer, ["arc_easy"], data_dir=tmp_path)
    with pytest.raises(UPQError, match=r"piqa.jsonl is missing, which piqa needs; complete --data-dir"):
        evaluate_tasks(Oracle(letter), tokenizer, ["piqa"], data_dir=tmp_path)


# ---- answers that are kept


def test_a_run_that_was_stopped_goes_on(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after each number of answers: the scores of a run that was not, and nothing is asked twice."""
    write_rows(tmp_path, "arc_easy", *({**ROWS["arc_easy"][1], "query": f"Is it {n}?"} for n in range(3)))
    write_rows(tmp_path, "gsm8k", *({**ROWS["gsm8k"][1], "context": f"{n} and {n}?"} for n in range(3)))
    model, file = tiny(tokenizer, 2048, eos=0), tmp_path / "kept" / "answers.jsonl"

    def scores(answers: Path | None, digest: str = "a") -> Any:
        options: dict[str, Any] = {"data_dir": tmp_path, "limit": 2, "num_fewshot": 0, "of": {"model": digest}}
        return evaluate_tasks(model, tokenizer, ["arc_easy", "gsm8k"], answers=answers, **options)

    def dying(self: KeptAnswers, kind: str, arguments: Any, answer: Any) -> None:
        if len(self) == stop:
            raise KeyboardInterrupt
        keep(self, kind, arguments, answer)

    whole, keep = scores(None), KeptAnswers.add_partial
    for stop in (4, 7):  # amid choices, and amid answers that are written
        monkeypatch.setattr(KeptAnswers, "add_partial", dying)
        with pytest.raises(KeyboardInterrupt):
            scores(file)
        monkeypatch.setattr(KeptAnswers, "add_partial", keep)
        assert len(file.read_text().splitlines()) == 1 + stop
        with file.open("a") as torn:
            torn.write('{"key": "0')
    assert scores(file) == whole
    assert len(file.read_text().splitlines()) == 1 + 2 * 3 + 2
    monkeypatch.setattr(type(model), "forward", None)  # nothing is left to compute
    assert scores(file) == whole
    with pytest.raises(UPQError, match=r"answers.jsonl: holds answers of model 'a', this run has 'b'; name another"):
        scores(file, "b")


@pytest.mark.nightly
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared evaluation data is not here")
def test_real_files_of_choices_are_read_whole(tokenizer: Any) -> None:
    wanted = {"arc_easy": 2376, "arc_challenge": 1172, "piqa": 1838, "openbookqa": 500, "winogrande": 1267}
    wanted |= {"hellaswag": 1000, "lambada_openai": 5153, "gsm8k": 1319}
    scores = evaluate_tasks(Oracle(lambda _: "#### 18"), tokenizer, list(wanted), data_dir=SHARED)
    assert {task: scores[task]["samples"] for task in wanted} == wanted


@pytest.mark.nightly
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared evaluation data is not here")
def test_real_data_is_seen_whole(tokenizer: Any) -> None:
    notes, oracle = Notes(), Oracle(lambda prompt: " B" if prompt.endswith("Answer:") else "Yes.")
    scores = evaluate_tasks(oracle, tokenizer, ["mmlu", "ifeval"], data_dir=SHARED, progress=notes)
    assert notes.lines == []  # a note would say that subjects are missing
    assert scores["mmlu"]["samples"] == 14042
    assert [scores[f"mmlu_{name}"]["samples"] for name in ("stem", "other", "social_sciences", "humanities")] == [
        3153,
        3107,
        3077,
        4705,
    ]
    # the answers are shared out about evenly
    assert 0.2 < scores["mmlu"]["acc"] < 0.3
    assert scores["ifeval"]["samples"] == 541
    assert 0 < scores["ifeval"]["inst_level_strict_acc"] < 0.5


def test_padding_is_a_token_that_the_embedding_has() -> None:
    """lm-eval adds one to a tokenizer that has neither padding nor an end token."""
    model, tokenizer = tiny_model("llama", vocab_size=256), byte_tokenizer()
    harness = _as_lm(model, tokenizer, 2, False, None)
    assert len(harness.tokenizer) == 256
    assert harness.tokenizer.pad_token_id == 255
    assert tokenizer.pad_token_id is None
