"""The exceptions of pyllava: each is a PyllavaError, some are also the built-in one would expect.

A missing file stays FileNotFoundError, a wrong argument TypeError or ValueError: those are not repeated here.
"""

from __future__ import annotations


class PyllavaError(RuntimeError):
    """The base of all of them: a request that cannot be carried out, with one line that says why."""


class ModelFileError(PyllavaError, ValueError):
    """A GGUF file is damaged, cut short or not GGUF at all; the text names file, field and offset."""


class ModelMismatchError(PyllavaError):
    """The parts of a model do not fit: a tensor of another shape, or a projector for another model."""


class UnsupportedModelError(PyllavaError):
    """A sound file that holds what this version cannot run: another architecture, projector or tokenizer."""


class ImageError(PyllavaError, ValueError):
    """A picture cannot be used: no image, damaged, cut short, too large, an array of the wrong shape."""


class ContextOverflowError(PyllavaError):
    """Prompt, images and answer need more positions than the context has; the text gives both numbers."""


class ModelMemoryError(PyllavaError, MemoryError):
    """Weights, KV cache or buffers would not fit in memory; the text says what is needed and what is free."""


class DeviceError(PyllavaError):
    """The device asked for does not exist in this build or on this machine, or it failed while computing."""


class GenerationCancelled(PyllavaError):
    """``cancel()`` stopped a running call; the object stays usable."""


class HubError(PyllavaError):
    """A repository of a model hub cannot be reached or read, or what it holds is no model; the text says what can be done."""


class NumericError(PyllavaError):
    """Logits, or weights to quantise, are NaN or infinite: a broken file or an overflow, never usable."""


class ClosedError(PyllavaError):
    """The object was closed before the call, or while the call ran."""


class ForkError(PyllavaError):
    """A model loaded before ``fork()`` was used in the child: load it there, or start with "spawn"."""
