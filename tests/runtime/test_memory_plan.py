"""Plans add up, keep within their limits, and say what would do where nothing does."""

import re
from dataclasses import replace

import pytest

from dairllm.config import MemoryAmount
from dairllm.errors import LimitError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.build import build_graph
from dairllm.graph.types import FloatType, NetworkConfig, NodeConfig
from dairllm.runtime.memory_plan import BATCH_ROWS, MemoryPlan, plan_memory
from dairllm.units import parse_size

RUNTIME = 50 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    path = tmp_path_factory.mktemp("plan") / "m.m"
    write_random_model(
        path, small_spec(weight_type=FloatType.Q40, dim=512, n_heads=8, n_kv_heads=4, hidden_dim=2048, n_layers=8, seq_len=4096)
    )
    return ModelFile.open(path)


def plan(model: ModelFile, limit: str, max_seq_len: int | None = None, rows: tuple[int, ...] = BATCH_ROWS) -> MemoryPlan:
    def build(seq_len: int, rows: int) -> tuple[NetworkConfig, NodeConfig]:
        network, (node,) = build_graph(replace(model.spec, seq_len=seq_len), 1, FloatType.Q80, rows)
        return network, node

    return plan_memory(model, build, MemoryAmount.parse(limit), n_threads=2, max_seq_len=max_seq_len, rows=rows, runtime=RUNTIME)


def test_with_room_for_everything_the_model_is_used_as_it_is(model: ModelFile) -> None:
    found = plan(model, "4GiB")
    assert found.budget_blocks is None
    assert found.missing == 0
    assert (found.seq_len, found.rows) == (4096, 256)
    assert found.total <= 4 << 30


@pytest.mark.parametrize("limit", ["200MiB", "120MiB", "90MiB", "70MiB", "64MiB"])
def test_a_plan_keeps_within_its_limit_and_its_parts_add_up(model: ModelFile, limit: str) -> None:
    found = plan(model, limit)
    rows = {what: size for what, size, _ in found.table()}
    assert found.total <= parse_size(limit)
    assert sum(size for what, size in rows.items() if what not in ("in all", "smallest limit")) == rows["in all"] == found.total
    assert found.kv_cache <= max(parse_size(limit) // 4, plan(model, limit, 256).kv_cache)


def test_less_room_never_means_less_to_read(model: ModelFile) -> None:
    missing = [plan(model, f"{size}MiB", 256, (32,)).missing for size in range(64, 120, 2)]
    assert missing == sorted(missing, reverse=True)
    assert missing[0] > 0
    assert missing[-1] == 0


def test_the_smallest_limit_works_and_one_less_does_not(model: ModelFile) -> None:
    with pytest.raises(LimitError, match=r"the memory limit 52MiB is too small: 50MiB program, .* KV cache") as told:
        plan(model, "52MiB")
    enough = re.search(r"(\S+) would do", str(told.value))
    assert enough is not None
    smallest = plan(model, "64MiB", 256).smallest
    assert plan(model, f"{smallest}B", 256).total <= smallest
    with pytest.raises(LimitError):
        plan(model, f"{smallest - 1}B", 256)


def test_a_chosen_context_is_kept(model: ModelFile) -> None:
    assert plan(model, "80MiB", 1024).seq_len == 1024
    assert plan(model, "80MiB").seq_len < 4096
    with pytest.raises(LimitError, match=r"--max-seq-len, now 4096"):
        plan(model, "70MiB", 4096)


def conversations(model: ModelFile, limit: int, most: int) -> MemoryPlan:
    def build(seq_len: int, rows: int) -> tuple[NetworkConfig, NodeConfig]:
        network, (node,) = build_graph(replace(model.spec, seq_len=seq_len), 1, FloatType.Q80, rows)
        return network, node

    amount = MemoryAmount.parse(f"{limit}B")
    return plan_memory(model, build, amount, n_threads=2, max_seq_len=1024, runtime=RUNTIME, conversations=most)


def test_what_is_left_beside_all_weights_goes_to_more_conversations(model: ModelFile) -> None:
    one = conversations(model, 4 << 30, 1)
    assert (one.conversations, one.budget_blocks) == (1, None)
    assert conversations(model, 4 << 30, 8).conversations == 8
    for count in range(1, 8):
        found = conversations(model, one.total + count * one.kv_cache - 1, 8)
        assert found.conversations == count
        assert found.total == one.total + (count - 1) * one.kv_cache <= found.limit
        assert found.smallest == one.smallest, "one conversation is enough"
    table = {what: (size, remark) for what, size, remark in conversations(model, 4 << 30, 8).table()}
    assert table["KV cache"] == (8 * one.kv_cache, "1024 tokens of each of 8 conversations")
    assert conversations(model, 4 << 30, 8).figures()["kv_cache_bytes"] == 8 * one.kv_cache


def test_where_weights_are_paged_there_is_one_conversation(model: ModelFile) -> None:
    found = conversations(model, conversations(model, 4 << 30, 1).smallest + (1 << 20), 8)
    assert found.budget_blocks is not None
    assert found.conversations == 1
