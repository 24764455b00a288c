"""UniPic2-SD3.5M-Kontext's transformer: SD3's MMDiT with clean reference latents in the sequence."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.utils import apply_lora_scale

RELEASED_CLASS_NAME = "SD3Transformer2DKontextModel"
_GOLDEN = (5**0.5 - 1) / 2


class KontextTransformer(SD3Transformer2DModel):
    """SD3 transformer that sees reference images as extra tokens (UniPic 2.0, the Kontext stage).

    Adds no parameter: the state dict is key for key SD3's, and without a reference the forward *is* SD3's.
    The image stream holds `[reference 1, …, reference n, target]`. All go through one `pos_embed`: the target and
    the first reference with the centre crop of their own size, further ones with crops beside it, for attention
    does not see in which order pictures stand. All share the target's time embedding; there is no role
    embedding and no mask. References of another size than the target, and several of them, extend the released
    model, which was trained on one reference of the target's size.

    Folders load whether their config names `SD3Transformer2DKontextModel` (as released),
    `SD3Transformer2DModel` or this class; saved configs carry the released name.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        reference_hidden_states: torch.Tensor | Sequence[torch.Tensor] | None = None,
        *,
        return_dict: bool = True,
        **sd3_options: Any,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the velocity `noise - clean` of the target latents.

        Args:
            hidden_states: noisy target latents, B C H W.
            encoder_hidden_states: prompt embeddings, B L D.
            pooled_projections: pooled prompt embeddings, B P.
            timestep: 1000 x sigma, B.
            reference_hidden_states: clean reference latents, B C h w, or a sequence of such tensors.
            return_dict: `False` returns `(velocity,)`.
            **sd3_options: those of `SD3Transformer2DModel.forward`: `skip_layers`, `joint_attention_kwargs` (LoRA's
                scale, an IP adapter's embeddings), `block_controlnet_hidden_states`. Beside references the first two
                act on all tokens, and a ControlNet's residuals, B L D of the target alone, on the target's.

        Returns:
            velocity of the target, B C H W.

        Raises:
            ValueError: a reference has the wrong rank, batch or channels.
        """
        references = _reference_list(reference_hidden_states)
        if not references:
            return super().forward(
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                pooled_projections=pooled_projections,
                timestep=timestep,
                return_dict=return_dict,
                **sd3_options,
            )
        for index, reference in enumerate(references):
            _check_reference(index, reference, hidden_states)
        velocity = self._forward_sequence(
            hidden_states, references, encoder_hidden_states, pooled_projections, timestep, **sd3_options
        )
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    @apply_lora_scale("joint_attention_kwargs")
    def _forward_sequence(
        self,
        target: torch.Tensor,
        references: list[torch.Tensor],
        text: torch.Tensor,
        pooled: torch.Tensor,
        timestep: torch.Tensor,
        *,
        block_controlnet_hidden_states: Sequence[torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        skip_layers: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Run `[references, target]` through the blocks; equals SD3's forward for an empty list."""
        num_reference_tokens = sum(self._num_tokens(reference) for reference in references)
        further = [self._embed_further(image, place) for place, image in enumerate(references[1:], 1)]
        tokens = torch.cat([*map(self.pos_embed, references[:1]), *further, self.pos_embed(target)], dim=1)
        time = self.time_text_embed(timestep, pooled)
        text = self.context_embedder(text)
        attention = self._attention_options(joint_attention_kwargs, timestep)
        controls = block_controlnet_hidden_states
        for index, block in enumerate(self.transformer_blocks):
            if skip_layers is not None and index in skip_layers:
                pass
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                text, tokens = self._gradient_checkpointing_func(block, tokens, text, time, attention)
            else:
                text, tokens = block(
                    hidden_states=tokens,
                    encoder_hidden_states=text,
                    temb=time,
                    joint_attention_kwargs=attention,
                )
            if controls is not None and not block.context_pre_only:
                residual = controls[int(index / (len(self.transformer_blocks) / len(controls)))]
                own = tokens[:, num_reference_tokens:] + residual
                tokens = torch.cat([tokens[:, :num_reference_tokens], own], dim=1)
        tokens = tokens[:, num_reference_tokens:]
        return self._unpatchify(self.proj_out(self.norm_out(tokens, time)), target.shape[-2:])

    def _attention_options(
        self, given: dict[str, Any] | None, timestep: torch.Tensor
    ) -> dict[str, Any] | None:
        """What attention processors are given, with an IP adapter's embeddings as they read them."""
        if given is None or "ip_adapter_image_embeds" not in given:
            return given
        states, embedding = self.image_proj(given["ip_adapter_image_embeds"], timestep)
        others = {name: value for name, value in given.items() if name != "ip_adapter_image_embeds"}
        return others | {"ip_hidden_states": states, "temb": embedding}

    def _embed_further(self, latents: torch.Tensor, place: int) -> torch.Tensor:
        """Tokens [B, L, D] of the reference at `place` >= 1: its crop of the position table is moved to the right by
        `place` golden sections of the table's width, around its edge, so that each place is far from the others however
        many there are."""
        embed = self.pos_embed
        side, patches = embed.pos_embed_max_size, embed.proj(latents)
        rows, columns = patches.shape[-2:]
        top, left = (side - rows) // 2, (side - columns) // 2 + round(place * _GOLDEN * side)
        at = torch.arange(left, left + columns, device=latents.device) % side
        crop = embed.pos_embed.unflatten(1, (side, side))[:, top : top + rows, at].flatten(1, 2)
        return (patches.flatten(2).transpose(1, 2) + crop).to(patches.dtype)

    def _num_tokens(self, latents: torch.Tensor) -> int:
        patch = self.pos_embed.patch_size
        return (latents.shape[-2] // patch) * (latents.shape[-1] // patch)

    def _unpatchify(self, patches: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """Tokens back to an image: B L (p p C) -> B C H W, size = (H, W)."""
        patch = self.pos_embed.patch_size
        rows, columns = size[0] // patch, size[1] // patch
        grid = patches.unflatten(1, (rows, columns)).unflatten(-1, (patch, patch, self.out_channels))
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(
            patches.shape[0], self.out_channels, rows * patch, columns * patch
        )

    def to_json_string(self) -> str:
        """Config as JSON, under the released class name so that saved folders keep the released layout."""
        config = json.loads(super().to_json_string())
        return json.dumps(config | {"_class_name": RELEASED_CLASS_NAME}, indent=2) + "\n"


def _reference_list(references: torch.Tensor | Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
    if references is None:
        return []
    return [references] if isinstance(references, torch.Tensor) else list(references)


def _check_reference(index: int, reference: torch.Tensor, target: torch.Tensor) -> None:
    if reference.ndim != 4 or reference.shape[:2] != target.shape[:2]:
        raise ValueError(
            f"reference_hidden_states[{index}] has shape {tuple(reference.shape)}, but the target latents "
            f"{tuple(target.shape)} need the same batch and channels: B C h w"
        )
