"""What is generated is the model's own distribution, whatever its generation_config.json says."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from tiny import byte_tokenizer, tiny_model
from upq import decoding
from upq.core.errors import UPQError
from upq.core.scramble import uniform
from upq.data.conversations import ChatTemplate
from upq.data.generated import Frame, Words, sample
from upq.data.rows import Message
from upq.text.date import TODAY, fixed_date
from upq.text.generation import Sampling, end_tokens, next_tokens
from upq.world.answers import answers

# What such files hold that changes what is generated, or how.
SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 5.0},
    {"num_beams": 4},
    {"num_return_sequences": 2, "do_sample": True},
    {"max_new_tokens": 2},
    {"max_length": 3},
    {"min_new_tokens": 20},
    {"min_p": 0.9, "top_k": 1, "temperature": 0.01},
    {"suppress_tokens": list(range(100))},
    {"use_cache": False},
    {"return_dict_in_generate": True, "output_scores": True},
    {"no_repeat_ngram_size": 1},
    {"prefill_chunk_size": 1},
    {"cache_implementation": "static"},
]
TOKENIZER = byte_tokenizer(bos="<s>", eos="</s>", chat_template="{% for m in messages %}<s>{{ m.content }}{% endfor %}")
PROMPTS = [[256, 1, 2, 3], [256, 9]]


HOW = [[Sampling(heat, row) for row in range(2)] for heat in (0.0, 1.0)]


def test_numbers_of_a_seed_are_splitmix64s() -> None:
    """Its published first numbers of the seed 1234567; of many seeds at once, at any step."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    seeds, steps = np.full(4, 1234567, np.uint64), np.arange(4, dtype=np.uint64)
    assert uniform(seeds, steps).tolist() == [(number >> 11) / 2**53 for number in published]
    other = uniform(np.array([5, 1234567], np.uint64), np.array([2**40, 3], np.uint64))
    assert other[1] == (published[3] >> 11) / 2**53
    assert uniform(np.array([2**64 - 1], np.uint64), np.array([0], np.uint64))[0] < 1


def test_a_token_depends_on_its_logits_and_its_seed_alone() -> None:
    logits_BV = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    how = [Sampling(0.7 * (i % 3), seed=i) for i in range(9)]
    steps = list(range(9))
    together = next_tokens(logits_BV, how, steps)
    assert together == [next_tokens(logits_BV[i : i + 1], how[i : i + 1], [i])[0] for i in range(9)]
    assert [together[i] for i in (0, 3, 6)] == logits_BV[::3].argmax(-1).tolist()
    assert len({next_tokens(logits_BV[1:2], [Sampling(3.0, 1)], [step])[0] for step in range(60)}) > 10
    for row in (0, 1):  # the likeliest, and drawn
        broken_BV = logits_BV.clone()
        broken_BV[row, 3] = torch.nan
        with pytest.raises(UPQError, match="logits hold NaN"):
            next_tokens(broken_BV, how, steps)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_settings_of_the_file_change_nothing(settings: dict[str, Any]) -> None:
    model = tiny_model("llama", vocab_size=258)
    model.generation_config = GenerationConfig(eos_token_id=list(range(60, 90)))
    torch.manual_seed(0)
    wanted = (
        [sample(model, TOKENIZER, PROMPTS, how, 12) for how in HOW],
        answers(model, TOKENIZER, ["ab", "c"]),
    )
    changed = GenerationConfig(eos_token_id=list(range(60, 90)), **settings)
    model.generation_config = changed
    torch.manual_seed(0)
    found = (
        [sample(model, TOKENIZER, PROMPTS, how, 12) for how in HOW],
        answers(model, TOKENIZER, ["ab", "c"]),
    )
    assert found == wanted
    assert any(map(any, wanted[0]))  # some answer ended
    assert model.generation_config is changed  # for its own user as it was


def test_each_step_reads_one_token_whatever_the_files_say() -> None:
    model = tiny_model("llama", vocab_size=258, use_cache=False)
    model.generation_config = GenerationConfig(use_cache=False)
    widths: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _module, inputs: widths.append(inputs[0].shape[1]))
    sample(model, TOKENIZER, [[256, 1, 2]], [Sampling()], 4)
    assert widths == [3, 1, 1, 1]


