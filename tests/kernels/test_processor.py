"""What a processor is and can do, read off the system's own words."""

import itertools
from pathlib import Path

import llvmlite.binding as llvm
import pytest

from dairllm.kernels import processor
from dairllm.kernels.objects import targets

ONE = """\
processor	: 0
vendor_id	: GenuineIntel
cpu family	: 6
model		: 151
model name	: 12th Gen Intel(R) Core(TM) i5
stepping	: 2
cpu MHz		: 1234.5
flags		: fpu sse2 fma f16c avx2 avx_vnni
bogomips	: 4992.00

"""
ARM = """\
processor	: 0
BogoMIPS	: 243.75
Features	: fp asimd asimddp
CPU implementer	: 0x41
CPU part	: 0xd0c

"""


@pytest.fixture(autouse=True)
def nothing_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_CPU_NAME", raising=False)
    monkeypatch.delenv("NUMBA_CPU_FEATURES", raising=False)


@pytest.fixture
def cpuinfo(tmp_path: Path) -> Path:
    return tmp_path / "cpuinfo"


def test_features_are_those_of_all_processors_by_llvms_names(cpuinfo: Path) -> None:
    cpuinfo.write_text(ONE + ONE.replace("f16c ", "").replace(": 0", ": 1"))
    assert processor.features(cpuinfo) == {"fpu", "sse2", "fma", "avx2", "avxvnni"}
    cpuinfo.write_text(ONE.replace("avx_vnni", "avx512_vnni"))
    assert "avx512vnni" in processor.features(cpuinfo)
    cpuinfo.write_text(ONE.replace("sse2", "sse4_1 sse4_2"))
    assert {"sse4.1", "sse4.2"} < processor.features(cpuinfo)
    cpuinfo.write_text(ARM)
    assert processor.features(cpuinfo) == {"fp", "asimd", "asimddp"}
    assert processor.features(cpuinfo.parent / "none") == frozenset()


def test_the_compiler_knows_what_a_form_needs_by_the_same_names() -> None:
    """A form is chosen by the system's word, and compiled by LLVM's."""
    present = {name for name, has in llvm.get_host_cpu_features().items() if has}
    needed = set().union(*(target.needs for target in targets.TARGETS))
    if needed & set(llvm.get_host_cpu_features()):  # an x86
        assert needed & processor.features() == needed & present


def test_kinds_are_told_apart_and_clocks_are_not(cpuinfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(text: str) -> str | None:
        cpuinfo.write_text(text)
        return processor.identity(cpuinfo)

    assert found(ONE) == found(ONE + ONE.replace("1234.5", "800.0").replace("processor	: 0", "processor	: 1"))
    others = [ONE, ONE.replace("151", "154"), ONE.replace("avx_vnni", ""), ONE + ARM, ARM, ARM.replace("0xd0c", "0xd40")]
    for one, other in itertools.combinations(others, 2):
        assert found(one) != found(other)
    assert found("") is None
    assert processor.identity(cpuinfo.parent / "none") is None
    plain = found(ONE)
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert found(ONE) != plain
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+avx2,-fma")
    assert processor.features(cpuinfo) == {"avx2"}
