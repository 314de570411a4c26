"""Data: the digits, shards of moments, the order of batches, arrays on the mesh, images out."""

import contextlib
import itertools
import json
import logging
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import GOLDEN, channels_last
from PIL import Image
from test_hostile import CLEAR, memory_mb

from maskdit_jax.config_file import load
from maskdit_jax.data import shards as shards_module
from maskdit_jax.data.codec import draw_latents
from maskdit_jax.data.images import save_png, tile, to_uint8
from maskdit_jax.data.pipeline import batches, to_devices
from maskdit_jax.data.shards import finish_shards, open_shards, read_report, shard_names, write_shard
from maskdit_jax.data.sources import Digits, LatentShards, open_source
from maskdit_jax.distributed.mesh import batch_sharding, make_mesh
from maskdit_jax.errors import UserError
from maskdit_jax.methods.method import Shape
from maskdit_jax.training.loop import warn_of_scale

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def user_error(*fragments: str):
    """The block raises a UserError of one line in which every fragment stands."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


# Digits


def test_digits_are_1437_for_training_and_360_held_out():
    train, held_out = Digits("train"), Digits("held_out")
    assert (len(train), len(held_out)) == (1437, 360)
    for source in (train, held_out):
        assert source.images.shape == (len(source), 8, 8, 1)
        assert (source.images.min(), source.images.max()) == (-1, 1)
        assert source.images.dtype == np.float32
        assert set(source.labels) == set(range(10))


def test_digits_of_both_splits_are_all_digits_once():
    """The splits are disjoint: together they have each of scikit-learn's images as often as it does."""
    from sklearn.datasets import load_digits

    def rows(images, labels):
        return sorted(map(tuple, np.column_stack([images.reshape(len(images), -1), labels]).tolist()))

    train, held_out, original = Digits("train"), Digits("held_out"), load_digits()
    together = rows(
        np.concatenate([train.images, held_out.images]), np.concatenate([train.labels, held_out.labels])
    )
    assert together == rows(original.images / 8 - 1, original.target)


def test_digits_split_is_fixed():
    """Cards and runs of different days are about the same held-out digits."""
    assert Digits("held_out").labels[:12].tolist() == [6, 6, 6, 2, 5, 6, 6, 2, 2, 1, 1, 9]
    np.testing.assert_array_equal(Digits("train").images, Digits("train").images)


def test_digits_batch_is_images_and_their_labels():
    source = Digits()
    batch = source.read(np.array([5, 0, 5]), np.arange(3))
    assert set(batch) == {"clean", "labels"}
    np.testing.assert_array_equal(batch["clean"], source.images[[5, 0, 5]])
    np.testing.assert_array_equal(batch["labels"], source.labels[[5, 0, 5]])


# Order of batches


