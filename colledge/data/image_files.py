"""Labelled images as they lie on disk: read as bytes, each fault named by its file; nothing is scaled here.

idx            train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-... (.gz or not)   MNIST, Fashion-MNIST
CIFAR binary   data_batch_1.bin to data_batch_5.bin, test_batch.bin                      CIFAR-10
CIFAR python   data_batch_1 to data_batch_5, test_batch                                  CIFAR-10
               train, test; by their fine labels                                         CIFAR-100
npz            x_train, y_train, x_test, y_test in the only .npz                         as Keras keeps its own
png            train/CLASS/*.png, test/CLASS/*.png; classes in the order of their names
"""

from __future__ import annotations

import gzip
import math
import pickle
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from colledge.errors import ColledgeError, DataError, one_line

Split = Literal["train", "test"]

Bytes = npt.NDArray[np.uint8]


class Images(NamedTuple):
    """Images as they lie on disk: uint8, [rows, channels, height, width]; int64, [rows]; folders name classes."""

    pixels: Bytes
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...] | None = None


_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_BYTES = math.prod(_CIFAR_SHAPE)
_CIFAR_FILES: Mapping[Split, tuple[str, ...]] = {
    "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
    "test": ("test_batch",),
}
_OF_PROGRAMS = ("__MACOSX", "Thumbs.db", "desktop.ini")
_PICTURES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
    | {".heic", ".heif", ".avif", ".jp2", ".ppm", ".pgm", ".pnm", ".tga", ".svg"}
)
_AGAIN = "fetch the file again."


def read_images(folder: Path, split: Split) -> Images:
    """Return the images of a folder and their labels, which number `class_names` where folders name the classes.

    Args:
        folder: Holds files of one of the formats above, found by the names of its training split; or an .npz itself.
        split: Which images.

    Raises:
        DataError: The folder or a file of this split is missing, or a file is not what its name says.
        ColledgeError: The images are .png and Pillow is not installed.
    """
    if not folder.exists():
        raise DataError(f"{folder}: no such folder.", fix="give the path of a folder of images.")
    readers = [reader for pattern, reader in _READERS.items() if _has_file(folder, pattern)]
    if _pngs not in readers and any(path.suffix.lower() in _PICTURES for path in folder.glob("train/**/*")):
        readers.append(_pngs)  # says why it reads none of them
    if folder.suffix == ".npz":
        readers = [_npz]
    if len(readers) != 1:
        raise DataError(
            f"{folder}: holds training images in {len(readers)} formats, wanted one of {', '.join(_READERS)}.",
            fix="give the folder in which these files lie.",
        )
    images, labels, class_names = readers[0](folder, split)
    if len(images) != len(labels) or not len(labels):
        raise DataError(
            f"{folder}: {len(images)} images and {len(labels)} labels in the {split} split, wanted as many, and some.",
            fix="fetch both files of that split again.",
        )
    return Images(images, labels.astype(np.int64), class_names)


def _has_file(folder: Path, pattern: str) -> bool:
    either = "".join(f"[{c}{c.upper()}]" for c in "png")
    return any(path.is_file() for path in folder.glob(pattern.replace("png", either)))


def _content(path: Path) -> bytes:
    """Return what is in a file, or in the .gz of its name."""
    zipped = path.with_name(f"{path.name}.gz")
    try:
        if zipped.exists() and not path.exists():
            return gzip.decompress(zipped.read_bytes())
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.", fix="fetch all files of the data set.") from None
    except (OSError, EOFError, zlib.error) as fault:
        raise DataError(f"{path}: cannot be read ({one_line(fault)}).", fix=_AGAIN) from None


