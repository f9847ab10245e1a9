"""Imports of every run, and their objects out of the garbage collector's sight: a fork then finds both done."""

import atexit
import gc

import upq.cli
import upq.run.run  # noqa: F401

gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)
