"""Images in every format that is read, the files made here; each fault is one line."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from colledge.data import ImageSettings, image_settings, load_images
from colledge.data.image_files import read_images
from colledge.data.images import FASHION_MNIST
from colledge.errors import ColledgeError, DataError

Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]  # [rows, channels, height, width], [rows]
SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")


def made(num_rows: int, shape: tuple[int, ...], seed: int) -> Arrays:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (num_rows, *shape), dtype=np.uint8), np.arange(num_rows) * 7 % 10


# -- writers of each format, from its description ------------------------------------------------------------------


def write_idx(folder: Path, data: Mapping[str, Arrays], compress: Callable[[bytes], bytes] = bytes) -> None:
    suffix = ".gz" if compress is gzip.compress else ""
    for split, (images, labels) in data.items():
        name = "train" if split == "train" else "t10k"
        sizes = len(images), *images.shape[2:]
        content = struct.pack(">IIII", 0x803, *sizes) + images.tobytes()
        (folder / f"{name}-images-idx3-ubyte{suffix}").write_bytes(compress(content))
        content = struct.pack(">II", 0x801, len(labels)) + labels.astype(np.uint8).tobytes()
        (folder / f"{name}-labels-idx1-ubyte{suffix}").write_bytes(compress(content))


def write_idx_gz(folder: Path, data: Mapping[str, Arrays]) -> None:
    write_idx(folder, data, gzip.compress)


def cifar_batches(data: Mapping[str, Arrays]) -> Mapping[str, Arrays]:
    images, labels = data["train"]
    pieces = zip(np.array_split(images, 5), np.array_split(labels, 5), strict=True)
    return {**{f"data_batch_{i}": piece for i, piece in enumerate(pieces, 1)}, "test_batch": data["test"]}


def write_cifar_binary(folder: Path, data: Mapping[str, Arrays]) -> None:
    for name, (images, labels) in cifar_batches(data).items():
        rows = np.concatenate([labels.astype(np.uint8)[:, None], images.reshape(len(images), -1)], axis=1)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())


def python2_pickle(
    images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], key: bytes = b"labels"
) -> bytes:
    """Return a batch as cPickle of Python 2 writes it in protocol 2, opcode by opcode: the files people download."""

    def string(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    rows = images.reshape(len(images), -1)
    raw = rows.tobytes()
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R(K\x03" + string(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
    shape = b"M" + struct.pack("<H", len(rows)) + b"M" + struct.pack("<H", rows.shape[1]) + b"\x86"
    array += b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<I", len(raw)) + raw + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels.tolist()) + b"e"
    entries = string(b"batch_label") + string(b"training batch 1 of 5")
    return b"\x80\x02}(" + entries + string(key) + numbers + string(b"data") + array + b"u."


def write_cifar_python(folder: Path, data: Mapping[str, Arrays]) -> None:
    for name, arrays in cifar_batches(data).items():
        (folder / name).write_bytes(python2_pickle(*arrays))


def write_cifar_100(folder: Path, data: Mapping[str, Arrays]) -> None:
    for split, (images, labels) in data.items():
        (folder / split).write_bytes(python2_pickle(images, labels, b"fine_labels"))


def write_npz(folder: Path, data: Mapping[str, Arrays]) -> None:
    arrays: dict[str, Any] = {}
    for split, (images, labels) in data.items():
        arrays |= {f"x_{split}": np.moveaxis(images, 1, 3), f"y_{split}": labels.astype(np.uint8)[:, None]}
    np.savez_compressed(folder / "images.npz", **arrays)


def write_pngs(folder: Path, data: Mapping[str, Arrays]) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="needs Pillow")
    for split, (images, labels) in data.items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / split / f"class-{label}" / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image_module.fromarray(np.moveaxis(image, 0, 2).squeeze()).save(path)


CIFAR = (3, 32, 32)
FORMATS: list[tuple[Callable[[Path, Mapping[str, Arrays]], None], tuple[int, ...]]] = [
    (write_idx, (1, 5, 7)),
    (write_idx_gz, (1, 5, 7)),
    (write_cifar_binary, CIFAR),
    (write_cifar_python, CIFAR),
    (write_cifar_100, CIFAR),
    (write_npz, (3, 5, 7)),
    (write_pngs, (3, 5, 7)),
    (write_pngs, (1, 5, 7)),
]


def scaled(images: npt.NDArray[np.uint8], by: npt.NDArray[np.uint8]) -> Tensor:
    """Return images scaled by the mean and deviation of others, in float64."""
    values, constants = torch.from_numpy(images.copy()).double(), torch.from_numpy(by.copy()).double()
    mean = constants.mean(dim=(0, 2, 3), keepdim=True)
    return (values - mean) / constants.std(dim=(0, 2, 3), keepdim=True, correction=0)


@pytest.mark.parametrize(("write", "shape"), FORMATS)
def test_every_format_gives_the_images_that_were_written(
    tmp_path: Path, write: Callable[[Path, Mapping[str, Arrays]], None], shape: tuple[int, ...]
) -> None:
    data = {"train": made(60, shape, 0), "test": made(20, shape, 1)}
    write(tmp_path, data)
    for split in SPLITS:
        images, labels = data[split]
        loaded = load_images(str(tmp_path), split)
        pixels = loaded.inputs["pixels"]
        assert (pixels.dtype, loaded.labels.dtype) == (torch.float32, torch.int64)
        assert loaded.num_classes == 10
        expected = scaled(images, by=data["train"][0])
        if write is write_pngs:  # they lie by class
            order = np.argsort(labels, kind="stable")
            labels, expected = labels[order], expected[torch.from_numpy(order)]
        assert loaded.labels.tolist() == labels.tolist()
        torch.testing.assert_close(pixels.double(), expected, rtol=0, atol=1e-6)


def test_an_npz_is_also_read_by_its_own_path(tmp_path: Path) -> None:
    write_npz(tmp_path, {"train": made(20, (1, 4, 4), 0), "test": made(10, (1, 4, 4), 1)})
    (tmp_path / "images.npz").rename(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    assert load_images(str(tmp_path / "a.npz"), "test").num_rows == 10
    with pytest.raises(DataError, match=r"holds 2 \.npz files, wanted one"):
        load_images(str(tmp_path), "test")


# -- sources by name -----------------------------------------------------------------------------------------------


def test_digits() -> None:
    train, test = (load_images("digits", split) for split in SPLITS)
    assert train.inputs["pixels"].shape == (1438, 1, 8, 8)
    assert test.inputs["pixels"].shape == (359, 1, 8, 8)
    assert train.num_classes == test.num_classes == 10
    assert int(test.labels.bincount().min()) >= 25  # of some 36 of each class
    pixels = train.inputs["pixels"].double()
    assert abs(float(pixels.mean())) < 1e-6
    assert abs(float(pixels.std(correction=0)) - 1) < 1e-6
    datasets = pytest.importorskip("sklearn.datasets")
    levels = sorted({round(float(value), 4) for value in pixels.unique()})
    images = torch.from_numpy(datasets.load_digits().images)
    assert len(levels) == 17  # grey levels 0 to 16, scaled
    seen = torch.cat([train.inputs["pixels"], test.inputs["pixels"]]).reshape(1797, 64).double()
    wanted = (images.reshape(1797, 64) - images.mean()) / images.std()
    assert int(torch.cdist(wanted, seen).argmin(dim=1).unique().numel()) > 1790  # every image is in one split


def test_digits_can_be_learnt() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, test = (load_images("digits", split) for split in SPLITS)
    model = linear_model.LogisticRegression(max_iter=300)
    model.fit(train.inputs["pixels"].flatten(1).numpy(), train.labels.numpy())
    assert model.score(test.inputs["pixels"].flatten(1).numpy(), test.labels.numpy()) > 0.94


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist() -> None:
    train, test = (load_images("fashion-mnist", split) for split in SPLITS)
    assert train.inputs["pixels"].shape == (60000, 1, 28, 28)
    assert test.inputs["pixels"].shape == (10000, 1, 28, 28)
    assert train.labels.bincount().tolist() == [6000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    # The constants that people publish for it: mean 0.2860 and deviation 0.3530 of 1.
    assert float(train.inputs["pixels"].min()) == pytest.approx(-0.2860 / 0.3530, abs=3e-4)
    assert float(test.inputs["pixels"].max()) == pytest.approx((1 - 0.2860) / 0.3530, abs=6e-4)


# -- faults --------------------------------------------------------------------------------------------------------


def fault_of(source: Path | str, split: Literal["train", "test"] = "train") -> str:
    with pytest.raises(ColledgeError) as caught:
        load_images(str(source), split)
    line = str(caught.value)
    assert " Fix: " in line
    assert "\n" not in line
    return line


def idx_folder(folder: Path) -> Path:
    write_idx(folder, {"train": made(20, (1, 4, 4), 0), "test": made(10, (1, 4, 4), 1)})
    return folder


IDX_IMAGES, IDX_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def test_a_missing_folder_or_one_without_images(tmp_path: Path) -> None:
    assert "nowhere: no such folder." in fault_of(tmp_path / "nowhere")
    assert "holds training images in 0 formats, wanted one of train-images-idx3-ubyte*" in fault_of(tmp_path)
    write_cifar_binary(tmp_path, {"train": made(20, CIFAR, 0), "test": made(10, CIFAR, 1)})
    assert "in 2 formats" in fault_of(idx_folder(tmp_path))


def test_fashion_mnist_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colledge.data.images.FASHION_MNIST", tmp_path / "absent")
    assert "Fix: apt-get install dataset-fashion-mnist" in fault_of("fashion-mnist")


@pytest.mark.parametrize(("module", "source"), [("sklearn.datasets", "digits"), ("PIL", "folder")])
def test_a_library_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str
) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    line = fault_of(tmp_path if source == "folder" else source)
    assert "Fix: pip install " in line


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        (IDX_IMAGES, lambda content: content[:-1], "saw 335 bytes, wanted 336 for its shape [20, 4, 4]"),
        (IDX_IMAGES, lambda content: content + b"x", "saw 337 bytes, wanted 336"),
        (IDX_IMAGES, lambda content: content[:6], "saw 6 bytes, wanted"),
        (IDX_IMAGES, lambda content: b"", "begins with , wanted 00000803"),
        (IDX_IMAGES, lambda content: b"\0\0\x0d\x03" + content[4:], "begins with 00000d03, wanted 00000803"),
        (IDX_LABELS, lambda content: b"\0\0\x08\x03" + content[4:], "begins with 00000803, wanted 00000801"),
        (
            IDX_LABELS,
            lambda content: content[:8] + b"\xc8" + content[9:],
            "11 different labels from 0 to 200",
        ),
        (
            IDX_LABELS,
            lambda content: struct.pack(">II", 0x801, 3) + b"abc",
            "20 images and 3 labels in the train",
        ),
        (
            "t10k-labels-idx1-ubyte",
            lambda content: content[:8] + b"\x0a" + content[9:],
            "label 10 in the test",
        ),
        (
            "t10k-images-idx3-ubyte",
            lambda content: struct.pack(">IIII", 0x803, 10, 2, 8) + content[16:],
            "images of [1, 2, 8] in the test split, wanted [1, 4, 4] as in train",
        ),
        (
            IDX_IMAGES,
            lambda content: content[:16] + bytes(320),
            "all pixels of channel 0 are the same in the train split",
        ),
    ],
)
def test_a_damaged_idx_file(tmp_path: Path, name: str, change: Callable[[bytes], bytes], line: str) -> None:
    path = idx_folder(tmp_path) / name
    path.write_bytes(change(path.read_bytes()))
    assert line in fault_of(tmp_path, "test")


def test_no_file_of_a_split(tmp_path: Path) -> None:
    (idx_folder(tmp_path) / "t10k-images-idx3-ubyte").unlink()
    assert load_images(str(tmp_path), "train").num_rows == 20
    assert "t10k-images-idx3-ubyte: no such file." in fault_of(tmp_path, "test")


def test_no_images_at_all(tmp_path: Path) -> None:
    none = np.zeros((0, 1, 4, 4), dtype=np.uint8), np.zeros(0, dtype=np.int64)
    write_idx(tmp_path, {"train": none})
    assert "0 images and 0 labels in the train split" in fault_of(tmp_path)


def test_a_truncated_gz(tmp_path: Path) -> None:
    write_idx_gz(tmp_path, {"train": made(20, (1, 4, 4), 0)})
    path = tmp_path / f"{IDX_IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:-9])
    assert "train-images-idx3-ubyte: cannot be read (Compressed file ended" in fault_of(tmp_path)


def test_a_damaged_cifar_file(tmp_path: Path) -> None:
    write_cifar_binary(tmp_path, {"train": made(20, CIFAR, 0), "test": made(10, CIFAR, 1)})
    (tmp_path / "data_batch_5.bin").write_bytes(b"short")
    assert "data_batch_5.bin: saw 5 bytes, wanted a multiple of 3073" in fault_of(tmp_path)
    (tmp_path / "data_batch_5.bin").unlink()
    assert "data_batch_5.bin: no such file." in fault_of(tmp_path)


class Hostile:
    """Unpickled by pickle itself, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_is_refused_and_nothing_runs(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "mark"
    content = pickle.dumps({"data": Hostile(mark), "labels": []}, protocol)
    pickle.loads(content)
    assert mark.exists()  # so it is hostile
    mark.unlink()
    (tmp_path / "data_batch_1").write_bytes(content)
    assert f"it names {os.system.__module__}.system" in fault_of(tmp_path)
    assert not mark.exists()


def test_the_batches_written_here_are_what_numpy_itself_unpickles() -> None:
    images, labels = made(10, CIFAR, 0)
    batch = pickle.loads(python2_pickle(images, labels), encoding="bytes")
    assert np.array_equal(batch[b"data"], images.reshape(10, -1))
    assert batch[b"labels"] == labels.tolist()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",  # a dotted name
        b"cnumpy\ndtype\n(tR(dS'__class__'\nN\x86b.",  # would set attributes
        b"\x82\x01.",  # of copyreg's table of extensions
        b"S'a'\nQ.",  # a persistent id
        b"\x80\x02}.",  # no data
        b"\x80\x02}(U\x04dataK\x01U\x06labels]u.",  # data is no array
        b"",
        b"garbage",
        b"\x80\x02}(U\x04data",
    ],
)
def test_whatever_a_batch_file_holds_it_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data_batch_1").write_bytes(content)
    assert "data_batch_1: not a batch of CIFAR-10 (" in fault_of(tmp_path)