def test_the_compiled_decoder_takes_a_model_whose_files_say_use_cache_false(tmp_path: Any) -> None:
    import upq
    from tiny import tiny_artifact

    model: Any = upq.load(tiny_artifact(tmp_path / "artifact"))
    model.generation_config.use_cache = False
    decoding.attach(model)
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False)
    assert model.why_not_compiled is None


def test_end_tokens_are_those_of_the_file_and_the_tokenizer() -> None:
    assert end_tokens(GenerationConfig(eos_token_id=[9, 3]), TOKENIZER) == [3, 9, 257]
    assert end_tokens(GenerationConfig(eos_token_id=9), byte_tokenizer()) == [9]
    assert end_tokens(None, byte_tokenizer()) == []
    for wrong in ("</s>", [None], True, 2.5):
        with pytest.raises(UPQError, match=r"^generation_config\.json: eos_token_id is .*, not one or more token ids"):
            end_tokens(GenerationConfig(eos_token_id=wrong), TOKENIZER)


def test_a_template_reads_one_date() -> None:
    """Equal commands train on equal text, and a run goes on after midnight with the text of before."""
    dated = byte_tokenizer(
        eos="</s>", chat_template="{{ strftime_now('%d %b %Y %H:%M:%S') }} {{ messages[0].content }}"
    )
    template = ChatTemplate(dated)
    assert template.render((Message("user", "x"),), "here") == "26 Jul 2024 00:00:00 x"
    with fixed_date(), fixed_date():
        pass
    now = str(dated.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False))
    assert str(datetime.now().year) in now  # outside a run the clock goes on
    assert TODAY.year != datetime.now().year


EACH = "{% for m in messages %}FORM{% endfor %}"
CHATML = EACH.replace("FORM", "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n")
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURNS = "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}"
INST = EACH.replace("FORM", TURNS)
ASKED = "{% if add_generation_prompt %}assistant:{% endif %}"
PLAIN = EACH.replace("FORM", "{{ m.role }}: {{ m.content }}\n\n") + ASKED


@pytest.mark.parametrize(
    ("template", "header", "closing", "ending"),
    [
        (CHATML + PROMPT, "<|im_start|>user\n", "<|im_end|>", "<|im_end|>"),
        (INST, "[INST] ", "[/INST]", "</s>"),
        (PLAIN, "user: ", "assistant:", ""),
        ("{% for m in messages %}# {{ m.content }}{% endfor %}", "# ", "", ""),
    ],
)
def test_a_turn_ends_where_the_template_goes_on(template: str, header: str, closing: str, ending: str) -> None:
    assert Frame.of(byte_tokenizer(eos="</s>", chat_template=template)) == Frame(header, closing, ending)


@pytest.mark.parametrize("special", [False, True])
def test_what_is_written_behind_the_closing_text_is_left_out(special: bool) -> None:
    """As text or as a token of its own, and the model stops there."""
    tokenizer = byte_tokenizer(eos="</s>")
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["[/INST]"]})
    ids = [*tokenizer(" Write a poem. [/INST] Roses are red.", add_special_tokens=False)["input_ids"], 256]

    class Model:
        device = "cpu"
        generation_config = GenerationConfig(eos_token_id=256)

        def generate(self, rows: torch.Tensor, *, stopping_criteria: Any, **_: Any) -> torch.Tensor:
            while len(stopping_criteria) == 0 or not stopping_criteria(rows, None).all():  # as transformers' loop
                at = rows.shape[1] - 1
                if at == len(ids):
                    break
                rows = torch.cat([rows, torch.tensor([[ids[at]]] * len(rows))], 1)
            self.length = rows.shape[1] - 1
            return rows

    model: Any = Model()
    written = sample(model, tokenizer, [[1], [1]], HOW[0], 99, closing="[/INST]")
    assert written == [Words("Write a poem.", ended=True)] * 2
    assert model.length == tokenizer(" Write a poem. [/INST]", return_length=True)["length"][0]
    (found,) = sample(model, tokenizer, [[1]], [Sampling()], 99)
    assert found.text == ("Write a poem.  Roses are red." if special else "Write a poem. [/INST] Roses are red.")
