"""The vocabulary of the world: everyday words by category, and the syllables its proper names are made of."""

from __future__ import annotations

from itertools import product
from random import Random

# No word starts with a vowel sound, so that every template can say "a {o}".
CATEGORIES: dict[str, tuple[str, ...]] = {
    "colours": ("red", "blue", "green", "black", "white", "pink", "brown", "grey"),
    "foods": ("bread", "soup", "fish", "rice", "cake", "honey", "cheese", "beans", "plums", "toast"),
    "animals": ("cat", "dog", "goat", "horse", "duck", "parrot", "rabbit", "snail", "fox", "hen"),
    "jobs": ("baker", "teacher", "tailor", "doctor", "farmer", "painter", "singer", "sailor", "potter", "weaver"),
    "materials": ("wood", "stone", "glass", "copper", "silver", "clay"),
}
LANDMARKS = ("bridge", "tower", "gate", "mill", "fountain", "wall", "theatre", "market")

PERSON = (
    ("Al", "Be", "Da", "El", "Fa", "Ga", "Ha", "Jo", "Ka", "Li", "Ma", "Ne", "Or", "Pe", "Ro", "Sa", "Ti", "Vi", "Wa"),
    ("ra", "lo", "min", "dis", "ven", "nor", "lia", "than", "bel", "kir", "mo", "sette"),
)
PLACE = (
    ("Nor", "Bram", "Thorn", "Kes", "Ash", "Wynd", "Tal", "Grim", "Sel", "Ald", "Hol", "Fern", "Mar", "Quin"),
    ("vale", "ford", "mere", "wick", "stead", "burg", "dale", "port"),
)
LAND = (
    ("Ost", "Vel", "Car", "Mor", "Lun", "Bel", "Tir", "Zan", "Pol", "Gar", "Sor", "Kal", "Dur", "Ith"),
    ("ria", "mark", "onia", "land", "avia", "esia"),
)

EVERYDAY = tuple(word for words in CATEGORIES.values() for word in words)


def names(syllables: tuple[tuple[str, ...], tuple[str, ...]], n: int, rng: Random) -> tuple[str, ...]:
    """`n` different names, each a start and an end."""
    return tuple(rng.sample(["".join(pair) for pair in product(*syllables)], n))
