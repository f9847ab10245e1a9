"""Many texts at a time: each is what it would be alone, bit for bit, whatever is written beside it."""

from __future__ import annotations

import random
from itertools import count, islice
from typing import Any

import pytest
import torch

from test_decoding import MADE, by_transformers, packed
from tiny import tiny_model
from upq import kernels
from upq.core.errors import UPQError
from upq.decoding import Batch, Unsuitable, _batch, batch
from upq.decoding._parts import parts
from upq.kernels.decoder import Decoder
from upq.text.generation import Request, Sampling

RANDOM = random.Random(0)
PROMPTS = [[RANDOM.randrange(1, 67) for _ in range(length)] for length in (1, 40, 3, 17, 16, 5, 150, 2)]
PROMPTS.append([*PROMPTS[3], 4, 5])  # begins as another does


def requests(*, heat: float = 0.0, limit: int = 12) -> list[Request[int]]:
    """They end at different times: where a token of their own comes, or at their limit."""
    return [
        Request(i, tuple(ids), limit + i, lambda written, last=7 * i: written[-1] == last, Sampling(heat, i))  # type: ignore[misc]
        for i, ids in enumerate(PROMPTS)
    ]


def written(model: Any, asked: list[Request[int]], *, size: int, **options: Any) -> dict[int, list[int]]:
    return dict(batch(model, size=size, **options).write(asked))


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("dense", [False, True])
def test_a_batch_writes_what_each_text_is_alone(name: str, dense: bool) -> None:
    model = tiny_model(name, **MADE[name]) if dense else packed(name)
    for compute, heat in (("w2a8", 0.0), ("w2a16", 1.5)):
        with kernels.computing(compute):
            asked = requests(heat=heat)
            alone = {key: text for one in asked for key, text in written(model, [one], size=1).items()}
            assert written(model, asked, size=4) == alone
            assert written(model, asked[::-1], size=len(asked)) == alone
        assert len(set(map(len, alone.values()))) > 3


def test_no_text_waits_for_those_that_came_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step reads one prompt, and there is always another: by slot, the last slots would wait for ever."""
    monkeypatch.setattr(_batch, "_PORTION", 4)
    draw = random.Random(1)
    endless = (Request(i, tuple(draw.randrange(1, 67) for _ in range(4)), 1, lambda _: False) for i in count())
    texts = batch(packed("llama"), size=4).write(endless)
    assert [key for key, _ in islice(texts, 12)] == list(range(12))


@pytest.mark.parametrize("cache", ["float32", "int8"])
def test_logits_depend_on_their_own_text_alone(cache: Any) -> None:
    """Bit for bit: not on other texts, on portions, on what lay in the cache before, or on threads."""
    model = packed("qwen3", sliding_window=40, use_sliding_window=True, max_window_layers=1)
    whole = []
    for ids in PROMPTS:
        decoder = Decoder(parts(model), cache=cache)
        whole.append(decoder.forward({decoder.open(): ids})[0])
    decoder = Decoder(parts(model), cache=cache)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            texts = [decoder.open() for _ in PROMPTS]
            together = decoder.forward(dict(zip(texts, PROMPTS, strict=True)))
            assert torch.equal(together, torch.stack(whole))
            for text in texts[::2]:  # their blocks go to others
                decoder.close(text)
            begun = {decoder.open(): PROMPTS[i] for i in range(0, len(PROMPTS), 2)}
            for text in texts[1::2]:
                decoder.truncate(text, 1)
            decoder.forward({text: ids[: len(ids) // 2] or ids for text, ids in begun.items() if len(ids) > 1})
            for text, ids in begun.items():
                last = decoder.forward({text: ids[decoder.length(text) :]})[0]
                assert torch.equal(last, whole[PROMPTS.index(ids)])
            for text, ids in zip(texts[1::2], PROMPTS[1::2], strict=True):
                assert torch.equal(decoder.forward({text: ids[1:]})[0], whole[PROMPTS.index(ids)])
            for text in {*texts, *begun}:
                decoder.close(text)
        held = decoder.cached_bytes
        for _ in range(20):  # the memory of texts that are gone is used again
            text = decoder.open()
            decoder.forward({text: PROMPTS[6]})
            decoder.close(text)
        assert decoder.cached_bytes == held
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", MADE)
def test_an_original_writes_as_in_transformers(name: str) -> None:
    """The likeliest tokens of the model in float32, up to two that are equal within its rounding."""
    model = tiny_model(name, **MADE[name])
    for ids in (PROMPTS[1], PROMPTS[2]):
        request = Request(0, tuple(ids), 20, lambda _: False)
        ours = [*ids, *written(model, [request], size=2)[0]]
        theirs = by_transformers(model, torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert len(ours) == len(theirs[0])
        at = next((i for i, pair in enumerate(zip(ours, theirs[0].tolist(), strict=True)) if len({*pair}) > 1), None)
        if at is not None:
            with torch.no_grad():
                found = model(theirs[:, :at]).logits[0, -1]
            assert found.max() - found[ours[at]] < 1e-5 * found.std()


def test_keys_and_values_in_8_bits() -> None:
    """A position and head: half a step of 127 at most, so logits stay near; a quarter of the memory, and the scales."""
    model = tiny_model("llama", head_dim=32)
    ids = [RANDOM.randrange(1, 67) for _ in range(200)]
    exact, rounded = Decoder(parts(model, dense=True)), Decoder(parts(model, dense=True), cache="int8")
    first, second = (decoder.forward({decoder.open(): ids})[0] for decoder in (exact, rounded))
    assert not torch.equal(first, second)
    assert (first - second).norm() < 0.02 * first.norm()


def test_sampling_is_the_softmax() -> None:
    """Of 4,000 seeds; by the temperature, too."""
    model = tiny_model("llama")
    first = Decoder(parts(model, dense=True))
    logits = first.forward({first.open(): [5, 6]})[0]
    for heat in (1.0, 0.3):
        asked = (Request(i, (5, 6), 1, lambda _: False, Sampling(heat, i)) for i in range(4000))
        found = torch.tensor([text[0] for _, text in batch(model, size=64).write(asked)])
        share = torch.bincount(found, minlength=len(logits)) / 4000
        wanted = (logits / heat).softmax(-1)
        assert ((share - wanted).abs() < 5 * (wanted * (1 - wanted) / 4000).sqrt() + 1e-3).all()


def test_the_references_products_are_those_of_float32() -> None:
    model = packed("llama")
    with kernels.computing("w2a16"):
        exact = written(model, requests(), size=4)
    with kernels.computing("reference"):
        assert written(model, requests(), size=4) == exact
        with pytest.raises(Unsuitable, match="reference"):
            batch(model.to(torch.bfloat16), size=4)


def test_what_cannot_be_is_one_line() -> None:
    model = packed("llama")
    with pytest.raises(UPQError, match="a batch of 0 texts"):
        batch(model, size=0)
    with pytest.raises(UPQError, match="stored as float32 or int8, not 'int4'"):
        batch(model, size=1, cache="int4")  # type: ignore[arg-type]
    held: Batch[int] = batch(model, size=1, context=20)
    with pytest.raises(UPQError, match="a prompt of 15 tokens and 6 to write are more than the model's context of 20"):
        held.add(Request(0, tuple(range(15)), 6, lambda _: False))
    with pytest.raises(UPQError, match="an empty prompt"):
        held.add(Request(0, (), 6, lambda _: False))
    with pytest.raises(UPQError, match="token ids"):
        list(held.write([Request(0, (3, 999), 6, lambda _: False)]))
