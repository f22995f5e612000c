"""Answers as JSON: an object for a question, or a line for each picture."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from .._terminal import one_line
from .ask import Answers
from .structure_options import structures_given

if TYPE_CHECKING:
    from PIL import Image

    from ..answer import Answer, TokenLogprob
    from ..images import ImageSource
    from ..llava import Llava


class JsonAnswers(Answers):
    """Writes what is known of each answer, or with ``--jsonl`` why there is none, instead of its text."""

    def tell(self, model: Llava, run: list[ImageSource], pictures: list[Image.Image]) -> Answer:
        probabilities = None
        if self.options.choices:
            scores = self.score(model, pictures)
            answer, probabilities = scores.answer, dict(scores)
        else:
            answer = self.stream(model, pictures).whole()
        record = {**self._asked(run), **answer_record(answer)}
        if self.options.logprobs is not None:
            record["logprobs"] = [_entry(token) for token in answer.logprobs]
        if probabilities is not None:
            record["probabilities"] = probabilities
        elif structures_given(self.options):
            record["data"] = answer.data
        self._write({**record, "model": _model_record(model)})
        return answer

    def miss(self, run: list[ImageSource], error: Exception) -> None:
        self._write({**self._asked(run), "error": {"type": type(error).__name__, "message": one_line(error)}})

    def is_single(self) -> bool:
        return not self.options.jsonl and super().is_single()

    def _asked(self, run: list[ImageSource]) -> dict[str, Any]:
        names = [self._path(image) for image in run]
        return {"picture": names[0] if len(names) == 1 else names, "prompt": self.request.prompt}

    def _path(self, image: ImageSource) -> str:
        """As it was given, however long, unless it is the picture itself."""
        from .._sources import is_data_url

        is_path = isinstance(image, str) and image != "-" and not is_data_url(image)
        return str(image) if is_path else self.name(image)

    def _write(self, record: dict[str, Any]) -> None:
        """In ASCII: whatever the encoding of stdout, a reader of JSON gets the same text."""
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()


def answer_record(answer: Answer) -> dict[str, Any]:
    usage = dataclasses.asdict(answer.usage) | {"prompt_tokens": answer.usage.prompt_tokens}
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "usage": usage,
        "timings": dataclasses.asdict(answer.timings),
    }


def _entry(token: TokenLogprob) -> dict[str, Any]:
    """A token; its bytes as numbers, since a token may be part of a character."""
    entry = {
        "token": token.token,
        "id": token.id,
        "bytes": list(token.bytes),
        "logprob": token.logprob,
    }
    return entry | ({"alternatives": list(map(_entry, token.alternatives))} if token.alternatives else {})


def _model_record(model: Llava) -> dict[str, Any]:
    files = model.files
    return {
        "file": str(files.model),
        "mmproj": None if files.mmproj is None else str(files.mmproj),
        "template": model.template.name,
        "precision": model.precision,
    }
