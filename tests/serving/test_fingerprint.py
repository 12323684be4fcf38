"""What is the same in two fingerprints gives the same bits; whatever may give others is told apart."""

from dataclasses import replace
from pathlib import Path

from dairllm import __version__
from dairllm.formats.digest import sampled_digest
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.types import FloatType
from dairllm.runtime.node_status import NodeStatus
from dairllm.serving.fingerprint import Fingerprint

ALONE = (NodeStatus(0, "", "dairllm", 4, 2, 96),)
TWO = (NodeStatus(0, "", "dairllm", 2, 1, 48), NodeStatus(1, "10.0.0.2:9990", "dairllm", 2, 1, 48))
OTHER = NodeStatus(1, "10.0.0.2:9990", "dllama", 2, 1, 48)
UNEQUAL = (NodeStatus(0, "", "dairllm", 2, 1, 64), NodeStatus(1, "10.0.0.2:9990", "dairllm", 2, 1, 32))


def test_each_thing_that_changes_bits_changes_it() -> None:
    of = Fingerprint(b"a model", FloatType.Q80, FloatType.F32)
    ways = [
        of.of(ALONE), of.of(TWO), of.of((TWO[0], OTHER)), of.of(UNEQUAL), replace(of, model=b"another").of(ALONE),
        replace(of, sync=FloatType.F32).of(ALONE), replace(of, kv_cache=FloatType.F16).of(ALONE),
    ]  # fmt: skip
    assert len(set(ways)) == len(ways)
    assert all(way.startswith(f"dairllm-{__version__}-") for way in ways)


def test_what_crossed_the_wire_and_where_a_worker_listens_do_not() -> None:
    of = Fingerprint(b"a model", FloatType.Q80, FloatType.F32)
    moved = (replace(TWO[0], bytes_sent=7), replace(TWO[1], address="[::1]:1", bytes_received=9, weight_bytes_sent=5))
    assert of.of(moved) == of.of(TWO)


def digest(path: Path) -> bytes:
    with ModelFile.open(path) as model:
        return sampled_digest(model)


def test_models_are_told_apart_whatever_they_are_called(tmp_path: Path) -> None:
    first, copy, other, deeper = (tmp_path / f"{name}.m" for name in ("first", "copy", "other", "deeper"))
    write_random_model(first, small_spec(n_layers=2))
    copy.write_bytes(first.read_bytes())
    write_random_model(deeper, small_spec(n_layers=3))
    with ModelFile.open(first) as model:
        place = model.tensors[-1].offset
    changed = bytearray(first.read_bytes())
    changed[place] ^= 1
    other.write_bytes(changed)
    assert digest(copy) == digest(first)
    assert len({digest(path) for path in (first, other, deeper)}) == 3
