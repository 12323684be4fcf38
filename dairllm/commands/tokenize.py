"""`dairllm tokenize`: the ids of a text, and what each stands for."""

import json as json_format
import sys
from pathlib import Path

from dairllm.text.tokenizer import Tokenizer

__all__ = ["run"]


def run(tokenizer: Path, text: str, *, json: bool) -> None:
    """Print a line for each token of `text` ("-": of stdin, byte for byte), or one JSON object {"ids", "pieces"}.

    Bytes of a piece that are no UTF-8 by themselves (part of a character) are shown as U+FFFD.
    """
    vocabulary = Tokenizer.load(tokenizer)
    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    ids = vocabulary.encode(text)
    pieces = [vocabulary.pieces[token].decode("utf-8", "replace") for token in ids]
    if json:
        json_format.dump({"ids": ids, "pieces": pieces}, sys.stdout, ensure_ascii=False)
        sys.stdout.write("\n")
        return
    width = len(str(vocabulary.vocab_size))
    for token, piece in zip(ids, pieces, strict=True):
        sys.stdout.write(f"{token:>{width}}  {piece!r}\n")
