"""The command line as a person meets it: exit codes, one-line errors, the run of a command."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import upq.cli
from tiny import byte_tokenizer
from upq.cli.chat import _Talk
from upq.core.errors import UPQError
from upq.files.target import Target
from upq.run.console import console

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
QUICK = [
    "data.seq_len=32", "data.validation=4", "generate=null", "int2.samples=4",
    "int2.method=rtn", "distill.tokens=256", "distill.batch_size=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=300, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer(eos="<e>", chat_template=CHAT).save_pretrained(folder)
    return folder


@pytest.fixture
def upq_command(monkeypatch, capsys):
    """Run `upq ARGUMENTS`; returns exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["upq", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stopped:
            upq.cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


@pytest.mark.parametrize("kind", ["new", "file", "link", "broken link", "home"])
def test_figures_go_to_a_file_and_links_stay(kind, tmp_path, monkeypatch):
    real = tmp_path / "real.json"
    path = real if kind in ("new", "file") else tmp_path / "link.json"
    if kind in ("file", "link"):
        real.write_text("old")
    if "link" in kind:
        path.symlink_to("real.json")
    if kind == "home":
        monkeypatch.setenv("HOME", str(tmp_path))
        path = Path("~/real.json")
    Target.of(path).write({"a": 1})
    assert json.loads(real.read_text()) == {"a": 1}
    assert path.is_symlink() == ("link" in kind)


def test_figures_go_into_a_pipe_that_stays_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    Target.of(pipe).write({"a": 1})
    assert json.loads(os.read(reader, 100)) == {"a": 1}
    os.close(reader)
    assert pipe.is_fifo()


def test_a_pipe_whose_reader_has_gone_is_one_line(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    target = Target.of(pipe)
    os.close(reader)
    with pytest.raises(UPQError, match="pipe: cannot write: Broken pipe"):
        target.write({"a": 1})


def test_figures_behind_a_descriptor_come_after_what_is_there(tmp_path):
    with (tmp_path / "shown").open("w") as shown:
        shown.write("a table\n")
        shown.flush()
        path = Path(f"/dev/fd/{shown.fileno()}")
        Target.of(path).write([1])
    assert (tmp_path / "shown").read_text() == "a table\n[\n  1\n]\n"


def test_figures_have_a_place_before_the_work(tmp_path):
    (tmp_path / "dangling.json").symlink_to("gone/x.json")
    for path, reason in ((tmp_path, "is a directory"), (tmp_path / "gone" / "x", "no such directory")):
        with pytest.raises(UPQError, match=rf"--json {path}: {reason}"):
            Target.of(path)
    with pytest.raises(UPQError, match="no such directory"):
        Target.of(tmp_path / "dangling.json")


def settings(*overrides):
    return [word for override in (*QUICK, *overrides) for word in ("--set", override)]


def test_each_of_two_models_goes_on_from_its_own_answers(monkeypatch):
    asked = []

    def answer(name, tokenizer, history, options, streamer):
        asked.append((name, [message["content"] for message in history]))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return f"{name}!"

    monkeypatch.setattr(sys.modules["upq.cli.chat"], "answer", answer)  # upq.cli has the command under this name
    talk = _Talk(console(), ["a", "b"], ["A", "B"], [None, None], {}, [{"role": "system", "content": "Be kind."}])
    talk.ask("one")
    with pytest.raises(KeyboardInterrupt):
        talk.ask("two")
    talk.ask("three")  # what was interrupted was not asked
    talk.reset()
    talk.ask("four")
    assert asked[-4:] == [
        ("A", ["Be kind.", "one", "A!", "three"]),
        ("B", ["Be kind.", "one", "B!", "three"]),
        ("A", ["Be kind.", "four"]),
        ("B", ["Be kind.", "four"]),
    ]


def test_quantize_then_eval_then_chat(model, tmp_path, upq_command):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"the {i}th fox sees {i * i} geese"}) + "\n" for i in range(200)))
    out = tmp_path / "out [v2]"  # rich would read a tag
    code, shown, errors = upq_command("quantize", model, "--out", out, "--data", text, *settings())
    assert code == 0, errors
    assert "original" in shown
    assert "artefact" in shown
    assert "peak memory" in shown
    assert f"{out} is ready: upq chat '{out}'" in shown
    assert "int2: 2/2" in shown  # plain lines, since this is no terminal

    figures = tmp_path / "figures.json"
    plain = tmp_path / "plain.txt"
    plain.write_text("the 7th fox sees 49 geese " * 30)
    arguments = ["--against", model, "--text", plain, "--seq-len", 32, "--json", figures]
    code, shown, errors = upq_command("eval", out, *arguments)
    assert code == 0, errors
    measured = json.loads(figures.read_text())
    assert measured["kld"] > 0
    assert 2 < measured["bits_per_weight"] < 3
    assert "tasks" not in measured

    code, shown, errors = upq_command("chat", out, "--prompt", "hello", "--max-tokens", 5)
    assert code == 0, errors
    code, shown, errors = upq_command("chat", out, "--against", model, "--prompt", "hello", "--max-tokens", 5)
    assert code == 0, errors
    assert shown.count(out.name) == 1  # the columns are printed once where they cannot grow
    assert shown.count(" tokens, ") == 2
    assert shown.count("tokens/s") == 2

    code, shown, errors = upq_command(
        "bench", out, "--repeats", 1, "--prompt", 3, "--tokens", 4, "--prefill", 20, "--json", figures
    )
    assert code == 0, errors
    assert "of a plain read" in shown
    measured = json.loads(figures.read_text())
    assert measured["engines"][0]["decode"] > 0
    assert measured["engines"][0]["decode_ratio"] == 1
    assert (measured["decoder"], measured["why_not_compiled"]) == ("upq", None)
    assert "decoder: upq, compiled" in shown

    code, shown, errors = upq_command("quantize", model, "--out", out, "--data", text, *settings())
    assert code == 0
    assert "nothing to do" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "./nowhere", "--out", "OUT"], "./nowhere: no such directory"),
        (["quantize", "MODEL", "--out", "OUT", "--recipe", "perfect"], "neither a file nor one of: default"),
        (["quantize", "MODEL", "--out", "OUT", "--set", "distill.speed=9"], "unknown key 'distill.speed'"),
        (["quantize", "MODEL", "--out", "OUT", "--set", "seed"], "expected key=value"),
        (["quantize", "MODEL", "--out", "OUT", "--data", "./no.txt"], "./no.txt: no such file"),
        (
            ["quantize", "MODEL", "--out", "OUT", "--set", "int2.method=magic", "--set", "data.seq_len=32"],
            "unknown block-wise method 'magic': choose one of",
        ),
        (["eval", "MODEL"], "nothing to measure: give --text"),
        (["chat", "./nowhere"], "./nowhere: no such directory"),
        (["bench", "./nowhere"], "./nowhere: no such directory"),
        (["bench", "MODEL"], "the compiled decoder does not run this model: it is not packed"),
        (["bench", "MODEL", "--against", "onnx"], "--against must be gguf, got 'onnx'"),
        (["bench", "MODEL", "--compute", "reference"], "--compute must be w2a8 or w2a16"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(model, tmp_path, upq_command, arguments, said):
    places = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
    code, _, errors = upq_command(*[places.get(word, word) for word in arguments])
    assert code == 2
    assert said in errors
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
    assert not (tmp_path / "out" / "upq.json").exists()


def test_debug_shows_the_traceback(upq_command, monkeypatch):
    from upq.core.errors import UPQError

    monkeypatch.setenv("UPQ_DEBUG", "")  # so that what --debug sets is taken back
    monkeypatch.setattr("sys.argv", ["upq", "--debug", "chat", "./nowhere"])
    with pytest.raises(UPQError):
        upq.cli.main()


def test_doctor_names_versions_and_cores(upq_command):
    code, shown, _ = upq_command("doctor")
    assert code == 0
    assert torch.__version__ in shown
    for word in ("cores", "memory", "GPU", "transformers"):
        assert word in shown


@pytest.mark.parametrize(("kernels", "named"), [(None, "pip install 'upq[cuda]'"), ("reference", "reference")])
def test_doctor_names_the_kernels_of_a_gpu(upq_command, monkeypatch, kernels, named):
    from upq.kernels import cuda

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(name="H1", total_memory=8e10))
    monkeypatch.setitem(sys.modules, "gemlite", None)
    monkeypatch.setattr("upq.kernels._of_environment", lambda: kernels)  # which is read once a process
    cuda.library.cache_clear()
    code, shown, _ = upq_command("doctor")
    assert code == 0
    line = next(line for line in shown.splitlines() if "kernels on it" in line)
    assert named in line
    assert "missing: gemlite  → pip install 'upq[cuda]'" in shown


def test_eval_refuses_kernels_that_a_gpu_does_not_have(upq_command, monkeypatch, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abc")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    code, _, errors = upq_command("eval", "./nowhere", "--text", text, "--device", "cuda", "--compute", "w2a8")
    assert code == 2
    assert "kernels w2a8 run on the CPU alone" in errors
