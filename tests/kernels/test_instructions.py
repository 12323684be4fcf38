"""Instructions hold what their kinds have, and nothing else: what does not fit is refused by name."""

import pytest

from dairllm.engine.assembler import Assembler
from dairllm.kernels import instructions
from dairllm.kernels.fields import fields_of
from dairllm.kernels.instructions import CLAIMS, FIELDS, INSTRUCTION_WORDS, MAX_FIELDS, Kind, pack


def values(kind: Kind) -> dict[str, int]:
    return {name: number for number, name in enumerate(FIELDS[kind], 1)}


@pytest.mark.parametrize("kind", Kind)
def test_a_kinds_fields_lie_in_order_behind_it_and_never_in_the_word_of_claims(kind: Kind) -> None:
    words = pack(kind, values(kind))
    assert len(words) == INSTRUCTION_WORDS
    assert words[: len(FIELDS[kind]) + 1] == [kind, *range(1, len(FIELDS[kind]) + 1)]
    assert words[CLAIMS] == 0


def test_one_field_too_many_is_refused_when_the_kernels_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would lie in the word that threads count up."""
    more = tuple(f"more_{number}" for number in range(MAX_FIELDS + 1 - len(FIELDS[Kind.ATTEND])))
    most = FIELDS[Kind.ATTEND] + more[:-1]
    monkeypatch.setitem(instructions.FIELDS, Kind.ATTEND, most)
    instructions._check()
    monkeypatch.setitem(instructions.FIELDS, Kind.ATTEND, most + more[-1:])
    with pytest.raises(ValueError, match=rf"^ATTEND has {MAX_FIELDS + 1} fields; expected up to {MAX_FIELDS} of different names$"):
        instructions._check()


def test_a_name_that_stands_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(instructions.FIELDS, Kind.SOFTMAX, ("x", "x_row", "x"))
    with pytest.raises(ValueError, match=r"^SOFTMAX has 3 fields; expected up to 16 of different names$"):
        instructions._check()


def test_a_kind_without_fields_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(instructions.FIELDS, Kind.SHIFT)
    with pytest.raises(KeyError, match="SHIFT"):
        instructions._check()


@pytest.mark.parametrize("change", [{"n": None}, {"m": 1}])
def test_a_program_is_given_all_fields_and_no_other(change: dict[str, int | None]) -> None:
    given = {name: value for name, value in (values(Kind.SOFTMAX) | change).items() if value is not None}
    with pytest.raises(ValueError, match=rf"^fields of SOFTMAX that are missing, or that it does not have: {next(iter(change))}$"):
        Assembler().add(Kind.SOFTMAX, [], **given)


def test_kernels_read_what_several_kinds_have_at_the_same_places() -> None:
    with pytest.raises(ValueError, match=r"^no field is the same in all of EMBED, SOFTMAX$"):
        fields_of(Kind.EMBED, Kind.SOFTMAX)
