"""The trained parts as one module, so that one DeepSpeed engine holds them; what of it is frozen, where it starts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import recipes
from models.components import load_transformer
from models.kontext import KontextTransformer
from models.metaquery.conditioner import MetaQueryConditioner, load_conditioner
from models.metaquery.config import ConnectorConfig, MetaQueryConfig
from pretrain.flow.config import ConnectorSection, FlowRecipe

Prompt = tuple[Tensor, Tensor] | Callable[[Tensor], Tensor]
"""prompt_embeds [B, L, J] and pooled [B, P]; or what shows the queries [Q, D] to the VLM and returns [B, Q, D]."""


class FlowModel(nn.Module):
    """Transformer, and with a VLM the conditioner. Children keep the released key names below their own."""

    def __init__(self, transformer: KontextTransformer, conditioner: MetaQueryConditioner | None):
        super().__init__()
        self.transformer = transformer
        self.conditioner = conditioner

    def forward(self, noisy: Tensor, timestep: Tensor, prompt: Prompt, references: Tensor | None) -> Tensor:
        """Velocity [B, C, h, w] float32 at `noisy` [B, C, h, w]; timestep [B] = 1000 sigma; references [B, C, h, w].

        Latents stay float32 up to here: in bfloat16 a small noise level would be rounded away.
        """
        dtype = self.transformer.dtype
        embeds, pooled = self.embed(prompt)
        return self.transformer(
            noisy.to(dtype),
            embeds.to(dtype),
            pooled.to(dtype),
            timestep,
            reference_hidden_states=None if references is None else references.to(dtype),
            return_dict=False,
        )[0].float()

    def embed(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """What the transformer reads of the prompts: [B, L, J] and [B, P]."""
        if isinstance(prompt, tuple):
            return prompt
        assert self.conditioner is not None
        return self.conditioner(prompt)


def load_model(recipe: FlowRecipe) -> FlowModel:
    """The recipe's start, on the CPU, in its dtype; fresh parts are drawn from its seed.

    Raises FileNotFoundError and ValueError as the loaders of the parts do.
    """
    dtype = getattr(torch, recipe.model.dtype)
    transformer = load_transformer(recipes.resolve(recipe.model.path), dtype=dtype)
    conditioner = None
    if recipe.uses_vlm and recipe.model.conditioner is not None:
        conditioner = load_conditioner(recipes.resolve(recipe.model.conditioner), dtype=dtype)
    elif recipe.uses_vlm:
        from transformers import AutoConfig

        vlm = AutoConfig.from_pretrained(recipes.resolve(str(recipe.model.vlm)), local_files_only=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            config = conditioner_config(
                recipe.model.connector, vlm.text_config.hidden_size, transformer.config
            )
            conditioner = MetaQueryConditioner(config).to(dtype)
    return FlowModel(transformer, conditioner)


def conditioner_config(
    sizes: ConnectorSection, llm_hidden_size: int, transformer: dict[str, int]
) -> MetaQueryConfig:
    """A conditioner of these sizes between a VLM of this width and a transformer of this config."""
    return MetaQueryConfig(
        connector_config=ConnectorConfig(
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
            num_hidden_layers=sizes.num_hidden_layers,
            num_attention_heads=sizes.num_attention_heads,
        ),
        num_queries=sizes.num_queries,
        llm_hidden_size=llm_hidden_size,
        pooled_projection_dim=transformer["pooled_projection_dim"],
        joint_attention_dim=transformer["joint_attention_dim"],
    )


def part_of(name: str) -> str:
    """The part that a parameter of `FlowModel` belongs to: queries, connector or transformer."""
    if name.startswith("transformer."):
        return "transformer"
    return "queries" if name == "conditioner.meta_queries" else "connector"


def set_trained(model: FlowModel, recipe: FlowRecipe) -> None:
    """Give gradients to the parts that the recipe trains, and to no other."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(recipe.trains(part_of(name)))


def prepare_blocks(model: FlowModel, recipe: FlowRecipe) -> None:
    """Gradient checkpointing and compilation, as the recipe says.

    Blocks are compiled one by one: they share their code, and a whole transformer would be compiled anew for every
    bucket and task.
    """
    conditioner = model.conditioner
    if recipe.model.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()
        if conditioner is not None:
            conditioner.enable_gradient_checkpointing()
    if recipe.model.compile:
        for block in [
            *model.transformer.transformer_blocks,
            *(conditioner.connector.layers if conditioner else []),
        ]:
            block.compile()
