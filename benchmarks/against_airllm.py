"""A small model through AirLLM's way, one layer at a time, and through ours, its weights on the disk: tokens a second, in turn.

    python benchmarks/against_airllm.py --gguf SmolLM2.gguf --airllm-python VENV/bin/python --folder F [--weights q40] [--rounds 3]

VENV has airllm, torch and gguf installed. Into the folder go the checkpoint that AirLLM reads and our converted file, which stay there.
Ours may hold a little more than what a plan calls the smallest limit, so it reads every weight from the disk for every token; AirLLM has
all of the machine's memory, page cache included. Both continue the same ids, taking the likeliest token.
"""

import argparse
import json
import statistics
from pathlib import Path

from dairllm.bench.idle import wait_until_idle
from dairllm.bench.processes import output
from dairllm.bench.programs import Dairllm, Task
from dairllm.bench.results import ratio
from dairllm.formats.convert import convert_gguf
from dairllm.graph.types import FloatType

PROMPT = "Counting: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"
CONTEXT = 256
CHILD = Path(__file__).with_name("airllm_child.py")


SLACK = 8 << 20
"""More than a plan's smallest limit: a process that generates holds a little more than one that plans."""


def smallest_limit(ours: Dairllm, model: Path) -> int:
    """A plan's smallest limit depends on the batch, which depends on the limit."""
    limit, smallest = 0, ours.plan(model, "100%", CONTEXT)["smallest_limit_bytes"]
    while smallest != limit:
        limit = smallest
        smallest = min(limit, ours.plan(model, f"{limit + SLACK}B", CONTEXT)["smallest_limit_bytes"])
    return limit + SLACK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--airllm-python", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--weights", default="q80", choices=["q40", "q80", "f32"], help="of ours")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    o = parser.parse_args()
    checkpoint, model = o.folder / "checkpoint", o.folder / f"model-{o.weights}.m"
    if not checkpoint.exists():
        output([o.airllm_python, CHILD, "checkpoint", o.gguf, checkpoint])
    if not model.exists():
        convert_gguf(o.gguf, model, FloatType[o.weights.upper()])
    ours = Dairllm()
    ids = ours.tokenize(model.with_suffix(".t"), PROMPT)
    task, limit = Task(model, PROMPT, tuple(ids), o.steps, CONTEXT, o.threads), smallest_limit(ours, model)
    mine, theirs = [], []
    for number in range(o.rounds):
        wait_until_idle()
        a = ours.generate(task, limit=limit)
        wait_until_idle()
        said = output([o.airllm_python, CHILD, "tokens", checkpoint, ",".join(map(str, ids)), o.steps])
        b = json.loads(said.splitlines()[-1])
        mine.append(a.generation)
        theirs.append(b["tokens_per_second"])
        same = sum(x == y for x, y in zip(a.more["ids"], b["ids"], strict=True))
        print(f"{number + 1}: {mine[-1]:.2f} / {theirs[-1]:.3f} tokens/s; {same} of {o.steps} ids are the same", flush=True)
    plan = ours.plan(model, f"{limit}B", CONTEXT)
    print(
        f"limit {limit >> 20} MiB, peak resident {a.more['peak_rss_bytes'] >> 20} MiB; "
        f"{plan['missing_bytes_a_token'] / 1e6:.0f} of {plan['weight_bytes'] / 1e6:.0f} MB read for each token"
    )
    print(
        f"{statistics.median(mine):.2f} / {statistics.median(theirs):.3f} tokens/s; ratio {ratio(mine, theirs, more_is_better=True)}",
        flush=True,
    )


if __name__ == "__main__":
    main()
