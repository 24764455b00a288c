"""UniPic2-MetaQuery: text to image, editing and understanding, by diffusers' calling conventions."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image

from models.components import load_scheduler, load_transformer, load_vae
from models.conditioning import ConditioningBatch
from models.drawing import DrawingPipeline, Generators, References
from models.folders import METAQUERY_PARTS, check_model_folder, check_vlm_folder, require
from models.kontext import KontextTransformer
from models.metaquery.conditioner import MetaQueryConditioner, load_conditioner
from models.metaquery.encoder import MetaQueryEncoder
from models.metaquery.reading import PositionMode, QueryReader
from models.metaquery.vlm import load_vlm
from models.text import stack_embeds


class MetaQueryPipeline(DrawingPipeline):
    """`pipeline("a red fox")`, `pipeline("make it blue", image=photo)`, `pipeline.answer([photo], "what is it?")`.

    The folder holds `transformer/ vae/ scheduler/ conditioner/`; the frozen Qwen2.5-VL is a folder of its own. An
    edit's references reach the transformer as latents and the VLM as pictures, beside the prompt and beside the
    negative prompt alike.
    """

    parts = METAQUERY_PARTS

    def __init__(
        self,
        transformer: KontextTransformer,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        conditioner: MetaQueryConditioner,
        vlm: Any,
        tokenizer: Any,
        image_processor: Any,
        position_mode: PositionMode = "flat",
    ) -> None:
        """Join loaded parts; `vlm`, `tokenizer` and `image_processor` are what `models.metaquery.vlm.load_vlm` returns.

        Raises:
            ValueError: conditioner, VLM and transformer do not fit each other, or an unknown position mode.
        """
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            conditioner=conditioner,
            vlm=vlm,
            tokenizer=tokenizer,
            image_processor=image_processor,
        )
        self.register_to_config(position_mode=position_mode)
        made, read = conditioner.config, transformer.config
        for name in ("joint_attention_dim", "pooled_projection_dim"):
            if getattr(made, name) != read[name]:
                raise ValueError(
                    f"the conditioner's {name} is {getattr(made, name)}, the transformer's {read[name]}"
                )
        self._encoder()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | Path,
        vlm_folder: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        position_mode: PositionMode = "flat",
    ) -> "MetaQueryPipeline":
        """Load local folders; the VAE stays in float32.

        Raises:
            FileNotFoundError: every part of either folder that is missing.
            ValueError: as `__init__`, `MetaQueryConditioner.from_pretrained` and `models.metaquery.vlm.load_vlm`.
        """
        require(check_model_folder(folder, METAQUERY_PARTS) + check_vlm_folder(vlm_folder))
        vlm, tokenizer, image_processor = load_vlm(vlm_folder, dtype=torch_dtype, device=device)
        return cls(
            transformer=load_transformer(folder, dtype=torch_dtype, device=device),
            scheduler=load_scheduler(folder),
            vae=load_vae(folder, device=device),
            conditioner=load_conditioner(folder, dtype=torch_dtype, device=device),
            vlm=vlm,
            tokenizer=tokenizer,
            image_processor=image_processor,
            position_mode=position_mode,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: References = None,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        reference_pixels: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate `num_images_per_prompt` images for each of N prompts, prompt by prompt.

        The arguments are those of `KontextPipeline.__call__`, without given embeddings.

        Raises ValueError for inputs that contradict each other or cannot be read.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        size, shown = self._shown(image, len(prompts), height, width, reference_pixels)
        encoder = self._encoder()
        batch = ConditioningBatch(*stack_embeds(encoder.encode(prompts, shown or None)))
        if guidance_scale > 1:
            given = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
            negatives = list(given)
            if len(negatives) != len(prompts):
                raise ValueError(f"{len(negatives)} negative_prompts do not fit {len(prompts)} prompts")
            embeds, pooled = stack_embeds(encoder.encode(negatives, shown or None))
            batch = replace(batch, negative_prompt_embeds=embeds, negative_pooled_prompt_embeds=pooled)
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

    def answer(self, images: Sequence[Image.Image], question: str, *, max_new_tokens: int = 512) -> str:
        """See `MetaQueryEncoder.answer`."""
        return self._encoder().answer(images, question, max_new_tokens=max_new_tokens)

    def _encoder(self) -> MetaQueryEncoder:
        """Of the components as they are; its cache lives as long as one call."""
        reader = QueryReader(
            self.vlm, self.tokenizer, self.image_processor, position_mode=self.config["position_mode"]
        )
        return MetaQueryEncoder(self.conditioner, reader)
