"""AirLLM at work. Run by an interpreter that has airllm, torch, transformers and gguf: nothing of ours is needed.

    python airllm_child.py checkpoint F.gguf FOLDER
    python airllm_child.py tokens FOLDER 1,2,3 24

The first writes the checkpoint that AirLLM reads, in bfloat16, the type that the model was trained in. The second continues ids with the
likeliest tokens and prints one JSON object; the first token, which has the prompt in it, is not timed.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

CONTEXT = 256


class Clock(BaseStreamer):  # type: ignore[misc, unused-ignore] # it may not be installed
    """Notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to note."""


def checkpoint(gguf: Path, folder: Path) -> None:
    """Embedding and classifier are one matrix in the model; AirLLM reads them as two."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.config.tie_word_embeddings = False
    model.hf_quantizer = None  # what was read is values by now
    del model.config.quantization_config
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def tokens(folder: Path, ids: list[int], count: int) -> None:
    from airllm import AutoModel

    model = AutoModel.from_pretrained(str(folder), device="cpu", max_seq_len=CONTEXT)
    prompt, clock = torch.tensor([ids]), Clock()
    words = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "use_cache": True, "streamer": clock}
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **words)
    new = out[0, len(ids) :].tolist()
    seconds = clock.times[-1] - clock.times[1]  # what it is told first are the prompt's ids
    print("\n" + json.dumps({"ids": new, "tokens_per_second": (len(new) - 1) / seconds}))


if __name__ == "__main__":
    if sys.argv[1] == "checkpoint":
        checkpoint(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        tokens(Path(sys.argv[2]), [int(word) for word in sys.argv[3].split(",")], int(sys.argv[4]))
