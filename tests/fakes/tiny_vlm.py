"""A tiny Qwen2.5-VL in the hub's folder layout, made with the real classes from a seed; stock vLLM serves it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

from worlds.shapes.training.tokenizers import CHAT_TEMPLATE, SPECIAL_TOKENS

HIDDEN_SIZE = 64
DIGITS = "0123456789"


def make_tiny_vlm(path: str | Path, *, seed: int = 0) -> Path:
    """Write model, tokenizer and image processor; returns the folder.

    The model is random but for one thing: it answers with digits. Dimension 0 of every text embedding is large,
    which survives to the last layer, and the rows of the digits in the output matrix look at it. The remaining
    dimensions, which the images reach through attention, decide which digit.
    """
    path = Path(path)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(path)
    Qwen2VLImageProcessor(min_pixels=4 * 28 * 28, max_pixels=16 * 28 * 28).save_pretrained(path)
    (path / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(_config(tokenizer)).eval()
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[:, 0] = 1.0
        rows = torch.tensor([tokenizer.convert_tokens_to_ids(digit) for digit in DIGITS])
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[rows, 0] = 2.0
        model.lm_head.weight[rows, 1:] *= 10.0
    model.save_pretrained(path)
    return path


def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, so that every text can be written and every digit is one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: k for k, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
    )
    fast.init_kwargs["tokenizer_class"] = "Qwen2TokenizerFast"
    return fast


def _config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    token = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6},
            "tie_word_embeddings": False,
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": HIDDEN_SIZE,
            "fullatt_block_indexes": [1],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 112,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        vision_token_id=token("<|vision_pad|>"),
        tie_word_embeddings=False,
    )
