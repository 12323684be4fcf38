"""`dairllm inspect` of a GGUF file: what there is to convert."""

import json as json_format
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dairllm.errors import ConfigError, printable
from dairllm.formats.gguf import GgufFile, GgufTensor
from dairllm.units import format_size

__all__ = ["run"]

_MOST_ENTRIES = 8
"""Of a list: longer ones, such as a vocabulary, are told by their length."""

_MOST_CHARACTERS = 60


def run(path: Path, *, layer: int | None = None, json: bool = False) -> None:
    """Print the metadata and the tensors of a GGUF file.

    Args:
        path: the file.
        layer: only the tensors of this layer.
        json: one JSON object in place of tables.

    Raises:
        FormatError: it is no whole GGUF file.
        ConfigError: the gguf library is missing, or there is no such layer.
    """
    with GgufFile.open(path) as file:
        tensors = [tensor for tensor in file.tensors.values() if layer is None or tensor.name.startswith(f"blk.{layer}.")]
        if layer is not None and not tensors:
            raise ConfigError(f"{path} has no layer {layer}")
        nbytes = path.stat().st_size
        if json:
            json_format.dump(_object(file, nbytes, tensors), sys.stdout)
            sys.stdout.write("\n")
        else:
            sys.stdout.writelines(f"{line}\n" for line in _lines(file, nbytes, tensors))


def _object(file: GgufFile, nbytes: int, tensors: list[GgufTensor]) -> dict[str, Any]:
    return {
        "path": str(file.path),
        "bytes": nbytes,
        "metadata": {key: _short(value) for key, value in _metadata(file)},
        "tensors": [
            {
                "name": tensor.name,
                "type": tensor.type_name.lower(),
                "shape": list(tensor.shape),
                "offset": tensor.offset,
                "bytes": tensor.nbytes,
            }
            for tensor in tensors
        ],
    }


def _metadata(file: GgufFile) -> Iterator[tuple[str, Any]]:
    names = file.keys()
    return ((name, file.value(name)) for name in names)


def _short(value: Any) -> Any:
    """A value of the metadata, long lists by their length."""
    return {"length": len(value)} if isinstance(value, list) and len(value) > _MOST_ENTRIES else value


def _lines(file: GgufFile, nbytes: int, tensors: list[GgufTensor]) -> Iterator[str]:
    total = len(file.tensors)
    yield f"{file.path}: a GGUF file of {nbytes} bytes ({format_size(nbytes)}), {total} tensors; dairllm convert makes a model of it"
    yield ""
    for key, value in _metadata(file):
        shown = f"a list of {len(value)}" if isinstance(value, list) and len(value) > _MOST_ENTRIES else printable(value, _MOST_CHARACTERS)
        yield f"  {printable(key):<42} {shown}"
    yield ""
    rows = [("offset", "bytes", "type", "shape", "tensor")]
    for tensor in tensors:
        shape = " x ".join(map(str, tensor.shape))
        rows.append((str(tensor.offset), str(tensor.nbytes), tensor.type_name.lower(), shape, printable(tensor.name)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for offset, size, kind, shape, name in rows:
        yield f"{offset:>{widths[0]}}  {size:>{widths[1]}}  {kind:<{widths[2]}}  {shape:>{widths[3]}}  {name}"