def test_cifar_100_has_a_hundred_classes_and_is_never_unpickled(tmp_path: Path) -> None:
    images = made(200, CIFAR, 0)[0]
    labels = np.arange(200) * 7 % 100
    (tmp_path / "train").write_bytes(python2_pickle(images, labels, b"fine_labels"))
    loaded = load_images(str(tmp_path), "train")
    assert (loaded.num_classes, loaded.labels.tolist()) == (100, labels.tolist())
    (tmp_path / "train").write_bytes(python2_pickle(images, labels, b"coarse_labels"))
    assert "train: not a batch of CIFAR-100 (KeyError" in fault_of(tmp_path)
    mark = tmp_path / "mark"
    (tmp_path / "train").write_bytes(pickle.dumps({"data": Hostile(mark)}))
    assert f"it names {os.system.__module__}.system" in fault_of(tmp_path)
    assert not mark.exists()


def test_images_are_scaled_and_numbered_as_settings_say(tmp_path: Path) -> None:
    images, labels = made(20, (1, 4, 4), 0)
    np.savez(tmp_path / "a.npz", x_train=images[:, 0], y_train=labels % 3)
    seen = image_settings(str(tmp_path))
    assert (seen.shape, seen.classes, seen.class_names) == ((1, 4, 4), 3, None)
    assert seen.mean == pytest.approx((images.mean() / 255,))
    assert seen.deviation == pytest.approx((images.std() / 255,))
    plain = ImageSettings(shape=(1, 4, 4), classes=5)
    loaded = load_images(str(tmp_path), "train", plain)
    assert loaded.num_classes == 5  # a node may hold some classes only
    torch.testing.assert_close(
        loaded.inputs["pixels"], torch.from_numpy(images / 127.5 - 1).float(), rtol=0, atol=1e-6
    )
    same = load_images(
        str(tmp_path), "train", plain.model_copy(update={"mean": seen.mean, "deviation": seen.deviation})
    )
    assert torch.equal(same.inputs["pixels"], load_images(str(tmp_path), "train").inputs["pixels"])
    with pytest.raises(DataError, match=r"label 2 in the train split, wanted 0 to 1 as data\.images says"):
        load_images(str(tmp_path), "train", ImageSettings(shape=(1, 4, 4), classes=2))


