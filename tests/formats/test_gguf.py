import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from dairllm.errors import ConfigError, FormatError
from dairllm.formats.gguf import READABLE_TYPES, GgufFile, GgufTensor

MakeGguf = Callable[..., Path]
TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q5_1", "Q5_0")


@pytest.mark.parametrize("weight", TYPES)
def test_values_are_those_of_the_library(make_gguf: MakeGguf, gguf_values: dict[str, np.ndarray], weight: str) -> None:
    with GgufFile.open(make_gguf(weight=weight)) as file:
        for name, values in gguf_values.items():
            tensor = file.tensors[name]
            assert tensor.shape == values.shape
            kind = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else weight]
            expected = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
            got = np.concatenate([file.rows(tensor, first, min(7, tensor.n_rows - first)) for first in range(0, tensor.n_rows, 7)])
            assert got.dtype == np.float32
            assert np.array_equal(got.reshape(values.shape), expected)


def test_metadata_by_kind(make_gguf: MakeGguf) -> None:
    changes = {"a.integer": 7, "a.real": 0.5, "a.flag": True, "a.text": "é", "a.texts": ["x", "y"], "a.numbers": [1, 2]}
    with GgufFile.open(make_gguf(metadata=changes)) as file:
        assert (file.integer("a.integer"), file.real("a.real"), file.flag("a.flag"), file.text("a.text")) == (7, 0.5, True, "é")
        assert (file.texts("a.texts"), file.numbers("a.numbers")) == (["x", "y"], [1, 2])
        assert file.real("a.integer") == 7.0
        assert (file.integer("b", 3), file.text("b", ""), file.flag("b", False), file.texts("b", [])) == (3, "", False, [])
        assert set(changes) <= set(file.keys())
        with pytest.raises(FormatError, match=r"expected metadata b \(an integer\), found none of that name"):
            file.integer("b")
        for wrong in (lambda: file.integer("a.flag"), lambda: file.integer("a.text"), lambda: file.real("a.flag")):
            with pytest.raises(FormatError, match="as a"):
                wrong()
        with pytest.raises(FormatError, match=r"a text as tokenizer.ggml.tokens, found \['<\|endoftext\|>'.*\.\.\."):
            file.text("tokenizer.ggml.tokens")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a GGUF file, which begins with b'GGUF', found an empty file"),
        (b"\xcd\xab\x00\x0a" + bytes(100), "found a .m model file, which needs no conversion"),
        (b"GGUF", "the end of the file at byte 4: it is cut short, fetch it anew"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a little-endian GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "the end of the file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "the end of the file"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "the end of the file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 99), "a GGUF file that can be read"),
    ],
)
def test_what_is_no_such_file(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        GgufFile.open(path)
    assert message in str(caught.value)


def test_truncation(make_gguf: MakeGguf) -> None:
    path = make_gguf()
    data = path.read_bytes()
    for length in [*range(4, 600, 13), *range(600, len(data), 9973), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(FormatError):
            GgufFile.open(path)


def test_a_file_that_shrinks_while_it_is_read(make_gguf: MakeGguf) -> None:
    path = make_gguf()
    with GgufFile.open(path) as file:
        tensor = file.tensors["output.weight"]
        os.truncate(path, tensor.offset + 10)
        with pytest.raises(FormatError, match=r"more bytes of tensor output.weight"):
            file.rows(tensor, 0, 1)


def test_what_is_no_plain_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="a folder"):
        GgufFile.open(tmp_path)
    with pytest.raises(FormatError, match="no file of this name"):
        GgufFile.open(tmp_path / "none.gguf")


def test_without_the_library(make_gguf: MakeGguf, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_gguf()
    monkeypatch.setitem(sys.modules, "gguf", None)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(
        ConfigError,
        match=r"needs the gguf library: pip install gguf \(in the folder that dairllm's source is in, pip install '\.\[convert\]'",
    ):
        GgufFile.open(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_types_that_are_named_are_those_that_can_be_read(make_gguf: MakeGguf) -> None:
    """All that the library can turn into values; what it cannot is refused with the list."""
    with GgufFile.open(make_gguf()) as file:
        for kind in gguf.GGMLQuantizationType:
            block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
            tensor = GgufTensor("x", kind.name, (1, 1), file.tensors["output.weight"].offset, block_bytes)
            if kind.name in READABLE_TYPES:
                assert file.rows(tensor, 0, 1).dtype == np.float32
            else:
                with pytest.raises(FormatError, match=rf"tensor x in a type that can be read \(F32, F16, BF16, Q4_0,.*found {kind.name}$"):
                    file.rows(tensor, 0, 1)
