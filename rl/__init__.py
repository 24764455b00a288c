"""Flow-GRPO training: objective, learner, controller, stages. Importing it loads neither torch nor ray."""

from pathlib import Path

import core

if Path(core.__path__[0]).resolve().parent != Path(__file__).resolve().parents[1]:
    # Any other folder that hides one of ours is named by `core` itself.
    raise ImportError(
        f"{core.__path__[0]} hides this project's package 'core': rename it, or run from another folder"
    )
