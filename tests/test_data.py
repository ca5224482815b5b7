"""Readers, augmentation and the order of batches."""

import gzip
import pickle
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dnw.data import (
    Augment,
    FolderImages,
    Images,
    InMemory,
    Streaming,
    crop_and_flip,
    hold_out,
    list_folder,
    load,
    read_cifar10,
    read_digits,
    read_mnist,
)
from dnw.data._batches import _Decoder, deal, epoch_order

CPU = torch.device("cpu")


def test_digits_are_in_the_package():
    train, test = read_digits()
    assert train.images.shape == (1257, 1, 8, 8)
    assert test.images.shape == (540, 1, 8, 8)
    assert train.images.dtype == torch.uint8
    assert int(train.images.max()) == 255
    assert torch.bincount(torch.cat([train.labels, test.labels])).tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]
    # the first image is a zero: a ring around an empty centre
    assert train.labels[0] == 0
    assert train.images[0, 0, 3:5, 3].float().mean() < train.images[0, 0, 3:5, 2].float().mean()


# --- MNIST ---


def write_idx(path: Path, values: np.ndarray, zipped: bool = False) -> None:
    raw = bytes((0, 0, 8, values.ndim)) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.with_name(path.name + ".gz") if zipped else path).write_bytes(gzip.compress(raw) if zipped else raw)


def write_mnist(folder: Path, train: int = 20, test: int = 10, zipped: bool = False) -> None:
    generator = np.random.default_rng(0)
    for part, num in (("train", train), ("t10k", test)):
        write_idx(folder / f"{part}-images-idx3-ubyte", generator.integers(0, 256, (num, 28, 28), np.uint8), zipped)
        write_idx(folder / f"{part}-labels-idx1-ubyte", generator.integers(0, 10, (num,), np.uint8), zipped)


@pytest.mark.parametrize("place", [".", "raw", "MNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(tmp_path, place, zipped):
    write_mnist(tmp_path / place, zipped=zipped)
    train, test = read_mnist(tmp_path)
    assert train.images.shape == (20, 1, 28, 28)
    expected = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    assert np.array_equal(train.images[:, 0].numpy(), expected)
    assert len(test) == 10


def test_damaged_mnist(tmp_path):
    with pytest.raises(ValueError, match=r"no MNIST file train-images-idx3-ubyte .* --data-dir"):
        read_mnist(tmp_path)
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(
        ValueError, match=r"train-images-idx3-ubyte: cut off or damaged: 15,675 bytes of values, its header says 15,680"
    ):
        read_mnist(tmp_path)
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="not an IDX file of 3-dimensional bytes"):
        read_mnist(tmp_path)
    write_mnist(tmp_path / "zipped", zipped=True)
    zipped = tmp_path / "zipped" / "t10k-images-idx3-ubyte.gz"
    raw = bytearray(zipped.read_bytes())
    raw[200:260] = bytes(60)
    zipped.write_bytes(raw)
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte.gz: damaged gzip file"):
        read_mnist(tmp_path / "zipped")
    path.write_bytes(whole)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="20 train images but 3 labels"):
        read_mnist(tmp_path)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("train-labels-idx1", np.full(20, 10, np.uint8), "label 0 is 10, not a digit from 0 to 9"),
        ("t10k-labels-idx1", np.arange(3, 13, dtype=np.uint8), "label 9 is 12, not a digit from 0 to 9"),
        ("train-images-idx3", np.zeros((0, 28, 28), np.uint8), r"holds no images \(its header says 0x28x28\)"),
        ("t10k-images-idx3", np.zeros((10, 0, 28), np.uint8), r"holds no images \(its header says 10x0x28\)"),
    ],
)
def test_mnist_of_wrong_values(tmp_path, part, values, message):
    write_mnist(tmp_path)
    write_idx(tmp_path / f"{part}-ubyte", values)
    with pytest.raises(ValueError, match=rf"{part}-ubyte: {message}$"):
        read_mnist(tmp_path)


