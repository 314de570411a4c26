"""The authors' caches, LMDB and tars, as our shards: every value, hostile files, interrupted imports."""

import collections
import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import lmdb
import numpy as np
import pytest

from maskdit_jax.data.importing import import_latents
from maskdit_jax.data.latents import draw_latents
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
LABELS = [0, 2, 1, 0, 2, 1]  # of the small items below: three images and their flips


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
        rf"imported 10 images \(20 views\) from .* to .*out: {len(shards)} shards, latents rms 0\.\d\d",
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


# Small items, to spoil: six, of [8, 4, 4].
def small_items() -> list[np.ndarray]:
    return list(np.random.default_rng(0).standard_normal((6, 8, 4, 4), np.float32))


def small_members() -> list[tuple[str, bytes]]:
    members = []
    for i, (label, moments) in enumerate(zip(LABELS, small_items())):
        members += [(f"{i:07d}.cls", b"%d" % label), (f"{i:07d}.latent", pickle.dumps(moments, protocol=4))]
    return members


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> None:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def small_keys() -> dict[str, bytes]:
    keys = {"length": b"6"}
    for i, (label, moments) in enumerate(zip(LABELS, small_items())):
        keys |= {f"z-{i}": moments.tobytes(), f"y-{i}": b"%d" % label}
    return keys


def write_lmdb(folder: Path, keys: dict[str, bytes]) -> None:
    with lmdb.open(str(folder), map_size=2**24) as env, env.begin(write=True) as transaction:
        for key, value in keys.items():
            transaction.put(key.encode(), value)
    (folder / "lock.mdb").unlink()


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_every_binary_protocol_and_order(protocol, order, tmp_path):
    moments = [np.asarray(x, order=order) for x in small_items()]
    members = [(f"{i:07d}.latent", pickle.dumps(x, protocol=protocol)) for i, x in enumerate(moments)]
    write_tar(tmp_path / "in/b.tar", members[::-1])  # in any order, over any tars
    write_tar(tmp_path / "in/a.tar", [(f"{i:07d}.cls", b"%d" % label) for i, label in enumerate(LABELS)])
    run(tmp_path / "in", tmp_path / "out", num_classes=3)
    labels, found = items(tmp_path / "out")
    np.testing.assert_array_equal(labels, LABELS)
    np.testing.assert_array_equal(found, small_items())


def test_values_that_are_not_finite_are_kept_and_said(tmp_path, caplog):
    moments = small_items()
    moments[4][0, 0, 0] = np.nan
    write_lmdb(tmp_path / "in", small_keys() | {"z-4": moments[4].tobytes()})
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
    write_lmdb(tmp_path / "small", small_keys())
    with pytest.raises(UserError, match=r"shard-00000-of-00002 is of another import"):
        run(tmp_path / "small", out, format="lmdb", shard_size=2)
    assert contents(out) == {name: before[name] for name in before if name != METADATA}
    assert read_report(out, "shard-00000-of-00002")["num_records"] == 5


class _RunsCode:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def _spoilt(change):
    """Writes the small tar after `change` of its members by name."""

    def write(folder: Path) -> None:
        members = dict(small_members())
        change(members)
        write_tar(folder / "x.tar", list(members.items()))

    return write


def _with_pickle(content: bytes):
    return _spoilt(lambda members: members.update({"0000003.latent": content}))


def _twice(folder: Path) -> None:
    write_tar(folder / "x.tar", small_members())
    write_tar(folder / "y.tar", small_members()[4:5])


def _bytes_of_tar(change):
    def write(folder: Path) -> None:
        write_tar(folder / "x.tar", small_members())
        (folder / "x.tar").write_bytes(change((folder / "x.tar").read_bytes()))

    return write


