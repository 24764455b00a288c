"""On the import path of processes whose environment has `WorkerServer.commands()`."""

import os
import sys

if "TESTS_FORK_SERVER" in os.environ:
    sys.path.append(os.path.dirname(os.path.dirname(__file__)))
    import forked_workers

    sys.path.pop()
    forked_workers.stand_in()
