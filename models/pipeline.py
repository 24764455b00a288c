"""Text to image and image editing with the Kontext transformer, by diffusers' calling conventions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from models.components import load_scheduler, load_text_encoder, load_tokenizer, load_transformer, load_vae
from models.conditioning import ConditioningBatch
from models.drawing import DrawingPipeline, Generators, References
from models.folders import PARTS, TEXT_ENCODERS, TOKENIZERS, check_model_folder, require
from models.kontext import KontextTransformer
from models.text import SD3TextEncoder, stack_embeds


class KontextPipeline(DrawingPipeline):
    """UniPic2-SD3.5M-Kontext: `pipeline("a red fox")`, `pipeline("make it blue", image=photo)`, or, with several
    references, `pipeline("put the cat of the second picture on the chair", image=[room, cat])`.

    The folder need not have a `model_index.json`: the released one has none, and none is written. A seed
    gives one image: latents stay in float32, and the reference is encoded to the mode of its posterior.
    """

    parts = PARTS
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
        require(check_model_folder(folder, needed))
        for name in needed:
            if name in TEXT_ENCODERS:
                components[name] = load_text_encoder(folder, name, dtype=torch_dtype, device=device)
            elif name in TOKENIZERS:
                components[name] = load_tokenizer(folder, name)
            elif name == "transformer":
                components[name] = load_transformer(folder, dtype=torch_dtype, device=device)
            elif name == "vae":
                components[name] = load_vae(folder, device=device)
            else:
                components[name] = load_scheduler(folder)
        return cls(**components)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: References = None,
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
        reference_pixels: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate `num_images_per_prompt` images for each of N prompts, prompt by prompt.

        Args:
            prompt: one or N prompts, or `prompt_embeds` N L D with `pooled_prompt_embeds` N P.
            image: reference to edit, in any mode, size and EXIF rotation: a picture is that of every prompt; of a list
                of pictures, N prompts have one each, and a single prompt has them all as its references, in the order
                in which it speaks of them; a list of lists has each prompt's references. The first is edited and
                decides the size; further ones are shown in their own proportions at up to as many pixels. Prompts of
                one call have as many references, of the same sizes.
            negative_prompt: one for all or one each; unused when `guidance_scale` is at most 1.
            height, width: pixels. By default the transformer's `sample_size`; for an edit, the nearest of the
                training aspect ratios to the reference's, at the same area.
            generator: one for the batch, or one for each image.
            latents: initial noise, instead of `generator`'s.
            reference_pixels: of all references of a prompt together; further ones share what the first leaves.
            output_type: `pil`, `np` (N H W 3 in [0, 1]), `pt` (N 3 H W in [0, 1]) or `latent`.

        Raises ValueError for inputs that contradict each other or are missing.
        """
        given = (prompt_embeds, pooled_prompt_embeds)
        prompts = self._condition("prompt", prompt, given, None, max_sequence_length)
        count = len(prompts[0])
        if guidance_scale > 1:
            given = (negative_prompt_embeds, negative_pooled_prompt_embeds)
            negatives = self._condition("negative_prompt", negative_prompt, given, count, max_sequence_length)
            batch = ConditioningBatch(*prompts, (), *negatives)
        else:
            batch = ConditioningBatch(*prompts)
        size, shown = self._shown(image, count, height, width, reference_pixels)
        return self._draw(
            batch,
            shown,
            size,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
        )

    def _condition(
        self,
        name: str,
        prompt: str | Sequence[str] | None,
        given: tuple[torch.Tensor | None, torch.Tensor | None],
        count: int | None,
        max_sequence_length: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the prompts, N L D and pooled N P, or those given; a single one is repeated to `count`."""
        embeds, pooled = given
        if (embeds is None) != (pooled is None):
            raise ValueError(f"{name}_embeds and its pooled companion must be given together")
        if embeds is None or pooled is None:
            if prompt is None:
                raise ValueError(f"give {name} or {name}_embeds")
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            embeds, pooled = stack_embeds(self._text_encoder(name, max_sequence_length).encode(prompts))
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
