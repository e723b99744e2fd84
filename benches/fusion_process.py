"""Scripts that run where FusionBench is installed, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path


def figures(script: str, *arguments: str) -> dict | None:
    """What a script of this folder prints as JSON, None without such an interpreter.

    Args:
        script: its file.
        arguments: of its command line.
    """
    interpreter = os.environ.get("FASTMERGE_FUSIONBENCH")
    if interpreter is None:
        return None
    command = [interpreter, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])
