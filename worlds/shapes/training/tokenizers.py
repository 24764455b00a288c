"""Small tokenizers of the classes that SD3 and Qwen2.5-VL use, from a corpus of which every word becomes one token."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import log
from typing import Any, cast

from tokenizers import Regex, pre_tokenizers
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

START, END = "<|startoftext|>", "<|endoftext|>"
NUM_SENTINELS = 4
_WORD_END = "</w>"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Far below any word's log-frequency, so that a known word is never spelt out.
_LETTER_SCORE = -30.0

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


def clip_tokenizer(corpus: Iterable[str], *, max_vocabulary: int, length: int) -> CLIPTokenizer:
    """Byte-pair tokenizer; ids 0 and 1 are start and end, and padding is the end token.

    Raises ValueError when the tokens exceed `max_vocabulary`.
    """
    words = sorted({word for text in corpus for word in text.lower().split()})
    vocabulary = [START, END, *_LETTERS, *(f"{letter}{_WORD_END}" for letter in _LETTERS)]
    merges = byte_pair_merges([[*word[:-1], word[-1] + _WORD_END] for word in words])
    vocabulary += dict.fromkeys(left + right for left, right in merges)
    if len(vocabulary) > max_vocabulary:
        raise ValueError(f"max_vocabulary={max_vocabulary} is too small for {len(vocabulary)} CLIP tokens")
    ids = {token: i for i, token in enumerate(vocabulary)}
    # The class is annotated for "left right" strings, and takes pairs only.
    return CLIPTokenizer(vocab=ids, merges=cast(Any, merges), model_max_length=length)


def t5_tokenizer(corpus: Iterable[str], *, max_vocabulary: int, length: int) -> T5Tokenizer:
    """Unigram tokenizer over whole words, with single letters for anything else.

    Raises ValueError when words, letters and special tokens exceed `max_vocabulary`.
    """
    counts = Counter(word for text in corpus for word in text.lower().split())
    total = sum(counts.values())
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", _LETTER_SCORE)]
    vocabulary += [(f"▁{word}", log(count / total)) for word, count in sorted(counts.items()) if word != "▁"]
    vocabulary += [(letter, _LETTER_SCORE) for letter in _LETTERS]
    vocabulary += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(NUM_SENTINELS))]
    if len(vocabulary) > max_vocabulary:
        raise ValueError(f"max_vocabulary={max_vocabulary} is too small for {len(vocabulary)} T5 tokens")
    return T5Tokenizer(vocab=vocabulary, extra_ids=NUM_SENTINELS, model_max_length=length)


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


def byte_pair_merges(pieces: Sequence[list[str]]) -> list[tuple[str, str]]:
    """Merges, commonest pair first, until every word, given as its symbols, is one token.

    Ties go by spelling: a trainer that breaks them by hash order would number the tokens anew in each process,
    and a resumed run would read other ids than the run it continues.
    """
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for piece in pieces for pair in pairwise(piece))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merge(piece, best) for piece in pieces]


def _merge(piece: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in piece:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged
