"""Pictures: whatever their kind, one form; what is none is named in one line."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from resonance_nn import ResonanceConfig, ResonanceForImageClassification, ResonanceImageProcessor
from resonance_nn.data.documents import DataError
from resonance_nn.data.images import channels_of, read_idx, read_image
from resonance_nn.tasks.augment import image_changes
from resonance_nn.tasks.images import find_pictures


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def colours(tmp_path):
    """A picture of 4 × 6 pixels, its left half red, saved in several ways."""
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3, 0] = 255
    image = Image.fromarray(pixels)
    image.save(tmp_path / "colour.png")
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("P").save(tmp_path / "palette.gif")
    image.convert("1").save(tmp_path / "bits.png")
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray(np.dstack([pixels, np.full((4, 6), 255, np.uint8)])).save(tmp_path / "alpha.png")
    return tmp_path


@pytest.mark.parametrize("name", ["colour.png", "grey.png", "palette.gif", "bits.png", "cmyk.tif", "alpha.png"])
def test_every_kind_of_picture_becomes_one(colours, name):
    for channels in (1, 3):
        pixels = read_image(colours / name, channels)
        assert pixels.shape == (4, 6, channels)
        assert pixels.dtype == np.uint8
        assert pixels[:, :3].mean() > 20 + pixels[:, 3:].mean()
    if name not in ("grey.png", "bits.png"):
        red = read_image(colours / name, 3)[0, 0]
        assert red[0] > 200
        assert red[1] < 60


def test_what_is_transparent_is_white_and_what_is_turned_is_turned_back(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png", 3) == 255).all()
    wide = Image.fromarray(np.zeros((2, 5, 3), np.uint8))
    exif = wide.getexif()
    exif[274] = 6  # turned by a quarter
    wide.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg", 3).shape == (5, 2, 3)


def test_sixteen_bits_keep_their_light():
    values = np.linspace(0, 65535, 24).reshape(4, 6).astype(np.uint16)
    pixels = read_image(Image.fromarray(values), 1)[..., 0]
    assert np.abs(pixels - values / 257.0).max() <= 0.51


def test_the_channels_of_pictures(colours):
    assert {path.name: channels_of(path) for path in colours.iterdir()} == {
        "colour.png": 3, "grey.png": 1, "palette.gif": 3, "bits.png": 1, "cmyk.tif": 3, "alpha.png": 3
    }  # fmt: skip
    assert [channels_of(np.zeros(shape, np.uint8)) for shape in ((4, 6), (4, 6, 1), (4, 6, 3))] == [1, 1, 3]
    (colours / "none.png").write_text("no picture")
    with pytest.raises(DataError, match=r"none\.png: cannot be read as a picture"):
        channels_of(colours / "none.png")
    with pytest.raises(DataError, match=r"nowhere\.png: no such file"):
        channels_of(colours / "nowhere.png")
    with pytest.raises(ValueError, match="num_channels = 2: pictures are read as 1, grey"):
        read_image(colours / "grey.png", 2)


def test_arrays():
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert (read_image(grey, 1)[..., 0] == grey).all()
    assert (read_image(grey[..., None] / 255.0, 3) == grey[..., None]).all()
    for wrong in (
        np.zeros((0, 4)), np.zeros((2, 2, 2)), np.zeros(5), np.full((2, 2), np.nan), np.full((2, 2), 7.0),
        np.full((2, 2), 300), np.full((2, 2), -1),
    ):  # fmt: skip
        with pytest.raises(DataError):
            read_image(wrong, 3)


def test_what_is_no_picture_is_named(tmp_path, colours):
    (tmp_path / "text.png").write_text("no picture")
    whole = (colours / "colour.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").touch()
    for name in ("text.png", "cut.png", "empty.jpg"):
        with pytest.raises(DataError, match=f"{name}: cannot be read as a picture") as caught:
            read_image(tmp_path / name, 3)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "none.png", 3)
    with pytest.raises(DataError, match="is a folder, not a picture"):
        read_image(tmp_path, 3)


def test_idx_files(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 4, 3)).astype(np.uint8)
    (tmp_path / "a").write_bytes(idx(array))
    (tmp_path / "b").write_bytes(gzip.compress(idx(array)))
    assert (read_idx(tmp_path / "a") == array).all()
    assert (read_idx(tmp_path / "b") == array).all()
    (tmp_path / "cut").write_bytes(idx(array)[:-1])
    (tmp_path / "gz").write_bytes(gzip.compress(idx(array))[:-9])
    (tmp_path / "other").write_bytes(b"something else")
    for name, message in (("cut", "its head says 5 × 4 × 3"), ("gz", "cannot be read"), ("other", "not an IDX file")):
        with pytest.raises(DataError, match=message):
            read_idx(tmp_path / name)


def test_pictures_with_classes_are_found(tmp_path, colours):
    for name in ("cat", "dog"):
        (tmp_path / "folders" / name / "deep").mkdir(parents=True)
        (tmp_path / "folders" / name / "deep" / "a.PNG").write_bytes((colours / "colour.png").read_bytes())
    (tmp_path / "folders" / "cat" / "notes.txt").write_text("not one")
    assert [(p.label, str(p.source)[-10:]) for p in find_pictures(str(tmp_path / "folders"))] == [
        ("cat", "deep/a.PNG"),
        ("dog", "deep/a.PNG"),
    ]
    (tmp_path / "list.csv").write_text("image,label\ncolour.png,red\ngrey.png,grey\n")
    assert [p.label for p in find_pictures(str(tmp_path / "list.csv"))] == ["red", "grey"]
    images, labels = np.zeros((3, 2, 2), np.uint8), np.array([7, 1, 7], np.uint8)
    (tmp_path / "t-images-idx3-ubyte").write_bytes(idx(images))
    with pytest.raises(DataError, match="labels-idx1-ubyte lies beside it"):
        find_pictures(str(tmp_path / "t-images-idx3-ubyte"))
    (tmp_path / "t-labels-idx1-ubyte").write_bytes(idx(labels))
    assert [p.label for p in find_pictures(str(tmp_path / "t-images-idx3-ubyte"))] == ["7", "1", "7"]
    (tmp_path / "t-labels-idx1-ubyte").write_bytes(idx(labels[:2]))
    with pytest.raises(DataError, match="2 labels for 3 images"):
        find_pictures(str(tmp_path / "t-images-idx3-ubyte"))
    (tmp_path / "hollow").mkdir()
    for path, message in (("hollow", "one for each class"), ("nowhere", "no such file or folder")):
        with pytest.raises(DataError, match=message):
            find_pictures(str(tmp_path / path))


def test_processor_is_saved_and_used_by_the_pipeline(tmp_path, colours):
    torch.manual_seed(0)
    processor = ResonanceImageProcessor(1, [0.25], [0.5])
    config = ResonanceConfig(
        hidden_size=32, num_hidden_layers=1, mixers=("global_filter",), image_size=(4, 6), patch_size=2, num_channels=1,
        id2label={0: "left", 1: "right", 2: "none"},
    )  # fmt: skip
    model = ResonanceForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    again = AutoImageProcessor.from_pretrained(tmp_path / "m")
    values = again(Image.open(colours / "colour.png"))["pixel_values"]
    assert values.shape == (1, 1, 4, 6)
    grey = read_image(colours / "grey.png", 1)[..., 0]
    assert torch.allclose(values[0, 0], torch.from_numpy((grey / 255 - 0.25) / 0.5).float(), atol=1e-6)
    found = pipeline("image-classification", model=str(tmp_path / "m"))(str(colours / "colour.png"), top_k=3)
    with torch.no_grad():
        expected = model(values).logits[0].softmax(-1)
    assert {one["label"]: one["score"] for one in found} == pytest.approx(
        dict(zip(config.id2label.values(), expected.tolist(), strict=True)), abs=1e-5
    )
    with pytest.raises(ValueError, match=r"images of 4 × 6, 5 × 6 pixels in one batch"):
        again([np.zeros((4, 6)), np.zeros((5, 6))])
    assert again([np.zeros((4, 6)), np.zeros((5, 6))], size=(4, 4))["pixel_values"].shape == (2, 1, 4, 4)
    with pytest.raises(ValueError, match="image_std"):
        ResonanceImageProcessor(3, [0.5], [0.0])


def test_random_changes(tmp_path):
    values = torch.randn(64, 1, 16, 16)
    for names in (("flip",), ("crop",), ("zoom",), ("erase",), ("flip", "crop", "zoom", "erase")):
        change = image_changes(names)
        assert change is not None
        torch.manual_seed(0)
        once = change(values)
        torch.manual_seed(0)
        assert torch.equal(change(values), once)
        assert once.shape == values.shape
        changed = (once != values).flatten(1).any(1).float().mean()
        assert 0.1 < changed <= 1
    flip = image_changes(("flip",))
    assert flip is not None
    once = flip(values)
    same = (once == values).flatten(1).all(1)
    assert torch.equal(once[~same], values[~same].flip(3))
    zoom = image_changes(("zoom",))
    assert zoom is not None
    square = torch.zeros(400, 1, 40, 40)
    square[:, :, 10:30, 10:30] = 1
    sides = zoom(square).sum((1, 2, 3)).sqrt() / 20
    assert 0.84 < sides.min() < 0.92
    assert 1.08 < sides.max() < 1.16
    assert float((sides != 1).float().mean()) == pytest.approx(0.3, abs=0.1)
    assert image_changes(()) is None
