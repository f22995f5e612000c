"""A whole LLaVA model in one step: a published checkpoint in, language model and projector file out.

The layout of the original authors and that of Hugging Face both become the same two files. Every tensor is
planned before the first byte is written, both files are written beside their names, and they get them
together, when both have been read back and the library has opened them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .._part_file import check_new
from .._template_choice import choose
from .chat_template import jinja
from .checkpoints.checkpoint import Checkpoint, checkpoint_files
from .checkpoints.json_file import Config
from .checkpoints.tensor import Tensor
from .errors import CheckpointError, NoCheckpoint, OutputError, shown
from .gguf_out import Metadata, OutTensor, written
from .language_model import config_ids, language_metadata, language_tensors
from .library import opened_by_library
from .llama_params import read_llama_params
from .llava_config import is_hugging_face, tower_base, tower_folders
from .mixes import OUT_TYPES, language_plan
from .names import projector_name, projector_type, tower_name
from .projector_file import OUTPUT_OF, Part, projector_plan, stored_layers
from .script import log
from .surgery import find_projector, renamed
from .tokenizer_files import read_vocabulary
from .vision_params import LlavaFacts, VisionParams, llava_facts, pixel_settings, vision_params, weight_files
from .vit_config import read_llava_config, tower_settings
from .vocabulary import Vocabulary
from .xtuner import adapted_tower


@dataclass(frozen=True)
class Options:
    """The flags of the script; defaults as there."""

    outtype: str = "f16"
    mmproj_outtype: str = "f16"
    vision_tower: Path | None = None
    template: str | None = None
    name: str | None = None
    pad_vocab: bool = False
    check: bool = True
    overwrite: bool = True


@dataclass(frozen=True)
class Model:
    """The two files that were written."""

    model: Path
    mmproj: Path
    template: str


@dataclass(frozen=True)
class _Plan:
    path: Path
    metadata: Metadata
    tensors: list[OutTensor]


def convert(folder: Path, output_folder: Path, options: Options) -> Model:
    """Write OUT/<name>-<type>.gguf and OUT/mmproj-<name>-<type>.gguf, or neither.

    Raises CheckpointError, OutputError, ValueError, OSError (FileExistsError without `options.overwrite`).
    """
    config, settings = read_llava_config(folder)
    name = options.name or model_name(folder)
    if not name or "/" in name or os.sep in name or "\0" in name:
        raise OutputError(f"--name {shown(name)}: need a plain file name")
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint(checkpoint_files(folder)))
        projector = find_projector(folder, checkpoint, stack)
        params, facts, tower = _tower(folder, config, settings, checkpoint, options, stack)
        layout = "Hugging Face" if is_hugging_face(config.table) else "original"
        kind = "LLaVA-1.6" if facts.pinpoints else "LLaVA-1.5"
        log.info("%s: %s in the %s layout, %d tensors", folder, kind, layout, len(checkpoint))
        log.info("vision tower: %d layers of %d, from %s", params.n_layer, params.n_embd, tower.path)
        out_kind = OUT_TYPES[options.mmproj_outtype]
        projector_path = output_folder / f"mmproj-{name}-{out_kind}.gguf"
        plan = projector_plan(name, params, facts, tower, Part(folder, projector), out_kind)
        mmproj = _Plan(projector_path, *plan)
        language, template = _language_model(folder, output_folder, name, config, checkpoint, options)
        _check_widths(folder, mmproj, language)
        if not options.overwrite:
            for path in (mmproj.path, language.path):
                check_new(path)
        output_folder.mkdir(parents=True, exist_ok=True)
        sources = [tensor.source for tensor in (*mmproj.tensors, *language.tensors)]
        inputs = {source.file.path for source in sources if isinstance(source, Tensor)}
        written_mmproj = stack.enter_context(_written(mmproj, inputs))
        written_model = stack.enter_context(_written(language, inputs))
        if options.check:
            opened_by_library(written_model, written_mmproj)
    return Model(language.path, mmproj.path, template)


def _written(plan: _Plan, inputs: set[Path]) -> contextlib.AbstractContextManager[Path]:
    return written(plan.path, plan.metadata, plan.tensors, inputs=sorted(inputs))


def model_name(folder: Path) -> str:
    """The folder's name as it was given; in a cache of Hugging Face's hub, the repository's."""
    path = Path(os.path.abspath(folder))
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rsplit("--", 1)[-1]
    return path.name


# The vision tower


