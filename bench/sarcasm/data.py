"""The headlines: found, downloaded, read in any of their forms, and verified.

Misra & Arora, "Sarcasm Detection using News Headlines Dataset", AI Open 4 (2023), version 1. Every
form in circulation (JSON array, JSON lines, CSV, each maybe gzipped) has the same sequence of
(headline, label), and a hash over that sequence is what says whether the data is right.
"""

import csv
import gzip
import hashlib
import http.client
import io
import json
import os
import random
import tempfile
import urllib.request
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

URL = "https://storage.googleapis.com/download.tensorflow.org/data/sarcasm.json"
TIMEOUT = 30  # seconds without an answer or a byte
SYNTHETIC = "synthetic"
VERSION_1 = "81bab07deb35852e20941f6bc157b3bb8861c205a570e1736ed513e1ecdb4598"
VERSION_2 = "ded221e1e3c8d90bc0cc48f9ed289ddf969d07885fcb7eef74cc630b173c341c"
COUNT_1, COUNT_2 = 26_709, 28_619
HELP = (
    "Needed is version 1 of the News Headlines Dataset for Sarcasm Detection (26,709 headlines), "
    f"as from {URL} or Kaggle's rmisra/news-headlines-dataset-for-sarcasm-detection "
    "(Sarcasm_Headlines_Dataset.json, not _v2): name it by --data or LSTM_TRITON_DATA; "
    "or run on generated headlines by --data synthetic."
)


class DataError(Exception):
    """The data set is missing, damaged or another one; the message says how to get the right one."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}. {HELP}")


@dataclass(frozen=True)
class Headlines:
    """A data set in its original order.

    texts, labels: one each a headline; label 1 is sarcastic.
    name: "version 1" or "synthetic".
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    name: str

    @property
    def synthetic(self) -> bool:
        return self.name == SYNTHETIC

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.texts, self.labels)


def load(source: str | None = None) -> Headlines:
    """The data set from `source`, else the file that LSTM_TRITON_DATA names, else the cached download.

    Args:
        source: a path, or "synthetic" for generated headlines.

    Raises:
        DataError: there is none, or it is not version 1.
    """
    source = source or os.environ.get("LSTM_TRITON_DATA")
    if source == SYNTHETIC:
        return generate()
    return verified(Path(source).expanduser()) if source else downloaded()


def default_out(headlines: Headlines) -> Path:
    """Where results go: generated headlines' have a folder of their own."""
    return Path("reports", "sarcasm-synthetic" if headlines.synthetic else "sarcasm")


def fingerprint(texts: Sequence[str], labels: Sequence[int]) -> str:
    """sha256 (hex) of the lines "label, tab, headline, newline" in UTF-8."""
    digest = hashlib.sha256()
    for text, label in zip(texts, labels, strict=True):
        digest.update(f"{label}\t{text}\n".encode())
    return digest.hexdigest()


def verified(path: Path) -> Headlines:
    """The version 1 that the file holds; DataError if it holds anything else."""
    texts, labels = read(path)
    found = fingerprint(texts, labels)
    if found == VERSION_1:
        return Headlines(texts, labels, "version 1")
    if found == VERSION_2 or len(texts) == COUNT_2:
        raise DataError(f"{path} is version 2 of the data set ({len(texts):,} headlines)")
    if len(texts) < COUNT_1:
        raise DataError(f"{path} is truncated or another data set: {len(texts):,} of {COUNT_1:,} headlines")
    raise DataError(f"{path} is another data set or changed: {len(texts):,} headlines with sha256 {found}")


def read(path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Headlines and labels of a file; its form is told by its first bytes, not by its name.

    Raises:
        DataError: the file is missing, damaged or of no known form.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"No such file: {path}") from None
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}") from None
    try:
        if content.startswith(b"PK"):
            raise DataError(f"{path} is a zip archive: unpack it and name the file inside")
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        pairs = [(str(r["headline"]), int(r["is_sarcastic"])) for r in _records(content.decode("utf-8"))]
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path} is truncated or damaged: it does not unpack") from None
    except (KeyError, TypeError, ValueError, csv.Error) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise DataError(f"{path} is truncated, damaged or of another form: {_reason(error)}") from None
    return tuple(text for text, _ in pairs), tuple(label for _, label in pairs)


def _records(text: str) -> Iterable[dict[str, str]]:
    start = text.lstrip()[:1]
    if start == "[":
        return json.loads(text)
    if start == "{":
        # Not splitlines: headlines hold characters that it takes for line ends.
        return (json.loads(line) for line in text.split("\n") if line.strip())
    return csv.DictReader(io.StringIO(text, newline=""))


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no field {error}"
    if isinstance(error, UnicodeDecodeError):
        return "no UTF-8 text"
    return str(error).splitlines()[0]


def cache_path() -> Path:
    """Where the download is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lstm_triton" / "sarcasm.json"


def downloaded() -> Headlines:
    """The data set from the cache, fetched first where it is not there or was damaged."""
    path = cache_path()
    if path.exists():
        try:
            return verified(path)
        except DataError:
            path.unlink()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _fetch(path)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(f"No data set given, and the download from {URL} failed: {reason}") from None


def _fetch(path: Path) -> Headlines:
    """Downloads to a file beside `path`, which takes its name only once its content is verified."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    part = Path(name)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        with (
            os.fdopen(handle, "wb") as file,
            urllib.request.urlopen(URL, timeout=TIMEOUT) as answer,
            Progress(*columns) as progress,
        ):
            size = answer.headers.get("Content-Length")
            task = progress.add_task("headlines", total=int(size) if size else None)
            while block := answer.read(1 << 16):
                file.write(block)
                progress.advance(task, len(block))
        texts, labels = read(part)
        if fingerprint(texts, labels) != VERSION_1:
            raise DataError(f"What {URL} gave is not version 1 of the data set")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return Headlines(texts, labels, "version 1")


def generate(count: int = 2000, seed: int = 0) -> Headlines:
    """Headlines of made-up words, as long as real ones; which words they use says something of their label.

    Args:
        count: how many; about 44 % get label 1, as in the real data set.
        seed: same seed, same headlines.
    """
    draw = random.Random(seed)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = sorted({"".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(1500)})
    draw.shuffle(words)
    common, tell_tale = words[16:], (words[:8], words[8:16])
    weights = [1 / (rank + 5) for rank in range(len(common))]
    texts, labels = [], []
    for _ in range(count):
        label = int(draw.random() < 0.44)
        length = min(max(round(draw.gauss(9.8, 3.2)), 2), 40)
        text = draw.choices(common, weights, k=length)
        for place in range(length):
            if draw.random() < 0.2:
                # One tell-tale word in five is of the other label, so that the task is not trivial.
                text[place] = draw.choice(tell_tale[label if draw.random() < 0.8 else 1 - label])
        texts.append(" ".join(text) + draw.choice(["", "", "", "?", "!", ", " + draw.choice(common)]))
        labels.append(label)
    return Headlines(tuple(texts), tuple(labels), SYNTHETIC)
