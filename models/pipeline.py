"""Text to image and image editing with the Kontext transformer, by diffusers' calling conventions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.loaders import SD3LoraLoaderMixin
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from models.adapter_files import read_adapter, save_adapter
from models.components import (
    PARTS,
    TEXT_ENCODERS,
    TOKENIZERS,
    check_model_folder,
    load_scheduler,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
    save_component,
)
from models.kontext import KontextTransformer
from models.latents import (
    decode_latents,
    encode_images,
    image_to_tensor,
    latent_shape,
    nearest_size,
    vae_factor,
)
from models.lora import adapter_settings, adapter_state, attach_lora, attached_adapters, load_adapter_state
from models.pictures import to_rgb
from models.text import PromptEmbeds, SD3TextEncoder

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Generators = torch.Generator | list[torch.Generator] | None


class KontextPipeline(DiffusionPipeline, SD3LoraLoaderMixin):
    """UniPic2-SD3.5M-Kontext: `pipeline("a red fox")`, or `pipeline("make it blue", image=photo)`.

    The folder need not have a `model_index.json`: the released one has none, and none is written. A seed
    gives one image: latents stay in float32, and the reference is encoded to the mode of its posterior.
    """

    _optional_components = [*TEXT_ENCODERS, *TOKENIZERS]

    def __init__(
        self,
        transformer: KontextTransformer,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModelWithProjection | None = None,
        tokenizer: Any = None,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: Any = None,
        text_encoder_3: T5EncoderModel | None = None,
        tokenizer_3: Any = None,
    ) -> None:
        """Join loaded parts. Without the text parts, calls need `prompt_embeds` and its companions."""
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **components: Any,
    ) -> "KontextPipeline":
        """Load a local folder in the released layout; the VAE stays in float32.

        Args:
            **components: parts to use instead of the folder's, such as `transformer=`.

        Raises:
            FileNotFoundError: every part that is missing.
            ValueError: a component of an unknown name.
        """
        unknown = sorted(components.keys() - set(PARTS))
        if unknown:
            raise ValueError(f"unknown components {unknown}: a pipeline has {', '.join(PARTS)}")
        needed = [name for name in PARTS if name not in components]
        problems = check_model_folder(folder, needed)
        if problems:
            raise FileNotFoundError("; ".join(problems))
        loaders = {
            "transformer": lambda: load_transformer(folder, dtype=torch_dtype, device=device),
            "vae": lambda: load_vae(folder, device=device),
            "scheduler": lambda: load_scheduler(folder),
        }
        for name in needed:
            if name in TEXT_ENCODERS:
                components[name] = load_text_encoder(folder, name, dtype=torch_dtype, device=device)
            elif name in TOKENIZERS:
                components[name] = load_tokenizer(folder, name)
            else:
                components[name] = loaders[name]()
        return cls(**components)

    def save_pretrained(self, folder: str | Path) -> None:  # type: ignore[override]
        """Write the folder that `from_pretrained` reads, part by part, each replaced in one step.

        Raises:
            ValueError: a part is missing, or the transformer carries an adapter, which a folder cannot hold.
        """
        missing = [name for name in PARTS if getattr(self, name) is None]
        if missing:
            raise ValueError(f"cannot save a pipeline without its {', '.join(missing)}")
        adapters = attached_adapters(self.transformer)
        if adapters:
            raise ValueError(
                f"the transformer carries adapters {adapters}: write them with save_adapter, or the merged "
                "transformer with models.adapter_files.save_merged_transformer"
            )
        for name in PARTS:
            save_component(getattr(self, name), Path(folder) / name)

    def load_adapter(self, folder: str | Path, adapter_name: str = "policy") -> None:
        """Attach an adapter folder written by training (or by PEFT) under a name that is not in use."""
        state, settings = read_adapter(folder)
        attach_lora(
            self.transformer,
            rank=settings.rank,
            alpha=settings.alpha,
            targets=settings.targets,
            adapter_name=adapter_name,
            trainable=False,
        )
        load_adapter_state(self.transformer, state, adapter_name)

    def save_adapter(self, folder: str | Path, adapter_name: str = "policy") -> None:
        """Write an attached adapter as a PEFT folder with the diffusers LoRA file inside."""
        settings = adapter_settings(self.transformer, adapter_name)
        save_adapter(
            adapter_state(self.transformer, adapter_name),
            folder,
            rank=settings.rank,
            alpha=settings.alpha,
            targets=settings.targets,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int = 256,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate `num_images_per_prompt` images for each of N prompts, prompt by prompt.

        Args:
            prompt: one or N prompts, or `prompt_embeds` N L D with `pooled_prompt_embeds` N P.
            image: reference to edit, one for all prompts or one each; any mode, size and EXIF rotation.
            negative_prompt: one for all or one each; unused when `guidance_scale` is at most 1.
            height, width: pixels. By default the transformer's `sample_size`; for an edit, the nearest of the
                training aspect ratios to the reference's, at the same area.
            generator: one for the batch, or one for each image.
            latents: initial noise, instead of `generator`'s.
            output_type: `pil`, `np` (N H W 3 in [0, 1]), `pt` (N 3 H W in [0, 1]) or `latent`.

        Raises ValueError for inputs that contradict each other or are missing.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r} is none of {', '.join(OUTPUT_TYPES)}")
        given = (prompt_embeds, pooled_prompt_embeds)
        rows = [self._condition("prompt", prompt, given, None, max_sequence_length)]
        count = len(rows[0][0])
        if guidance_scale > 1:
            given = (negative_prompt_embeds, negative_pooled_prompt_embeds)
            rows.insert(
                0, self._condition("negative_prompt", negative_prompt, given, count, max_sequence_length)
            )
        images = self._images(image, count)
        size = self._size(images, height, width)
        final = self._denoise(
            self._noise(latents, generator, count * num_images_per_prompt, size),
            torch.cat([text.repeat_interleave(num_images_per_prompt, 0) for text, _ in rows]),
            torch.cat([pooled.repeat_interleave(num_images_per_prompt, 0) for _, pooled in rows]),
            self._reference(images, size, num_images_per_prompt),
            num_inference_steps,
            guidance_scale,
        )
        output: Any = (
            final if output_type == "latent" else _convert(decode_latents(self.vae, final), output_type)
        )
        return ImagePipelineOutput(images=output) if return_dict else (output,)

    def _denoise(
        self,
        latents: torch.Tensor,
        text: torch.Tensor,
        pooled: torch.Tensor,
        reference: torch.Tensor | None,
        steps: int,
        guidance_scale: float,
    ) -> torch.Tensor:
        """Euler steps on float32 latents. Text rows are `[negative, positive]` or `[positive]` alone."""
        dtype, device = self.transformer.dtype, latents.device
        repeats = len(text) // len(latents)
        if reference is not None:
            reference = reference.repeat(repeats, 1, 1, 1).to(device, dtype)
        text, pooled = text.to(device, dtype), pooled.to(device, dtype)
        self.scheduler.set_timesteps(steps, device=device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            velocity = self.transformer(
                latents.repeat(repeats, 1, 1, 1).to(dtype),
                text,
                pooled,
                timestep.expand(len(text)),
                reference_hidden_states=reference,
                return_dict=False,
            )[0].float()
            if repeats == 2:
                negative, positive = velocity.chunk(2)
                velocity = negative + guidance_scale * (positive - negative)
            # The scheduler returns its first argument's dtype: in bfloat16 it would round the latents.
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return latents

    def _condition(
        self,
        name: str,
        prompt: str | Sequence[str] | None,
        given: tuple[torch.Tensor | None, torch.Tensor | None],
        count: int | None,
        max_sequence_length: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(N L D, N P) for the prompts, or those given; a single one is repeated to `count`."""
        embeds, pooled = given
        if (embeds is None) != (pooled is None):
            raise ValueError(f"{name}_embeds and its pooled companion must be given together")
        if embeds is None or pooled is None:
            if prompt is None:
                raise ValueError(f"give {name} or {name}_embeds")
            encoder = self._text_encoder(name, max_sequence_length)
            encoded: list[PromptEmbeds] = encoder.encode(
                [prompt] if isinstance(prompt, str) else list(prompt)
            )
            embeds = torch.stack([one.prompt_embeds for one in encoded])
            pooled = torch.stack([one.pooled_prompt_embeds for one in encoded])
        if count is not None and len(embeds) == 1:
            embeds, pooled = embeds.repeat(count, 1, 1), pooled.repeat(count, 1)
        if len(embeds) != len(pooled) or len(embeds) != (count or len(embeds)):
            raise ValueError(f"{len(embeds)} {name}s ({len(pooled)} pooled) do not fit {count} prompts")
        return embeds, pooled

    def _text_encoder(self, name: str, max_sequence_length: int) -> SD3TextEncoder:
        if any(getattr(self, part) is None for part in (*TEXT_ENCODERS, *TOKENIZERS)):
            raise ValueError(
                f"this pipeline has no text encoders: give {name}_embeds and its pooled companion"
            )
        return SD3TextEncoder(
            clip_tokenizers=[self.tokenizer, self.tokenizer_2],
            clip_encoders=[self.text_encoder, self.text_encoder_2],
            t5_tokenizer=self.tokenizer_3,
            t5_encoder=self.text_encoder_3,
            max_sequence_length=max_sequence_length,
            cache_bytes=0,
        )

    @staticmethod
    def _images(image: Image.Image | Sequence[Image.Image] | None, count: int) -> list[Image.Image]:
        """Upright RGB references, none or one for each prompt."""
        if image is None:
            return []
        if isinstance(image, Image.Image):
            return [to_rgb(image)] * count
        if len(image) != count:
            raise ValueError(f"{len(image)} images do not fit {count} prompts: give one for all, or one each")
        return [to_rgb(one) for one in image]

    def _size(self, images: list[Image.Image], height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels of what is generated."""
        factor = vae_factor(self.vae.config)
        side, multiple = (
            self.transformer.config.sample_size * factor,
            self.transformer.config.patch_size * factor,
        )
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

    def _reference(
        self, images: list[Image.Image], size: tuple[int, int], repeats: int
    ) -> torch.Tensor | None:
        if not images:
            return None
        pixels = torch.stack([image_to_tensor(image, *size) for image in images])
        return encode_images(self.vae, pixels).repeat_interleave(repeats, 0)

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


def _convert(images: torch.Tensor, output_type: str) -> Any:
    """uint8 N H W 3 to the type asked for."""
    if output_type == "pil":
        return [Image.fromarray(image) for image in images.numpy()]
    if output_type == "np":
        return images.numpy().astype(np.float32) / 255
    return images.permute(0, 3, 1, 2).float() / 255
