"""``pyllava-cli``: a file for what asks a question, and one for each command."""

from .main import main

__all__ = ["main"]
