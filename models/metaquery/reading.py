"""Reading a prompt, and the pictures it refers to, with a frozen Qwen2.5-VL: its states at MetaQuery's queries.

The queries stand after the assistant header of a chat without system prompt (UniPic 2.0, section 3.1). A batch is
padded behind the queries, and attention is causal: nothing that is read can see the padding, so no mask is needed.

Shapes: B prompts, T tokens of the longest row, Q queries, D width of the language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.metaquery.vlm import expand_pictures, load_vlm, prepare_pictures, refuse_control_tokens

PositionMode = Literal["flat", "mrope"]
POSITION_MODES: tuple[PositionMode, ...] = ("flat", "mrope")
VIEW_SCALE = 28 / 32
"""The VLM sees a reference at this share of the size at which the transformer does, as in the released inference."""
PIXELS_PER_TOKEN = 32
"""Side in pixels of the edit image's part that one token of the released VLM (28 pixels a token) then sees."""


@dataclass(frozen=True)
class _Prefix:
    """What stands before the queries: ids [t], embeddings [t, D], and the pictures' grids [n, 3] in patches."""

    ids: Tensor
    embeds: Tensor
    grids: Tensor | None


class QueryReader:
    """A frozen VLM that reads prompts for MetaQuery.

    `position_mode` says which positions the language model sees: `flat` counts tokens on all three axes, as the
    released inference does (on transformers 4.55), `mrope` is Qwen2.5-VL's own multimodal RoPE.
    """

    def __init__(
        self, vlm: Any, tokenizer: Any, image_processor: Any, *, position_mode: PositionMode = "flat"
    ) -> None:
        """Join loaded parts (see `load_vlm`); freezes `vlm`. Raises ValueError for an unknown mode."""
        if position_mode not in POSITION_MODES:
            raise ValueError(f"position_mode={position_mode!r} is none of {', '.join(POSITION_MODES)}")
        self.vlm = vlm.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.position_mode = position_mode
        self._checkpointing = False

    @classmethod
    def from_pretrained(
        cls,
        vlm_folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        position_mode: PositionMode = "flat",
    ) -> "QueryReader":
        """Load the folder of a Qwen2.5-VL. Raises as `models.metaquery.vlm.load_vlm` does."""
        return cls(*load_vlm(vlm_folder, dtype=dtype, device=device), position_mode=position_mode)

    @property
    def hidden_size(self) -> int:
        """D, the width that `MetaQueryConfig.llm_hidden_size` must have."""
        return self.vlm.config.text_config.hidden_size

    def enable_gradient_checkpointing(self) -> None:
        """Compute the language model's layers again in the backward pass instead of keeping their activations."""
        self.vlm.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        self._checkpointing = True

    def hidden_states(
        self,
        meta_queries: Tensor,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]] | None = None,
    ) -> Tensor:
        """Last hidden states [B, Q, D] at the queries, after the final norm, in the VLM's dtype.

        Differentiable in `meta_queries` [Q, D]; the VLM's weights get no gradient. Rows do not depend on each
        other but for rounding.

        Args:
            prompts: what to draw, or, where the row has images, how to edit the first.
            images: None, or for each prompt its references in order, none where it has none: at the sizes at which the
                transformer sees them.

        Raises:
            TypeError: a single string instead of a list.
            ValueError: lists of different lengths, queries of another width, a prompt with control tokens, or a
                picture that cannot be shown.
        """
        if isinstance(prompts, str):
            raise TypeError(f"hidden_states takes a list of prompts, not the string {prompts!r}")
        given = [()] * len(prompts) if images is None else list(images)
        if len(given) != len(prompts):
            raise ValueError(
                f"{len(given)} lists of images do not fit {len(prompts)} prompts: give one, maybe empty, for each"
            )
        if meta_queries.shape[-1] != self.hidden_size:
            raise ValueError(
                f"queries of width {meta_queries.shape[-1]} do not fit a VLM of width {self.hidden_size}"
            )
        prefixes = self._prefixes(prompts, given)
        count = len(meta_queries)
        rows = [torch.cat([p.embeds, meta_queries.to(p.embeds.device, p.embeds.dtype)]) for p in prefixes]
        position_ids = pad_sequence(
            [self._positions(prefix, count) for prefix in prefixes], batch_first=True
        ).permute(2, 0, 1)
        states = self._run(pad_sequence(rows, batch_first=True), position_ids)
        return torch.stack(
            [state[len(row) - count : len(row)] for state, row in zip(states, rows, strict=True)]
        )

    def _run(self, embeds: Tensor, position_ids: Tensor) -> Tensor:
        """The language model on embeddings [B, T, D] at positions [3, B, T]: states [B, T, D]."""
        language_model = self.vlm.model.language_model
        # transformers checkpoints in training mode only; Qwen2.5-VL has nothing else that behaves otherwise there.
        language_model.train(self._checkpointing and torch.is_grad_enabled())
        try:
            return language_model(
                inputs_embeds=embeds, position_ids=position_ids, use_cache=False
            ).last_hidden_state
        finally:
            language_model.eval()

    @torch.no_grad()
    def _prefixes(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> list[_Prefix]:
        """The chat of every row up to the queries, its pictures among the embeddings."""
        model, device = self.vlm.model, self.vlm.device
        shown = [image for row in images for image in row]
        features: Any = iter(())
        grids: Any = iter(())
        counts: Any = iter(())
        if shown:
            pictures = prepare_pictures(shown, self.image_processor, scale=VIEW_SCALE)
            grids, counts = iter(pictures.grids.to(device)), iter(pictures.tokens)
            features = iter(
                model.get_image_features(pictures.pixels.to(device), pictures.grids.to(device)).pooler_output
            )
        prefixes = []
        for prompt, row in zip(prompts, images, strict=True):
            ids = self._ids(prompt, list(islice(counts, len(row)))).to(device)
            embeds = model.get_input_embeddings()(ids)
            grid = None
            if row:
                seen = torch.cat(list(islice(features, len(row))))
                embeds[ids == self.vlm.config.image_token_id] = seen.to(embeds.dtype)
                grid = torch.stack(list(islice(grids, len(row))))
            prefixes.append(_Prefix(ids, embeds, grid))
        return prefixes

    def _ids(self, prompt: str, picture_tokens: Sequence[int]) -> Tensor:
        """Token ids [t] of the user's turn, its pictures first, and the assistant's header."""
        refuse_control_tokens(prompt, self.tokenizer)
        pictures = "<|vision_start|><|image_pad|><|vision_end|>" * len(picture_tokens)
        turn = f"{pictures}{prompt}" if pictures else f"Generate an image: {prompt}"
        text = f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return expand_pictures(ids, self.vlm.config.image_token_id, picture_tokens)

    def _positions(self, prefix: _Prefix, num_queries: int) -> Tensor:
        """Positions [t + Q, 3] of a row: time, height and width."""
        length = len(prefix.ids) + num_queries
        if self.position_mode == "flat":
            return torch.arange(length, device=prefix.ids.device)[:, None].expand(length, 3)
        kinds = torch.zeros(1, length, dtype=torch.long, device=prefix.ids.device)
        kinds[0, : len(prefix.ids)] = prefix.ids == self.vlm.config.image_token_id
        # Only the lengths of runs of text and picture matter, so the kinds stand for the ids as well.
        positions, _ = self.vlm.model.get_rope_index(kinds, kinds, image_grid_thw=prefix.grids)
        return positions[:, 0].T
