"""``python -m tests.benchmarks.worker TASK ARGUMENTS RESULT`` runs one task.

ARGUMENTS is JSON, and what the task measured is written to the file RESULT as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.benchmarks.catalogue import TASKS


def main(task: str, arguments: str, result: str) -> None:
    measured = TASKS[task](**json.loads(arguments))
    if int(os.environ.get("RANK", "0")) == 0:
        Path(result).write_text(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
