import pytest
from transformers import AutoTokenizer

from worlds.shapes.training.shapes import edit_batch, t2i_batch
from worlds.shapes.training.tokenizers import clip_tokenizer, t5_tokenizer

CORPUS = t2i_batch(0, 0, 800).prompts + edit_batch(0, 0, 800).prompts


def test_every_word_is_one_clip_token_after_a_save_and_load(tmp_path):
    tokenizer = clip_tokenizer(CORPUS, max_vocabulary=400, length=12)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in CORPUS[::50]:
        assert len(loaded(text).input_ids) == len(text.split()) + 2
        assert loaded(text).input_ids == tokenizer(text).input_ids
    padded = loaded("a circle", padding="max_length", max_length=12).input_ids
    assert padded[0] == loaded.bos_token_id and padded[3:] == [loaded.eos_token_id] * 9
    assert loaded.model_max_length == 12


def test_every_word_is_one_t5_token_after_a_save_and_load(tmp_path):
    tokenizer = t5_tokenizer(CORPUS, max_vocabulary=400, length=12)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in CORPUS[::50]:
        ids = loaded(text).input_ids
        assert len(ids) == len(text.split()) + 1
        assert loaded.decode(ids, skip_special_tokens=True) == text
    assert loaded.unk_token_id not in loaded("an unheard word").input_ids


def test_a_vocabulary_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="max_vocabulary=60"):
        clip_tokenizer(CORPUS, max_vocabulary=60, length=12)
    with pytest.raises(ValueError, match="max_vocabulary=60"):
        t5_tokenizer(CORPUS, max_vocabulary=60, length=12)