def _tower(
    folder: Path,
    config: Config,
    settings: Config,
    checkpoint: Checkpoint,
    options: Options,
    stack: contextlib.ExitStack,
) -> tuple[VisionParams, LlavaFacts, Part]:
    """The tower's settings and tensors: the checkpoint's own, which was trained with it, else another
    folder's.
    """
    own = renamed(checkpoint, tower_name)
    if own:
        tower = Part(folder, own)
        vision = tower_settings(folder, config, options.vision_tower)
    else:
        source = options.vision_tower or _tower_folder(folder, config)
        tensors = adapted_tower(folder, stack.enter_context(Checkpoint(weight_files(source))), stack)
        tower = Part(source, tensors)
        vision = tower_settings(folder, config, source)
    pixels: Mapping[str, Any] = {}
    for place in (options.vision_tower, folder, tower.path, *tower_folders(folder, config.table)):
        pixels = pixels or ({} if place is None else pixel_settings(place))
    params = vision_params(vision, pixels)
    facts = llava_facts(settings, params)
    return replace(params, n_layer=stored_layers(tower, params, facts)), facts, tower


def _tower_folder(folder: Path, config: Config) -> Path:
    for found in tower_folders(folder, config.table):
        with contextlib.suppress(NoCheckpoint):
            checkpoint_files(found)
            return found
    named = tower_base(config.table)
    if named is None:
        raise CheckpointError(
            f"{folder}: no vision tower in the checkpoint, and its config.json names none (mm_vision_tower): "
            f"give its folder with --vision-tower"
        )
    name, base = named
    beside = Path(os.path.abspath(folder)).parent / base
    raise CheckpointError(
        f"{folder}: no vision tower in the checkpoint, which was trained with {shown(name)}: get that model "
        f"(its config.json and its weights) into {beside}, or give its folder with --vision-tower"
    )


# The language model


def _language_model(
    folder: Path, output_folder: Path, name: str, config: Config, checkpoint: Checkpoint, options: Options
) -> tuple[_Plan, str]:
    """The plan of its file, and the name of its template."""
    params, own = read_llama_params(folder, checkpoint, None)
    left = {
        key: value for key, value in checkpoint.items() if not projector_name(key) and not tower_name(key)
    }
    plan = language_plan(options.outtype, params)
    tensors = language_tensors(left, params, plan, skip_unknown=True)
    n_vocab = tensors[0].shape[0]
    outer = config_ids(config)
    ids = {key: outer[key] if value is None else value for key, value in config_ids(own).items()}
    found = read_vocabulary(folder, ("spm", "hfft"), ids)
    vocabulary = _fitted(found, n_vocab, options.pad_vocab)
    names = [name, model_name(folder), *_names_in(config), *_names_in(own)]
    template = options.template or _told_template(names, vocabulary)
    if vocabulary.chat_template is None:
        vocabulary = replace(vocabulary, chat_template=jinja(template))
    if config.get("mm_use_im_start_end") is True:
        log.warning(
            "mm_use_im_start_end: the model was trained with <im_start> and <im_end> around a picture, which no "
            "prompt template here writes"
        )
    metadata = language_metadata(name, params, n_vocab, plan.mix)
    metadata.text("pyllava.template", template)
    vocabulary.describe(metadata)
    return _Plan(output_folder / f"{name}-{plan.mix.name}.gguf", metadata, tensors), template


def _told_template(names: list[str], vocabulary: Vocabulary) -> str:
    found = choose(names, vocabulary.chat_template, {token.text for token in vocabulary.tokens}.__contains__)
    log.info("prompt template: %s (%s)", found.name, found.why)
    if found.doubt:
        log.warning("prompt template: %s; --template NAME chooses another than %s", found.doubt, found.name)
    return found.name


def _names_in(config: Config) -> list[str]:
    """What a config calls its model; not the folders of a path, which say nothing of it."""
    name = config.get("_name_or_path")
    return [re.split(r"[/\\]", name.rstrip("/\\"))[-1]] if isinstance(name, str) else []


def _fitted(vocabulary: Vocabulary, n_vocab: int, pad: bool) -> Vocabulary:
    """One token per row. Rows that round the vocabulary up are kept, as tokens that no text is read as: the
    model gives exactly the numbers that the checkpoint gives, whatever lies in those rows.
    """
    rounded = len(vocabulary) < n_vocab and vocabulary.is_rounded_up(n_vocab)
    return vocabulary.fitted(n_vocab, pad=pad or rounded, drop_added=True)


def _check_widths(folder: Path, mmproj: _Plan, language: _Plan) -> None:
    """The projector ends where the language model begins."""
    shapes = {tensor.name: tensor.shape for tensor in mmproj.tensors}
    kind = projector_type(name for name in shapes if name.startswith("mm."))
    width, n_embd = shapes[OUTPUT_OF[str(kind)]][0], language.tensors[0].shape[1]
    if width != n_embd:
        raise CheckpointError(
            f"{folder}: the projector gives rows of {width}, the language model takes {n_embd}"
        )