def _end_of_last_member(content: bytes) -> int:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        last = tar.getmembers()[-1]
    return last.offset_data + -(-last.size // 512) * 512


def _bad_header(content: bytes) -> bytes:
    return content[:1024] + b"x" + content[1025:]  # the second header's first byte


def _link(folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as tar:
        member = tarfile.TarInfo("0000000.latent")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)


def _opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


# A dtype that says of itself that it holds no objects, which numpy would believe: pointers from bytes.
_FORGED = _opcodes(
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR",
    b"(K\x01K\x08K\x04K\x04\x87cnumpy\ndtype\n(X\x02\x00\x00\x00O8\x89\x88tR",
    b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
    b"\x89B\x00\x02\x00\x00" + bytes(512) + b"tb",
)
_OBJECTS = np.full((8, 4, 4), None, object)
_NESTED = _opcodes(b"cnumpy._core.numeric\n_frombuffer\n(C\x00N", b")" + b"\x85" * 10**5, b"X\x01\0\0\0CtR")
HOSTILE_TARS = {
    "code": (_with_pickle(pickle.dumps(_RunsCode())), "x.tar, item 0000003: .*would load 'posix.system'"),
    "eval": (_with_pickle(_opcodes(b"cbuiltins\neval\n\x8c\x011\x85R")), "would load 'builtins.eval'"),
    "numpy's own": (
        _with_pickle(_opcodes(b"cnumpy\nfromfile\n\x8c\x011\x85R")),
        "would load 'numpy.fromfile'",
    ),
    "dotted": (_with_pickle(_opcodes(b"\x8c\x05numpy\x8c\x0cndarray.dump\x93")), "load 'numpy.ndarray.dump'"),
    "line": (_with_pickle(_opcodes(b"\x8c\x03a\nb\x8c\x01c\x93")), r"would load 'a\\nb.c'"),
    "objects": (_with_pickle(pickle.dumps(_OBJECTS)), "item 0000003: an array of dtype 'O8?', expected"),
    "forged objects": (_with_pickle(_FORGED), "item 0000003: an array of dtype 'O8', expected"),
    "half": (_with_pickle(pickle.dumps(np.zeros((8, 4, 4), np.float16))), "an array of dtype 'f2'"),
    "big-endian": (_with_pickle(pickle.dumps(np.zeros((8, 4, 4), ">f4"))), "expected little-endian float32"),
    "shape": (_with_pickle(pickle.dumps(np.zeros((4, 8, 4), np.float32))), r"an array \(4, 8, 4\), expected"),
    "size": (
        _with_pickle(pickle.dumps(np.zeros((8, 2, 2), np.float32))),
        r"item 0000003: \[8, 2, 2\], but item 0 is \[8, 4, 4\]",
    ),
    "nested": (_with_pickle(_NESTED), "item 0000003: "),
    "no array": (_with_pickle(pickle.dumps([1, 2])), "item 0000003: its pickle is no array"),
    "cut pickle": (_with_pickle(pickle.dumps(np.zeros((8, 4, 4), np.float32))[:-9]), "its pickle is damaged"),
    "empty pickle": (_with_pickle(b""), "item 0000003: its pickle is damaged"),
    "no latent": (_spoilt(lambda m: m.pop("0000002.latent")), "in: 0000002.latent is missing"),
    "no last latent": (_spoilt(lambda m: m.pop("0000005.latent")), "in: 0000005.latent is missing"),
    "no class": (_spoilt(lambda m: m.pop("0000000.cls")), "in: 0000000.cls is missing"),
    "no last class": (_spoilt(lambda m: m.pop("0000005.cls")), "in: 0000005.cls is missing"),
    "neither": (
        _spoilt(lambda m: [m.pop("0000004.cls"), m.pop("0000004.latent")]),
        "in: 0000004.cls is missing",
    ),
    "odd": (
        _spoilt(lambda m: [m.pop("0000005.cls"), m.pop("0000005.latent")]),
        "holds 5 items, an odd number.*--no_flips",
    ),
    "twice": (_twice, "in: 0000002.cls is there twice, in x.tar and in y.tar"),
    "another member": (
        _spoilt(lambda m: m.update({"../0000006.cls": b"1"})),
        r"'\.\./0000006.cls' is no member",
    ),
    "link": (_link, "x.tar: '0000000.latent' is no member"),
    "no number": (_spoilt(lambda m: m.update({"0000001.cls": b"cat"})), "x.tar: 0000001.cls is b'cat'"),
    "class outside": (
        _spoilt(lambda m: m.update({"0000001.cls": b"3"})),
        r"x.tar, item 0000001: class 3 is outside 0 … 2 \(num_classes=3\), as are 0 others",
    ),
    "negative": (_spoilt(lambda m: m.update({"0000001.cls": b"-1"})), "x.tar: 0000001.cls is b'-1'"),
    "unlike halves": (
        _spoilt(lambda m: m.update({"0000004.cls": b"1"})),
        "x.tar, item 0000004: class 1, but item 1, .* is of class 2: give --no_flips",
    ),
    "cut in a member": (
        _bytes_of_tar(lambda b: b[: _end_of_last_member(b) - 600]),
        "x.tar is cut short, damaged",
    ),
    "cut after a member": (
        _bytes_of_tar(lambda b: b[: _end_of_last_member(b)]),
        "x.tar is cut short or damaged",
    ),
    "cut in a header": (_bytes_of_tar(lambda b: b[:1100]), "x.tar is cut short"),
    "damaged header": (_bytes_of_tar(_bad_header), "x.tar is cut short or damaged at byte 1,024"),
    "two in one": (_bytes_of_tar(lambda b: b + b), "x.tar is cut short or damaged at byte"),
    "empty": (_bytes_of_tar(lambda b: b""), "x.tar is cut short, damaged or not a plain tar"),
    "text": (_bytes_of_tar(lambda b: b"hello" * 1000), "x.tar is cut short, damaged or not a plain tar"),
    "no items": (_bytes_of_tar(lambda b: bytes(10240)), "in holds no items"),
    "no tars": (
        lambda folder: folder.mkdir(),
        r"in holds no \.tar; .* the folder that holds the \.tar files",
    ),
    "no folder": (lambda folder: None, "in: no such folder"),
}


def _keys(**changes):
    """Writes the small LMDB with other values; None: without the key."""

    def write(folder: Path) -> None:
        keys = small_keys() | {name.replace("_", "-"): value for name, value in changes.items()}
        write_lmdb(folder, {key: value for key, value in keys.items() if value is not None})

    return write


def _cut_lmdb(size: int):
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "data.mdb").write_bytes((LMDB / "data.mdb").read_bytes()[:size])

    return write


