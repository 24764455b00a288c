"""The driver of a cell: `rl.train` on a Ray that is there, with faults. Arguments: Ray's address, the workers'
Python, the recipe, and what `rl.train` is given besides."""

import functools
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(address: str, python: str, *arguments: str) -> int:
    import ray

    import rl.workers.start
    from rl.loop.controller import Controller
    from rl.train import main as train
    from tests.chaos import faults

    folder = Path(os.environ[faults.FOLDER])
    faults.install_in_driver()
    # A reward worker that hangs is noticed after all that its rewards may take, which is minutes.
    rl.workers.start.score_limit_s = lambda _, resources: resources.call_timeout_s

    def begin(self: Controller, *, run=Controller.run) -> None:
        (folder / faults.BEGUN).touch()
        run(self)

    Controller.run = functools.wraps(Controller.run)(begin)
    ray.init(
        address=address,
        log_to_driver=False,
        runtime_env={
            "py_executable": python,
            "worker_process_setup_hook": "tests.chaos.faults.install",
            "env_vars": {faults.FOLDER: str(folder), "PYTHONPATH": str(ROOT)},
        },
    )
    return train(list(arguments))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(*sys.argv[1:]))
