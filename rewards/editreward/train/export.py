"""`python -m rewards.editreward export RECIPE`: from a training run to the model folder that stock vLLM serves.

The folder holds the whole model (LoRA merged) with vLLM's weight names, a config that says
`Qwen2_5_VLForSequenceClassification`, tokenizer, image processor, chat template, and `editreward.json`. It appears
complete or not at all. Every other command, and the reward, reads this folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import recipes
from core.checkpoints import BEST, step_folders
from core.command_line import add_recipe_arguments
from core.files import atomic_write_json, atomic_write_text, publish_folder, verify_folder
from rewards.editreward.config import Recipe
from rewards.editreward.model_folder import ARCHITECTURE, MODEL
from rewards.editreward.settings import FILE, EditRewardSettings, load_settings
from rewards.editreward.validate import load_recipe

if TYPE_CHECKING:
    from rewards.editreward.model import EditRewardModel

log = logging.getLogger(__name__)
REFUSALS = (ValueError, FileExistsError, FileNotFoundError)
SHARD_SIZE = "5GB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe that trained, and where to read and write."""
    add_recipe_arguments(parser, "recipes/editreward.yaml", Recipe)
    parser.add_argument("--checkpoint", type=Path, help="folder under best/; default: the run's best")
    parser.add_argument(
        "--out", type=Path, help=f"model folder to write; default: {MODEL}/ in the run's folder"
    )


def run(arguments: argparse.Namespace) -> int:
    """Export and print the folder."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    checkpoint = arguments.checkpoint or newest_best(recipe.run_dir)
    folder = arguments.out or recipe.run_dir / MODEL
    export_checkpoint(checkpoint, recipes.resolve(recipe.model.path), folder)
    sys.stdout.write(f"{folder}\n")
    return 0


def newest_best(run_dir: Path) -> Path:
    """The best weights of a run. Raises FileNotFoundError before the first validation."""
    found = list(step_folders(run_dir / BEST))
    if not found:
        raise FileNotFoundError(f"{run_dir / BEST} is empty: no validation of this run has scored yet")
    return found[-1]


def export_checkpoint(checkpoint: Path, base: Path, folder: Path) -> None:
    """Put trained weights on the base they were trained from, merge, write.

    Raises ValueError for a damaged checkpoint, or one whose weights do not fit the base.
    """
    from safetensors.torch import load_file

    from core.training.optimization import trained_parameters
    from rewards.editreward.model import merge_lora
    from rewards.editreward.train.rank import TRAINABLE_FILE, make_trainable_model

    problems = verify_folder(checkpoint)
    if problems:
        raise ValueError("\n".join(problems))
    settings = load_settings(checkpoint)
    made_by = load_recipe(checkpoint / "recipe.yaml", [f"model.path={base}"])
    model = make_trainable_model(made_by)
    live, stored = dict(trained_parameters(model)), load_file(checkpoint / TRAINABLE_FILE)
    differing = sorted(live.keys() ^ stored.keys()) or [n for n in live if live[n].shape != stored[n].shape]
    if differing:
        raise ValueError(
            f"{checkpoint}: {len(differing)} weights do not fit {base}, first {differing[0]}; "
            "give the base it was trained from as model.path"
        )
    for name, parameter in live.items():
        parameter.data.copy_(stored[name])
    merge_lora(model)
    write_export(model, base, settings, folder)


def write_export(model: EditRewardModel, base: Path, settings: EditRewardSettings, folder: Path) -> None:
    """Write the model folder. `base` is the Qwen2.5-VL folder whose tokenizer and image processor it takes over.

    The model must be whole on the CPU and free of LoRA (`merge_lora`). A folder that is already there is replaced
    when it is an export, and refused when it is anything else.

    Raises:
        FileExistsError: `folder` exists and is no export.
    """
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoTokenizer

    if folder.exists() and any(folder.iterdir()) and not (folder / FILE).is_file():
        raise FileExistsError(f"{folder} exists and is no exported model; choose another folder")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.file_tensors()}
    save_torch_state_dict(tensors, temporary, max_shard_size=SHARD_SIZE)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(temporary)
    atomic_write_text(temporary / "chat_template.jinja", settings.chat_template)
    atomic_write_json(temporary / "preprocessor_config.json", _image_processor(base, settings))
    atomic_write_json(temporary / "config.json", _config(model, settings))
    atomic_write_json(temporary / FILE, settings.to_json())
    publish_folder(temporary, folder)
    log.info("exported to %s", folder)


def _config(model: EditRewardModel, settings: EditRewardSettings) -> dict[str, Any]:
    """The base's config with the head's size on top, where vLLM looks for it.

    vLLM (0.32) takes a top-level count of 2 for the library's default and then asks `text_config`, whose default is
    2 as well: so two dimensions are right too.
    """
    labels = dict(enumerate(settings.dimensions))
    record = model.backbone.config.to_dict()
    record |= {
        "architectures": [ARCHITECTURE],
        "dtype": str(model.score.weight.dtype).removeprefix("torch."),
        "id2label": {str(k): name for k, name in labels.items()},
        "label2id": {name: k for k, name in labels.items()},
        "num_labels": len(labels),
    }
    return json.loads(json.dumps(record, default=str))


def _image_processor(base: Path, settings: EditRewardSettings) -> dict[str, Any]:
    record = json.loads((base / "preprocessor_config.json").read_text(encoding="utf-8"))
    for old in ("min_pixels", "max_pixels"):
        record.pop(old, None)
    limits = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
    return record | {"image_processor_type": "Qwen2VLImageProcessor", "size": limits}
