"""Load the kernels in a process of its own, and say what it took.

    python -m tests.kernels.start_kernels FOLDER [SECONDS]

Prints whether this process compiled, why numba is in it, and what a call leaves in a mailbox. With SECONDS the compiler is not the
real one but takes so long, and the objects of FOLDER's file; it leaves a line in FOLDER's log.
"""

import json
import sys
import time
from pathlib import Path

from dairllm.kernels.objects import entry, targets
from dairllm.kernels.objects.cache import ObjectCodeCache, Objects, decode
from dairllm.kernels.objects.compiler import compile_objects
from dairllm.kernels.objects.targets import Target


def own_objects() -> Objects:
    """The objects that this process takes, compiled if need be."""
    entry.load_entry()
    target = targets.current()
    assert target is not None
    return ObjectCodeCache(target).read() or compile_objects(target)  # where nothing can be kept


def main(folder: Path, seconds: float | None) -> None:
    real, calls = entry.compile_objects, []

    def counted(target: Target) -> Objects:
        calls.append(1)
        if seconds is None:
            return real(target)
        with (folder / "log").open("a") as log:
            log.write("compiled\n")
        time.sleep(seconds)
        return decode((folder / "objects").read_bytes(), "objects")

    entry.compile_objects = counted
    loaded = entry.load_entry()
    from dairllm.engine.allocation import aligned

    mailbox = aligned(320).view("int64")
    loaded.ring(mailbox.ctypes.data, 7)
    said = {
        "compiled": len(calls),
        "numba": loaded.why_numba,
        "modules": sorted({"numba", "llvmlite"} & set(sys.modules)),
        "rung": int(mailbox[0]),
    }
    print(json.dumps(said))  # noqa: T201 - what the tests read


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else None)