def test_images_of_another_size_than_the_config_says(tmp_path):
    write_mnist(tmp_path)
    assert load("mnist", tmp_path, 28)[0].images.shape == (20, 1, 28, 28)
    with pytest.raises(ValueError, match=r"data.image_size=32: the images of data.name=mnist are 28x28 pixels"):
        load("mnist", tmp_path, 32)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((10, 28, 30), np.uint8))
    with pytest.raises(ValueError, match=r"data.image_size=28: the images of data.name=mnist are 28x30 pixels"):
        load("mnist", tmp_path, 28)
    with pytest.raises(ValueError, match=r"data.image_size=9: the images of data.name=digits are 8x8 pixels"):
        load("digits", tmp_path, 9)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("sizes", [(2**31, 28, 28), (2**32 - 1,) * 3, (2**30 // 784 + 1, 28, 28)])
def test_a_header_of_more_than_is_read(tmp_path, sizes, zipped):
    write_mnist(tmp_path, zipped=zipped)
    path = tmp_path / f"train-images-idx3-ubyte{'.gz' * zipped}"
    raw = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in sizes) + bytes(784)
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    shown = "x".join(map(str, sizes))
    with pytest.raises(ValueError, match=rf"{path.name}: its header says {shown} bytes of values; at most 1,073,741,824"):
        read_mnist(tmp_path)


@pytest.mark.parametrize("length", [0, 3, 4, 6, 15])
def test_an_idx_file_cut_off_in_its_header(tmp_path, length):
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte: (not an IDX file|cut off in its header)"):
        read_mnist(tmp_path)


def test_no_more_is_unpacked_than_the_header_says(tmp_path):
    write_mnist(tmp_path, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    start = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in (20, 28, 28))
    path.write_bytes(gzip.compress(start + bytes(100_000_000), 1))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"more than 15,680 bytes of values, its header says 15,680$"):
        read_mnist(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


# --- CIFAR-10 ---


def write_cifar(folder: Path, num: int = 4, protocol: int = 2, keys_as_bytes: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate([f"data_batch_{j}" for j in range(1, 6)] + ["test_batch"]):
        data = np.random.default_rng(i).integers(0, 256, (num, 3072), np.uint8)
        content = {
            "data": data,
            "labels": [(i + j) % 10 for j in range(num)],
            "batch_label": "x",
            "filenames": ["a.png"] * num,
        }
        if keys_as_bytes:
            content = {k.encode(): v for k, v in content.items()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("keys_as_bytes", [True, False])
def test_cifar_batches_are_read_without_numpy_or_our_code_being_run_by_them(tmp_path, protocol, keys_as_bytes):
    write_cifar(tmp_path / "cifar-10-batches-py", protocol=protocol, keys_as_bytes=keys_as_bytes)
    train, test = load("cifar10", tmp_path, 32)
    assert train.images.shape == (20, 3, 32, 32)
    expected = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8).reshape(4, 3, 32, 32)
    assert np.array_equal(train.images[:4].numpy(), expected)
    assert test.labels.tolist() == [5, 6, 7, 8]


def test_cifar_batch_as_python_2_wrote_it(tmp_path):
    """Python 2 wrote byte strings where Python 3 writes text and named numpy.core.multiarray."""
    write_cifar(tmp_path)
    raw = bytes(range(256)) * 24
    code = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87R"
        b"(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + len(raw).to_bytes(4, "little") + raw + b"tbU\x06labels](K\x03K\x04eu."
    )
    (tmp_path / "test_batch").write_bytes(code)
    _, test = read_cifar10(tmp_path)
    assert test.labels.tolist() == [3, 4]
    assert test.images.flatten()[:300].tolist() == (list(range(256)) * 2)[:300]


class Hostile:
    def __reduce__(self):
        return (sys.exit, ("executed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({b"data": Hostile()}), r"test_batch: refused: its pickle names sys\.exit"),
        (pickle.dumps(Path("x")), r"refused: its pickle names pathlib"),
        (pickle.dumps([1, 2]), "expected a dictionary, found a list"),
        (
            pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [1, 2]}, protocol=2),
            r"no image bytes \[n, 3072\]",
        ),
        (
            pickle.dumps({b"data": np.zeros((2, 3072), np.int64), b"labels": [1, 2]}, protocol=2),
            "not the plain bytes of images",
        ),
        (
            pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, protocol=2),
            "one label for each of 2 images",
        ),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, protocol=2), "label 0 is not a whole number"),
        (pickle.dumps({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, protocol=4), "holds no images"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": (1,)}, protocol=2), "one label for each of 1"),
        (
            pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"\xff": 0, b"labels": 1}, protocol=2),
            "one label for each of 1",
        ),
        (b"", "damaged or no pickle"),
        (b"\x80\x04\x95\xff\xff", "damaged or no pickle|refused"),
    ],
)
def test_bad_cifar_batches(tmp_path, content, message):
    write_cifar(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_cifar10(tmp_path)


@pytest.mark.parametrize("label", [-1, 10, 10**30, True, 3.0, 3.7, float("nan"), None, "3", [3], [], np.zeros((), np.uint8)])
def test_cifar_labels_are_whole_numbers(tmp_path, label):
    write_cifar(tmp_path)
    content = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [9, label]}
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=r"data_batch_2: label 1 is not a whole number from 0 to 9$"):
        read_cifar10(tmp_path)


