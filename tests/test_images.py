"""Images in: decoding, squares, folders, and what they hold; hostile ones are in test_hostile.py."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdit_jax import main
from maskdit_jax.data.image_sets import open_image_set
from maskdit_jax.data.images import centre_square, decode_image, random_square, to_float, to_uint8
from maskdit_jax.data.pipeline import batches
from maskdit_jax.data.sources import open_source
from maskdit_jax.errors import UserError
from maskdit_jax.methods.method import Shape

ROOT = Path(__file__).parent.parent


def encoded(array: np.ndarray, kind: str = "PNG", mode: str | None = None, palette=None, **options) -> bytes:
    image = Image.fromarray(array)
    buffer = io.BytesIO()
    (image.convert(mode, palette=palette or 0) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def test_lossless_files_give_their_pixels(pixels):
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        np.testing.assert_array_equal(decode_image(encoded(pixels, kind, **options), "x"), pixels)


def test_cmyk_grey_palette_and_sixteen_bits_become_rgb():
    grey = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))
    rgb = np.repeat(grey[..., None], 3, axis=-1)
    for content, tolerance in (
        (encoded(rgb, "JPEG", "CMYK", quality=95), 8),
        (encoded(grey), 0),
        (encoded(rgb, "PNG", "P", palette=Image.Palette.ADAPTIVE), 4),
        (encoded(grey.astype(np.uint16) * 256 + 7), 0),
        (encoded(rgb, "PNG", "RGBA"), 0),
    ):
        image = np.asarray(decode_image(content, "x"), int)
        assert image.shape == (32, 32, 3)
        assert np.abs(image - rgb).max() <= tolerance


def pictures(mode: str = "RGB", size: tuple[int, int] = (16, 24)) -> Image.Image:
    """Left half red, right half blue, as the mode can show it."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2, 0, *size))
    return image.convert(mode)


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners(content: bytes, **options) -> tuple[list[int], list[int]]:
    """Pixels top left and bottom right of what is decoded."""
    image = decode_image(content, "x", **options)
    assert image.mode == "RGB"
    array = np.asarray(image)
    return array[0, 0].tolist(), array[-1, -1].tolist()


RED, BLUE, WHITE = [255, 0, 0], [0, 0, 255], [255, 255, 255]


def transparent(mode: str) -> Image.Image:
    """The left half can be seen through, whatever colour is hidden there."""
    image = pictures("RGBA")
    image.putalpha(Image.fromarray(np.repeat([[0] * 8 + [255] * 8], 24, 0).astype(np.uint8)))
    return image.convert(mode)


def palette_alpha() -> bytes:
    """How opaque each colour of the palette is: all but red."""
    return bytes(0 if i == pictures("P").getpixel((0, 0)) else 255 for i in range(256))


@pytest.mark.parametrize(
    "content",
    [
        file_of(transparent("RGBA"), "PNG"),
        file_of(transparent("RGBA"), "WEBP", lossless=True),
        file_of(pictures("P"), "PNG", transparency=palette_alpha()),
        file_of(pictures("RGB"), "PNG", transparency=(255, 0, 0)),
        file_of(pictures("P"), "PNG", transparency=pictures("P").getpixel((0, 0))),
        file_of(pictures("P"), "GIF", transparency=pictures("P").getpixel((0, 0))),
    ],
    ids=["RGBA PNG", "RGBA WebP", "palette with alpha", "one colour", "palette PNG", "palette GIF"],
)
def test_transparent_parts_are_white(content):
    assert corners(content) == (WHITE, BLUE)


def test_half_transparent_grey_is_mixed_with_white():
    assert (
        corners(file_of(Image.new("LA", (8, 8), (100, 51)), "PNG")) == ([224, 224, 224],) * 2
    )  # 255 - 155 / 5


def test_one_bit_is_black_and_white():
    image = Image.new("1", (8, 8))
    image.putpixel((0, 0), 1)
    assert corners(file_of(image, "PNG")) == (WHITE, [0, 0, 0])


