"""Where every tensor of a `.m` file lies, and every node's slice of it.

Order (WT is the type of the weights; ``[d, n]`` maps n inputs to d outputs, rows are outputs, one after the other)::

    embedding F32 [vocab, dim]
    per layer:  q WT [q_dim, dim], k WT [kv_dim, dim], v WT [kv_dim, dim], wo WT [dim, q_dim],
                w1 WT [ff, dim], w2 WT [dim, ff], w3 WT [ff, dim]
                    (with experts: gate F32 [n_experts, dim], then w1, w2, w3 of each expert),
                norm_q F32 [head_dim], norm_k F32 [head_dim]   (Qwen3 only),
                norm_0 F32 [dim] (before attention), norm_1 F32 [dim] (before the feed-forward block)
    final norm F32 [dim], classifier WT [vocab, dim]

Nothing is padded, so nothing is aligned. Tensors bear the names of the graph's ops; (name, layer) is what the wire uses too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dairllm.errors import GraphError
from dairllm.graph.model import ModelSpec
from dairllm.graph.slicing import Axis, Part, Share, equal_shares, weight_part
from dairllm.graph.types import FloatType, row_bytes

__all__ = [
    "Slice",
    "Tensor",
    "column_slice",
    "layout_bytes",
    "node_slice",
    "part_slices",
    "row_slice",
    "share_slices",
    "tensor_layout",
    "walk_layout",
    "whole",
]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor's place in the file.

    Attributes:
        name: of the op that it is the weight of.
        layer: 0 for tensors outside layers.
        expert: 0 for tensors that belong to no expert.
        shape: (d, n): d rows of n values; (n,) for norms.
        offset: of its first byte in the file.
        row_bytes: of one row (of the whole where there is one dimension).
    """

    name: str
    layer: int
    expert: int
    float_type: FloatType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    row_bytes: int

    @property
    def n_rows(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def n_columns(self) -> int:
        """Values of a row."""
        return self.shape[-1]

    @property
    def label(self) -> str:
        """For messages: ``"block_matmul_w1 of layer 3"``."""
        label = self.name if not self.name.startswith("block_") else f"{self.name} of layer {self.layer}"
        return f"{label}, expert {self.expert}" if self.expert else label


@dataclass(frozen=True, slots=True)
class Slice:
    """Part of a tensor as it lies in the file: `n_rows` pieces of `slice_row_bytes`, each `stride` bytes after the one before.

    On a node, and on the wire, the pieces lie one after the other.
    """

    offset: int
    stride: int
    n_rows: int
    slice_row_bytes: int

    @property
    def nbytes(self) -> int:
        return self.n_rows * self.slice_row_bytes


def tensor_layout(spec: ModelSpec, header_bytes: int) -> tuple[Tensor, ...]:
    """All tensors in file order. For a spec that has been checked (`model_header`)."""
    return tuple(walk_layout(spec, header_bytes))


def layout_bytes(spec: ModelSpec, header_bytes: int) -> int:
    """Length of the whole file, found without making a list of its tensors."""
    plan = _layer_plan(spec)
    layer = sum(_nbytes(float_type, shape) for _, _, float_type, shape in plan)
    return header_bytes + sum(_nbytes(*entry[2:]) for entry in _head(spec) + _tail(spec)) + spec.n_layers * layer


def walk_layout(spec: ModelSpec, header_bytes: int) -> Iterator[Tensor]:
    """All tensors in file order, one at a time."""
    offset = header_bytes

    def place(layer: int, name: str, expert: int, float_type: FloatType, shape: tuple[int, ...]) -> Tensor:
        nonlocal offset
        nbytes = _nbytes(float_type, shape)
        tensor = Tensor(name, layer, expert, float_type, shape, offset, nbytes, row_bytes(float_type, shape[-1]))
        offset += nbytes
        return tensor

    plan = _layer_plan(spec)
    for entry in _head(spec):
        yield place(0, *entry)
    for layer in range(spec.n_layers):
        for entry in plan:
            yield place(layer, *entry)
    for entry in _tail(spec):
        yield place(0, *entry)


def whole(tensor: Tensor) -> Slice:
    """All of a tensor."""
    return Slice(tensor.offset, tensor.row_bytes, tensor.n_rows, tensor.row_bytes)


def row_slice(tensor: Tensor, first: int, count: int) -> Slice:
    """Rows (outputs) from `first` on.

    Raises:
        GraphError: there are no such rows.
    """
    if first < 0 or count < 1 or first + count > tensor.n_rows:
        raise GraphError(f"{tensor.label} has {tensor.n_rows} rows; rows {first} to {first + count} are not among them")
    return Slice(tensor.offset + first * tensor.row_bytes, tensor.row_bytes, count, tensor.row_bytes)


def column_slice(tensor: Tensor, first: int, count: int) -> Slice:
    """Columns (inputs) from `first` on, of every row: a whole number of blocks from a block's start.

    Raises:
        GraphError: there are no such columns, or they cut a block.
    """
    if first < 0 or count < 1 or first + count > tensor.n_columns:
        raise GraphError(f"{tensor.label} has {tensor.n_columns} columns; columns {first} to {first + count} are not among them")
    try:
        start, nbytes = row_bytes(tensor.float_type, first), row_bytes(tensor.float_type, count)
    except ValueError as error:
        raise GraphError(f"columns {first} to {first + count} of {tensor.label} cut a block: {error}") from error
    return Slice(tensor.offset + start, tensor.row_bytes, tensor.n_rows, nbytes)


def share_slices(tensor: Tensor, spec: ModelSpec, share: Share) -> tuple[Slice, ...]:
    """What a node with `share` holds of a tensor (``graph.slicing`` says which part that is).

    Of rows: one slice after the other. Of columns: every row of the node's is made of that row of each slice. A share without
    classifier rows has no slice of the classifier.

    Raises:
        GraphError: the share cuts a block, or goes beyond the tensor.
    """
    return part_slices(tensor, weight_part(spec, share, tensor.name))


def part_slices(tensor: Tensor, part: Part) -> tuple[Slice, ...]:
    """A part of a tensor, span after span.

    Raises:
        GraphError: the part cuts a block, or goes beyond the tensor.
    """
    if part.spans is None:
        return (whole(tensor),)
    cut = row_slice if part.axis is Axis.ROWS else column_slice
    return tuple(cut(tensor, span.start, span.size) for span in part.spans if span.size)


def node_slice(tensor: Tensor, spec: ModelSpec, node: int, n_nodes: int) -> Slice:
    """What node `node` of `n_nodes` equal ones holds of a tensor.

    Raises:
        GraphError: the model cannot be divided by `n_nodes`.
    """
    shares = equal_shares(spec, n_nodes)
    if not 0 <= node < n_nodes:
        raise GraphError(f"there is no node {node} among {n_nodes}")
    (found,) = share_slices(tensor, spec, shares[node])
    return found


_Entry = tuple[str, int, FloatType, tuple[int, ...]]  # name, expert, type, shape


def _head(spec: ModelSpec) -> list[_Entry]:
    return [("embedding", 0, FloatType.F32, (spec.vocab_size, spec.dim))]


def _tail(spec: ModelSpec) -> list[_Entry]:
    return [
        ("final_norm", 0, FloatType.F32, (spec.dim,)),
        ("final_matmul_logits", 0, spec.weight_type, (spec.vocab_size, spec.dim)),
    ]


def _layer_plan(spec: ModelSpec) -> list[_Entry]:
    """One layer's tensors; all layers are alike."""
    weight, dim = spec.weight_type, spec.dim
    plan: list[_Entry] = [
        ("block_matmul_q", 0, weight, (spec.q_dim, dim)),
        ("block_matmul_k", 0, weight, (spec.kv_dim, dim)),
        ("block_matmul_v", 0, weight, (spec.kv_dim, dim)),
        ("block_matmul_wo", 0, weight, (dim, spec.q_dim)),
    ]
    if spec.n_experts:
        plan.append(("block_moe_gate", 0, FloatType.F32, (spec.n_experts, dim)))
    for expert in range(max(spec.n_experts, 1)):
        plan += [
            ("block_matmul_w1", expert, weight, (spec.ff_dim, dim)),
            ("block_matmul_w2", expert, weight, (dim, spec.ff_dim)),
            ("block_matmul_w3", expert, weight, (spec.ff_dim, dim)),
        ]
    if spec.has_qk_norm:
        plan += [(name, 0, FloatType.F32, (spec.head_dim,)) for name in ("block_norm_q", "block_norm_k")]
    return plan + [(name, 0, FloatType.F32, (dim,)) for name in ("block_norm_0", "block_norm_1")]


def _nbytes(float_type: FloatType, shape: tuple[int, ...]) -> int:
    rows = shape[0] if len(shape) == 2 else 1
    return rows * row_bytes(float_type, shape[-1])
