"""The judge of whole models: a checkpoint in the Hugging Face layout as `transformers` loads and runs it, float32.

The pixels are those of the original procedure (LLaVA's expand2square, and its anyres for 1.6), not of transformers'
image processors, which differ from what the models were trained with.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .reference import Array, logit_scale, next_pixels, pixels_of, torch, transformers
from .seed_models import SeedModel

Picture = npt.NDArray[np.uint8]
Prompt = Sequence["int | object"]
"""Token ids, and a mark of any other type where an image stands."""


class Judge:
    """A class of transformers with the checkpoint of a folder, float32."""

    def __init__(self, folder: Path, kind: str, image_token: int) -> None:
        self.image_token = image_token
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.net, info = getattr(transformers, kind).from_pretrained(
                folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
            )
        wrong = {what: names for what, names in info.items() if names}
        assert not wrong, f"transformers does not take this checkpoint: {wrong}"
        self.net.generation_config.eos_token_id = None

    def seen(self, *pictures: Picture) -> dict[str, Any]:
        """What the model takes of pictures."""
        raise NotImplementedError

    def embeddings(self, picture: Picture) -> Array:
        """float32 [n_tokens, n_embd]: what stands in the place of the image."""
        with torch.no_grad():
            (rows,) = self.net.get_image_features(**self.seen(picture)).pooler_output
        return np.ascontiguousarray(rows.numpy())

    def ids(self, prompt: Prompt, n_image: Sequence[int]) -> Any:
        """Token ids and marks -> one id for each row of each image."""
        counts, ids = iter(n_image), []
        for item in prompt:
            ids += [item] if isinstance(item, int) else [self.image_token] * next(counts)
        return torch.tensor([ids])

    def logits(self, prompt: Prompt, pictures: Sequence[Picture], n_image: Sequence[int]) -> Array:
        """float32 [n, n_vocab] of all positions; `n_image`: rows of each picture."""
        with torch.no_grad():
            out = self.net(input_ids=self.ids(prompt, n_image), use_cache=False, **self.seen(*pictures))
        return np.ascontiguousarray(out.logits[0].numpy()) / logit_scale(self.net.config.text_config)

    def greedy(self, prompt: Prompt, picture: Picture, n_image: int, n: int) -> list[int]:
        """The `n` likeliest next tokens, as transformers generates them."""
        ids = self.ids(prompt, [n_image])
        out = self.net.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            do_sample=False,
            **self.seen(picture),
        )
        return [int(i) for i in out[0, ids.shape[1] :]]


class Published(Judge):
    """LlavaForConditionalGeneration or LlavaNextForConditionalGeneration of a folder."""

    def __init__(self, folder: Path, model: SeedModel) -> None:
        self.model = model
        kind = f"Llava{'Next' if model.anyres else ''}ForConditionalGeneration"
        super().__init__(folder, kind, model.image_token)
        if model.anyres:
            # transformers reads a pair as height, width, the original as width, height: that decides between two
            # resolutions that fit as well. The original is right.
            turned = [[height, width] for width, height in self.net.config.image_grid_pinpoints]
            self.net.config.image_grid_pinpoints = turned
            self.net.model.config.image_grid_pinpoints = turned

    def seen(self, *pictures: Picture) -> dict[str, Any]:
        side = self.model.spec.image_size
        if not self.model.anyres:
            return {"pixel_values": torch.from_numpy(np.stack([pixels_of(p, side) for p in pictures]))}
        views = [next_pixels(picture, side, self.model.pinpoints) for picture in pictures]
        most = max(map(len, views))
        filled = [np.pad(x, ((0, most - len(x)), (0, 0), (0, 0), (0, 0))) for x in views]
        sizes = torch.tensor([picture.shape[:2] for picture in pictures])
        return {"pixel_values": torch.from_numpy(np.stack(filled)), "image_sizes": sizes}
