"""`dairllm inspect`: what a model file holds."""

import json as json_format
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from dairllm.commands import inspect_gguf
from dairllm.errors import ConfigError
from dairllm.formats.file_kind import is_gguf
from dairllm.formats.model_file import ModelFile, Tensor
from dairllm.graph.model import ModelSpec
from dairllm.units import format_size

__all__ = ["run"]


def run(model: Path, *, layer: int | None = None, json: bool = False) -> None:
    """Print the header and the tensors of a `.m` file, or what a GGUF file has.

    Args:
        model: the file.
        layer: only the tensors of this layer, and each of its experts; otherwise an expert's three tensors share a line.
        json: one JSON object for programs, with every tensor, in place of tables for people.

    Raises:
        FormatError: it is neither.
        ConfigError: there is no such layer.
    """
    if is_gguf(model):
        inspect_gguf.run(model, layer=layer, json=json)
        return
    with ModelFile.open(model) as file:
        if layer is not None and not 0 <= layer < file.spec.n_layers:
            raise ConfigError(f"{model} has layers 0 to {file.spec.n_layers - 1}, not {layer}")
        tensors = [tensor for tensor in file.tensors if layer is None or (_in_layer(tensor) and tensor.layer == layer)]
        if json:
            json_format.dump(_object(file, tensors), sys.stdout)
            sys.stdout.write("\n")
            return
        sys.stdout.writelines(f"{line}\n" for line in _lines(file, tensors, every_expert=layer is not None))


def _object(file: ModelFile, tensors: Iterable[Tensor]) -> dict[str, Any]:
    return {
        "path": str(file.path),
        "bytes": file.nbytes,
        "header_bytes": file.header_bytes,
        "header": _header(file.spec),
        "tensors": [
            {
                "name": tensor.name,
                "layer": tensor.layer if _in_layer(tensor) else None,
                "expert": tensor.expert if _of_expert(tensor, file.spec) else None,
                "type": tensor.float_type.name.lower(),
                "shape": list(tensor.shape),
                "offset": tensor.offset,
                "bytes": tensor.nbytes,
                "row_bytes": tensor.row_bytes,
            }
            for tensor in tensors
        ],
    }


def _header(spec: ModelSpec) -> dict[str, Any]:
    """What the header says, named as in `ModelSpec`; what does not apply is left out."""
    values: dict[str, Any] = {
        "arch": spec.arch.name.lower(),
        "dim": spec.dim,
        "hidden_dim": spec.hidden_dim,
        "n_layers": spec.n_layers,
        "n_heads": spec.n_heads,
        "n_kv_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "seq_len": spec.seq_len,
        "weight_type": spec.weight_type.name.lower(),
        "hidden_act": spec.hidden_act.name.lower(),
        "norm_epsilon": spec.norm_epsilon,
        "rope_type": spec.rope_type.name.lower(),
        "rope_theta": spec.rope_theta,
    }
    if spec.rope_scaling_factor != 1:
        values["rope_scaling_factor"] = spec.rope_scaling_factor
        values["rope_low_freq_factor"] = spec.rope_low_freq_factor
        values["rope_high_freq_factor"] = spec.rope_high_freq_factor
        values["rope_orig_max_seq_len"] = spec.rope_orig_max_seq_len
    if spec.n_experts:
        values["n_experts"] = spec.n_experts
        values["n_active_experts"] = spec.n_active_experts
        values["moe_hidden_dim"] = spec.moe_hidden_dim
    return values


def _lines(file: ModelFile, tensors: list[Tensor], *, every_expert: bool) -> Iterator[str]:
    yield f"{file.path}: {file.nbytes} bytes ({format_size(file.nbytes)}), {len(file.tensors)} tensors from byte {file.header_bytes} on"
    yield ""
    for name, value in _header(file.spec).items():
        yield f"  {name:<22} {value:g}" if isinstance(value, float) else f"  {name:<22} {value}"
    yield ""
    rows = [("offset", "bytes", "type", "shape", "layer", "tensor")]
    for tensor, count, nbytes in _grouped(tensors, file.spec, every_expert):
        shape = " x ".join(map(str, tensor.shape))
        place = str(tensor.layer) if _in_layer(tensor) else "-"
        name = tensor.name
        if count > 1:
            name = f"w1, w2, w3 of {count} experts"
        elif _of_expert(tensor, file.spec):
            name = f"{tensor.name}, expert {tensor.expert}"
        rows.append((str(tensor.offset), str(nbytes), tensor.float_type.name.lower(), shape, place, name))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        offset, nbytes_text, kind, shape, place, name = row
        yield (
            f"{offset:>{widths[0]}}  {nbytes_text:>{widths[1]}}  {kind:<{widths[2]}}  {shape:>{widths[3]}}  {place:>{widths[4]}}  {name}"
        )


def _grouped(tensors: list[Tensor], spec: ModelSpec, every_expert: bool) -> Iterator[tuple[Tensor, int, int]]:
    """Tensors, how many experts each stands for, and bytes: all experts of a layer as one unless `every_expert`."""
    for (together, _), group in groupby(tensors, lambda tensor: (_of_expert(tensor, spec) and not every_expert, tensor.layer)):
        members = list(group)
        if together:
            yield members[0], spec.n_experts, sum(tensor.nbytes for tensor in members)
        else:
            yield from ((tensor, 1, tensor.nbytes) for tensor in members)


def _in_layer(tensor: Tensor) -> bool:
    return tensor.name.startswith("block_")


def _of_expert(tensor: Tensor, spec: ModelSpec) -> bool:
    return bool(spec.n_experts) and tensor.name in ("block_matmul_w1", "block_matmul_w2", "block_matmul_w3")