def _channels_first(images: npt.NDArray[Any], where: Path) -> Bytes:
    """Return [rows, height, width] or [rows, height, width, channels] with channels first."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"{where}: images are {images.dtype} of shape {list(images.shape)}, wanted uint8 of [rows, height, width] "
            "or [rows, height, width, channels].",
            fix="save bytes from 0 to 255, channels last.",
        )
    return images[:, None] if images.ndim == 3 else np.moveaxis(images, 3, 1)


# -- idx ---------------------------------------------------------------------------------------------------------


def _idx(folder: Path, split: Split) -> Images:
    name = {"train": "train", "test": "t10k"}[split]
    images = _idx_array(folder / f"{name}-images-idx3-ubyte", 3)
    return Images(_channels_first(images, folder), _idx_array(folder / f"{name}-labels-idx1-ubyte", 1))


def _idx_array(path: Path, num_dims: int) -> npt.NDArray[Any]:
    """Return an idx file's array: 0, 0, 8 (bytes), the number of dimensions, each as a big-endian int32, the bytes."""
    content = _content(path)
    magic = bytes([0, 0, 8, num_dims])
    if content[:4] != magic:
        raise DataError(
            f"{path}: begins with {content[:4].hex()}, wanted {magic.hex()} (idx of bytes, {num_dims} dimension(s)).",
            fix=_AGAIN,
        )
    begin = 4 + 4 * num_dims
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, begin, 4)]
    if len(content) != begin + math.prod(shape):
        raise DataError(
            f"{path}: saw {len(content)} bytes, wanted {begin + math.prod(shape)} for its shape {shape}.",
            fix=_AGAIN,
        )
    return np.frombuffer(content, dtype=np.uint8, offset=begin).reshape(shape)


# -- CIFAR -------------------------------------------------------------------------------------------------------


def _cifar_binary(folder: Path, split: Split) -> Images:
    """Read rows of one byte of label and 3072 of pixels: red, green, blue."""
    rows = np.concatenate([_cifar_rows(folder / f"{name}.bin") for name in _CIFAR_FILES[split]])
    return Images(rows[:, 1:].reshape(-1, *_CIFAR_SHAPE), rows[:, 0].astype(np.int64))


def _cifar_rows(path: Path) -> Bytes:
    content = _content(path)
    if len(content) % (1 + _CIFAR_BYTES):
        raise DataError(
            f"{path}: saw {len(content)} bytes, wanted a multiple of {1 + _CIFAR_BYTES}.", fix=_AGAIN
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, 1 + _CIFAR_BYTES)


def _cifar_python(folder: Path, split: Split) -> Images:
    batches = [_cifar_batch(folder / name, b"labels", "CIFAR-10") for name in _CIFAR_FILES[split]]
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return Images(images, labels)


def _cifar_100(folder: Path, split: Split) -> Images:
    return Images(*_cifar_batch(folder / split, b"fine_labels", "CIFAR-100"))


