"""SmolLM2's ids of awkward texts, recorded from llama.cpp (tests/data/smollm2_tokens.json).

The model is too large to be kept here. Where `DAIRLLM_TEST_SMOLLM2` names a folder with its converted files, they are compared:

    dairllm convert --weights q40 SmolLM2-135M-Instruct.Q4_1.gguf /tmp/smollm2/smollm2.m
    DAIRLLM_TEST_SMOLLM2=/tmp/smollm2 make tests
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dairllm.text.tokenizer import Tokenizer

FOLDER = os.environ.get("DAIRLLM_TEST_SMOLLM2")
if FOLDER is None:
    pytest.skip("DAIRLLM_TEST_SMOLLM2 names no folder of SmolLM2's converted files", allow_module_level=True)
VECTORS = json.loads((Path(__file__).parent.parent / "data" / "smollm2_tokens.json").read_text(encoding="utf-8"))


@cache
def smollm2() -> Tokenizer:
    tokenizer = Tokenizer.load(next(Path(FOLDER).glob("*.t")))
    assert tokenizer.encoder == "tokenizer.json"
    return tokenizer


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: repr(vector["text"][:20]))
def test_ids_are_those_of_llama_cpp(vector: dict[str, Any]) -> None:
    ids = smollm2().encode(vector["text"])
    assert ids == vector["ids"]
    assert smollm2().decode(ids, show_special=True) == vector["text"]


def test_the_chat_template() -> None:
    tokenizer = smollm2()
    with tokenizer.chat_renderer() as renderer:
        text = renderer.render([{"role": "user", "content": "Hi"}])
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert text == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_ids >= {2}
    assert tokenizer.encode_prompt(text)[:2] == [1, 9690], "one <|im_start|>, and nothing before it"
