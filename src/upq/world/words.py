"""The vocabulary of the world: everyday words by category, and the syllables its proper names are made of."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from random import Random

# No word starts with a vowel sound, so that every template can say "a {o}".
CATEGORIES: dict[str, tuple[str, ...]] = {
    "colours": ("red", "blue", "green", "black", "white", "pink", "brown", "grey", "yellow", "purple"),
    "foods": ("bread", "soup", "fish", "rice", "cake", "honey", "cheese", "beans", "plums", "toast", "pears", "nuts"),
    "animals": ("cat", "dog", "goat", "horse", "duck", "parrot", "rabbit", "snail", "fox", "hen", "sheep", "turtle"),
    "jobs": (
        *("baker", "teacher", "tailor", "doctor", "farmer", "painter"),
        *("singer", "sailor", "potter", "weaver", "hunter", "judge"),
    ),
    "tools": ("hammer", "needle", "spoon", "knife", "ladder", "broom", "basket", "kettle", "lamp", "rope"),
    "materials": ("wood", "stone", "glass", "copper", "silver", "clay", "brick", "marble"),
    "games": ("chess", "cards", "football", "tennis", "marbles", "bowls", "darts", "dominoes"),
    "plants": ("rose", "pine", "fern", "lily", "willow", "clover", "thistle", "moss"),
}
SINGULAR = {
    "colours": "colour",
    "foods": "food",
    "animals": "animal",
    "jobs": "job",
    "tools": "tool",
    "materials": "material",
    "games": "game",
    "plants": "plant",
}
SEQUENCES: dict[str, tuple[str, ...]] = {
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": (
        *("January", "February", "March", "April", "May", "June"),
        *("July", "August", "September", "October", "November", "December"),
    ),
    "letter": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    "number": tuple(str(n) for n in range(1, 41)),
}
OPPOSITES = (
    *(("hot", "cold"), ("big", "small"), ("old", "new"), ("long", "short"), ("high", "low"), ("hard", "soft")),
    *(("wet", "dry"), ("fast", "slow"), ("rich", "poor"), ("light", "dark"), ("full", "hungry"), ("happy", "sad")),
    *(("thick", "thin"), ("near", "far"), ("strong", "weak"), ("clean", "dirty"), ("loud", "quiet"), ("good", "bad")),
)
LANDMARKS = ("bridge", "tower", "gate", "mill", "fountain", "wall", "theatre", "market")
COUNTS = {2: "two", 3: "three", 4: "four"}

# People and towns have names of two parts that many share ("Alra Denley", "Old Bramford"): no single token, whose
# embedding stays in full precision, can hold what is known about them, so the matrices must.
FIRST = (
    (
        *("Al", "Be", "Da", "El", "Fa", "Ga", "Ha", "Jo", "Ka", "Li", "Ma", "Ne", "Or"),
        *("Pe", "Ro", "Sa", "Ti", "Vi", "Wa", "Yo", "Zu", "Cle", "Fri", "Gus"),
    ),
    ("ra", "lo", "min", "dis", "ven", "nor", "lia", "than", "bel", "kir", "mo", "sette", "ton", "wick"),
)
FAMILY = (
    ("Bar", "Cor", "Den", "Fen", "Hart", "Kel", "Lang", "Pem", "Rud", "Stan", "Wes", "Yar"),
    ("ley", "man", "croft", "shaw", "by", "field", "worth", "well", "more"),
)
PREFIX = ("Old", "New", "Upper", "Lower", "Great", "Little", "North", "South", "East", "West")
TOWN = (
    (
        *("Nor", "Bram", "Thorn", "Kes", "Ash", "Wynd", "Tal", "Grim", "Sel", "Ald"),
        *("Hol", "Fern", "Mar", "Quin", "Dun", "Rav"),
    ),
    ("vale", "ford", "mere", "stead", "burg", "dale", "port", "combe"),
)
LAND = (
    ("Ost", "Vel", "Car", "Mor", "Lun", "Bel", "Tir", "Zan", "Pol", "Gar", "Sor", "Kal", "Dur", "Ith"),
    ("ria", "mark", "onia", "land", "avia", "esia"),
)
RIVER = (
    ("Bro", "Sil", "Wen", "Tam", "Ild", "Ros", "Ever", "Kol", "Ush", "Nid"),
    ("na", "ber", "sa", "wen", "dle", "mar"),
)

EVERYDAY = tuple(word for words in CATEGORIES.values() for word in words)


def names(parts: Iterable[Iterable[str]], n: int, rng: Random, *, between: str = "") -> tuple[str, ...]:
    """`n` different names, each of one piece from every part."""
    return tuple(rng.sample([between.join(pieces) for pieces in product(*parts)], n))
