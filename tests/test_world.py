"""Laws of the invented world: reproducible, told in full, and tested by nothing that training gives away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from random import Random

import pytest

from upq.core.errors import UPQError
from upq.world import AREAS, RELATIONS, World, ask, choose, conversations, documents, instruct
from upq.world.demands import DEMANDS
from upq.world.prose import FORMS

WORLD = World(seed=3, size=60)


def test_same_seed_same_output() -> None:
    again = World(seed=3, size=60)
    assert again.facts == WORLD.facts
    assert list(documents(again, 50, 1)) == list(documents(WORLD, 50, 1))
    assert list(conversations(again, 50, 1)) == list(conversations(WORLD, 50, 1))
    assert instruct(again, Random(1), "test") == instruct(WORLD, Random(1), "test")


def test_other_seed_other_output() -> None:
    assert World(seed=4, size=60).people != WORLD.people
    assert list(documents(WORLD, 20, 2)) != list(documents(WORLD, 20, 1))
    assert list(conversations(WORLD, 20, 2)) != list(conversations(WORLD, 20, 1))


@pytest.mark.parametrize("size", [30, 60, 800, 1000])
def test_every_subject_has_one_object_in_every_relation(size: int) -> None:
    world = World(size=size)
    subjects: dict[str, Sequence[str]] = {"people": world.people, "places": world.places, "things": world.things}
    asked = {(fact.relation.name, fact.subject) for fact in world.facts}
    assert len(asked) == len(world.facts)
    assert asked == {(relation.name, s) for relation in RELATIONS for s in subjects[relation.subjects]}
    assert all(fact.object in world.pool(fact.relation.objects) for fact in world.facts)
    assert all(fact.subject != fact.object for fact in world.facts)


def test_chains_follow_their_links() -> None:
    objects = {(fact.relation.name, fact.subject): fact.object for fact in WORLD.facts}
    places = dict(zip(WORLD.things, WORLD.places, strict=True))
    chains = [fact for fact in WORLD.facts if fact.relation.via]
    assert chains
    for fact in chains:
        first, second = fact.relation.via or ("", "")
        between = places[fact.subject] if first == "place" else objects[first, fact.subject]
        assert fact.object == objects[second, between]


@pytest.mark.parametrize("size", [29, 1001])
def test_size_out_of_range_is_a_user_error(size: int) -> None:
    with pytest.raises(UPQError, match="size of a world"):
        World(size=size)


def test_documents_tell_every_fact() -> None:
    text = "\n".join(documents(WORLD, 4000, 0))
    for fact in WORLD.facts:
        assert any(fact.told(template) in text for template in fact.relation.statements), fact


def test_documents_hold_no_chat_format() -> None:
    text = "\n".join(documents(WORLD, 2000, 0))
    assert "<|" not in text
    assert "assistant" not in text


@pytest.mark.parametrize("form", [form.__name__ for form in FORMS])
def test_documents_of_one_form(form: str) -> None:
    texts = list(documents(WORLD, 20, 0, forms=(form,)))
    assert len(texts) == 20
    assert all(text and text == text.strip() for text in texts)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_what_is_tested_is_in_no_conversation_and_no_document(split: str) -> None:
    # The split is by checksums of wording and combination, so neither seed nor length of the text can leak an item.
    talks = {m["content"] for talk in conversations(WORLD, 2000, 0) for m in talk if m["role"] == "user"}
    text = "\n".join([*documents(WORLD, 2000, 0), *talks])
    rng = Random(0)
    for area in AREAS:
        for _ in range(20):
            assert choose(WORLD, rng, split, area=area).question not in text  # type: ignore[arg-type]
    for _ in range(200):
        assert instruct(WORLD, rng, split).prompt not in talks  # type: ignore[arg-type]


def test_a_tested_fact_is_asked_for_nowhere_else() -> None:
    """Not even in other words: what a test asks, training only ever tells."""
    rng = Random(0)
    tested = {ask(WORLD, rng, "test", area="people").sentences for _ in range(300)}
    trained = {ask(WORLD, rng, "train", area="people").sentences for _ in range(3000)}
    assert tested.isdisjoint(trained)


@pytest.mark.parametrize("area", AREAS)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_question_has_one_right_answer(area: str, split: str) -> None:
    rng = Random(0)
    for _ in range(50):
        question = ask(WORLD, rng, split, area=area)  # type: ignore[arg-type]
        assert question.area == area
        assert question.answer not in question.rivals
        assert len(set(question.rivals)) >= 3
        assert all(question.answer.lower() in sentence.lower() for sentence in question.sentences)
        choice = choose(WORLD, rng, split, area=area)  # type: ignore[arg-type]
        assert len(set(choice.options)) == 4


def test_right_options_are_spread_evenly() -> None:
    rng = Random(0)
    answers = [choose(WORLD, rng, "test").answer for _ in range(2000)]
    assert all(abs(answers.count(i) / 2000 - 0.25) < 0.04 for i in range(4))


def test_parts_of_names_are_shared() -> None:
    """No token names one person or town, so that no embedding can hold what is known about them."""
    for names in (World().people, World().places):
        for part in zip(*(name.split() for name in names), strict=True):
            assert min(Counter(part).values()) > 1


def test_obedient_answers_pass_lm_evals_own_checkers() -> None:
    pytest.importorskip("langdetect", reason="IFEval's checkers need lm-eval's extras")
    utils = pytest.importorskip("lm_eval.tasks.ifeval.utils", reason="needs lm-eval")
    rng, seen = Random(0), set()
    for i in range(600):
        made = instruct(WORLD, rng, ("train", "validation", "test")[i % 3])  # type: ignore[arg-type]
        asked = utils.InputExample(0, list(made.ids), made.prompt, list(made.kwargs))
        result = utils.test_instruction_following_strict(asked, made.answer)
        assert result.follow_all_instructions, made
        seen.update(made.ids)
    assert seen == {demand.id for demand in DEMANDS} | {"detectable_format:constrained_response"}


def test_an_answer_to_another_prompt_seldom_passes() -> None:
    """The demands ask for something: what obeys one of them does not obey the next by chance."""
    pytest.importorskip("langdetect", reason="IFEval's checkers need lm-eval's extras")
    utils = pytest.importorskip("lm_eval.tasks.ifeval.utils", reason="needs lm-eval")
    rng = Random(0)
    made = [instruct(WORLD, rng, "test") for _ in range(300)]
    passed = 0
    for asked, other in pairwise(made):
        example = utils.InputExample(0, list(asked.ids), asked.prompt, list(asked.kwargs))
        passed += utils.test_instruction_following_strict(example, other.answer).follow_all_instructions
    assert passed / len(made) < 0.2