class Numbers:
    """The source 0 … count - 1."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count

    def read(self, items, draws):
        return {"labels": items.astype(np.int32), "draw": draws}


def order(count: int, num_batches: int, source=None, **options) -> list[int]:
    """Labels of the first batches, one after the other."""
    stream = batches(source or Numbers(count), **{"seed": 0, "batch_size": 4} | options)
    return [int(i) for batch in itertools.islice(stream, num_batches) for i in batch["labels"]]


@pytest.mark.parametrize("batch_size", [1, 4, 20], ids=lambda n: f"batch_{n}")
def test_two_epochs_see_every_item_twice_in_different_orders(batch_size):
    """Also where batches cross the border of the epochs, and where one batch holds them both."""
    seen = order(10, 20 // batch_size, batch_size=batch_size)
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second != list(range(10)) != first


def test_order_is_a_function_of_the_seed():
    assert order(100, 50, seed=1) == order(100, 50, seed=1)
    assert order(100, 50, seed=1) != order(100, 50, seed=2)


def test_order_does_not_depend_on_the_batch_size():
    assert order(10, 15, batch_size=4) == order(10, 6, batch_size=10)


@pytest.mark.parametrize("start_item", [0, 4, 7, 10, 27])
def test_start_item_resumes_without_repeat_or_skip(start_item):
    """At the border of a batch or not, in the first epoch of ten items or in the third."""
    uninterrupted = order(10, 12)
    resumed = order(10, 5, start_item=start_item)
    assert resumed == uninterrupted[start_item : start_item + 20]


@pytest.mark.parametrize("process_count", [1, 2, 3])
@pytest.mark.parametrize("start_item", [0, 12])
def test_batches_of_the_processes_make_up_the_batch_of_one(process_count, start_item):
    options = {"batch_size": 6, "seed": 3, "start_item": start_item}
    streams = [
        batches(Numbers(10), process_index=i, process_count=process_count, **options)
        for i in range(process_count)
    ]
    for whole in itertools.islice(batches(Numbers(10), **options), 5):
        parts = [next(stream)["labels"] for stream in streams]
        assert {len(part) for part in parts} == {6 // process_count}
        np.testing.assert_array_equal(np.concatenate(parts), whole["labels"])


def test_draws_count_the_items_of_the_run():
    """Whatever the number of processes: augmentation must not be the same for two items, or twice."""
    options = {"batch_size": 6, "seed": 0, "start_item": 12, "process_count": 3}
    streams = [batches(Numbers(10), process_index=i, **options) for i in range(3)]
    for start in (12, 18, 24):
        draws = np.concatenate([next(stream)["draw"] for stream in streams])
        np.testing.assert_array_equal(draws, np.arange(start, start + 6))


def test_number_of_threads_does_not_change_the_batches():
    one, many = (batches(Digits(), batch_size=479, seed=0, num_threads=n) for n in (1, 8))
    for expected, actual in itertools.islice(zip(one, many, strict=True), 4):
        np.testing.assert_array_equal(actual["clean"], expected["clean"])
        np.testing.assert_array_equal(actual["labels"], expected["labels"])


# To the devices


def host_batches(count: int):
    """Batches of 16 items; batch i counts up from 16·i."""
    for i in range(count):
        label = np.arange(16, dtype=np.int32) + 16 * i
        yield {"labels": label, "clean": np.float32(label[:, None, None, None] * np.ones((1, 2, 2, 3)))}


@pytest.mark.parametrize("data, fsdp", [(8, 1), (4, 2)])
def test_device_batches_are_the_host_batches_spread_over_the_mesh(data, fsdp):
    sharding = batch_sharding(make_mesh(data, fsdp))
    on_devices = to_devices(host_batches(6), sharding)
    for host, device in itertools.islice(zip(host_batches(4), on_devices, strict=True), 4):
        for name, array in device.items():
            assert isinstance(array, jax.Array)
            assert array.sharding.is_equivalent_to(sharding, array.ndim)
            assert {shard.data.shape[0] for shard in array.addressable_shards} == {2}
            assert len({shard.device for shard in array.addressable_shards}) == 8
            np.testing.assert_array_equal(array, host[name])


def test_device_batches_are_sent_before_they_are_asked_for():
    source = host_batches(9)
    on_devices = to_devices(source, batch_sharding(make_mesh(8, 1)), ahead=2)
    assert next(on_devices)["labels"][0] == 0
    assert next(source)["labels"][0] == 16 * 3  # batches 1 and 2 are on their way


# Moments


@pytest.fixture
def moments() -> np.ndarray:
    """Moments [11, 2, 4, 4, 6] of eleven images and their mirror images."""
    return np.random.default_rng(0).standard_normal((11, 2, 4, 4, 6)).astype(np.float32)


def write_folder(folder, moments, labels, *, num_classes, shard_size, latent_scale=0.5):
    folder.mkdir()
    names = shard_names(-(-len(moments) // shard_size))
    for i, name in enumerate(names):
        part = slice(i * shard_size, (i + 1) * shard_size)
        write_shard(folder, name, moments[part], labels[part])
    reports = [read_report(folder, name) for name in names]
    options = {"num_classes": num_classes, "latent_scale": latent_scale, "about": {"source": "test"}}
    return finish_shards(folder, reports, **options)


@pytest.fixture
def folder(moments, tmp_path):
    """The moments in two shards, of eight and of three records; image i has the label 20 + i."""
    write_folder(tmp_path / "moments", moments, 20 + np.arange(11), num_classes=40, shard_size=8)
    return tmp_path / "moments"


WANTED = Shape(image_size=4, channels=3, num_classes=40)
WANTED_DIGITS = Shape(image_size=8, channels=1, num_classes=10)


def test_shards_give_back_the_moments(folder, moments):
    metadata, shards = open_shards(folder)
    assert [len(shard.labels) for shard in shards] == [8, 3]
    np.testing.assert_array_equal(np.concatenate([shard.moments for shard in shards]), moments)
    np.testing.assert_array_equal(np.concatenate([shard.labels for shard in shards]), 20 + np.arange(11))
    assert Shape(*(metadata[name] for name in Shape._fields)) == WANTED


def test_source_of_latents_has_every_image_and_its_mirror_image(folder, moments):
    source = open_source(f"latents:{folder}", WANTED, space="latents")
    assert len(source) == 22
    batch = source.read(np.arange(22)[::-1], np.arange(22))
    np.testing.assert_array_equal(batch["moments"][::-1], moments.reshape(22, 4, 4, 6))
    np.testing.assert_array_equal(batch["labels"][::-1], np.repeat(20 + np.arange(11), 2))


def test_source_of_latents_without_mirror_images_has_every_image(moments, tmp_path):
    write_folder(tmp_path / "one", moments[:, :1], np.arange(11), num_classes=40, shard_size=4)
    source = open_source(f"latents:{tmp_path / 'one'}", WANTED, space="latents")
    batch = source.read(np.arange(len(source)), np.arange(len(source)))
    np.testing.assert_array_equal(batch["moments"], moments[:, 0])


@pytest.mark.parametrize("process_count", [1, 2, 3])
def test_two_epochs_of_latents_have_every_view_twice(folder, moments, process_count):
    """The union of the processes' parts, in another order each epoch."""
    source = open_source(f"latents:{folder}", WANTED, space="latents")
    streams = [
        batches(source, batch_size=6, seed=0, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    seen = np.concatenate([next(stream)["moments"] for _ in range(8) for stream in streams])[:44]
    sums, expected = seen.sum((1, 2, 3)), np.sort(moments.sum((2, 3, 4)).ravel())
    for epoch in (sums[:22], sums[22:]):
        np.testing.assert_array_equal(np.sort(epoch), expected)
    assert not np.array_equal(sums[:22], sums[22:])


def test_half_precision_moments_stay_so_on_disk_and_give_float32_latents(moments, tmp_path):
    half = moments.astype(np.float16)
    write_folder(tmp_path / "half", half, np.zeros(11), num_classes=1, shard_size=100)
    (shard,) = open_shards(tmp_path / "half")[1]
    assert shard.moments.dtype == np.float16
    np.testing.assert_array_equal(shard.moments, half)
    assert draw_latents(jnp.asarray(half[:, 0]), jnp.zeros((11, 4, 4, 3)), 1.0).dtype == np.float32


def test_recipe_of_the_docstring_opens_a_shard_with_numpy_alone(folder, moments, monkeypatch):
    """The indented lines of the module's docstring, run in the folder."""
    lines = [line for line in shards_module.__doc__.splitlines() if line.startswith("    ")]
    *statements, expression = textwrap.dedent("\n".join(lines)).splitlines()
    assert len(statements) == 4
    monkeypatch.chdir(folder)
    names = {"json": json, "np": np}
    exec("\n".join(statements), names)
    np.testing.assert_array_equal(eval(expression, names), moments[7, 1])


def test_statistics_are_those_of_drawn_latents(folder, moments):
    """Mean, standard deviation and rms of the scaled latents of the images, against many draws."""
    stats = json.loads((folder / "stats.json").read_text())
    noise = np.random.default_rng(1).standard_normal((4000, 11, 4, 4, 3)).astype(np.float32)
    drawn = np.asarray(jax.vmap(lambda n: draw_latents(moments[:, 0], n, 0.5))(noise))
    np.testing.assert_allclose(stats["latents_mean"], drawn.mean((0, 1, 2, 3)), atol=5e-3)
    np.testing.assert_allclose(stats["latents_std"], drawn.std((0, 1, 2, 3)), rtol=5e-3)
    np.testing.assert_allclose(stats["latents_rms"], np.sqrt(np.square(drawn).mean()), rtol=5e-3)
    np.testing.assert_allclose(stats["raw_latents_rms"], stats["latents_rms"] / 0.5, rtol=1e-6)
    assert stats["num_images"] == 11
    assert stats["count_per_class"] == {str(20 + i): 1 for i in range(11)}


def test_moments_in_fortran_order_are_read_as_what_they_are(folder, moments):
    np.save(folder / f"{shard_names(2)[0]}.moments.npy", np.asfortranarray(moments[:8]))
    source = open_source(f"latents:{folder}", WANTED, space="latents")
    batch = source.read(np.arange(22), np.arange(22))
    np.testing.assert_array_equal(batch["moments"], moments.reshape(22, 4, 4, 6))


STATISTICS = {"values": 1, "sum": [0.0], "sum_of_squares": [0.0], "count_per_class": {"0": 1}}
DAMAGED_REPORTS = {
    "a list": [],
    "no name": {"name": None},
    "another name": {"name": "../shard"},
    "text for a number": {"num_records": "8"},
    "a negative number": {"num_records": -8},
    "names that are numbers": {"skipped": [1]},
    "no list": {"skipped": "a.jpg"},
    "no checksums": {"sha256": {}},
    "checksums that are numbers": {"sha256": {"moments": 1, "labels": 2}},
    "no statistics": {"statistics": None},
    "statistics of text": {"statistics": STATISTICS | {"sum": ["0"]}},
    "statistics of two lengths": {"statistics": STATISTICS | {"sum": [0.0, 0.0]}},
    "a class that is no number": {"statistics": STATISTICS | {"count_per_class": {"ant": 1}}},
    "a count that is none": {"statistics": STATISTICS | {"count_per_class": {"0": None}}},
    "no values": {"statistics": STATISTICS | {"values": 0}},
}


@pytest.mark.parametrize("damage", DAMAGED_REPORTS.values(), ids=DAMAGED_REPORTS)
def test_shard_with_a_damaged_report_is_none(folder, damage):
    """So that the command makes it again."""
    name = shard_names(2)[0]
    file = folder / f"{name}.json"
    report = json.loads(file.read_text())
    file.write_text(json.dumps(report | damage if isinstance(damage, dict) else damage))
    assert read_report(folder, name) is read_report(folder, name, verify=False) is None


def test_report_tells_a_sound_shard_from_an_altered_one(folder):
    name = shard_names(2)[0]
    assert read_report(folder, name)["num_records"] == 8
    file = folder / f"{name}.moments.npy"
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)
    assert read_report(folder, name) is None
    (folder / f"{name}.json").unlink()
    assert read_report(folder, name, verify=False) is None


@pytest.mark.slow
def test_index_of_all_imagenet_opens_in_seconds_and_little_memory(tmp_path):
    """2.56 million items of 32×32×8 float16 in 313 shards; the files are holes of the right size."""
    names = shard_names(313)
    listed, left = [], 1_281_167
    for name in names:
        count = min(4096, left)
        left -= count
        with (tmp_path / f"{name}.moments.npy").open("wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": (count, 2, 32, 32, 8)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + count * 2 * 32 * 32 * 8 * 2)
        np.save(tmp_path / f"{name}.labels.npy", np.zeros(count, np.int32))
        listed.append({"name": name, "num_records": count})
    metadata = {"image_size": 32, "channels": 4, "num_classes": 1000, "views": 2, "dtype": "float16"}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata | {"shards": listed}))
    if CLEAR.exists():
        CLEAR.write_text("5")
    memory, started = memory_mb("VmRSS"), time.monotonic()
    source = LatentShards(str(tmp_path))
    assert time.monotonic() - started < 10
    batch = next(batches(source, batch_size=256, seed=0, start_item=2_562_300, num_threads=2))
    assert len(source) == 2_562_334
    assert batch["moments"].shape == (256, 32, 32, 8)
    assert memory_mb("VmHWM") - memory < 500


