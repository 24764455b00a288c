"""What a client knows of a served model: its constants, and the name that stands for exactly these bytes.

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

from core.files import COMPLETE, file_sha256
from rewards.editreward.settings import FILE, EditRewardSettings, SettingsError, load_settings


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
