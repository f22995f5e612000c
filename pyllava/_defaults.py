"""Numbers that hold unless told otherwise, in Python and on the command line."""

MAX_TOKENS = 512
"""Tokens of an answer, at most."""