@pytest.mark.parametrize(
    "shape", [b"K\x02", b"K\x02M\x00\x0c\x86\x85", b"J\xff\xff\xff\xffM\x00\x0c\x86", b"G@\0\0\0\0\0\0\0M\x00\x0c\x86"]
)
def test_cifar_shapes_are_whole_numbers(tmp_path, shape):
    """As a pickle spells 2, ((2, 3072),), (-1, 3072) and (2.0, 3072)."""
    write_cifar(tmp_path)
    raw = pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2]}, protocol=2)
    assert raw.count(b"K\x02M\x00\x0c\x86") == 1
    (tmp_path / "test_batch").write_bytes(raw.replace(b"K\x02M\x00\x0c\x86", shape))
    with pytest.raises(ValueError, match=r"test_batch: (no image bytes \[n, 3072\] under 'data'|damaged or no pickle)"):
        read_cifar10(tmp_path)


def test_missing_cifar(tmp_path):
    with pytest.raises(ValueError, match=r"no CIFAR-10 in .*cifar-10-batches-py.*--data-dir"):
        load("cifar10", tmp_path, 32)
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(ValueError, match="data_batch_3: no such file"):
        load("cifar10", tmp_path, 32)


# --- folders ---


def write_tree(root: Path, size: int = 6, num: int = 3, test: str = "test", wide: int = 0) -> None:
    for part in ("train", test):
        for label, name in enumerate(("cat", "dog")):
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(num):
                Image.new("RGB", (size + wide, size), (label * 100, i * 10, 7)).save(folder / f"{i}.png")


@pytest.mark.parametrize("test", ["val", "test"])
def test_folder_in_memory(tmp_path, test):
    write_tree(tmp_path, test=test)
    train, _ = load("folder", tmp_path, 6)
    assert isinstance(train, Images)
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.images[4, :, 2, 3].tolist() == [100, 10, 7]


def test_images_are_held_out_once_for_all(tmp_path):
    train, _ = read_digits()
    rest, held = hold_out(train, 200)
    assert (len(rest), len(held)) == (1057, 200)
    both = torch.cat([rest.images, held.images]).flatten(1)
    assert torch.equal(both.sort(0).values, train.images.flatten(1).sort(0).values)
    assert torch.equal(hold_out(train, 200)[1].images, held.images)
    write_tree(tmp_path)
    files, _ = list_folder(tmp_path)
    rest, held = hold_out(files, 2)
    assert {*rest.paths, *held.paths} == set(files.paths)
    assert [path.parent.name == "dog" for path in held.paths] == [label == 1 for label in held.labels]
    for number in (0, 6):
        with pytest.raises(ValueError, match=f"data.validation={number}: allowed is a number below .* training images, 6"):
            hold_out(files, number)


def test_to_test_no_training_image_is_decoded(tmp_path):
    write_tree(tmp_path)
    (tmp_path / "train" / "dog" / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2\.png"):
        load("folder", tmp_path, 6)
    train, test = load("folder", tmp_path, 6, testing=True)
    assert test.images.shape == (6, 3, 6, 6)
    assert train.classes == test.classes == ("cat", "dog")


def test_cifar_as_a_tree(tmp_path):
    write_tree(tmp_path / "cifar10", size=32)
    assert load("cifar10", tmp_path, 32)[0].images.shape == (6, 3, 32, 32)


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="no such folder; name it with --data-dir"):
        load("folder", tmp_path / "none", 6)
    with pytest.raises(ValueError, match=r"expected the folders train/<class>/ and val/<class>/"):
        load("folder", tmp_path, 6)
    write_tree(tmp_path)
    (tmp_path / "train" / "cow").mkdir()
    with pytest.raises(ValueError, match=r"cow: holds no images"):
        load("folder", tmp_path, 6)
    (tmp_path / "train" / "cow").rmdir()
    (tmp_path / "train" / "dog").rename(tmp_path / "train" / "dot")
    with pytest.raises(ValueError, match="hold different classes; 'dog' is in one only"):
        load("folder", tmp_path, 6)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_corrupt_image_is_named(tmp_path, content):
    write_tree(tmp_path)
    path = tmp_path / "train" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:40] if content is None else content)
    with pytest.raises(ValueError, match=r"dog/1.png: cannot be read as an image"):
        load("folder", tmp_path, 6)