def test_a_truncated_batch_or_one_of_another_shape(tmp_path: Path) -> None:
    images, labels = made(10, CIFAR, 0)
    whole = python2_pickle(images, labels)
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:40]):
        (tmp_path / "data_batch_1").write_bytes(content)
        assert "not a batch of CIFAR-10" in fault_of(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(python2_pickle(images[:, :, :16], labels))
    assert "its data is of shape (10, 1536)" in fault_of(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(python2_pickle(images, labels[:9]))
    assert "cannot reshape array of size 9" in fault_of(tmp_path)


def test_a_damaged_npz(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    images, labels = made(20, (1, 4, 4), 0)
    np.savez(path, x_train=images[:, 0].astype(np.float32), y_train=labels)
    assert "images are float32 of shape [20, 4, 4], wanted uint8" in fault_of(path)
    np.savez(path, x_train=images[:, 0], y_train=labels.astype(np.float32))
    assert "y_train is float32, wanted integers" in fault_of(path)
    np.savez(path, x_train=images[:, 0])
    assert "y_train is not a file in the archive" in fault_of(path)
    np.savez(path, x_train=np.array([Hostile(tmp_path / "mark")]), y_train=labels)
    assert "Object arrays cannot be loaded when allow_pickle=False" in fault_of(path)
    assert not (tmp_path / "mark").exists()
    path.write_bytes(pickle.dumps(Hostile(tmp_path / "mark")))
    assert "File is not a zip file" in fault_of(path)
    assert not (tmp_path / "mark").exists()


def test_pictures_that_would_not_be_read_are_named(tmp_path: Path) -> None:
    write_pngs(tmp_path, {"train": made(20, (3, 4, 4), 0)})
    wanted = len(read_images(tmp_path, "train").labels)
    folder = tmp_path / "train" / "class-3"
    pictures = sorted(folder.iterdir())
    pictures[0].rename(pictures[0].with_suffix(".PNG"))
    for left in (folder / ".DS_Store", folder / "._0001.png", folder / "Thumbs.db"):
        left.write_bytes(b"x")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    images = read_images(tmp_path, "train")
    assert (len(images.labels), len(images.class_names or ())) == (wanted, 10)
    pictures[0].with_suffix(".PNG").rename(pictures[0].with_suffix(".jpg"))
    assert "class-3: 1 file(s) or folder(s) there are no .png and are not read (1 .jpg)" in fault_of(tmp_path)
    for path in folder.glob("*.*"):
        path.unlink()
    assert "class-3: holds no picture" in fault_of(tmp_path)


def test_damaged_pngs(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="needs Pillow")
    write_pngs(tmp_path, {"train": made(20, (3, 4, 4), 0)})
    assert f"{tmp_path / 'test'}: no such folder." in fault_of(tmp_path, "test")
    (tmp_path / "test" / "zebra").mkdir(parents=True)
    assert "zebra: no such class in train." in fault_of(tmp_path, "test")
    last = tmp_path / "train" / "class-9" / "9999.png"
    image_module.new("RGB", (5, 4)).save(last)
    assert "9999.png: is of shape [4, 5, 3], wanted [4, 4, 3]" in fault_of(tmp_path)
    image_module.new("P", (4, 4)).save(last)
    assert "9999.png: cannot be read (its mode is P, wanted L or RGB)" in fault_of(tmp_path)
    write_pngs(tmp_path, {"train": made(1, (3, 32, 32), 0)})
    first = tmp_path / "train" / "class-0" / "0000.png"
    whole = first.read_bytes()
    for content in (b"", b"not an image", whole[:20], whole[: len(whole) // 2]):
        first.write_bytes(content)
        assert "0000.png: cannot be read (" in fault_of(tmp_path)


def test_pictures_of_no_class_or_of_no_kind_that_is_read_are_said(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="needs Pillow")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.jpeg").write_bytes(b"")
    assert "no .png and are not read (1 .jpeg)" in fault_of(tmp_path)
    (tmp_path / "train" / "2.webp").write_bytes(b"")
    assert "train: 1 picture(s) of no class are not read, such as 2.webp" in fault_of(tmp_path)
