"""llama.cpp, as the package xllamacpp has it, at work on one task. Run by an interpreter that has that package, and needs nothing of ours.

    python llama_cpp_child.py '{"model": "F.gguf", "threads": 2, "context": 256, "prompt_ids": [1, 2], "steps": 32, "in_group": false,
                                  "flash": true}'

Prints one JSON object; its ids continue the first 8 of the prompt. `in_group` is for a memory-limited control group: the file is used where
it is mapped, with neither a repacked copy of the weights, which would not fit, nor a pass to warm up. `flash` leaves flash attention to it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import xllamacpp

__all__ = ["main"]


def main() -> None:
    task = json.loads(sys.argv[1])
    parameters = xllamacpp.CommonParams()
    parameters.model.path = task["model"]
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = task["threads"]
    parameters.n_ctx, parameters.n_parallel = task["context"], 1
    parameters.n_gpu_layers = parameters.verbosity = 0
    parameters.no_extra_bufts, parameters.warmup = task["in_group"], not task["in_group"]
    if not task["flash"]:
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    # What is only done once is done before the clock runs; so are the ids, which it only tells beside probabilities.
    first = _complete(server, task["prompt_ids"][:8], min(task["steps"], 16), n_probs=1)
    before = _read_bytes()
    timings = _complete(server, task["prompt_ids"], task["steps"])["timings"]
    report = {
        "ids": [token["id"] for token in first["choices"][0]["logprobs"]["content"]],
        "prompt_tokens_per_second": timings["prompt_per_second"],
        "tokens_per_second": timings["predicted_per_second"],
        "read_bytes": _read_bytes() - before,
        "version": xllamacpp.__version__,
    }
    sys.stdout.write("\n" + json.dumps(report) + "\n")


def _complete(server: Any, ids: list[int], steps: int, **more: Any) -> Any:
    request = {"prompt": ids, "n_predict": steps, "temperature": 0, "cache_prompt": False, "ignore_eos": True, **more}
    answer = server.handle_completions(request)
    return answer if isinstance(answer, dict) else json.loads(answer)


def _read_bytes() -> int:
    """From the disk, by this process, so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


if __name__ == "__main__":
    main()
