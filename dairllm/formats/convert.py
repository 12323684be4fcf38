"""GGUF to `.m`, `.t` and `tokenizer.json`.

One tensor at a time, and of a large tensor some rows at a time. Blocks of Q4_0 and Q8_0 are the same bytes as those of Q40 and Q80: where
the types are the same they are copied, never rounded again. Q4_0 can be said in Q80, too. All other blocks are rounded a second time; so is
a weight that is stored with fewer bits than it had, which costs quality, and is warned of.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dairllm.errors import ConfigError, FormatError, LimitError
from dairllm.formats.gguf import FLOAT_TYPES, GgufFile, GgufTensor
from dairllm.formats.gguf_llama import llama_spec, nearest_weight_type, tensor_sources
from dairllm.formats.gguf_vocabulary import Vocabulary, read_vocabulary
from dairllm.formats.model_layout import Tensor
from dairllm.formats.model_writer import ModelWriter
from dairllm.formats.quants import q80_of_q40
from dairllm.formats.replaced_file import made_folder, replaced_file
from dairllm.formats.tokenizer_json import UnsayableTokenizer, json_vocabulary
from dairllm.graph.model import ModelSpec
from dairllm.graph.types import BLOCK_VALUES, FloatType, row_bytes

__all__ = ["Conversion", "Progress", "convert_gguf"]

Progress = Callable[[str, int, int], None]
"""Called as the model is written: the tensor at hand, bytes written, bytes in all."""

_CHUNK_VALUES = 1 << 20
"""Values that are decoded and encoded at a time: 4 MiB as float32, so that the passes over them meet in the cache."""

_SAME_VALUES: dict[tuple[str, FloatType], Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]] | None] = {
    ("Q4_0", FloatType.Q40): None,
    ("Q8_0", FloatType.Q80): None,
    ("Q4_0", FloatType.Q80): q80_of_q40,
}
"""Blocks that go over as they are, or by a function that keeps their values."""
_MAX_VALUE = {FloatType.F32: np.inf, FloatType.Q40: 8 * 65504.0, FloatType.Q80: 127 * 65504.0}
"""The largest magnitude that a type can hold: beyond it the f16 scale of a block is infinite."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What has been written.

    Attributes:
        spec: the model.
        files: paths and sizes in bytes.
        copied_bytes: of blocks whose values were taken over as they were.
        warnings: what the user should know, a sentence each.
    """

    spec: ModelSpec
    files: dict[Path, int]
    copied_bytes: int
    warnings: tuple[str, ...]


def convert_gguf(source: Path, target: Path, weight_type: FloatType | None = None, progress: Progress | None = None) -> Conversion:
    """Convert a GGUF file of the architecture `llama`.

    All files appear complete or not at all: an exception, KeyboardInterrupt included, leaves the folder as it was.

    Args:
        source: the GGUF file.
        target: the `.m` file to write; its `.t` lies beside it under the same name, and `tokenizer.json` in the same folder. The
            folder is made where it is missing.
        weight_type: F32, Q40 or Q80: what the weights are stored as; None for the one that keeps them as they are, as far as one does.
        progress: is told how far it is.

    Raises:
        ConfigError: `target` is no name for a `.m` file, or its folder holds the `tokenizer.json` of another model.
        FormatError: `source` cannot be read, or is a model that a `.m` file cannot say.
        LimitError: there is no room for it on the disk.
        OSError: a file cannot be written.
    """
    if target.suffix != ".m":
        raise ConfigError(f"expected a target whose name ends in .m, found {target}")
    with GgufFile.open(source) as file, ExitStack() as stack:
        spec = llama_spec(file, nearest_weight_type(file) if weight_type is None else weight_type)
        vocabulary = read_vocabulary(file, spec.vocab_size)
        model = ModelWriter(target, spec)
        sources = tensor_sources(file, model.tensors)
        try:
            tokenizer = vocabulary.file.encode()
        except ValueError as error:
            raise FormatError(source, None, "a vocabulary that a .t file can say", str(error)) from error
        texts = {target.with_suffix(".t"): tokenizer}
        if vocabulary.json is not None:
            texts[target.with_name("tokenizer.json")] = vocabulary.json.encode()
        stack.enter_context(made_folder(target.parent))
        warnings = [*vocabulary.warnings, *_check_beside(target, vocabulary), *_rounded_again(model.tensors, sources)]
        _check_room(target, model.nbytes + sum(map(len, texts.values())))
        # The last to be entered is the first to get its name: the model comes last.
        stack.enter_context(model)
        for path, data in texts.items():
            stack.enter_context(replaced_file(path)).write(data)
        copied = _write_model(file, model, sources, progress)
        sizes = {target: model.nbytes} | {path: len(data) for path, data in texts.items()}
    return Conversion(spec, sizes, copied, tuple(warnings))


def _write_model(file: GgufFile, model: ModelWriter, sources: Callable[[Tensor], GgufTensor], progress: Progress | None) -> int:
    """Write all tensors; returns bytes of blocks that were copied."""
    copied = 0
    for tensor in model.tensors:
        source = sources(tensor)

        def report(rows: int, tensor: Tensor = tensor) -> None:
            if progress is not None:
                progress(tensor.label, tensor.offset + rows * tensor.row_bytes, model.nbytes)

        report(0)
        model.write_tensor(tensor.name, _pieces(file, source, tensor, report), tensor.layer, tensor.expert)
        if (source.type_name, tensor.float_type) in _SAME_VALUES:
            copied += tensor.nbytes
    return copied


def _pieces(file: GgufFile, source: GgufTensor, tensor: Tensor, report: Callable[[int], None]) -> Iterator[npt.NDArray[Any]]:
    """The rows of a tensor, some at a time: blocks to be copied, or values to be encoded."""
    kinds = source.type_name, tensor.float_type
    step = max(1, _CHUNK_VALUES // tensor.n_columns)
    for first in range(0, tensor.n_rows, step):
        count = min(step, tensor.n_rows - first)
        if kinds in _SAME_VALUES:
            raw, change = file.raw_rows(source, first, count), _SAME_VALUES[kinds]
            stored = raw if change is None else change(raw)
            scales = stored.reshape(-1, row_bytes(tensor.float_type, BLOCK_VALUES))[:, :2].copy().view("<f2")
            if not np.isfinite(scales).all():
                raise FormatError(file.path, source.offset, f"finite scales in tensor {source.name}", "NaN or infinity")
            yield stored
        else:
            values = file.rows(source, first, count)
            largest = max(float(values.max()), -float(values.min()))  # NaN comes out as NaN
            if not largest <= _MAX_VALUE[tensor.float_type] or largest == np.inf:
                expected = f"values in tensor {source.name} that {tensor.float_type.name} can hold"
                raise FormatError(file.path, source.offset, expected, f"a value of magnitude {largest:g}")
            yield values
        report(first + count)


def _rounded_again(tensors: tuple[Tensor, ...], sources: Callable[[Tensor], GgufTensor]) -> list[str]:
    """A warning where blocks become other blocks; says of which types, and what keeps them."""
    pairs = {(sources(tensor).type_name, tensor.float_type, tensor.name) for tensor in tensors}
    again = {pair for pair in pairs if pair[0] not in FLOAT_TYPES and pair[1] != FloatType.F32 and pair[:2] not in _SAME_VALUES}
    if not again:
        return []
    types = " and ".join(sorted({type_name for type_name, _, _ in again}))
    what = "the classifier's weights" if {name for _, _, name in again} == {"final_matmul_logits"} else "weights"
    target = next(iter(again))[1]
    if target == FloatType.Q80:
        return [f"{what} of type {types} are rounded again, to Q80: that costs next to nothing, but the file is larger than its source"]
    return [f"{what} of type {types} are rounded again, to {target.name}, which costs quality; --weights q80 keeps nearly all of it"]


def _check_beside(target: Path, vocabulary: Vocabulary) -> list[str]:
    """A `tokenizer.json` serves every model of its folder: raise ConfigError rather than overwrite another model's. Returns warnings."""
    path = target.with_name("tokenizer.json")
    if not path.exists():
        return []
    if vocabulary.json is None:
        return [f"{path} was there before; it is used if it has the vocabulary of this model"]
    try:
        same = json_vocabulary(path.read_bytes()) == json_vocabulary(vocabulary.json)
    except UnsayableTokenizer:
        same = False
    if not same:
        raise ConfigError(f"{path} has another vocabulary than this model; convert into a folder of its own")
    return []


def _check_room(target: Path, nbytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < nbytes:
        raise LimitError(f"{os.fspath(target)} needs {nbytes} bytes, and there are {free} free on its disk")
