"""Laws of the invented world: reproducible, told in full, and a quiz that nothing has given away."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from upq.data.world import RELATIONS, Check, World, conversations, documents, quiz, satisfies, score
from upq.data.world.checks import CHECKERS
from upq.data.world.prose import FORMS
from upq.data.world.tasks import TASKS, draw
from upq.errors import UPQError

WORLD = World(seed=3, size=12)


def test_same_seed_same_output() -> None:
    again = World(seed=3, size=12)
    assert again.facts == WORLD.facts
    assert list(documents(again, 50, 1)) == list(documents(WORLD, 50, 1))
    assert list(conversations(again, 50, 1)) == list(conversations(WORLD, 50, 1))
    assert quiz(again, 40, 1) == quiz(WORLD, 40, 1)


def test_other_seed_other_output() -> None:
    assert World(seed=4, size=12).people != WORLD.people
    assert list(documents(WORLD, 20, 2)) != list(documents(WORLD, 20, 1))
    assert list(conversations(WORLD, 20, 2)) != list(conversations(WORLD, 20, 1))
    assert quiz(WORLD, 40, 2) != quiz(WORLD, 40, 1)


@pytest.mark.parametrize("size", [6, 12, 60, 200])
def test_every_subject_has_one_object_in_every_relation(size: int) -> None:
    world = World(size=size)
    subjects: dict[str, Sequence[str]] = {"people": world.people, "places": world.places, "things": world.things}
    asked = {(fact.relation.name, fact.subject) for fact in world.facts}
    assert len(asked) == len(world.facts)
    assert asked == {(relation.name, s) for relation in RELATIONS for s in subjects[relation.subjects]}
    assert all(fact.object in world.pool(fact.relation.objects) for fact in world.facts)


def test_size_out_of_range_is_a_user_error() -> None:
    with pytest.raises(UPQError, match="size of a world"):
        World(size=5)


def test_documents_tell_every_fact() -> None:
    text = "\n".join(documents(WORLD, 600, 0))
    for fact in WORLD.facts:
        assert any(fact.told(template) in text for template in fact.relation.statements), fact


def test_documents_hold_no_chat_format() -> None:
    text = "\n".join(documents(WORLD, 600, 0))
    assert "<|" not in text
    assert "assistant" not in text


@pytest.mark.parametrize("form", [form.__name__ for form in FORMS])
def test_documents_of_one_form(form: str) -> None:
    texts = list(documents(WORLD, 20, 0, forms=(form,)))
    assert len(texts) == 20
    assert all(text and text == text.strip() for text in texts)


def test_quiz_is_in_no_conversation_and_no_document() -> None:
    # Longer texts than any training run of the tests; the split is by topic, so neither seed nor length can leak.
    talks = {m["content"] for talk in conversations(WORLD, 5000, 0) for m in talk if m["role"] == "user"}
    text = "\n".join(documents(WORLD, 3000, 0))
    for item in quiz(WORLD, 100, 0):
        prompt = item.messages[-1]["content"]
        assert prompt not in talks
        # A list of words may go on to become another prompt, so a prompt counts where it ends.
        assert f"{prompt}\n" not in text
        assert f'{prompt}"' not in text


def test_quiz_is_half_knowledge_half_obedience_of_every_kind() -> None:
    items = quiz(WORLD, 100, 0)
    assert len({item.messages[-1]["content"] for item in items}) == len(items) == 100
    assert sum(item.knows for item in items) == 50
    assert {item.kind for item in items} == set(TASKS)


def test_quiz_larger_than_the_world_is_a_user_error() -> None:
    with pytest.raises(UPQError, match="ask for fewer"):
        quiz(World(size=6), 5000, 0)


@pytest.mark.parametrize("task", TASKS)
def test_checkers_accept_the_reference_and_reject_what_is_wrong(task: str) -> None:
    rng = Random(0)
    for held_out in (False, True):
        for _ in range(30):
            exchange = draw(WORLD, rng, task=task, held_out=held_out)
            assert satisfies(exchange.check, exchange.answer), exchange
            assert satisfies(exchange.check, f" {exchange.answer}\n"), exchange
            for wrong in ("", "nonsense", "No. No. no", "Here: nonsense, and more of it"):
                assert not satisfies(exchange.check, wrong), (exchange, wrong)


def test_knowledge_rejects_a_rival_and_a_list_of_all() -> None:
    item = quiz(WORLD, 2, 0)[0]
    expected, *rivals = item.check.args
    assert score(item, f"It is {expected}, I think.")
    assert not score(item, f"It is {rivals[0]}.")
    assert not score(item, f"{expected} or {rivals[0]}")


@pytest.mark.parametrize(
    ("kind", "args", "right", "wrong"),
    [
        ("says", ("red", "blue"), "A Red one.", "A redder one."),
        ("one_word", ("red", "blue"), "Blue.", "red blue"),
        ("full_sentence", ("red",), "It is red.", "It is red"),
        ("capitals", ("red",), "IT IS RED!", "IT IS rED!"),
        ("starts_with", ("Well", "red"), "Well, it is red.", "Wellington is red."),
        ("ends_with", ("That is all.", "red"), "It is red. That is all.", "It is red. That is all"),
        ("exactly", ("dog cat",), "Here: dog, cat.", "dog cat cat"),
        ("items", ("2", "red", "blue", "pink"), "Here you are: pink, red", "red, red"),
    ],
)
def test_checkers_by_example(kind: str, args: tuple[str, ...], right: str, wrong: str) -> None:
    assert satisfies(Check(kind, args), right)
    assert not satisfies(Check(kind, args), wrong)


def test_every_checker_has_an_example() -> None:
    marks = test_checkers_by_example.pytestmark  # type: ignore[attr-defined]
    assert {example[0] for example in marks[0].args[1]} == set(CHECKERS)
