"""Qwen2's own tokenizer class with the words of the shapes world: a word is one token, anything else is bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from tokenizers import Regex, pre_tokenizers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from worlds.shapes.training.tokenizers import byte_pair_merges

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML as Qwen2.5-VL's own template writes it, without a system turn."""


def vlm_tokenizer(corpus: Iterable[str], *, max_vocabulary: int) -> Qwen2Tokenizer:
    """A tokenizer under which every word of the corpus, with the space before it if there is one, is one token.

    Digits are single tokens (Qwen2's rule). Ids follow from the corpus's words alone.
    Raises ValueError when the tokens exceed `max_vocabulary`.
    """
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = sorted({word for text in corpus for word, _ in splitter.pre_tokenize_str(text)})
    merges = byte_pair_merges([list(word) for word in words])
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary += dict.fromkeys(left + right for left, right in merges)
    size = len(vocabulary) + len(SPECIAL_TOKENS)
    if size > max_vocabulary:
        raise ValueError(f"max_vocabulary={max_vocabulary} is too small for {size} tokens")
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)},
        # The class is annotated for "left right" strings, and takes pairs only.
        merges=cast(Any, merges),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return tokenizer
