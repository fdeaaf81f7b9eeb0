from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_lab.data import load_text, load_tokens

SHAKESPEARE = Path(__file__).parent / "shakespeare.txt"
LINES = " \n = Title = \n \n The first <unk> , naïve . \n The second <unk> . \n"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A token file in which every split is `LINES`."""
    words = LINES.replace("\n", "<eos>").split()
    vocab = ["<eos>", *dict.fromkeys(w for w in words if w != "<eos>")]
    ids = np.array([vocab.index(word) for word in words], np.uint16)
    path = tmp_path_factory.mktemp("tokens") / "tokens.npz"
    encoded = np.frombuffer("\n".join(vocab).encode(), np.uint8)
    np.savez(path, train=ids, valid=ids, test=ids, vocab=encoded)
    return load_tokens(path)


@pytest.mark.parametrize("unit", ["character", "byte"])
def test_splits_hold_the_file_in_order(unit):
    text = load_text(SHAKESPEARE, unit=unit)
    whole = SHAKESPEARE.read_bytes().decode()
    assert text.decode(text.tokens["train"]) + text.decode(text.tokens["valid"]) == whole
    assert len(text.tokens["train"]) == int(0.9 * len(whole))
    assert max(ids.max() for ids in text.tokens.values()) < text.vocab_size


def test_characters_are_numbered_in_order():
    text = load_text(SHAKESPEARE)
    whole = SHAKESPEARE.read_text()
    assert text.vocab_size == len(set(whole))
    assert text.decode(np.arange(text.vocab_size)) == "".join(sorted(set(whole)))


@given(st.text(alphabet="aβ€𝄞\n\r z", min_size=20))
@settings(max_examples=20, deadline=None)
def test_any_utf8(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(written.encode())
    for unit in "character", "byte":
        text = load_text(path, unit=unit)
        ids = text.encode(written)
        assert ids.dtype == np.int32 and text.decode(ids) == written
        in_order = np.concatenate([text.tokens["train"], text.tokens["valid"]])
        np.testing.assert_array_equal(in_order, ids)
        total = sum(text.bytes_per_token(s) * len(ids) for s, ids in text.tokens.items())
        assert round(total) == len(written.encode())


def test_a_character_that_the_file_lacks():
    with pytest.raises(ValueError, match="'ß'"):
        load_text(SHAKESPEARE).encode("Fuß")


def test_batches_are_crops_and_a_function_of_seed_and_step():
    text = load_text(SHAKESPEARE)
    whole = text.decode(text.tokens["train"])
    size = dict(batch_size=16, length=20)
    batch = text.batch(3, 5, **size)
    for inputs, targets in zip(batch["inputs"], batch["targets"]):
        assert inputs.dtype == targets.dtype == np.int32 and inputs.shape == targets.shape == (20,)
        assert text.decode(inputs) + text.decode(targets[-1:]) in whole
        np.testing.assert_array_equal(inputs[1:], targets[:-1])
    again = load_text(SHAKESPEARE).batch(3, 5, **size)
    np.testing.assert_array_equal(again["inputs"], batch["inputs"])
    for seed, step in (3, 6), (4, 5), (5, 3):
        assert (text.batch(seed, step, **size)["inputs"] != batch["inputs"]).any()


def test_rows_of_a_batch_are_those_of_the_whole():
    text, size, rows = load_text(SHAKESPEARE), dict(batch_size=6, length=20), np.array([0, 3, 4])
    last = list(text.evaluation_batches(**size))[-1]
    for whole, some in (
        (text.batch(3, 5, **size), text.batch(3, 5, **size, rows=rows)),
        (last.whole(), last.make(rows)),
    ):
        for name, array in whole.items():
            np.testing.assert_array_equal(some[name], array[rows])


def test_every_crop_can_be_drawn(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij")
    text = load_text(path, valid_fraction=0.5)
    drawn = text.batch(0, 0, batch_size=200, length=3)["inputs"]
    assert set(map(text.decode, drawn)) == {"abc", "bcd"}
    assert text.batch(0, 0, batch_size=2, length=4)["targets"].shape == (2, 4)
    with pytest.raises(ValueError, match=r"length.*train.*5"):
        text.batch(0, 0, batch_size=2, length=5)


@given(st.integers(1, 5), st.integers(1, 500))
@settings(max_examples=20, deadline=None)
def test_evaluation_covers_a_split_once(batch_size, length):
    text = load_text(SHAKESPEARE)
    ids = text.tokens["valid"]
    rows = text.evaluation_batches(batch_size=batch_size, length=length)
    batches = [each.whole() for each in rows]
    assert {b["inputs"].shape for b in batches} == {(batch_size, length)}
    inputs, targets = (np.concatenate([b[k].ravel() for b in batches]) for k in batches[0])
    assert inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(targets[targets >= 0], ids[1:])
    np.testing.assert_array_equal(inputs[targets >= 0], ids[:-1])
    assert (targets[targets < 0] == -100).all() and not inputs[targets < 0].any()
    assert (targets >= 0).sum() > len(targets) - batch_size * length


def test_token_file(tokens):
    size = len(tokens.tokens["valid"])
    assert set(tokens.tokens) == {"train", "valid", "test"}
    assert tokens.bytes_per_token("test") * size == pytest.approx(len(LINES.encode()))
    decoded = tokens.decode(tokens.tokens["valid"])
    assert decoded == "\n= Title =\n\nThe first <unk> , naïve .\nThe second <unk> .\n"
    np.testing.assert_array_equal(tokens.encode(decoded), tokens.tokens["valid"])
    np.testing.assert_array_equal(tokens.encode("The third"), tokens.encode("The <unk>"))
    assert tokens.batch(0, 0, batch_size=2, length=8)["inputs"].dtype == np.int32


def test_a_word_without_unk(tmp_path):
    vocab = np.frombuffer(b"<eos>\none", np.uint8)
    ids = np.array([1, 0], np.uint16)
    np.savez(tmp_path / "tokens.npz", train=ids, valid=ids, vocab=vocab)
    with pytest.raises(ValueError, match="unk"):
        load_tokens(tmp_path / "tokens.npz").encode("two")


@pytest.mark.parametrize("load", [load_text, load_tokens])
def test_missing_file(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/absent does not exist: give the path"):
        load(tmp_path / "absent")


def test_bad_files_and_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"unit.*'word'"):
        load_text(SHAKESPEARE, unit="word")
    with pytest.raises(ValueError, match="valid_fraction"):
        load_text(SHAKESPEARE, valid_fraction=0)
    (tmp_path / "empty").touch()
    for unit in "character", "byte":
        with pytest.raises(ValueError, match="empty"):
            load_text(tmp_path / "empty", unit=unit)
    np.savez(tmp_path / "other.npz", train=np.arange(3))
    with pytest.raises(ValueError, match="valid"):
        load_tokens(tmp_path / "other.npz")
