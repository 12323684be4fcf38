"""`dairllm`, with compute threads that have the faults that a file says.

    DAIRLLM_TEST_FAULT=FILE python -m tests.commands.faulty_node ARGUMENTS OF DAIRLLM

As long as FILE is there, each call of a compute thread of that number has the fault in it: "NUMBER raise" or "NUMBER hang".
DAIRLLM_TEST_LONGEST_CALL: seconds that a computation may take.
"""

import os
from pathlib import Path

from dairllm.cli.app import main
from dairllm.engine import executor
from dairllm.runtime import compute
from tests.engine.faulty_threads import FaultyThreads


def fault(thread: int) -> str | None:
    try:
        number, what = Path(os.environ["DAIRLLM_TEST_FAULT"]).read_text(encoding="ascii").split()
    except (FileNotFoundError, ValueError):
        return None
    return what if int(number) == thread else None


if __name__ == "__main__":
    executor.load_entry = lambda: FaultyThreads(fault).entry
    compute.LONGEST_CALL = float(os.environ.get("DAIRLLM_TEST_LONGEST_CALL", compute.LONGEST_CALL))
    main()