def _no_lmdb(folder: Path) -> None:
    folder.mkdir()
    (folder / "data.mdb").write_bytes(b"hello" * 10000)


HOSTILE_LMDBS = {
    "no z": (_keys(z_3=None), "data.mdb: z-3 is missing"),
    "no y": (_keys(y_2=None), "data.mdb: y-2 is missing"),
    "no length": (_keys(length=None), "data.mdb: length is missing"),
    "text for length": (_keys(length=b"six"), "data.mdb: length is b'six', expected a number"),
    "short length": (_keys(length=b"4"), r"data.mdb has 13 keys, but length=4 makes 9"),
    "long length": (_keys(length=b"999999999999"), "data.mdb: z-6 is missing"),
    "nothing": (_keys(length=b"0"), "data.mdb has 13 keys, but length=0 makes 1"),
    "odd size": (_keys(z_0=bytes(100)), "data.mdb: z-0 is 100 bytes, which are no"),
    "no bytes": (_keys(z_0=b""), "data.mdb: z-0 is 0 bytes"),
    "another size": (_keys(z_5=bytes(128)), "data.mdb: z-5 is 128 bytes, but z-0 is 512"),
    "no number": (_keys(y_1=b"cat"), "data.mdb: y-1 is b'cat', expected a number"),
    "class outside": (_keys(y_1=b"1000"), "data.mdb, item 1: class 1000 is outside 0 … 2"),
    "unlike halves": (_keys(y_5=b"0"), "data.mdb, item 5: class 0, but item 2, .*--no_flips"),
    "odd": (_keys(length=b"5", z_5=None, y_5=None), "holds 5 items, an odd number.*--no_flips"),
    "cut": (_cut_lmdb(400_000), "data.mdb is cut short: 400,000 of 770,048 bytes"),
    "cut to one page": (_cut_lmdb(4096), "data.mdb is damaged or not an LMDB"),
    "empty": (_cut_lmdb(0), "data.mdb is damaged or not an LMDB"),
    "text": (_no_lmdb, "data.mdb is damaged or not an LMDB"),
    "no file": (lambda folder: folder.mkdir(), r"data.mdb: no such file; .* the folder that holds data\.mdb"),
    "no folder": (lambda folder: None, "in: no such folder; .* the folder that holds data.mdb"),
}
HOSTILE = {("webdataset", name): case for name, case in HOSTILE_TARS.items()}
HOSTILE |= {("lmdb", name): case for name, case in HOSTILE_LMDBS.items()}


@pytest.mark.parametrize("case", HOSTILE, ids="-".join)
def test_hostile_files_are_refused_in_one_line(case, tmp_path, monkeypatch):
    """And leave no data set, no file of their own and no mark of any code that they name."""
    monkeypatch.chdir(tmp_path)
    write, message = HOSTILE[case]
    write(tmp_path / "in")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message) as refused:
        run(tmp_path / "in", tmp_path / "out", format=case[0], num_classes=3)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
    assert contents(tmp_path) == before


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


def test_tool_on_the_golden_lmdb(tmp_path):
    flags = ["--format=lmdb", f"--input={LMDB}", f"--out={tmp_path / 'out'}"]
    full = tool(*flags, largest_file_kb="100")
    assert full.returncode == 2
    assert re.fullmatch(r"error: .*shard-00000-of-00001 could not be written: .*\n", full.stderr), full.stderr
    assert contents(tmp_path) == {}
    done = tool(*flags)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"\nimported 10 images \(20 views\) from .* to .*: 1 shards, latents rms 0\.\d\d\n$", done.stdout
    )
    assert_golden(*items(tmp_path / "out"))
    again = tool(*flags, "--shard_size=3", "--no_flips")
    assert again.returncode == 2
    assert re.fullmatch(r"error: .* already is a data set.*\n", again.stderr)
    counts = collections.Counter(EXPECTED["labels"][:10].tolist())
    found = json.loads((tmp_path / "out/stats.json").read_text())["count_per_class"]
    assert found == {str(label): count for label, count in counts.items()}
