"""Which texts a VLM may be shown: a picture or the end of a turn, written into a caption, would be read as one."""

from typing import Any

from core.shards.errors import SampleError
from models.metaquery.vlm import refuse_control_tokens
from pretrain.data.sources import Source


def readable_texts(source: Source, ordinal: int, tokenizer: Any) -> tuple[str, ...]:
    """A sample's texts. Raises SampleError also for one that the tokenizer's VLM refuses, whichever is drawn."""
    texts = source.texts(ordinal)
    try:
        for text in texts:
            refuse_control_tokens(text, tokenizer)
    except ValueError as error:
        raise SampleError(str(error)) from error
    return texts
