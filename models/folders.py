"""The released model folders: which parts they hold, and what is missing of them. Needs no torch."""

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from core.files import folder_manifest
from core.text import parse_json, read_text

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
TEXT_PARTS = TEXT_ENCODERS + TOKENIZERS
PARTS = ("transformer", "vae", *TEXT_PARTS, "scheduler")
"""UniPic2-SD3.5M-Kontext's folder."""
METAQUERY_PARTS = ("transformer", "vae", "scheduler", "conditioner")
"""UniPic2-MetaQuery's folder; its Qwen2.5-VL is a folder of its own."""

MAX_SEQUENCE_LENGTH = 256
"""T5 tokens that the released scripts read."""
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")


def check_model_folder(folder: str | Path, parts: Collection[str] = PARTS) -> list[str]:
    """Every problem with (the named parts of) a model folder in the released layout; empty when it can load.

    Looks at names, JSON and weight indexes only, never at tensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder}: no such model folder; download or build the model there, or correct the path"]
    known = dict.fromkeys((*PARTS, *METAQUERY_PARTS))
    problems = [problem for name in known if name in parts for problem in _check_part(folder / name)]
    if problems and (folder / "adapter" / "adapter_config.json").is_file():
        trained = folder / "adapter"
        return [f"{folder} is a run's folder: give the model that it trained, and {trained} as its adapter"]
    if problems and folder.name in known and (folder.parent / "vae").is_dir():
        return [f"{folder} is one part of a model: give the model's folder, {folder.parent}"]
    return problems


def is_metaquery_folder(folder: str | Path) -> bool:
    """Whether a model folder is conditioned by MetaQuery (it has `conditioner/`) and not by text encoders."""
    return (Path(folder) / "conditioner").is_dir()


def check_vlm_folder(folder: str | Path) -> list[str]:
    """Every problem with the folder of a Qwen2.5-VL; empty when it can load. Looks at no tensor."""
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder}: no such folder; download Qwen2.5-VL there, or correct the path"]
    problems = _check_json(folder / "config.json") + check_weights(folder) + _check_tokenizer(folder)
    problems += _check_json(folder / "preprocessor_config.json")
    if not problems:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "qwen2_5_vl":
            problems.append(f"{folder / 'config.json'}: model_type is {kind!r}, expected 'qwen2_5_vl'")
    return problems


def t5_length(folder: str | Path) -> int:
    """T5 tokens that a Kontext folder reads: as many as its tokenizer was made for, as the released scripts at most."""
    text = (Path(folder) / "tokenizer_3" / "tokenizer_config.json").read_text(encoding="utf-8")
    return min(MAX_SEQUENCE_LENGTH, int(json.loads(text).get("model_max_length", MAX_SEQUENCE_LENGTH)))


def model_sha256(folder: Path, parts: Sequence[str] = PARTS) -> str:
    """sha256 over the names and sha256 sums of all files of all parts, weights and configs alike."""
    return _sha256({name: folder_manifest(folder / name) for name in parts})


def vlm_sha256(folder: str | Path) -> str:
    """The same over all files of a VLM's folder."""
    return _sha256(folder_manifest(folder))


def require(problems: list[str]) -> None:
    """Raise FileNotFoundError with all the problems of one of the checks above, where there are any."""
    if problems:
        raise FileNotFoundError("; ".join(problems))


def _check_part(part: Path) -> list[str]:
    if not part.is_dir():
        return [f"{part}: missing subfolder of the model"]
    if part.name == "scheduler":
        return _check_json(part / "scheduler_config.json")
    if part.name in TOKENIZERS:
        return _check_json(part / "tokenizer_config.json") + _check_tokenizer(part)
    return _check_json(part / "config.json") + check_weights(part)


def _check_json(path: Path) -> list[str]:
    if not path.is_file():
        return [f"{path}: missing config file"]
    try:
        parse_json(read_text(path))
    except (OSError, ValueError) as error:
        return [f"{path}: not readable as JSON ({error})"]
    return []


def check_weights(part: Path) -> list[str]:
    """What is missing of a part's safetensors: a weight file, or shards that an index names."""
    indexes = sorted(part.glob("*.safetensors.index.json"))
    if not indexes:
        return [] if any(part.glob("*.safetensors")) else [f"{part}: no *.safetensors weight file"]
    problems = []
    for index in indexes:
        try:
            shards = set(parse_json(read_text(index))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{index}: not a readable weight index ({error!r})")
            continue
        missing = sorted(shard for shard in shards if not (part / shard).is_file())
        problems += [f"{part / shard}: weight shard named by {index.name} is missing" for shard in missing]
    return problems


def _check_tokenizer(part: Path) -> list[str]:
    if not any((part / name).is_file() for name in _TOKENIZER_FILES):
        return [f"{part}: no tokenizer file (one of {', '.join(_TOKENIZER_FILES)})"]
    return []


def _sha256(manifest: object) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
