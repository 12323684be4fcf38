"""`dairllm generate`: continue a prompt on this machine."""

import json
import secrets
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from dairllm import machine
from dairllm.commands.generate_options import GenerateOptions
from dairllm.commands.progress import COMPILING, waiting
from dairllm.engine.sampler import Sampler
from dairllm.errors import ConfigError
from dairllm.formats.model_file import ModelFile
from dairllm.graph.types import FloatType
from dairllm.nodes.generation import Generation
from dairllm.nodes.local import LocalNode
from dairllm.text.chat import render_chat
from dairllm.text.tokenizer import Tokenizer

__all__ = ["run"]


def run(options: GenerateOptions) -> None:
    """Generate, streaming the text to stdout, or one JSON object at the end.

    Raises:
        DairllmError: files, settings or the computation; one clear line.
    """
    with ModelFile.open(options.model, max_seq_len=options.max_seq_len) as model:
        tokenizer = _tokenizer(options)
        if tokenizer is not None and tokenizer.vocab_size > model.spec.vocab_size:
            raise ConfigError(
                f"the tokenizer knows {tokenizer.vocab_size} tokens, the model {model.spec.vocab_size}: they do not belong together"
            )
        prompt_ids = _prompt_ids(options, tokenizer)
        sync = None if options.sync is None else FloatType[options.sync.upper()]
        with waiting(COMPILING):
            started = LocalNode(model, n_threads=options.threads, kernels=options.kernels, sync=sync)
        with started as node:
            logits = _Logits(options.logits, options.steps, node.vocab_size) if options.logits else None
            seed = secrets.randbits(64) if options.seed is None else options.seed
            generation = Generation(
                node,
                Sampler(options.temperature, options.top_p, seed),
                prompt_ids,
                options.steps,
                () if options.ignore_eos or tokenizer is None else tokenizer.eos_ids,
                logits.append if logits else None,
            )
            text = _stream(generation, tokenizer, quiet=options.json)
            if logits:
                logits.close()
            if options.json:
                print(json.dumps(_report(generation, text, node)))  # noqa: T201 - the answer


def _tokenizer(options: GenerateOptions) -> Tokenizer | None:
    if options.tokenizer is None:
        return None
    return Tokenizer.load(options.tokenizer)


def _prompt_ids(options: GenerateOptions, tokenizer: Tokenizer | None) -> list[int]:
    if options.prompt_ids is not None:
        return list(options.prompt_ids)
    if tokenizer is None or options.prompt is None:
        raise ConfigError("a prompt needs a tokenizer")
    if not options.chat:
        return tokenizer.encode_prompt(options.prompt)
    if tokenizer.chat_template is None:
        raise ConfigError(f"{options.tokenizer} has no chat template: --chat cannot be used with this model")
    messages = [{"role": "user", "content": options.prompt}]
    return tokenizer.encode(render_chat(tokenizer.chat_template, messages, bos=tokenizer.bos_text, eos=tokenizer.eos_text))


def _stream(generation: Generation, tokenizer: Tokenizer | None, quiet: bool) -> str:
    """The generated text; printed as it comes unless `quiet`. Without a tokenizer the ids are printed."""
    pieces: list[str] = []
    decoder = tokenizer.decoder() if tokenizer is not None else None

    def show(piece: str) -> None:
        pieces.append(piece)
        if not quiet:
            sys.stdout.write(piece)
            sys.stdout.flush()

    for token in generation.run():
        if decoder is not None:
            show(decoder.feed(token))
        elif not quiet:
            show(f"{token} ")
    if decoder is not None:
        show(decoder.finish())
    if not quiet:
        sys.stdout.write("\n")
    return "".join(pieces) if decoder is not None else ""


def _report(generation: Generation, text: str, node: LocalNode) -> dict[str, Any]:
    return {
        "prompt_ids": list(generation.prompt_ids),
        "ids": generation.ids,
        "text": text,
        "finish_reason": generation.finish_reason,
        "seed": generation.sampler.seed,
        "prefill_tokens_per_second": round(generation.prefill_tokens_per_second, 3),
        "decode_tokens_per_second": round(generation.decode_tokens_per_second, 3),
        "peak_rss_bytes": machine.peak_rss_bytes(),
        "bytes_sent": 0,
        "bytes_received": 0,
        "weight_bytes_sent": 0,
        "nodes": [{"node": 0, "kernels": node.kernel_form, "threads": node.n_threads}],
    }


class _Logits:
    """A `.npy` file of float32 [steps, vocabulary], row by row; cut to the rows that came when it is closed."""

    def __init__(self, path: Path, steps: int, vocab_size: int) -> None:
        self._path, self._rows = path, 0
        try:
            self._array = open_memmap(path, mode="w+", dtype=np.float32, shape=(steps, vocab_size))
        except OSError as e:
            raise ConfigError(f"--logits {path}: {e.strerror or e}") from None

    def append(self, logits: NDArray[np.float32]) -> None:
        self._array[self._rows] = logits
        self._rows += 1

    def close(self) -> None:
        if self._rows == len(self._array):
            self._array.flush()
            return
        rows = np.array(self._array[: self._rows])
        del self._array
        with self._path.open("wb") as file:
            np.save(file, rows)
