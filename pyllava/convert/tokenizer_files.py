"""Which of a checkpoint's files its vocabulary is read from: `tokenizer.model` (SentencePiece), or
`tokenizer.json`, which holds the same kind of vocabulary in Hugging Face's form, or byte-level BPE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoints.json_file import read_json_if_there
from .errors import CheckpointError
from .special_tokens import chat_template_of, find_end_of_turn, find_special_ids, special_names
from .vocabulary import Vocabulary, checked
from .vocabulary_hf import read_hf
from .vocabulary_spm import read_spm


def read_vocabulary(folder: Path, kinds: Sequence[str], config_ids: Mapping[str, Any]) -> Vocabulary:
    """The first of `kinds` ("spm", "hfft") that `folder` holds; `config_ids`: the ids in config.json."""
    settings = read_json_if_there(folder / "tokenizer_config.json")
    names = special_names(folder, settings)
    for kind in kinds:
        path = folder / {"spm": "tokenizer.model", "hfft": "tokenizer.json"}[kind]
        if path.exists():
            vocabulary = read_spm(path, settings, names) if kind == "spm" else read_hf(path, names)
            break
    else:
        raise CheckpointError(
            f"{folder}: no tokenizer.model or tokenizer.json of the kinds {','.join(kinds)}"
        )
    ids = find_special_ids(vocabulary, names, config_ids)
    ids |= find_end_of_turn(folder, vocabulary, ids["eos"], config_ids)
    add_bos = settings.get("add_bos_token")
    usual = vocabulary.add_bos if vocabulary.is_byte_level else True
    add_eos = settings.get("add_eos_token")
    return dataclasses.replace(
        checked(vocabulary),
        special_ids=ids,
        add_bos="bos" in ids and (add_bos if isinstance(add_bos, bool) else usual),
        add_eos=add_eos if isinstance(add_eos, bool) else False,
        chat_template=chat_template_of(folder, settings),
    )