def test_an_image_of_another_size_is_named(tmp_path):
    write_tree(tmp_path)
    Image.new("RGB", (9, 6)).save(tmp_path / "train" / "dog" / "1.png")
    with pytest.raises(ValueError, match="1.png: is 9x6 pixels, the others are 6x6"):
        load("folder", tmp_path, 6)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("strict", [False, True])
def test_an_image_of_too_many_pixels_is_one_clear_error(tmp_path, monkeypatch, factor, strict):
    """Pillow warns above its limit and raises above twice that; both are the same here, whatever becomes of warnings."""
    write_tree(tmp_path)
    path = tmp_path / "train" / "dog" / "1.png"
    Image.new("RGB", (100 * factor, 15)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        with pytest.raises(ValueError, match=r"^[^\n]*dog/1.png: cannot be read as an image \(.*pixels"):
            load("folder", tmp_path, 6)
        Image.new("RGB", (100 * factor, 15)).save(path.with_name("0.png"))  # the one whose size is looked at first
        with pytest.raises(ValueError, match=r"^[^\n]*dog/0.png: cannot be read as an image \(.*pixels"):
            load("folder", tmp_path, 6)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # whoever trusts the images
    assert isinstance(load("folder", tmp_path, 6)[0], FolderImages)


def test_a_strip_too_thin_to_be_resized(tmp_path):
    """Its shorter side of one pixel would become six, and its longer one 400,000."""
    write_tree(tmp_path, size=12)
    Image.new("RGB", (60_000, 1)).save(tmp_path / "test" / "dog" / "1.png")
    train, test = list_folder(tmp_path)
    decoder = _Decoder(test, 224, training=False)
    with pytest.raises(ValueError, match=r"dog/1.png: is 60000x1 pixels, too thin a strip to be resized"):
        decoder[4, []]
    assert decoder[3, []][0].shape == (3, 224, 224)
    assert _Decoder(train, 224, training=True)[4, [0.5] * 5][0].shape == (3, 224, 224)


# --- augmentation ---


def test_crop_and_flip_literal():
    image = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).view(1, 1, 2, 2).repeat(4, 1, 1, 1)
    # offsets of 0, 1, 2 pixels for draws below 1/3, 2/3, 1; offset 1 is the image itself
    draws = torch.tensor([[0.5, 0.5, 0.9], [0.0, 0.5, 0.9], [0.5, 0.9, 0.9], [0.5, 0.5, 0.1]])
    out = crop_and_flip(image, draws, Augment(crop_padding=1, flip=True))
    assert out[:, 0].tolist() == [[[1, 2], [3, 4]], [[0, 0], [1, 2]], [[2, 0], [4, 0]], [[2, 1], [4, 3]]]


def test_no_augmentation_changes_nothing():
    images = torch.randint(0, 255, (3, 2, 5, 4), dtype=torch.uint8)
    assert torch.equal(crop_and_flip(images, torch.rand(3, 3), Augment()), images)


def test_flips_mirror_about_half_of_the_images():
    images = torch.arange(4).view(1, 1, 1, 4).repeat(2000, 1, 1, 1)
    flipped = (crop_and_flip(images, torch.rand(2000, 3), Augment(flip=True))[:, 0, 0, 0] == 3).float().mean()
    assert 0.4 < flipped < 0.6


# --- batches ---


