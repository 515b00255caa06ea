"""Labelled images by name or folder, scaled for a model.

Pixels are scaled to mean 0 and standard deviation 1 per channel, over all pixels of the TRAINING split; the test split
is scaled by the same two numbers. So nothing is learnt from what a model is judged by. Several sources of one kind of
images, such as folders of a federation's nodes, are scaled and numbered alike by `ImageSettings` instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator, model_validator

from colledge.data.image_files import Images, Split, read_images
from colledge.data.labelled import Labelled
from colledge.errors import ColledgeError, DataError
from colledge.records import Record

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
_WHITE = 255
_NO_SCALE = 0.5  # as mean and deviation: pixels from -1 to 1
_MOST_DEVIATION = 10.0  # that of pixels from 0 to 1 is 0.5 at most; some scale by more, nobody by as much

_Size = Annotated[int, Field(ge=1, strict=True)]
_Names = Annotated[tuple[str, ...], Field(min_length=1)]
_Deviation = Annotated[float, Field(gt=0)]


class ImageSettings(Record):
    """What images look like wherever they come from.

    `shape` is channels, height and width. `classes` are the names of the classes in the order of their numbers, or how
    many there are, where sources number them. `mean` and `deviation` are of each channel's pixels from 0 to 1, as in
    torchvision's Normalize; without them pixels are scaled from 0..1 to -1..1.
    """

    shape: tuple[_Size, _Size, _Size]
    classes: _Size | _Names
    mean: tuple[float, ...] | None = None
    deviation: tuple[_Deviation, ...] | None = None

    @field_validator("shape", mode="before")
    @classmethod
    def _check_shape(cls, value: object) -> object:
        if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(_is_size, value)):
            raise ValueError("wanted channels, height and width, such as [3, 32, 32]")
        return value

    @field_validator("classes", mode="before")
    @classmethod
    def _check_classes(cls, value: object) -> object:
        names = isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value)
        if not names and not _is_size(value):
            raise ValueError(
                "wanted how many classes there are, or a list of their names, such as [cat, dog]"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> ImageSettings:
        if (self.mean is None) != (self.deviation is None):
            raise ValueError("give mean and deviation, or neither")
        for name, values, most in (("mean", self.mean, 1.0), ("deviation", self.deviation, _MOST_DEVIATION)):
            if values is not None and len(values) != self.shape[0]:
                raise ValueError(f"{name} has {len(values)} number(s), the shape {self.shape[0]} channel(s)")
            strange = [value for value in values or () if not 0 <= value <= most]
            if strange:
                raise ValueError(
                    f"{name} is {strange[0]:g}, wanted that of pixels from 0 to 1: divide that of 0 to 255 by 255"
                )
        if self.class_names is not None and len(set(self.class_names)) < len(self.class_names):
            raise ValueError("classes has a name twice")
        return self

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes; None where they only have numbers."""
        return None if isinstance(self.classes, int) else self.classes

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    @property
    def scaling(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each channel, by which pixels from 0 to 1 are scaled."""
        unscaled = (_NO_SCALE,) * self.shape[0]
        return self.mean or unscaled, self.deviation or unscaled


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 1


def image_settings(source: str) -> ImageSettings:
    """Return what the training split of a source looks like, complete with its mean and deviation.

    Args:
        source: As of `load_images`.

    Raises:
        DataError: A file is missing or damaged, or there are gaps between the numbers of the classes.
        ColledgeError: A library that this source needs is not installed.
    """
    return _seen_in(_read(source, "train"), source)


def load_images(source: str, split: Split, settings: ImageSettings | None = None) -> Labelled:
    """Return the images of one split, scaled.

    Reading takes 5 bytes a pixel at most (1 as read, 4 as float32), what is returned 4.

    Args:
        source: `digits` (1797 images of 8x8 in scikit-learn; a fifth, in a fixed shuffled order, is the test split),
            `fashion-mnist` (Debian's dataset-fashion-mnist), or the path of a folder or .npz, as
            `colledge.data.image_files` lists them (`./digits` for a folder of that name).
        split: Which images.
        settings: What they must look like, and how they are scaled; None is like the source's own training split. Not
            all classes need be there.

    Returns:
        `pixels`, float32, [rows, channels, height, width]; the classes are those of the settings.

    Raises:
        DataError: A file is missing or damaged, or labels or sizes are not those wanted.
        ColledgeError: A library that this source needs is not installed.
    """
    images = _read(source, split)
    wanted = settings or _seen_in(images if split == "train" else _read(source, "train"), source)
    whose = "as in train" if settings is None else "as data.images says"
    labels = _numbered(images, wanted, source, f"in the {split} split", whose)
    if images.pixels.shape[1:] != wanted.shape:
        raise DataError(
            f"{source}: images of {list(images.pixels.shape[1:])} in the {split} split, wanted {list(wanted.shape)} "
            f"{whose}.",
            fix="give all images one size.",
        )
    mean, deviation = (
        (np.array(values) * _WHITE).astype(np.float32)[:, None, None] for values in wanted.scaling
    )
    pixels = images.pixels.astype(np.float32)
    pixels -= mean
    pixels /= deviation
    return Labelled({"pixels": torch.from_numpy(pixels)}, torch.from_numpy(labels), wanted.num_classes)


def _seen_in(images: Images, source: str) -> ImageSettings:
    """Return what some images, a training split, look like."""
    classes = np.unique(images.labels)
    if classes[0] != 0 or classes[-1] != len(classes) - 1:
        raise DataError(
            f"{source}: {len(classes)} different labels from {classes[0]} to {classes[-1]} in the train split, wanted "
            f"0 to {len(classes) - 1}.",
            fix="number the classes from 0 without a gap.",
        )
    mean, deviation = _constants(images.pixels, source)
    channels, height, width = images.pixels.shape[1:]
    return ImageSettings(
        shape=(channels, height, width),
        classes=images.class_names or len(classes),
        mean=tuple((mean / _WHITE).tolist()),
        deviation=tuple((deviation / _WHITE).tolist()),
    )


def _numbered(
    images: Images, wanted: ImageSettings, source: str, where: str, whose: str
) -> npt.NDArray[np.int64]:
    """Return labels by the numbers of the classes wanted.

    Raises:
        DataError: A class is not among them, or folders name classes that are wanted by number, or files number
            classes that are wanted by name.
    """
    labels, names = images.labels, images.class_names
    if names is not None and wanted.class_names is None:
        raise DataError(
            f"{source}: classes with names ({', '.join(names)}) {where}, wanted {wanted.num_classes} of numbers "
            f"{whose}.",
            fix="give their names as data.images.classes, in the same order to all nodes.",
        )
    if names is None and wanted.class_names is not None:
        raise DataError(
            f"{source}: classes with numbers {where}, wanted names ({', '.join(wanted.class_names)}) {whose}.",
            fix=f"give how many there are, such as {wanted.num_classes}, as data.images.classes to all nodes.",
        )
    if names is not None and wanted.class_names is not None:
        strange = [name for name in names if name not in wanted.class_names]
        if strange:
            raise DataError(
                f"{source}: class {strange[0]!r} {where}, wanted {', '.join(wanted.class_names)} {whose}.",
                fix="rename or remove the folder, or add its name at all nodes.",
            )
        return np.array([wanted.class_names.index(name) for name in names], dtype=np.int64)[labels]
    strange_labels = labels[(labels < 0) | (labels >= wanted.num_classes)]
    if len(strange_labels):
        raise DataError(
            f"{source}: label {strange_labels[0]} {where}, wanted 0 to {wanted.num_classes - 1} {whose}.",
            fix="leave out rows of other classes.",
        )
    return labels


def _read(source: str, split: Split) -> Images:
    if source == "digits":
        return _digits(split)
    if source == "fashion-mnist" and not FASHION_MNIST.is_dir():
        raise DataError(
            f"fashion-mnist: {FASHION_MNIST} is missing.",
            fix="apt-get install dataset-fashion-mnist, or give a folder with its four idx files.",
        )
    return read_images(FASHION_MNIST if source == "fashion-mnist" else Path(source), split)


def _digits(split: Split) -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ColledgeError("digits: needs scikit-learn.", fix="pip install scikit-learn.") from None
    digits = load_digits()
    # Its images lie by writer, so that the last of them would be other people's digits.
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0)).numpy()
    num_train = len(order) - len(order) // 5
    rows = order[:num_train] if split == "train" else order[num_train:]
    return Images(digits.images[rows, None].astype(np.uint8), digits.target[rows].astype(np.int64))


def _constants(
    pixels: npt.NDArray[np.uint8], source: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return mean and standard deviation of each channel, [channels]; from exact sums."""
    count = pixels.size // pixels.shape[1]
    mean = np.einsum("nchw->c", pixels, dtype=np.uint64) / count
    square = np.einsum("nchw,nchw->c", pixels, pixels, dtype=np.uint64) / count
    deviation = np.sqrt(square - mean**2)
    if not deviation.all():
        raise DataError(
            f"{source}: all pixels of channel {int(deviation.argmin())} are the same in the train split.",
            fix="give images with something in that channel, or leave it out.",
        )
    return mean, deviation