def test_drawn_latents_are_the_authors():
    """latent_scale·(mean + exp(logvar / 2)·noise); some golden logvar are beyond the clip at -30 and 20."""
    golden = {name: channels_last(array) for name, array in np.load(GOLDEN / "moments.npz").items()}
    mean, logvar = np.split(golden["moments_in"].astype(np.float64), 2, axis=-1)
    assert logvar.min() < -30 and logvar.max() > 20
    formula = 0.18215 * (mean + np.exp(np.clip(logvar, -30, 20) / 2) * golden["moments_noise"])
    drawn = draw_latents(jnp.asarray(golden["moments_in"]), jnp.asarray(golden["moments_noise"]), 0.18215)
    np.testing.assert_allclose(drawn, formula, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(drawn, golden["moments_sample"], rtol=1e-5, atol=1e-6)


# Mistakes


def test_missing_folder_says_how_to_make_it(tmp_path):
    with user_error(str(tmp_path / "none"), "metadata.json", "tools/encode_latents.py"):
        open_source(f"latents:{tmp_path / 'none'}", WANTED, space="latents")


@pytest.mark.parametrize(("name", "space"), [("digits", "latents"), ("latents:{folder}", "pixels")])
def test_space_of_the_data_must_be_the_models(folder, name, space):
    name = name.format(folder=folder)
    with user_error(f"data.source={name!r} gives", f"data.space={space!r}"):
        open_source(name, WANTED, space=space)


@pytest.mark.parametrize("field, asked", [("image_size", 8), ("channels", 4), ("num_classes", 1000)])
def test_data_of_another_shape_than_the_models_is_an_error(folder, field, asked):
    with user_error(f"data.{field}={asked}", f"the data has {getattr(WANTED, field)}"):
        open_source(f"latents:{folder}", WANTED._replace(**{field: asked}), space="latents")


def test_every_difference_of_shape_is_in_the_message():
    with user_error(
        "data.image_size=4", "has 8", "data.channels=3", "has 1", "data.num_classes=40", "has 10"
    ):
        open_source("digits", WANTED, space="pixels")


def test_unconditional_model_takes_data_with_any_classes(folder):
    assert len(open_source(f"latents:{folder}", WANTED._replace(num_classes=0), space="latents")) == 22


def test_some_of_the_digits_are_the_first_of_their_classes():
    every, some = Digits("train"), open_source("digits:8-9:60", WANTED_DIGITS, space="pixels")
    assert len(some) == 60
    assert set(some.labels) == {8, 9}
    eights_and_nines = np.isin(every.labels, [8, 9])
    np.testing.assert_array_equal(some.images, every.images[eights_and_nines][:60])
    assert set(open_source("digits:0-7", WANTED_DIGITS, space="pixels").labels) == set(range(8))


@pytest.mark.parametrize(
    "name", ["digits:", "digits:9-8", "digits:8", "digits:0-9:0", "digits:0-10", "digits:٣-٤"]
)
def test_digits_that_there_are_not_are_refused(name):
    with user_error(f"data.source={name!r}", "digits:FIRST-LAST:COUNT"):
        open_source(name, WANTED_DIGITS, space="pixels")


@pytest.mark.parametrize("name", ["", "digit", "imagenet:/data"])
def test_unknown_source_lists_the_known_ones(name):
    known = "digits[:FIRST-LAST[:COUNT]], latents:FOLDER, folder:PATH, tfds:NAME"
    with user_error(f"data.source={name!r}", known):
        open_source(name, WANTED, space="latents")


@pytest.mark.parametrize(("latent_scale", "warned"), [(0.18215, True), (1.0, False), (5.0, True)])
def test_latents_far_from_sigma_data_are_warned_of(folder, latent_scale, warned, caplog, monkeypatch):
    """Their rms before scaling is between 1 and 2."""
    monkeypatch.setattr(logging.getLogger("maskdit_jax"), "propagate", True)
    overrides = [f"--config.data.latent_scale={latent_scale}", "--config.method.sigma_data=1"]
    config = load(str(ROOT / "configs/in256.py"), overrides)
    source = open_source(f"latents:{folder}", WANTED, space="latents")
    assert 1 < source.rms < 2
    warn_of_scale(source, config)
    assert ("is data.latent_scale=" in caplog.text) == warned


# Images out


def test_pixels_are_clamped_and_truncated():
    """(x + 1)·127.5, never rounded: 254.9 is 254."""
    values = np.array([-9, -1, -1 + 0.99 / 127.5, -1 + 1.01 / 127.5, 0, 254.9 / 127.5 - 1, 1, 1.001, 9])
    pixels = to_uint8(values)
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == [0, 0, 0, 1, 127, 254, 255, 255, 255]


def test_tile_lays_images_row_by_row_with_grey_between():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8)
    g = 128
    expected = [
        [g, g, g, g, g, g, g, g, g],
        [g, 0, 0, 0, g, 1, 1, 1, g],
        [g, 0, 0, 0, g, 1, 1, 1, g],
        [g, g, g, g, g, g, g, g, g],
        [g, 2, 2, 2, g, 3, 3, 3, g],
        [g, 2, 2, 2, g, 3, 3, 3, g],
        [g, g, g, g, g, g, g, g, g],
        [g, 4, 4, 4, g, g, g, g, g],
        [g, 4, 4, 4, g, g, g, g, g],
        [g, g, g, g, g, g, g, g, g],
    ]
    grid = tile(images, columns=2)
    assert grid.dtype == np.uint8
    assert grid[..., 0].tolist() == expected


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_png_holds_the_pixels(channels, mode, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    save_png(tmp_path / "image.png", image)
    with Image.open(tmp_path / "image.png") as png:
        assert png.mode == mode
        np.testing.assert_array_equal(np.asarray(png).reshape(image.shape), image)
