"""An invented world that is told, talked about and asked after: open data, generated, with answers a program can check.

Three products share one set of facts: `documents` (prose, the open corpus), `conversations` (what instruction tuning
sees) and `quiz` (what neither contains). A new relation is data in `facts.py`, a new skill one function in `tasks.py`,
a new kind of text one function in `prose.py`.
"""

from upq.data.world.chat import Message, conversations
from upq.data.world.checks import Check, satisfies
from upq.data.world.exam import Item, quiz, score
from upq.data.world.facts import RELATIONS, Fact, Relation, World
from upq.data.world.prose import documents

__all__ = [
    "RELATIONS",
    "Check",
    "Fact",
    "Item",
    "Message",
    "Relation",
    "World",
    "conversations",
    "documents",
    "quiz",
    "satisfies",
    "score",
]
