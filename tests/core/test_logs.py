"""What a command logs: its own lines, and none for every request that a library makes."""

import subprocess
import sys

PROGRAM = """
import logging
from core.logs import start_logging
start_logging()
logging.getLogger("rl.anything").info("a step")
for library in ("httpx", "httpx2"):
    logging.getLogger(library).info("one request")
logging.getLogger("httpx2").warning("a connection was lost")
"""


def test_a_library_speaks_only_when_something_is_wrong():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240, check=True
    )
    lines = done.stderr.splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "INFO rl.anything: a step",
        "WARNING httpx2: a connection was lost",
    ]
