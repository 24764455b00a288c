"""An exported model folder: its constants, whether stock vLLM can serve it, and the name of exactly these bytes.

A served EditReward is named after its export: `editreward-` and the start of a hash over the manifest, which holds
the hash of every file. `serve` gives vLLM that name, the client computes it from its own copy and puts it into every
request: a server of any other model (other weights, other constants) answers 404, and the run stops. So nothing is
asked of the server about constants; the client needs two small files of the folder, `editreward.json` and
`COMPLETE`, where it runs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from core.files import COMPLETE, file_sha256
from rewards.editreward.settings import FILE, EditRewardSettings, SettingsError, load_settings

ARCHITECTURE = "Qwen2_5_VLForSequenceClassification"
MODEL = "model"
"""Where in a run's folder `export` writes, unless told otherwise."""


class ModelFolderError(ValueError):
    """A folder that cannot be served or scored with; `problems` holds one sentence for each thing to mend."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(f"- {problem}" for problem in problems))
        self.problems = problems


@dataclass(frozen=True)
class ModelCard:
    """A folder's constants and the name under which its model is served."""

    folder: Path
    settings: EditRewardSettings
    served_name: str


def read_card(folder: str | Path) -> ModelCard:
    """Reads the two small files that scoring over HTTP needs: `editreward.json` and the manifest.

    Raises ModelFolderError for a folder that is no export, and for constants that are not those exported with it.
    """
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise ModelFolderError([f"{folder}: no such folder; give the path of an exported EditReward"])
    try:
        settings = load_settings(folder)
        manifest = (folder / COMPLETE).read_bytes()
        exported = json.loads(manifest).get(FILE)
    except SettingsError as error:
        raise ModelFolderError([str(error)]) from error
    except (OSError, ValueError, AttributeError) as error:
        raise ModelFolderError(
            [f"{folder / COMPLETE}: not readable ({error}); the export, or a copy of it, never finished"]
        ) from error
    if file_sha256(folder / FILE) != exported:
        raise ModelFolderError(
            [
                f"{folder / FILE}: changed since the export, so its constants are not those of training; "
                "export the model again"
            ]
        )
    return ModelCard(folder, settings, f"editreward-{hashlib.sha256(manifest).hexdigest()[:16]}")


def folder_problems(folder: str | Path) -> list[str]:
    """Why stock vLLM could not serve this folder as an EditReward; empty when it can. Reads no weights."""
    folder = Path(folder)
    try:
        settings = load_settings(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (SettingsError, OSError, ValueError) as error:
        return [str(error)]
    problems = []
    if not (folder / COMPLETE).is_file():
        problems.append(f"{folder}: no {COMPLETE} file, so its export or its copy never finished")
    if config.get("architectures") != [ARCHITECTURE]:
        problems.append(
            f"{folder}/config.json: architectures is {config.get('architectures')}, not [{ARCHITECTURE!r}]"
        )
    k = len(settings.dimensions)
    if config.get("num_labels") != k or len(config.get("id2label", {})) != k:
        problems.append(
            f"{folder}/config.json: num_labels is {config.get('num_labels')}, {FILE} names {k} dimensions"
        )
    try:
        shape = _head_shape(folder)
    except SafetensorError as error:
        return [f"{folder}: a weight file is not whole ({error}); copy *.safetensors again"]
    if shape is None or shape[0] != k:
        problems.append(f"{folder}: language_model.score.weight has shape {shape}, expected {k} rows")
    return [f"{problem}; export the model again" for problem in problems]


def _head_shape(folder: Path) -> list[int] | None:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            if "language_model.score.weight" in file.keys():  # noqa: SIM118 - safe_open is no mapping
                return file.get_slice("language_model.score.weight").get_shape()
    return None
