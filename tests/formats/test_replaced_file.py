from pathlib import Path

import pytest

from dairllm.formats.replaced_file import replaced_file


def test_the_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x.m"
    with replaced_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "x.m"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with replaced_file(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replaced_file(tmp_path / "none" / "x.m"):
        pass


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    with replaced_file(tmp_path / "x.m"):
        pass
    assert (tmp_path / "x.m").stat().st_mode == plain.stat().st_mode
