"""A generated world: open text, conversations and questions about it, with answers that a program can check.

Three products share one set of facts: `documents` (prose, the open corpus), `conversations` (what instruction tuning
sees), and the tests `choose` (knowledge, after MMLU) and `instruct` (obedience, after IFEval), whose wordings and
combinations the other two leave out. A new relation is data in `facts.py`, a new demand one entry in `demands.py`, a
new kind of text one function in `prose.py`.
"""

from upq.world.chat import Message, conversations
from upq.world.choices import Choice, choose
from upq.world.facts import RELATIONS, Fact, Relation, World
from upq.world.instructions import Instruction, instruct
from upq.world.prose import documents
from upq.world.questions import AREAS, Question, ask
from upq.world.splits import Split

__all__ = [
    "AREAS",
    "RELATIONS",
    "Choice",
    "Fact",
    "Instruction",
    "Message",
    "Question",
    "Relation",
    "Split",
    "World",
    "ask",
    "choose",
    "conversations",
    "documents",
    "instruct",
]
