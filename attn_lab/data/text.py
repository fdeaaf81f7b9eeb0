"""Text as bytes, characters or given tokens."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attn_lab.data.files import existing
from attn_lab.data.order import IGNORE, Rows


@dataclass(frozen=True, eq=False)
class Text:
    """Token ids of a text, cut into splits.

    Attributes:
      tokens: ids `[N]` of each split, by its name: "train", "valid" and maybe "test".
      vocab_size: ids are in `0 .. vocab_size - 1`.
      encode: a string to ids, int32 `[N]`.
      decode: ids `[N]` to a string.
      token_bytes: UTF-8 bytes that each id stands for, `[vocab_size]`.
    """

    tokens: Mapping[str, np.ndarray]
    vocab_size: int
    encode: Callable[[str], np.ndarray]
    decode: Callable[[np.ndarray], str]
    token_bytes: np.ndarray

    def bytes_per_token(self, split: str = "valid") -> float:
        """UTF-8 bytes over tokens: bits per byte are `loss / (log(2) * bytes_per_token)`."""
        return float(self.token_bytes[self.tokens[split]].mean())

    def batch(
        self,
        seed: int,
        step: int,
        *,
        batch_size: int,
        length: int,
        split: str = "train",
        rows: Sequence[int] | slice = slice(None),
    ) -> dict[str, np.ndarray]:
        """Crops at places drawn uniformly from (seed, step), or some rows of this batch.

        Returns:
          `{"inputs", "targets"}`, int32 `[batch_size, length]`, or of `rows` alone; targets are the
          inputs one token later.

        Raises:
          ValueError: the split is shorter than a crop.
        """
        tokens = self.tokens[split]
        if len(tokens) <= length:
            raise ValueError(
                f"length must be less than the {len(tokens)} tokens of {split!r}; got {length}"
            )
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(len(tokens) - length, size=(batch_size, 1))[rows]
        crops = tokens[starts + np.arange(length + 1)].astype(np.int32)
        return {"inputs": crops[:, :-1], "targets": crops[:, 1:]}

    def evaluation_batches(
        self, *, batch_size: int, length: int, split: str = "valid"
    ) -> Iterator[Rows]:
        """The whole split in order, cut into windows: every token but the first is a target once.

        Yields:
          `{"inputs", "targets"}`, int32 `[batch_size, length]`, as `Rows`; behind the end of the
          text inputs are 0 and targets -100.
        """
        tokens = self.tokens[split].astype(np.int32)
        windows = -(-(len(tokens) - 1) // length)
        size = -(-windows // batch_size) * batch_size * length
        padding = size - (len(tokens) - 1)
        inputs = np.pad(tokens[:-1], (0, padding)).reshape(-1, length)
        targets = np.pad(tokens[1:], (0, padding), constant_values=IGNORE).reshape(-1, length)

        def window(first, rows):
            return {"inputs": inputs[first + rows], "targets": targets[first + rows]}

        for first in range(0, len(inputs), batch_size):
            yield Rows(batch_size, functools.partial(window, first))


def load_text(path: str | Path, *, unit: str = "character", valid_fraction: float = 0.1) -> Text:
    """A UTF-8 file as characters or bytes; the end of the file is the split "valid".

    Args:
      path: the file.
      unit: "character" (ids are ranks among the sorted distinct characters of the file) or "byte"
        (ids are the bytes, `vocab_size` 256).
      valid_fraction: of the tokens, for "valid".

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: an unknown unit, or a split would be empty.
    """
    path = existing(path, "give the path of a UTF-8 text file")
    if unit == "character":
        text = path.read_bytes().decode()
        chars = np.unique(np.array(list(text)))
        encode, decode = _character_codec(chars)
        ids, sizes = encode(text), [len(c.encode()) for c in chars]
    elif unit == "byte":
        encode, decode = _encode_bytes, _decode_bytes
        ids, sizes = np.fromfile(path, np.uint8), [1] * 256
    else:
        raise ValueError(f'unit must be "character" or "byte"; got {unit!r}')
    cut = int(len(ids) * (1 - valid_fraction))
    if not 0 < cut < len(ids):
        raise ValueError(
            f"valid_fraction={valid_fraction} leaves an empty split of the {len(ids)} tokens in "
            f"{path}"
        )
    tokens = {"train": ids[:cut], "valid": ids[cut:]}
    return Text(tokens, len(sizes), encode, decode, np.array(sizes))


def load_tokens(path: str | Path) -> Text:
    """A token file: npz with ids `train`, `valid`, maybe `test`, and `vocab`.

    `vocab` is the UTF-8 text of the tokens, one a line. The text is that of the WikiText files:
    tokens followed by a space, lines that begin with a space, `<eos>` at the end of a line.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: an array is missing.

    Source: Merity, Xiong, Bradbury, Socher, 2016, arXiv 1609.07843.
    """
    path = existing(path, "give the path of an npz file with the arrays train, valid and vocab")
    with np.load(path) as file:
        missing = {"train", "valid", "vocab"} - set(file.files)
        if missing:
            raise ValueError(f"{path} must hold the arrays train, valid and vocab; no {missing}")
        tokens = {name: file[name] for name in ("train", "valid", "test") if name in file.files}
        words = bytes(file["vocab"]).decode().split("\n")
    encode, decode = _word_codec(words)
    # `<eos>` stands for the newline and the space that begins the next line.
    sizes = [2 if word == "<eos>" else len(word.encode()) + 1 for word in words]
    return Text(tokens, len(words), encode, decode, np.array(sizes))


def _encode_bytes(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def _decode_bytes(ids):
    return bytes(np.asarray(ids, np.uint8)).decode(errors="replace")


def _character_codec(chars):
    def encode(text):
        given = np.array(list(text), dtype="<U1")
        ids = np.searchsorted(chars, given).clip(max=len(chars) - 1)
        unknown = given[chars[ids] != given]
        if unknown.size:
            raise ValueError(f"text must consist of characters of the file; got {unknown[0]!r}")
        return ids.astype(np.int32)

    def decode(ids):
        return "".join(chars[np.asarray(ids)])

    return encode, decode


def _word_codec(words):
    ids = {word: i for i, word in enumerate(words)}

    def encode(text):
        found = [ids.get(word, ids.get("<unk>")) for word in text.replace("\n", " <eos> ").split()]
        if None in found:
            raise ValueError("text must consist of words of the vocabulary, which has no <unk>")
        return np.array(found, np.int32)

    def decode(tokens):
        lines = " ".join(words[i] for i in np.asarray(tokens)).split("<eos>")
        return "\n".join(line.strip() for line in lines)

    return encode, decode
