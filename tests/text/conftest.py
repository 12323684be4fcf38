"""A small model's tokenizer, as its two files: a byte-level `tokenizer.json` and the `.t` of the same vocabulary."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dairllm.formats.token_names import BYTE_OF_CHARACTER, byte_level_piece
from dairllm.formats.tokenizer_file import TokenizerFile

SPECIAL = ("<|end|>", "<|turn|>")
MERGES = ["t h", "th e", "Ġ the", "c a", "ca t", "Ġ cat", "Ġ Ġ", "ĠĠ ĠĠ", "1 2", "12 3", "Ã ©", "Ċ Ċ", "e s", "es t"]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder with `small.t` and the `tokenizer.json` beside it. Specials come first, digits stand alone: no `.t` can say that."""
    names = [*SPECIAL, *BYTE_OF_CHARACTER, *(merge.replace(" ", "") for merge in MERGES)]
    library = Tokenizer(models.BPE(vocab={name: token for token, name in enumerate(names)}, merges=[tuple(m.split(" ")) for m in MERGES]))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    library.save(str(tmp_path / "tokenizer.json"))
    pieces = tuple(map(byte_level_piece, names))
    TokenizerFile(
        pieces=pieces,
        scores=tuple(-float(token) for token in range(len(pieces))),
        bos_id=len(pieces) - 1,
        eos_ids=(0,),
        add_bos=False,
        chat_template="{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}",
        max_token_length=max(map(len, pieces)),
    ).write(tmp_path / "small.t")
    return tmp_path


@pytest.fixture
def edit_tokenizer_json(model_folder: Path):  # type: ignore[no-untyped-def] # a function of a function
    """Change the `tokenizer.json` by a function of its document."""

    def edit(change) -> None:  # type: ignore[no-untyped-def] # see above
        path = model_folder / "tokenizer.json"
        document = json.loads(path.read_text(encoding="utf-8"))
        change(document)
        path.write_text(json.dumps(document), encoding="utf-8")

    return edit