def without_adobe_marker(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee\x00\x0eAdobe")
    return jpeg[:at] + jpeg[at + 16 :]


def test_cmyk_has_its_colours_with_adobes_marker_and_without():
    """Ink is stored inverted in both cases, as Adobe and all programs after it do."""
    content = file_of(pictures("CMYK"), "JPEG", quality=95)
    for jpeg in (content, without_adobe_marker(content)):
        for found, expected in zip(corners(jpeg), (RED, BLUE), strict=True):
            assert np.abs(np.subtract(found, expected)).max() < 10


def test_sixteen_bits_per_colour_keep_the_upper_eight():
    deep = np.full((8, 8), 0x1234, np.uint16)
    assert corners(file_of(Image.fromarray(deep), "PNG")) == ([0x12] * 3,) * 2
    rows = np.full((8, 8, 3), [0xFF01, 0x80FF, 0], ">u2")
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))), (b"IEND", b"")]
    png = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    assert corners(b"\x89PNG\r\n\x1a\n" + png) == ([0xFF, 0x80, 0],) * 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation):
    """Whatever way the camera was held; not where the preparation of a data set does not turn."""
    upright = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    inverse = [None, *Image.Transpose]  # Pillow's names, in another order than EXIF's
    turns = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    image, turn = Image.fromarray(upright), turns[orientation]
    stored = image if turn is None else image.transpose(inverse[1 + turn])
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = file_of(stored, "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(content, "x"), upright)
    np.testing.assert_array_equal(decode_image(content, "x", upright=False), stored)


def test_damaged_exif_does_not_spoil_a_photograph():
    content = file_of(pictures(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40, quality=95)
    (red, _, _), (_, _, blue) = corners(content)
    assert min(red, blue) > 240


def test_first_of_several_pictures_in_a_photograph_is_taken():
    content = file_of(pictures(), "MPO", save_all=True, append_images=[pictures(size=(8, 8))], quality=95)
    assert decode_image(content, "x").size == (16, 24)


def test_centre_square_halves_by_averaging_then_resizes_then_crops():
    """160×96 pixels at 24: two halvings, which are averages of 4×4 but for the rounding of each pass."""
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (96, 160, 3), np.uint8)
    means = array.astype(float).reshape(24, 4, 40, 4, 3).mean((1, 3))
    square = centre_square(Image.fromarray(array), 24)
    assert square.shape == (24, 24, 3)
    assert np.abs(square - means[:, 8:32]).max() <= 2


def test_centre_square_of_a_size_between_is_bicubic():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 30, 3), np.uint8))
    expected = np.asarray(image.resize((20, 30), Image.Resampling.BICUBIC))[5:25]
    np.testing.assert_array_equal(centre_square(image, 20), expected)
    assert centre_square(image, 64).shape == (64, 64, 3)  # enlarged


@pytest.mark.parametrize("shape", [(33, 64), (64, 33), (32, 32), (1000, 31)])
def test_squares_of_odd_sizes_have_the_size_asked_for(shape):
    image = Image.fromarray(np.zeros((*shape, 3), np.uint8))
    assert centre_square(image, 16).shape == (16, 16, 3)
    for seed in range(20):
        assert random_square(image, 16, np.random.default_rng(seed), 2.0).shape == (16, 16, 3)


def test_float_and_back_is_the_identity():
    values = np.arange(256, dtype=np.uint8)
    assert to_float(values).min() == -1 and to_float(values).max() == 1
    np.testing.assert_array_equal(to_uint8(to_float(values) + 1e-6), values)


