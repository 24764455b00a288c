"""Stage `vae`: a small `AutoencoderKL` on pictures of the shapes world."""

from pathlib import Path
from typing import cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

from core.pictures import contact_sheet
from core.training.randomness import torch_generator
from worlds.shapes.scenes.world import SIZE
from worlds.shapes.training.config import VaeRecipe
from worlds.shapes.training.loop import Stage, StageLoss
from worlds.shapes.training.shapes import scene_batch, to_tensor

# Steps no training batch reaches: data for grids and for the latents' statistics.
_STATISTICS_STEP = 1 << 30
_GRID_STEP = _STATISTICS_STEP + 1


class VaeStage(Stage):
    """Absolute plus squared error, plus a KL term that keeps latents small and the decoder used to noise.

    No perceptual or adversarial loss: the world has flat colours and sharp edges only. The posterior's noise is
    kept in training on purpose: the transformer's latents are never exact either.
    """

    def __init__(self, recipe: VaeRecipe) -> None:
        model = recipe.model
        levels = len(model.block_out_channels)
        self.recipe = recipe
        self.vae = AutoencoderKL(
            sample_size=SIZE,
            block_out_channels=tuple(model.block_out_channels),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=model.layers_per_block,
            latent_channels=model.latent_channels,
            norm_num_groups=model.norm_num_groups,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        self.modules = [self.vae]

    def loss(self, step: int) -> StageLoss:
        images = to_tensor(scene_batch(self.recipe.seed, step, self.recipe.batch_size))
        posterior = self._posterior(images)
        noise = torch.randn(posterior.mean.shape, generator=torch_generator(self.recipe.seed, step))
        decoded = self._decode(posterior.mean + posterior.std * noise)
        error = decoded - images
        squared, absolute = error.square().mean(), error.abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = squared + self.recipe.l1_weight * absolute + self.recipe.kl_weight * kl
        figures = {
            "squared_error": squared.item(),
            "absolute_error": absolute.item(),
            "kl": kl.item(),
            "posterior_std": posterior.std.mean().item(),
            "latent_std": posterior.mean.std().item(),
        }
        return StageLoss(loss, figures)

    def sample_grid(self) -> Image.Image:
        """Originals above their reconstructions from the posterior's mean."""
        images = to_tensor(scene_batch(self.recipe.seed, _GRID_STEP, 12))
        return contact_sheet([_to_uint8(images), _to_uint8(self._decode(self._posterior(images).mean))])

    def export(self, folder: Path) -> dict[str, float]:
        """Write `vae/` with `shift_factor` and `scaling_factor` measured on the rounded weights."""
        dtype = getattr(torch, self.recipe.export_dtype)
        rounded = cast(AutoencoderKL, AutoencoderKL.from_config(self.vae.config))
        rounded.load_state_dict({k: v.to(dtype).float() for k, v in self.vae.state_dict().items()})
        images = to_tensor(scene_batch(self.recipe.seed, _STATISTICS_STEP, self.recipe.statistics_images))
        latents = torch.cat([rounded.encode(batch).latent_dist.mode() for batch in images.split(64)])
        shift, scale = latents.mean().item(), 1 / latents.std().item()
        rounded.register_to_config(shift_factor=shift, scaling_factor=scale)
        decoded = torch.cat([rounded.decode(batch).sample for batch in latents.split(64)])
        rounded.to(dtype).save_pretrained(folder / "vae")
        return {
            "shift_factor": shift,
            "scaling_factor": scale,
            "squared_error": (decoded - images).square().mean().item(),
            "parameters": float(sum(p.numel() for p in rounded.parameters())),
        }

    def _posterior(self, images: Tensor) -> DiagonalGaussianDistribution:
        return self.vae.encode(images).latent_dist

    def _decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample


def _to_uint8(images: Tensor):  # type: ignore[no-untyped-def]
    """B 3 H W in [-1, 1] -> uint8 array B H W 3."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
