import subprocess
import sys
from pathlib import Path

import pytest

from dairllm.bench.memory_group import MemoryGroup
from dairllm.errors import ConfigError


@pytest.mark.parametrize(("legacy", "limit"), [(True, "memory.limit_in_bytes"), (False, "memory.max")])
def test_both_versions_of_control_groups(tmp_path: Path, legacy: bool, limit: str) -> None:
    if legacy:
        (tmp_path / "memory").mkdir()
    top = tmp_path / "memory" if legacy else tmp_path
    with MemoryGroup(1 << 20, tmp_path) as group:
        assert group.peak == 0
        (folder,) = top.iterdir()
        assert (folder / limit).read_text() == str(1 << 20)
        (folder / limit).unlink()  # here it is a file like others, which the folder's end would not take with it
    assert not list(top.iterdir())


def test_no_groups(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it takes root"), MemoryGroup(1 << 20, tmp_path / "nothing"):
        pass


def test_a_program_in_a_group() -> None:
    try:
        with MemoryGroup(64 << 20) as group:
            hold = "x = bytearray(20 << 20); open('/proc/self/cgroup').read()"
            subprocess.run([sys.executable, "-c", hold], check=True, preexec_fn=group.enter)
            assert group.peak == 0 or group.peak >= 20 << 20
            grab = subprocess.run([sys.executable, "-c", "x = bytearray(200 << 20)"], check=False, preexec_fn=group.enter)
            assert grab.returncode != 0
    except ConfigError as error:
        pytest.skip(str(error))
