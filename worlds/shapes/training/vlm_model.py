"""A Qwen2.5-VL of transformers at the recipe's size, and its forward pass over packed rows."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionBlock,
    apply_rotary_pos_emb_vision,
)

from worlds.shapes.training.config import VisionModel, VlmModel
from worlds.shapes.training.vlm_batch import VlmBatch
from worlds.shapes.training.vlm_pictures import GRID, MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH

HEAD_DIM = 64
"""Of the language model: the smallest that every build of vLLM serves."""
_MROPE_SECTION = [2, 4, 26]
"""Frequencies for time, rows and columns, fastest first. Each of the three then has some under which neighbours
differ; in the released shares columns have the slowest alone, and a picture's four columns would look alike."""
_ROPE_THETA = 1e4
_MAX_POSITIONS = 4096


def vision_config(model: VisionModel) -> Qwen2_5_VLVisionConfig:
    """Every block sees its whole picture: there are no windows of 28 pixels."""
    return Qwen2_5_VLVisionConfig(
        depth=model.layers,
        hidden_size=model.width,
        intermediate_size=model.mlp_width,
        num_heads=model.heads,
        out_hidden_size=model.token_width,
        fullatt_block_indexes=list(range(model.layers)),
        patch_size=PATCH_SIZE,
        spatial_merge_size=MERGE_SIZE,
        temporal_patch_size=TEMPORAL_PATCH,
    )


def vlm_config(
    model: VlmModel, vision: Qwen2_5_VLVisionConfig, tokenizer: Qwen2Tokenizer
) -> Qwen2_5_VLConfig:
    """The released layout at the recipe's size."""

    def token(text: str) -> int:
        return cast(int, tokenizer.convert_tokens_to_ids(text))

    tower = vision.to_dict()
    tower.pop("_name_or_path", None)  # the folder it was loaded from: of no use to anybody else

    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": model.heads * HEAD_DIM,
            "intermediate_size": model.mlp_width,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.heads,
            "max_position_embeddings": _MAX_POSITIONS,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": _MROPE_SECTION,
                "rope_theta": _ROPE_THETA,
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config=tower,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        vision_token_id=token("<|vision_pad|>"),  # type: ignore[call-arg]  # the released configs have it
        tie_word_embeddings=False,
    )


def read_rows(
    model: Qwen2_5_VLForConditionalGeneration, batch: VlmBatch, features: Tensor, middle: int
) -> tuple[Tensor, Tensor]:
    """Logits [A, vocabulary] where `batch.targets` are, and the pictures' tokens [N, P, H] after `middle` layers.

    `features` [N, P, H] are the pictures' tokens as the vision tower gives them.
    """
    body = model.model.language_model
    embeds = body.embed_tokens(batch.input_ids)
    image = (batch.input_ids == model.config.image_token_id)[..., None]
    output = body(
        inputs_embeds=embeds.masked_scatter(image, features),
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    logits = model.lm_head(output.last_hidden_state[batch.rows, batch.columns])
    return logits, output.hidden_states[middle][image[..., 0]].view_as(features)


def vision_features(visual: Qwen2_5_VisionTransformerPretrainedModel, pixels: Tensor) -> Tensor:
    """What `visual` gives for pictures of one size: pixels [N, P, D] -> tokens [N, P, H].

    The tower's own forward attends picture by picture in a Python loop; here all of them are one batch.
    """
    n, count = pixels.shape[:2]
    places = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID))
    hidden = visual.patch_embed(pixels.reshape(n * count, -1)).view(n, count, -1)
    rotary = visual.rotary_pos_emb(hidden, places)
    for module in visual.blocks:
        block = cast(Qwen2_5_VLVisionBlock, module)
        attention = block.attn
        states = attention.qkv(block.norm1(hidden)).view(n, count, 3, attention.num_heads, -1)
        query, key, value = states.unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(n, count, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden.view(n * count, -1)).view(n, count, -1)
