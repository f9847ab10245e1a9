"""The one error a user is meant to see: a single line with the place, the fault and the remedy."""

from __future__ import annotations


class UPQError(Exception):
    """Bad input or an impossible request. The command line prints the message and exits with code 2."""
