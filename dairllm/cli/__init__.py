"""The command line: what can be asked for. What a command does stands in `dairllm.commands`.

Only this package's imports are paid for by `dairllm --help`, so a command imports its body when it is called.
"""

from dairllm.cli import computing, files, installing, measuring
from dairllm.cli.app import app, main

__all__ = ["app", "computing", "files", "installing", "main", "measuring"]