def in_memory(rank: int = 0, world: int = 1, num: int = 23, batch_size: int = 8) -> InMemory:
    images = torch.arange(num, dtype=torch.uint8).view(num, 1, 1, 1).expand(num, 1, 2, 2)
    data = Images(images, torch.arange(num), ("a",))
    return InMemory(
        data,
        data,
        batch_size=batch_size,
        seed=3,
        augment=Augment(1, True),
        mean=[0.0],
        std=[1 / 255],
        device=CPU,
        rank=rank,
        world=world,
    )


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own():
    labels = [torch.cat([y for _, y in in_memory().train(epoch)]).tolist() for epoch in (0, 0, 1)]
    assert sorted(labels[0]) == list(range(23))
    assert labels[0] == labels[1] != labels[2]
    assert in_memory().num_batches == 3


def test_processes_share_a_batch_without_overlap():
    whole = [set(y.tolist()) for _, y in in_memory().train(0)]
    parts = [[y.tolist() for _, y in in_memory(rank, 2).train(0)] for rank in (0, 1)]
    assert [len(p) for p in parts[0]] == [len(p) for p in parts[1]] == [4, 4, 3]  # the odd image of the last batch is left out
    for i, batch in enumerate(whole):
        assert set(parts[0][i]) | set(parts[1][i]) <= batch
        assert not set(parts[0][i]) & set(parts[1][i])


def test_the_draws_belong_to_the_image_not_to_the_process():
    whole = {int(y): x for xs, ys in in_memory().train(0) for x, y in zip(xs, ys, strict=True)}
    for rank in (0, 1):
        for xs, ys in in_memory(rank, 2).train(0):
            for x, y in zip(xs, ys, strict=True):
                assert torch.equal(x, whole[int(y)])


def test_the_test_images_are_all_seen_by_somebody():
    seen = [int(y) for rank in range(3) for _, ys in in_memory(rank, 3).test() for y in ys]
    assert sorted(seen) == list(range(23))


def test_deal():
    assert deal(5, 2, 0, 1, whole=False) == [slice(0, 2, 1), slice(2, 4, 1), slice(4, 5, 1)]
    assert deal(5, 4, 1, 2, whole=False) == [slice(1, 4, 2)]
    assert deal(5, 4, 1, 2, whole=True) == [slice(1, 5, 2)]  # no process is without an image
    assert deal(6, 4, 1, 2, whole=True) == [slice(1, 4, 2), slice(5, 6, 2)]
    for whole in (False, True):
        with pytest.raises(ValueError, match="2 images for 3 processes: give fewer processes, or more images"):
            deal(2, 4, 0, 3, whole=whole)


def test_order_depends_on_seed_and_epoch():
    orders = [epoch_order(50, seed, epoch)[0].tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert orders[0] == orders[3]
    assert len({tuple(o) for o in orders}) == 3


def streaming(root: Path, workers: int, rank: int = 0, world: int = 1) -> Streaming:
    train, test = list_folder(root)
    assert isinstance(train, FolderImages)
    return Streaming(
        train,
        test,
        size=6,
        batch_size=4,
        seed=0,
        mean=[0.0] * 3,
        std=[1 / 255] * 3,
        device=CPU,
        workers=workers,
        rank=rank,
        world=world,
    )


def test_larger_folders_stream(tmp_path):
    write_tree(tmp_path, size=12, num=5, wide=3)
    assert isinstance(load("folder", tmp_path, 6)[0], FolderImages)
    batches = list(streaming(tmp_path, 0).train(0))
    assert [x.shape for x, _ in batches] == [(4, 3, 6, 6), (4, 3, 6, 6), (2, 3, 6, 6)]
    labels = torch.cat([y for _, y in batches])
    colours = torch.cat([x for x, _ in batches])[:, 0].mean(dim=(1, 2))
    assert torch.allclose(colours, labels * 100.0, atol=1)
    again = list(streaming(tmp_path, 0).train(0))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, again, strict=True))
    tests = list(streaming(tmp_path, 0).test())
    assert torch.cat([y for _, y in tests]).tolist() == [0] * 5 + [1] * 5


@pytest.mark.slow
def test_workers_give_the_same_batches_and_name_a_corrupt_image(tmp_path):
    write_tree(tmp_path, size=12, num=5)
    direct, workers = list(streaming(tmp_path, 0).train(1)), list(streaming(tmp_path, 2).train(1))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(direct, workers, strict=True))
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"^[^\n]*dog/1.png: cannot be read as an image[^\n]*$"):
        list(streaming(tmp_path, 2).train(0))
