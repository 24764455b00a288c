"""What both pipelines share: from noise and prompts to pictures, sizes, references, adapters."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.loaders import SD3LoraLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from core.pictures import to_rgb
from models.components import save_component
from models.conditioning import ConditioningBatch
from models.latents import (
    decode_latents,
    encode_images,
    image_to_tensor,
    latent_shape,
    nearest_size,
    vae_factor,
)
from models.lora.attach import (
    adapter_settings,
    adapter_state,
    attach_lora,
    attached_adapters,
    load_adapter_state,
)
from models.lora.files import read_adapter, save_adapter
from models.sampling import sample_latents, sigma_table
from models.sizes import reference_sizes

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Generators = torch.Generator | list[torch.Generator] | None
References = Image.Image | Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | None


class DrawingPipeline(DiffusionPipeline, SD3LoraLoaderMixin):
    """Base of `KontextPipeline` and `MetaQueryPipeline`, which differ in how they read prompts."""

    parts: ClassVar[tuple[str, ...]]
    """Subfolders of the released layout, each under the name of the component it holds."""

    def save_pretrained(self, folder: str | Path) -> None:  # type: ignore[override]
        """Write the folder that `from_pretrained` reads, part by part, each replaced in one step.

        Raises:
            ValueError: a part is missing, or the transformer carries an adapter, which a folder cannot hold.
        """
        missing = [name for name in self.parts if getattr(self, name) is None]
        if missing:
            raise ValueError(f"cannot save a pipeline without its {', '.join(missing)}")
        adapters = attached_adapters(self.transformer)
        if adapters:
            raise ValueError(
                f"the transformer carries adapters {adapters}: write them with save_adapter, or the merged "
                "transformer with models.lora.files.save_merged_transformer"
            )
        for name in self.parts:
            save_component(getattr(self, name), Path(folder) / name)

    def load_adapter(self, folder: str | Path, adapter_name: str = "policy") -> None:
        """Attach an adapter folder written by training (or by PEFT) under a name that is not in use."""
        state, settings = read_adapter(folder)
        attach_lora(self.transformer, **asdict(settings), adapter_name=adapter_name, trainable=False)
        load_adapter_state(self.transformer, state, adapter_name)

    def save_adapter(self, folder: str | Path, adapter_name: str = "policy") -> None:
        """Write an attached adapter as a PEFT folder with the diffusers LoRA file inside."""
        settings = adapter_settings(self.transformer, adapter_name)
        save_adapter(adapter_state(self.transformer, adapter_name), folder, **asdict(settings))

    def _draw(
        self,
        prompts: ConditioningBatch,
        shown: list[list[Image.Image]],
        size: tuple[int, int],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        num_images_per_prompt: int,
        generator: Generators,
        latents: torch.Tensor | None,
        output_type: str,
        return_dict: bool,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample, decode and convert; N prompts, with negatives where they are guided, and what `_shown` returns."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r} is none of {', '.join(OUTPUT_TYPES)}")
        prompts = replace(prompts, reference_latents=self._reference(shown))
        rows = torch.arange(len(prompts.prompt_embeds)).repeat_interleave(num_images_per_prompt)
        final = sample_latents(
            self.transformer,
            sigma_table(self.scheduler, num_inference_steps),
            self._noise(latents, generator, len(rows), size),
            prompts.rows(rows),
            guidance_scale,
            progress=self.progress_bar,
        )
        output: Any = (
            final if output_type == "latent" else _convert(decode_latents(self.vae, final), output_type)
        )
        return ImagePipelineOutput(images=output) if return_dict else (output,)

    def _shown(
        self,
        image: References,
        count: int,
        height: int | None,
        width: int | None,
        reference_pixels: int | None,
    ) -> tuple[tuple[int, int], list[list[Image.Image]]]:
        """Height and width in pixels of what is generated, and of each of `count` prompts its references, upright RGB
        at the sizes at which they are shown; no list without any."""
        rows = _references_by_prompt(image, count)
        multiple = self.transformer.config.patch_size * vae_factor(self.vae.config)
        size = self._size([row[0] for row in rows], height, width, multiple)
        sizes = [
            reference_sizes([(one.height, one.width) for one in row], size, multiple, reference_pixels)
            for row in rows
        ]
        if any(other != sizes[0] for other in sizes):
            raise ValueError(
                f"references are shown at {', '.join(map(str, sizes))} (height, width), but all prompts of one "
                "call have as many references, of the same sizes: give them in calls of their own"
            )
        return size, [
            [one.resize((w, h), Image.Resampling.LANCZOS) for one, (h, w) in zip(row, sizes[0], strict=True)]
            for row in rows
        ]

    def _size(
        self, images: list[Image.Image], height: int | None, width: int | None, multiple: int
    ) -> tuple[int, int]:
        """Height and width in pixels of what is generated; `images` are the pictures to edit."""
        side = self.transformer.config.sample_size * vae_factor(self.vae.config)
        if (height is None) != (width is None):
            raise ValueError(f"give both height ({height}) and width ({width}), or neither")
        if height is not None and width is not None:
            if height % multiple or width % multiple:
                raise ValueError(f"height {height} and width {width} must be multiples of {multiple}")
            return height, width
        sizes = {nearest_size(one.height, one.width, side * side, multiple=multiple) for one in images}
        if len(sizes) > 1:
            raise ValueError(f"the references suggest different sizes {sorted(sizes)}: give height and width")
        return sizes.pop() if sizes else (side, side)

    def _reference(self, shown: list[list[Image.Image]]) -> tuple[torch.Tensor, ...]:
        """Latents of the references by their place, N C h w each."""
        return tuple(
            encode_images(
                self.vae, torch.stack([image_to_tensor(one, one.height, one.width) for one in at_place])
            )
            for at_place in zip(*shown, strict=True)
        )

    def _noise(
        self, latents: torch.Tensor | None, generator: Generators, count: int, size: tuple[int, int]
    ) -> torch.Tensor:
        """Initial latents, float32; drawn so whatever the transformer's dtype, hence one image per seed."""
        shape = (count, *latent_shape(self.vae, *size))
        if latents is None:
            return randn_tensor(shape, generator, device=self._execution_device, dtype=torch.float32)
        if latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {shape}")
        return latents.to(self._execution_device, torch.float32)


def _references_by_prompt(image: References, count: int) -> list[list[Image.Image]]:
    """Upright RGB references of each of `count` prompts, as `KontextPipeline.__call__` takes them; no list for None."""
    if image is None:
        return []
    if isinstance(image, Image.Image):
        return [[to_rgb(image)]] * count
    given: list[Any] = list(image)
    flat = all(isinstance(one, Image.Image) for one in given)
    if not flat and any(isinstance(one, Image.Image) for one in given):
        raise ValueError(
            "image mixes pictures and lists of pictures: give a list of references for each prompt"
        )
    rows = (
        [given] if flat and count == 1 else [[one] for one in given] if flat else [list(row) for row in given]
    )
    if len(rows) != count:
        raise ValueError(
            f"{len(rows)} {'images' if flat else 'lists of images'} do not fit {count} prompts: give one picture for "
            "all, one each, or a list of references for each prompt"
        )
    if not all(rows):
        raise ValueError("a list of references is empty: leave image out for text-to-image")
    return [[to_rgb(one) for one in row] for row in rows]


def _convert(images: torch.Tensor, output_type: str) -> Any:
    """uint8 N H W 3 to the type asked for."""
    if output_type == "pil":
        return [Image.fromarray(image) for image in images.numpy()]
    if output_type == "np":
        return images.numpy().astype(np.float32) / 255
    return images.permute(0, 3, 1, 2).float() / 255