def write_images(root: Path, counts: dict[str, int]) -> None:
    """Images whose first pixel is (class, number, 0), lossless."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            array = np.full((8, 8, 3), (label, number, 0), np.uint8)
            array[:, 4:] += 100
            Image.fromarray(array).save(root / name / f"{number}.png")


def test_folder_has_a_class_for_each_sub_folder(tmp_path):
    write_images(tmp_path / "set", {"ant": 3, "bee": 2})
    images = open_image_set(f"folder:{tmp_path / 'set'}")
    assert images.classes == ["ant", "bee"]
    assert [images.load(i)[1] for i in range(len(images))] == [0, 0, 0, 1, 1]
    assert np.asarray(images.load(4)[0])[0, 0].tolist() == [1, 1, 0]
    flat = open_image_set(f"folder:{tmp_path / 'set/ant'}")
    assert flat.classes == []
    assert [flat.load(i)[1] for i in range(len(flat))] == [-1, -1, -1]


def test_empty_folders_and_unknown_kinds_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no images .* in"):
        open_image_set(f"folder:{tmp_path / 'empty'}")
    with pytest.raises(UserError, match="known: folder:PATH, tfds:NAME"):
        open_image_set("zip:x")


def test_pixels_are_flipped_for_half_of_the_draws_and_the_same_in_every_process(tmp_path):
    write_images(tmp_path / "set", {"ant": 3, "bee": 5})
    wanted = Shape(image_size=8, channels=3, num_classes=2)
    source = open_source(f"folder:{tmp_path / 'set'}", wanted, space="pixels", flip=True)
    batch = next(batches(source, batch_size=48, seed=0))
    options = {"batch_size": 48, "seed": 0, "process_count": 3}
    parts = [next(batches(source, process_index=i, **options)) for i in range(3)]
    for name, values in batch.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)
    values = to_uint8(batch["clean"] + 1e-6)
    assert batch["clean"].dtype == np.float32
    mirrored = values[:, 0, 0, 2] == 100
    assert 0.25 < mirrored.mean() < 0.75
    np.testing.assert_array_equal(values[:, 0, 0, 0] - 100 * mirrored, batch["labels"])
    first_pass, second_pass = mirrored[:24], mirrored[24:]
    assert not np.array_equal(first_pass, second_pass)


def train_flags(folder: Path, workdir: Path) -> list[str]:
    flags = f"""
        data.source=folder:{folder} data.flip=true data.max_zoom=1.5 data.channels=3 data.num_classes=2
        method.network.hidden_size=32 method.network.depth=1 method.network.num_heads=2
        method.network.use_decoder=false method.mae_coef=0
        training.num_steps=2 training.batch_size=8 sampling.num_steps=1 sampling.cfg_scale=1
        report.preview_columns=2 report.tensorboard=false evaluation.num_samples=0
    """
    overrides = [f"--config.{flag}" for flag in flags.split()]
    return [f"--config={ROOT / 'configs/digits.py'}", f"--workdir={workdir}", *overrides]


@pytest.mark.slow
def test_model_in_pixel_space_trains_on_a_folder(tmp_path, capsys):
    write_images(tmp_path / "set", {"ant": 3, "bee": 5})
    main.main(train_flags(tmp_path / "set", tmp_path / "run"))
    assert "8 items of folder:" in capsys.readouterr().out
    with Image.open(tmp_path / "run/samples.png") as png:
        assert png.mode == "RGB"


@pytest.mark.slow
def test_training_skips_an_unreadable_image_by_name_up_to_a_limit(tmp_path, capsys):
    write_images(tmp_path / "set", {"ant": 3, "bee": 5})
    (tmp_path / "set/bee/3.png").write_bytes(b"not an image")
    flags = train_flags(tmp_path / "set", tmp_path / "run")
    with pytest.raises(SystemExit):
        main.main([*flags, "--config.data.max_unreadable=0"])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "bee/3.png: not a readable image" in error
    assert len(error.splitlines()) == 1
    main.main(flags)
    said = capsys.readouterr().out
    assert said.count("warning: skipped ") == 1
    assert "bee/3.png: not a readable image" in said
    assert "finished at step 2" in said


@pytest.fixture
def damaged(tmp_path):
    """Seven images of two classes, the first three files of the second class no images."""
    write_images(tmp_path, {"ant": 2, "bee": 5})
    for name in ("0.png", "1.png", "4.png"):
        (tmp_path / "bee" / name).write_bytes(b"not an image")
    return tmp_path


def damaged_batch(folder, items, limit=100, start=0):
    shape = Shape(image_size=8, channels=3, num_classes=2)
    source = open_source(f"folder:{folder}", shape, space="pixels", flip=True, max_unreadable=limit)
    return source, source.read(np.array(items), np.arange(start, start + len(items)))


def test_the_next_image_stands_in_for_an_unreadable_one(damaged, messages, caplog):
    """The last one's next is the first; each is named once, however often it is drawn."""
    source, batch = damaged_batch(damaged, [2, 3, 6, 2])
    _, meant = damaged_batch(damaged, [4, 4, 0, 4])
    assert np.array_equal(batch["clean"], meant["clean"])
    assert batch["labels"].tolist() == meant["labels"].tolist() == [1, 1, 0, 1]
    assert caplog.text.count("warning: skipped ") == 3
    assert "bee/0.png: not a readable image" in caplog.text
    assert "(3 so far, data.max_unreadable=100)" in caplog.text
    # What was met before changes nothing: so a run that goes on, and another process, see the same.
    _, again = damaged_batch(damaged, [6, 2], start=2)
    assert np.array_equal(again["clean"], batch["clean"][2:])
    assert len(source) == 7  # the order, and the position in it, are of all of them


def test_too_many_unreadable_images_end_the_run_with_the_last_one(damaged):
    damaged_batch(damaged, [2, 3], limit=2)
    with pytest.raises(UserError, match=r"bee/4\.png: not a .*; 3 images cannot be decoded, more than data"):
        damaged_batch(damaged, [2, 3, 6], limit=2)
    for file in damaged.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 7 images can be decoded"):
        damaged_batch(damaged, [0])


def test_a_file_that_cannot_be_read_at_all_is_not_skipped(damaged):
    """It may be there again tomorrow, and would then have changed the run."""
    source, _ = damaged_batch(damaged, [4])
    (damaged / "bee" / "3.png").unlink()
    with pytest.raises(UserError, match=r"bee/3\.png cannot be read: No such file"):
        source.read(np.array([5]), np.array([0]))