class _Inert:
    """Stands for whatever a pickle names: keeps what it would be made of, makes nothing."""

    def __init__(self, *args: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _CifarUnpickler(pickle.Unpickler):
    """Reads plain values, and arrays as `_Inert`. No name leads to code that can do anything."""

    def find_class(self, module: str, name: str) -> type[_Inert]:
        """Return what stands for the names with which numpy's arrays are pickled; refuse every other name."""
        if (module, name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }:
            return _Inert
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _cifar_batch(path: Path, key: bytes, name: str) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Read {b"data": uint8 array [rows, 3072], key: list of labels}, pickled by Python 2."""
    try:
        with path.open("rb") as file:
            batch = _CifarUnpickler(file, encoding="bytes").load()
        _, shape, _, by_columns, raw = batch[b"data"].state  # as ndarray.__setstate__ takes it
        if by_columns or shape[1:] != (_CIFAR_BYTES,):
            raise ValueError(f"its data is of shape {shape}")
        images = np.frombuffer(raw, dtype=np.uint8).reshape(shape[0], *_CIFAR_SHAPE)
        return images, np.array(batch[key], dtype=np.int64).reshape(len(images))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.", fix="fetch all files of the data set.") from None
    except Exception as fault:  # whatever bytes make of an unpickler
        raise DataError(
            f"{path}: not a batch of {name} ({type(fault).__name__}: {one_line(fault)}).", fix=_AGAIN
        ) from None


# -- npz and png -------------------------------------------------------------------------------------------------


def _npz(source: Path, split: Split) -> Images:
    files = [source] if source.is_file() else sorted(source.glob("*.npz"))
    if len(files) != 1:
        raise DataError(
            f"{source}: holds {len(files)} .npz files, wanted one.", fix="give the file's own path."
        )
    try:
        with zipfile.ZipFile(files[0]):  # else numpy would take it for a pickle
            pass
        with np.load(files[0], allow_pickle=False) as arrays:
            images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as fault:
        raise DataError(
            f"{files[0]}: cannot be read ({one_line(fault)}).",
            fix="save x_train, y_train, x_test and y_test with numpy.savez.",
        ) from None
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{files[0]}: y_{split} is {labels.dtype}, wanted integers.", fix="save class numbers."
        )
    return Images(_channels_first(images, files[0]), labels.reshape(-1))


def _pngs(folder: Path, split: Split) -> Images:
    if not (folder / split).is_dir():
        raise DataError(f"{folder / split}: no such folder.", fix=f"give {split}/CLASS/*.png.")
    classes = sorted(path.name for path in _visible(folder / "train") if path.is_dir())
    strange = sorted({path.name for path in _visible(folder / split) if path.is_dir()} - set(classes))
    if strange:
        raise DataError(f"{folder / split / strange[0]}: no such class in train.", fix="remove the folder.")
    loose = [path for path in _visible(folder / split) if path.suffix.lower() in _PICTURES and path.is_file()]
    if loose:
        raise DataError(
            f"{folder / split}: {len(loose)} picture(s) of no class are not read, such as {loose[0].name}.",
            fix=f"put each into the folder of its class, such as {split}/CLASS/1.png.",
        )
    images: list[Bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        pictures = _pictures(folder / split / name)
        if split == "train" and not pictures:
            raise DataError(
                f"{folder / split / name}: holds no picture.", fix="add some, or remove the folder."
            )
        for path in pictures:
            image = _png(path)
            if images and image.shape != images[0].shape:
                raise DataError(
                    f"{path}: is of shape {list(image.shape)}, wanted {list(images[0].shape)} as those before it.",
                    fix="give all images one size and as many channels.",
                )
            images.append(image)
            labels.append(label)
    stacked = np.stack(images) if images else np.zeros((0, 1, 1), dtype=np.uint8)
    return Images(_channels_first(stacked, folder), np.array(labels, dtype=np.int64), tuple(classes))


def _visible(folder: Path) -> list[Path]:
    """Return what is in a folder, but for hidden files and folders, which programs leave there."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith((".", *_OF_PROGRAMS)))


def _pictures(folder: Path) -> list[Path]:
    """Return the pictures of a class; a folder that is not there has none.

    Raises:
        DataError: There are files of other kinds among them, or folders, which nobody would read.
    """
    inside = _visible(folder) if folder.is_dir() else []
    found = [path for path in inside if path.suffix.lower() == ".png" and path.is_file()]
    read = set(found)
    others = Counter(
        "folder" if path.is_dir() else path.suffix.lower() or "without a suffix"
        for path in inside
        if path not in read
    )
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        raise DataError(
            f"{folder}: {others.total()} file(s) or folder(s) there are no .png and are not read ({kinds}).",
            fix="save pictures as .png, and take other files out.",
        )
    return found


def _png(path: Path) -> Bytes:
    try:
        from PIL import Image
    except ImportError:
        raise ColledgeError(f"{path}: reading .png needs Pillow.", fix="pip install pillow.") from None
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode not in ("L", "RGB"):
                raise ValueError(f"its mode is {image.mode}, wanted L or RGB")
            return np.array(image, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as fault:
        raise DataError(
            f"{path}: cannot be read ({one_line(fault)}).", fix="save it as a PNG, grey (L) or RGB."
        ) from None


_READERS: Mapping[str, Callable[[Path, Split], Images]] = {
    "train-images-idx3-ubyte*": _idx,
    "data_batch_1.bin": _cifar_binary,
    "data_batch_1": _cifar_python,
    "train": _cifar_100,
    "*.npz": _npz,
    "train/*/*.png": _pngs,
}
