"""The authors' caches, LMDB and tars, as our shards. What is hostile in them: test_hostile.py."""

import collections
import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from readers import LABELS, lmdb_keys, write_lmdb, write_tar
from readers import items as small_items

from maskdit_jax.data import lmdb_items
from maskdit_jax.data.codec import draw_latents
from maskdit_jax.data.published import import_latents
from maskdit_jax.data.shards import METADATA, open_shards, read_report
from maskdit_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("messages")
ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests/golden/data"
LMDB, TARS, TARS_NUMPY2 = (
    GOLDEN / f"imagenet256_latent_{name}" for name in ("lmdb_tiny/train", "wds_tiny", "wds_tiny_np2")
)
EXPECTED = dict(np.load(GOLDEN / "data_expected.npz"))
ALIKE = {LMDB: "lmdb", TARS: "webdataset"}


def run(source: Path, out: Path, *, format: str = "webdataset", **options) -> dict:
    defaults = {"num_classes": 1000, "latent_scale": 0.18215, "flips": True, "shard_size": 4096}
    return import_latents(source, out, format=format, **defaults | options)


def items(out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] and moments [n, 8, H, W] of an import, in the order of the source: first all views 0."""
    metadata, shards = open_shards(out)
    moments = np.concatenate([shard.moments for shard in shards])
    labels = np.concatenate([shard.labels for shard in shards])
    assert metadata["views"] == moments.shape[1]
    by_view = moments.transpose(1, 0, 4, 2, 3)
    return np.tile(labels, metadata["views"]), by_view.reshape(-1, *by_view.shape[2:])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_golden(labels: np.ndarray, moments: np.ndarray) -> None:
    """Of the first items, all of them or some."""
    n = len(labels)
    np.testing.assert_array_equal(labels, EXPECTED["labels"][:n])
    np.testing.assert_allclose(moments.sum((1, 2, 3), np.float64), EXPECTED["sums"][:n], rtol=1e-9)
    np.testing.assert_array_equal(moments.reshape(n, -1)[:, :4], EXPECTED["first4"][:n])
    np.testing.assert_array_equal(moments[0], EXPECTED["moments_item0"])


@pytest.mark.parametrize("source", ALIKE, ids=ALIKE.values())
@pytest.mark.parametrize("shard_size", [4096, 3])
def test_golden_items_are_imported_bit_for_bit(source, shard_size, tmp_path, caplog):
    stats = run(source, tmp_path / "out", format=ALIKE[source], shard_size=shard_size)
    metadata, shards = open_shards(tmp_path / "out")
    labels, moments = items(tmp_path / "out")
    assert int(EXPECTED["length"]) == len(labels) == 20
    assert_golden(labels, moments)
    assert [len(shard.labels) for shard in shards] == ([3, 3, 3, 1] if shard_size == 3 else [10])
    described = {"image_size": 32, "channels": 4, "num_classes": 1000, "views": 2, "dtype": "float32"}
    described |= {"source": str(source), "autoencoder": "unknown"}
    assert metadata.items() >= described.items()
    assert stats["num_images"] == 10
    assert re.fullmatch(
        rf"imported 10 images \(20 views\) from .* to .*out: {len(shards)} shards?, latents rms 0\.\d\d",
        caplog.messages[-1],
    )

    pick = EXPECTED["pick"]
    drawn = draw_latents(
        np.moveaxis(moments[pick], 1, -1), np.moveaxis(EXPECTED["sample_noise"], 1, -1), 0.18215
    )
    np.testing.assert_allclose(
        np.moveaxis(np.asarray(drawn), -1, 1), EXPECTED["latent_sample"], rtol=1e-6, atol=1e-6
    )


def test_lmdb_and_tars_of_the_same_items_give_the_same_files(tmp_path):
    for source, format in ALIKE.items():
        run(source, tmp_path / format, format=format, shard_size=4)
    first, second = (contents(tmp_path / format) for format in ALIKE.values())
    assert first.keys() == second.keys()
    for name in first:
        if name not in (METADATA, "stats.json"):  # which name the source
            assert first[name] == second[name], name


def test_one_view_per_item_without_flips_and_pickles_of_numpy_2(tmp_path):
    run(LMDB, tmp_path / "20", format="lmdb", flips=False, shard_size=8)
    run(TARS_NUMPY2, tmp_path / "4", flips=False)
    for count in (20, 4):
        metadata, _ = open_shards(tmp_path / str(count))
        labels, moments = items(tmp_path / str(count))
        assert (metadata["views"], len(labels)) == (1, count)
        assert_golden(labels, moments)


def test_golden_tars_hold_the_members_that_they_should():
    listed = json.loads((GOLDEN / "data_members.json").read_text())
    assert sum(len(names) for names in listed.values()) >= 40
    for name, members in listed.items():
        with tarfile.open(GOLDEN / name) as opened:
            assert opened.getnames() == members


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_every_binary_protocol_and_order(protocol, order, tmp_path):
    moments = [np.random.default_rng(i).standard_normal((8, 4, 4), np.float32) for i in range(6)]
    pickles = [pickle.dumps(np.asarray(x, order=order), protocol=protocol) for x in moments]
    members = [(f"{i:07d}.latent", pickled) for i, pickled in enumerate(pickles)]
    write_tar(tmp_path, dict(members[::-1]), "b.tar")  # in any order, over any tars
    write_tar(tmp_path, {f"{i:07d}.cls": b"%d" % label for i, label in enumerate(LABELS)}, "a.tar")
    run(tmp_path / "in", tmp_path / "out", num_classes=3)
    labels, found = items(tmp_path / "out")
    np.testing.assert_array_equal(labels, LABELS)
    np.testing.assert_array_equal(found, moments)


def test_values_that_are_not_finite_are_kept_and_said(tmp_path, caplog):
    moments = small_items(16)
    moments[4][0, 0, 0] = np.nan
    write_lmdb(tmp_path, lmdb_keys() | {"z-4": moments[4].tobytes()})
    run(tmp_path / "in", tmp_path / "out", format="lmdb")
    np.testing.assert_array_equal(items(tmp_path / "out")[1], moments)
    (warning,) = (r.message for r in caplog.records if r.levelno == logging.WARNING)
    assert "data.mdb, item 4: not all of its values are finite" in warning


@pytest.mark.parametrize("source", ALIKE, ids=ALIKE.values())
def test_interrupted_import_goes_on(source, tmp_path, caplog):
    out = tmp_path / "out"
    run(source, out, format=ALIKE[source], shard_size=4)
    whole = contents(out)
    assert len(whole) == 3 * 3 + 2
    for name in (METADATA, "stats.json", *(n for n in whole if n.startswith("shard-00001"))):
        (out / name).unlink()
    (out / "shard-00001-of-00003.moments.npy.partial").write_bytes(b"cut")
    damaged = out / "shard-00002-of-00003.labels.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    caplog.clear()
    run(source, out, format=ALIKE[source], shard_size=4)
    assert contents(out) == whole
    assert [m.split(":")[0] for m in caplog.messages if m.startswith("shard-")] == [
        "shard-00000-of-00003 kept",
        "shard-00001-of-00003 written",
        "shard-00002-of-00003 written",
    ]


def test_folder_in_use_is_left_alone(tmp_path):
    out = tmp_path / "out"
    run(LMDB, out, format="lmdb", shard_size=5)
    before = contents(out)
    with pytest.raises(UserError, match=r"already is a data set, with a metadata\.json"):
        run(LMDB, out, format="lmdb", shard_size=5)
    assert contents(out) == before
    (out / METADATA).unlink()
    with pytest.raises(UserError, match=r"shard-00000-of-00002\..* is not of this import: .*--shard_size"):
        run(LMDB, out, format="lmdb", shard_size=4)
    with pytest.raises(UserError, match=r"shard-00000-of-00002 is of another import"):
        run(LMDB, out, format="lmdb", shard_size=10, flips=False)
    small = write_lmdb(tmp_path / "small")
    with pytest.raises(UserError, match=r"shard-00000-of-00002 is of another import"):
        run(small, out, format="lmdb", shard_size=2)
    assert contents(out) == {name: before[name] for name in before if name != METADATA}
    assert read_report(out, "shard-00000-of-00002")["num_records"] == 5


@pytest.fixture
def reader_process(monkeypatch) -> Iterator[Callable[[int], None]]:
    """Sends a signal to the process that reads an LMDB."""
    started = []

    class Noted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(lmdb_items.subprocess, "Popen", Noted)
    yield lambda number: started[0].send_signal(number)
    assert [process.poll() is None for process in started] == [False]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "data.mdb could not be read: .* ended by SIGKILL"),
        (signal.SIGSTOP, "does not answer"),
    ],
    ids=["killed", "stopped"],
)
def test_lmdb_process_that_is_killed_or_stopped_is_one_line(number, message, reader_process, monkeypatch):
    with pytest.raises(UserError, match=message), lmdb_items.lmdb_items(LMDB) as items:
        reader_process(number)
        monkeypatch.setattr(lmdb_items, "MAX_SILENCE_S", 0.1)
        next(items.read(np.arange(3)))


def test_items_of_an_lmdb_come_in_any_order_and_a_reading_may_be_given_up():
    with lmdb_items.lmdb_items(LMDB) as opened:
        next(opened.read(np.arange(20)))  # the other 19 are dropped
        backwards = np.stack(list(opened.read(np.tile(np.arange(20)[::-1], 4))))
    np.testing.assert_allclose(
        backwards.sum((1, 2, 3), np.float64), np.tile(EXPECTED["sums"][::-1], 4), rtol=1e-9
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "zip"}, "format=zip is unknown: lmdb, webdataset"),
        ({"shard_size": 0}, "shard_size=0 must be at least 1"),
        ({"num_classes": 0}, "num_classes=0 must be at least 1"),
        ({"latent_scale": float("nan")}, "latent_scale=nan must be a positive number"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(LMDB, tmp_path / "out", **{"format": "lmdb"} | options)
    assert contents(tmp_path) == {}


def tool(*flags: str, largest_file_kb: str = "unlimited") -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    limited = ["bash", "-c", f'ulimit -f {largest_file_kb} && exec "$@"', "bash"]
    script = [*limited, sys.executable, ROOT / "tools/import_latents.py", *flags]
    return subprocess.run(script, env=environment, capture_output=True, text=True)


@pytest.mark.processes
def test_tool_on_the_golden_lmdb(tmp_path):
    flags = ["--format=lmdb", f"--input={LMDB}", f"--out={tmp_path / 'out'}"]
    full = tool(*flags, largest_file_kb="100")
    assert full.returncode == 2
    assert re.fullmatch(r"error: .*shard-00000-of-00001 could not be written: .*\n", full.stderr), full.stderr
    assert contents(tmp_path) == {}
    done = tool(*flags)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"\nimported 10 images \(20 views\) from .* to .*: 1 shard, latents rms 0\.\d\d\n$", done.stdout
    )
    assert_golden(*items(tmp_path / "out"))
    again = tool(*flags, "--shard_size=3", "--no_flips")
    assert again.returncode == 2
    assert re.fullmatch(r"error: .* already is a data set.*\n", again.stderr)
    counts = collections.Counter(EXPECTED["labels"][:10].tolist())
    found = json.loads((tmp_path / "out/stats.json").read_text())["count_per_class"]
    assert found == {str(label): count for label, count in counts.items()}
