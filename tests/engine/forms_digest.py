"""Logits of the fixtures and of awkward random models as digests, with one form of the kernels.

    python -m tests.engine.forms_digest FORM FOLDER [--numba]

FOLDER holds the random models. --numba has the kernels compiled in this process, as where their object code cannot be loaded. Prints
{model: [digests]}: one digest wherever threads and batches made no difference, which is how it must be.
"""

import asyncio
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from dairllm.kernels import forms

DATA = Path(__file__).parent.parent / "data" / "dllama"
THREADS = (1, 2, 3)
LENGTH = 40


async def digests(path: Path, tokens: list[int]) -> list[str]:
    from dairllm.engine.executor import Executor
    from dairllm.formats.model_file import ModelFile
    from dairllm.net.compute import Compute
    from dairllm.nodes.local import LocalNode

    found = set()

    def note(logits: Any) -> None:
        found.add(hashlib.sha256(logits.tobytes()).hexdigest()[:16])

    for n_threads in THREADS:
        with ModelFile.open(path) as model, Executor(n_threads) as executor:
            node = LocalNode(model, Compute(executor, math.inf), n_threads=n_threads)
            await node.open()
            for sizes in ([LENGTH], [7, 33], [38, 2], [1] * LENGTH):
                at = 0
                for size in sizes:
                    logits = await node.feed(tokens[at : at + size], at, logits=True)
                    at += size
                note(logits)
            await node.close()
    return sorted(found)


def refuse_object_code() -> None:
    from dairllm.kernels import entry
    from dairllm.kernels.object_code import ObjectCodeError

    def refused(*_: object) -> None:
        raise ObjectCodeError("this test has none")

    entry.ObjectCode = refused  # type: ignore[assignment,misc] # as where it cannot be loaded


def main(form: str, folder: str, *how: str) -> None:
    forms.select(form)
    if how:
        refuse_object_code()
    golden = json.loads((DATA / "golden.json").read_text())["models"]
    result = {}
    for model, ids in golden.items():
        result[model] = asyncio.run(digests(DATA / f"{model}.m", (ids["prompt_ids"] + ids["generated_ids_1_node"])[:LENGTH]))
    for path in sorted(Path(folder).glob("*.m")):
        result[path.stem] = asyncio.run(digests(path, [(7 * i * i + 3 * i) % 97 for i in range(LENGTH)]))
    assert ("numba" in sys.modules) == bool(how), "who computed it"
    print(json.dumps(result))  # noqa: T201 - what the test reads


if __name__ == "__main__":
    main(*sys.argv[1:])
