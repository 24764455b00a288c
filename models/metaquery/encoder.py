"""`MetaQueryEncoder`: conditioner and frozen VLM behind one call, with a cache bounded in bytes, and answers."""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from core.pictures import to_rgb
from models.metaquery.conditioner import MetaQueryConditioner, load_conditioner
from models.metaquery.reading import PositionMode, QueryReader
from models.metaquery.vlm import answer_question
from models.text import DEFAULT_CACHE_BYTES, EmbedsCache, PromptEmbeds


class MetaQueryEncoder:
    """Stands where `SD3TextEncoder` stands for Kontext; prompts may come with the pictures they refer to.

    Encodes one prompt at a time, so that the result does not depend, to the bit, on what came with it. What is
    cached was made with the weights of its time: use the reader itself while they train. Not thread-safe.
    """

    def __init__(
        self,
        conditioner: MetaQueryConditioner | None,
        reader: QueryReader,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        """Join loaded parts; without a conditioner, `answer` works alone. `cache_bytes` 0 keeps nothing.

        Raises:
            ValueError: the conditioner was made for a VLM of another width.
        """
        if conditioner is not None and conditioner.config.llm_hidden_size != reader.hidden_size:
            raise ValueError(
                f"the conditioner was made for a VLM of width {conditioner.config.llm_hidden_size}, this one has "
                f"{reader.hidden_size}: give the Qwen2.5-VL that it was trained with"
            )
        self.conditioner = conditioner
        self.reader = reader
        self.cache = EmbedsCache(cache_bytes)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | None,
        vlm_folder: str | Path,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        position_mode: PositionMode = "flat",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> "MetaQueryEncoder":
        """Load `conditioner/` of a model folder (None: understanding alone) and a Qwen2.5-VL, both frozen.

        Raises:
            FileNotFoundError, ValueError: as `MetaQueryConditioner.from_pretrained` and `load_vlm`.
        """
        conditioner = None if folder is None else load_conditioner(folder, dtype=dtype, device=device)
        reader = QueryReader.from_pretrained(
            vlm_folder, dtype=dtype, device=device, position_mode=position_mode
        )
        return cls(conditioner, reader, cache_bytes=cache_bytes)

    def encode(
        self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]] | None = None
    ) -> list[PromptEmbeds]:
        """Embeddings of the prompts in order: prompt_embeds Q J and pooled_prompt_embeds P, on the CPU.

        Args:
            prompts: what to draw, or, with images, how to edit the first.
            images: as `QueryReader.hidden_states` takes them.

        Raises:
            TypeError: a single string instead of a list of them.
            ValueError: there is no conditioner; lists of different lengths; as `QueryReader.hidden_states`.
        """
        if isinstance(prompts, str):
            raise TypeError(f"encode takes a list of prompts, not the string {prompts!r}")
        given = [[]] * len(prompts) if images is None else [[to_rgb(one) for one in row] for row in images]
        if len(given) != len(prompts):
            raise ValueError(
                f"{len(given)} lists of images do not fit {len(prompts)} prompts: give one, maybe empty, for each"
            )
        return [
            self.cache.get((prompt, *map(_fingerprint, row)), partial(self._encode_one, prompt, row))
            for prompt, row in zip(prompts, given, strict=True)
        ]

    def answer(self, images: Sequence[Image.Image], question: str, *, max_new_tokens: int = 512) -> str:
        """The frozen VLM's own answer to a question about any number of pictures, just as it writes it.

        Greedy. Boxes are in pixels of the picture as `models.metaquery.vlm.shown_size` sizes it.

        Raises:
            ValueError: as `models.metaquery.vlm.answer_question`.
        """
        reader = self.reader
        return answer_question(
            reader.vlm, reader.tokenizer, reader.image_processor, images, question, max_new_tokens
        )

    @torch.no_grad()
    def _encode_one(self, prompt: str, images: Sequence[Image.Image]) -> PromptEmbeds:
        if self.conditioner is None:
            raise ValueError("this encoder has no conditioner: give the folder of a UniPic2-MetaQuery")
        embeds, pooled = self.conditioner(
            partial(self.reader.hidden_states, prompts=[prompt], images=[images])
        )
        return PromptEmbeds(prompt_embeds=embeds[0].cpu(), pooled_prompt_embeds=pooled[0].cpu())


def _fingerprint(image: Image.Image) -> bytes:
    """Size and pixels of an RGB image, hashed."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
