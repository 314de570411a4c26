"""Hostile data sets: the cases of tests/test_hostile.py for readers of data."""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from damage import Damage, changed, content, cut, deep, folder, huge, json_with, pipe, removed
from PIL import Image
from readers import MOMENTS_SHAPE, lmdb_keys, tar_members, write_lmdb, write_tar

from maskdit_jax.data.images import save_png

# Folders of moments

SHARD = "shard-00000-of-00002"
MOMENTS, LABELS, META = f"{SHARD}.moments.npy", f"{SHARD}.labels.npy", "metadata.json"


def npy(name: str, array: np.ndarray) -> Damage:
    """The file holds another array."""
    return lambda path: np.save(path / name, array, allow_pickle=True)


def npy_header(shape: str, dtype: str = "'<f4'") -> Damage:
    """The file of moments says in its header that it has another shape, or numbers of another kind."""
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return content(MOMENTS, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(2304))


def shards(*entries: object) -> Damage:
    return json_with(META, shards=list(entries))


def npz(path: Path) -> None:
    with (path / MOMENTS).open("wb") as file:
        np.savez(file, np.zeros((3, *MOMENTS_SHAPE[1:]), np.float32))


BAD = f"{MOMENTS} is missing, cut short or damaged: "
SOUND = np.zeros((3, *MOMENTS_SHAPE[1:]), np.float32)
MOMENTS_CASES = [
    (
        "moments",
        "stats.json is no JSON",
        content("stats.json", b"hello"),
        "stats.json cannot be read as JSON",
    ),
    ("moments", "stats.json is a list", content("stats.json", b"[]"), "stats.json", "expected a JSON object"),
    ("moments", "stats.json is binary", content("stats.json", b"\xff\x00\x80" * 99), "stats.json cannot be"),
    ("moments", "stats.json is empty", content("stats.json", b""), "stats.json cannot be read"),
    ("moments", "stats.json is nested", deep("stats.json"), "stats.json", "nested too deeply"),
    ("moments", "stats.json has text", json_with("stats.json", raw_latents_rms="1"), "raw_latents_rms='1'"),
    ("moments", "stats.json is a folder", folder("stats.json"), "stats.json: no such file"),
    ("moments", "stats.json is a pipe", pipe("stats.json"), "stats.json: no such file"),
    ("moments", "no metadata", removed(META), "no latents in", "metadata.json is missing", "encode_latents"),
    ("moments", "metadata is no JSON", content(META, b"hello"), "metadata.json cannot be read as JSON"),
    ("moments", "metadata is a list", content(META, b"[1]"), "metadata.json", "expected a JSON object"),
    ("moments", "metadata is binary", content(META, os.urandom(999)), "metadata.json"),
    ("moments", "metadata is nested", deep(META), "metadata.json", "nested too deeply"),
    ("moments", "metadata of 5 GB", huge(META, 5 * 10**9), "metadata.json is 5,000,000,000 bytes"),
    ("moments", "metadata is a pipe", pipe(META), "metadata.json is missing"),
    (
        "moments",
        "a number of 5,000 digits",
        content(META, b'{"views": ' + b"9" * 5000 + b"}"),
        "metadata.json",
    ),
    ("moments", "classes are text", json_with(META, num_classes="5"), "num_classes='5', expected a whole"),
    ("moments", "classes are null", json_with(META, num_classes=None), "num_classes=None, expected a whole"),
    ("moments", "classes are infinite", json_with(META, num_classes=float("inf")), "num_classes=inf"),
    ("moments", "classes are too many", json_with(META, num_classes=2**80), "num_classes=12089"),
    ("moments", "class names a text", json_with(META, class_names="ant"), "class_names=ant, expected a name"),
    ("moments", "class names too few", json_with(META, class_names=["a"]), "class_names=['a'], expected a n"),
    ("moments", "class names of numbers", json_with(META, class_names=[1, 2, 3, 4, 5]), "expected a name"),
    ("moments", "no number of channels", json_with(META, channels=...), "channels=None, expected"),
    ("moments", "no view", json_with(META, views=0), "views=0, expected a whole number of at least 1"),
    ("moments", "a fraction of a pixel", json_with(META, image_size=4.0), "image_size=4.0, expected a whole"),
    ("moments", "a type of objects", json_with(META, dtype="O"), "dtype='O', expected float16 or float32"),
    ("moments", "a type that is a list", json_with(META, dtype=["<f4"]), "dtype=['<f4'], expected float16"),
    ("moments", "no shards", shards(), "shards=[], expected a list of at least one shard"),
    ("moments", "shards are a number", json_with(META, shards=3), "shards=3, expected a list"),
    ("moments", "shards are numbers", shards(1, 2), "1 in shards has no name"),
    ("moments", "a name is a number", shards({"name": 1, "num_records": 3}), "has no name of a file"),
    (
        "moments",
        "a name leads out",
        shards({"name": "../in", "num_records": 3}),
        "'../in'",
        "no name of a file",
    ),
    ("moments", "a name is absolute", shards({"name": "/etc/a", "num_records": 3}), "'/etc/a'", "no name"),
    ("moments", "a name has a null", shards({"name": "a\0b", "num_records": 3}), "no name of a file"),
    ("moments", "a shard twice", shards(*[{"name": SHARD, "num_records": 3}] * 2), f"lists {SHARD} twice"),
    ("moments", "records negative", shards({"name": SHARD, "num_records": -3}), "num_records=-3, expected"),
    ("moments", "records as text", shards({"name": SHARD, "num_records": "3"}), "num_records='3', expected"),
    ("moments", "records too many", shards({"name": SHARD, "num_records": 2**31}), "num_records=2147483648"),
    ("moments", "records not as many", shards({"name": SHARD, "num_records": 4}), "expected float32 [4, 2,"),
    ("moments", "another shard missing", removed("shard-00001-of-00002.labels.npy"), "labels.npy is missing"),
    ("moments", "an npz", npz, BAD),
    ("moments", "an empty file", content(MOMENTS, b""), BAD, ": 0 bytes"),
    ("moments", "a pipe", pipe(MOMENTS), BAD),
    ("moments", "a folder", folder(MOMENTS), BAD),
    ("moments", "cut by a byte", cut(MOMENTS, -1), BAD),
    ("moments", "cut in the header", cut(MOMENTS, 40), BAD),
    ("moments", "a huge shape", npy_header("(1000000000000000000, 2, 4, 4, 6)"), BAD),
    ("moments", "a shape beyond 64 bits", npy_header("(4611686018427387904, 4, 4, 4, 6)"), BAD),
    ("moments", "a negative shape", npy_header("(-3, 2, 4, 4, 6)"), MOMENTS),
    ("moments", "a shape of text", npy_header("'abc'"), BAD),
    ("moments", "a nested header", npy_header("(" * 5000 + ")" * 5000), BAD),
    ("moments", "a header of code", npy_header("__import__('os').system('touch pwned')"), BAD),
    ("moments", "objects", npy(MOMENTS, np.full(SOUND.shape, None)), BAD),
    ("moments", "objects of a subtype", npy_header("(3, 2, 4, 4, 6)", "[('a', 'O')]"), BAD),
    ("moments", "float64", npy(MOMENTS, SOUND.astype(np.float64)), "is float64", "expected float32"),
    ("moments", "other byte order", npy(MOMENTS, SOUND.astype(">f4")), "is >f4 [3, 2, 4, 4, 6]"),
    ("moments", "other channels", npy(MOMENTS, SOUND[..., :4]), "[3, 2, 4, 4, 4]", "float32 [3, 2, 4, 4, 6]"),
    ("moments", "labels are text", npy(LABELS, np.array(["0", "1", "2"])), "labels.npy holds <U1, expected"),
    ("moments", "labels are complex", npy(LABELS, np.zeros(3, complex)), "labels.npy holds complex128"),
    ("moments", "labels are fractions", npy(LABELS, np.zeros(3)), "labels.npy holds float64, expected whole"),
    ("moments", "labels are objects", npy(LABELS, np.array([1, 2, None])), f"{LABELS} is missing, cut"),
    ("moments", "labels too many", npy(LABELS, np.zeros(4, np.int32)), "with [4] labels"),
    (
        "moments",
        "a class outside",
        npy(LABELS, np.array([0, 5, 1])),
        "has labels 0 … 5, outside the 5 classes",
    ),
    ("moments", "a class below -1", npy(LABELS, np.array([0, -2, 1])), "has labels -2 … 1, outside"),
]

# LMDB


def keys(**new: bytes | None) -> Damage:
    """The data base has other values; None: without the key."""
    change = {name.replace("_", "-"): value for name, value in new.items()}
    return lambda path: write_lmdb(
        path.parent, {key: value for key, value in (lmdb_keys() | change).items() if value is not None}
    )


def at_page(page: int, offset: int, new: bytes) -> Damage:
    return changed("data.mdb", lambda old: overwritten(old, page * 4096 + offset, new))


def overwritten(old: bytes, at: int, new: bytes) -> bytes:
    return old[:at] + new + old[at + len(new) :]


def all_pages(offset: int, new: bytes) -> Damage:
    """The same bytes in every page but the first two, which say where the tree begins."""

    def change(old: bytes) -> bytes:
        for page in range(2, len(old) // 4096):
            old = overwritten(old, page * 4096 + offset, new)
        return old

    return changed("data.mdb", change)


def pointer_outside(path: Path) -> None:
    """The only leaf says that its first key is beyond the end of the file: reading there is a bus error."""
    write_lmdb(path.parent, {"length": b"6"})
    all_pages(16, b"\xf0\xff")(path)


NOT_LMDB = "data.mdb is damaged or not an LMDB: "
LMDB_CASES = [
    ("lmdb", "no z", keys(z_3=None), "data.mdb: z-3 is missing"),
    ("lmdb", "no y", keys(y_2=None), "data.mdb: y-2 is missing"),
    ("lmdb", "no length", keys(length=None), "data.mdb: length is missing"),
    ("lmdb", "text for length", keys(length=b"six"), "data.mdb: length is b'six', expected a number"),
    ("lmdb", "short length", keys(length=b"4"), "data.mdb has 13 keys, but length=4 makes 9"),
    ("lmdb", "long length", keys(length=b"999999999999"), "data.mdb: z-6 is missing"),
    ("lmdb", "nothing", keys(length=b"0"), "data.mdb has 13 keys, but length=0 makes 1"),
    ("lmdb", "odd size", keys(z_0=bytes(100)), "data.mdb: z-0 is 100 bytes, which are no"),
    ("lmdb", "no bytes", keys(z_0=b""), "data.mdb: z-0 is 0 bytes"),
    ("lmdb", "another size", keys(z_5=bytes(128)), "data.mdb: z-5 is 128 bytes, but z-0 is 8,192"),
    ("lmdb", "no number", keys(y_1=b"cat"), "data.mdb: y-1 is b'cat', expected a number"),
    ("lmdb", "long text", keys(y_1=b"1" * 10**6), "data.mdb: y-1 is b'1111"),
    ("lmdb", "class outside", keys(y_1=b"1000"), "data.mdb, item 1: class 1000 is outside 0 … 2"),
    ("lmdb", "unlike halves", keys(y_5=b"0"), "data.mdb, item 5: class 0, but item 2, ", "--no_flips"),
    ("lmdb", "odd", keys(length=b"5", z_5=None, y_5=None), "holds 5 items, an odd number", "--no_flips"),
    ("lmdb", "cut", cut("data.mdb", 40_000), "data.mdb is cut short: 40,000 of "),
    ("lmdb", "cut to one page", cut("data.mdb", 4096), NOT_LMDB),
    ("lmdb", "empty", cut("data.mdb", 0), NOT_LMDB),
    ("lmdb", "text", content("data.mdb", b"hello" * 10_000), NOT_LMDB),
    ("lmdb", "no file", removed("data.mdb"), "data.mdb: no such file", "the folder that holds data.mdb"),
    ("lmdb", "a pipe", pipe("data.mdb"), "data.mdb: no such file"),
    ("lmdb", "a folder", folder("data.mdb"), "data.mdb: no such file"),
    ("lmdb", "pages of another kind", all_pages(10, b"\x02\x00"), NOT_LMDB),
    ("lmdb", "pointers that are wild", all_pages(16, b"\xff" * 2000), "data.mdb: length is missing"),
    ("lmdb", "a root outside", at_page(1, 128, b"\x40" + bytes(7)), NOT_LMDB),
    ("lmdb", "a pointer beyond the file", pointer_outside, "data.mdb is damaged: ", "was ended by SIG"),
]

# Tars


class RunsCode:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch pwned",)


def members(**new: bytes | None) -> Damage:
    """The tar has other members, named as _0000003_cls; None: without the member."""
    change = {name[1:].replace("_", "."): value for name, value in new.items()}
    return lambda path: write_tar(
        path.parent, {name: value for name, value in (tar_members() | change).items() if value is not None}
    )


def pickled(new: bytes) -> Damage:
    return members(_0000003_latent=new)


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def header(type: bytes, size: int, name: str = "0000000.latent", payload: bytes = b"") -> Damage:
    """The tar begins with a header that claims `size` bytes, followed by the sound tar."""
    info = tarfile.TarInfo(name)
    info.type, info.size = type, size
    raw = info.tobuf(tarfile.GNU_FORMAT) + payload + bytes(-len(payload) % 512)
    return changed("x.tar", lambda old: raw + old)


def holes(damage: Damage) -> Damage:
    """The tar is as large as what its headers claim, of holes."""

    def both(path: Path) -> None:
        damage(path)
        os.truncate(path / "x.tar", 30 * 10**9)

    return both


def end_of_last_member(tar: bytes) -> int:
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        last = opened.getmembers()[-1]
    return last.offset_data + -(-last.size // 512) * 512


def long_names(path: Path) -> None:
    """One header after the other says that the name of the next is longer."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 9
    (path / "x.tar").write_bytes((info.tobuf(tarfile.GNU_FORMAT) + bytes(512)) * 2000)


def link(path: Path) -> None:
    with tarfile.open(path / "x.tar", "w") as tar:
        member = tarfile.TarInfo("0000000.latent")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)


# A dtype that says of itself that it holds no objects, which numpy would believe: pointers from bytes.
FORGED = opcodes(
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR",
    b"(K\x01K\x08K\x04K\x04\x87cnumpy\ndtype\n(X\x02\x00\x00\x00O8\x89\x88tR",
    b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
    b"\x89B\x00\x02\x00\x00" + bytes(512) + b"tb",
)
NESTED = opcodes(b"cnumpy._core.numeric\n_frombuffer\n(C\x00N", b")" + b"\x85" * 10**5, b"X\x01\0\0\0CtR")
LARGE = 20 * 10**9
DOUBLED = b")" + b"2\x86" * 60  # (), ((), ()), … always twice the one before
LATENT = pickle.dumps(np.zeros((8, 4, 4), np.float32))


def endless_shape() -> bytes:
    """The shape of an array is a tuple of one tuple twice, which is one tuple twice, and so on."""
    sound = pickle.dumps(np.zeros((8, 4, 4), np.float32), protocol=3)
    return sound.replace(b"K\x08K\x04K\x04\x87", DOUBLED)


TAR_CASES = [
    ("tar", "code", pickled(pickle.dumps(RunsCode())), "x.tar, item 0000003", "would load 'posix.system'"),
    ("tar", "eval", pickled(opcodes(b"cbuiltins\neval\n\x8c\x011\x85R")), "would load 'builtins.eval'"),
    ("tar", "numpy's own", pickled(opcodes(b"cnumpy\nfromfile\n\x8c\x011\x85R")), "load 'numpy.fromfile'"),
    ("tar", "dotted", pickled(opcodes(b"\x8c\x05numpy\x8c\x0cndarray.dump\x93")), "'numpy.ndarray.dump'"),
    ("tar", "a line in a name", pickled(opcodes(b"\x8c\x03a\nb\x8c\x01c\x93")), r"would load 'a\nb.c'"),
    (
        "tar",
        "objects",
        pickled(pickle.dumps(np.full((8, 4, 4), None))),
        "item 0000003: an array of dtype 'O8",
    ),
    ("tar", "forged objects", pickled(FORGED), "item 0000003: an array of dtype 'O8', expected"),
    ("tar", "half", pickled(pickle.dumps(np.zeros((8, 4, 4), np.float16))), "an array of dtype 'f2'"),
    (
        "tar",
        "big-endian",
        pickled(pickle.dumps(np.zeros((8, 4, 4), ">f4"))),
        "expected little-endian float32",
    ),
    ("tar", "shape", pickled(pickle.dumps(np.zeros((4, 8, 4), np.float32))), "an array (4, 8, 4), expected"),
    (
        "tar",
        "size",
        pickled(pickle.dumps(np.zeros((8, 2, 2), np.float32))),
        "[8, 2, 2], but item 0 is [8, 4, 4]",
    ),
    ("tar", "nested pickle", pickled(NESTED), "item 0000003: "),
    ("tar", "8 EiB in a pickle", pickled(opcodes(b"\x8e" + b"\xff" * 7 + b"\x7f")), "its pickle is damaged"),
    ("tar", "4 GB in a memo", pickled(opcodes(b"Nr\xff\xff\xff\x0f")), "has LONG_BINPUT, which no"),
    (
        "tar",
        "a hash without end",
        pickled(opcodes(b"}", DOUBLED, b"Ns")),
        "has SETITEM, which no array needs",
    ),
    ("tar", "a shape without end", pickled(endless_shape()), "an array of no shape, expected"),
    ("tar", "5 GB in a pickle", pickled(opcodes(b"\x8e" + (5 * 10**9).to_bytes(8, "little"))), "is damaged"),
    ("tar", "no array", pickled(pickle.dumps([1, 2])), "item 0000003: its pickle is no array"),
    ("tar", "cut pickle", pickled(LATENT[:-9]), "its pickle is damaged"),
    ("tar", "empty pickle", pickled(b""), "item 0000003: its pickle is damaged"),
    ("tar", "no latent", members(_0000002_latent=None), "in: 0000002.latent is missing"),
    ("tar", "no last latent", members(_0000005_latent=None), "in: 0000005.latent is missing"),
    ("tar", "no class", members(_0000000_cls=None), "in: 0000000.cls is missing"),
    ("tar", "no last class", members(_0000005_cls=None), "in: 0000005.cls is missing"),
    ("tar", "neither", members(_0000004_cls=None, _0000004_latent=None), "in: 0000004.cls is missing"),
    (
        "tar",
        "odd",
        members(_0000005_cls=None, _0000005_latent=None),
        "holds 5 items, an odd number",
        "--no_flips",
    ),
    (
        *("tar", "twice", lambda path: write_tar(path.parent, {"0000002.cls": b"1"}, "y.tar")),
        "in: 0000002.cls is there twice, in x.tar and in y.tar",
    ),
    ("tar", "another member", members(**{"_../0000006_cls": b"1"}), "'../0000006.cls' is no member"),
    ("tar", "lines in a name", members(**{"_0\n\x1b[2J_cls": b"1"}), r"'0\n\x1b[2J.cls' is no member"),
    ("tar", "link", link, "x.tar: '0000000.latent' is no member"),
    ("tar", "no number", members(_0000001_cls=b"cat"), "x.tar: 0000001.cls is b'cat'"),
    (
        "tar",
        "class outside",
        members(_0000001_cls=b"3"),
        "item 0000001: class 3 is outside 0 … 2 (num_classes=3)",
    ),
    ("tar", "negative", members(_0000001_cls=b"-1"), "x.tar: 0000001.cls is b'-1'"),
    (
        "tar",
        "unlike halves",
        members(_0000004_cls=b"1"),
        "item 0000004: class 1, but item 1",
        "give --no_flips",
    ),
    (
        "tar",
        "cut in a member",
        changed("x.tar", lambda b: b[: end_of_last_member(b) - 600]),
        "cut short, damaged",
    ),
    (
        "tar",
        "cut after a member",
        changed("x.tar", lambda b: b[: end_of_last_member(b)]),
        "x.tar is cut short or",
    ),
    ("tar", "cut in a header", cut("x.tar", 1100), "x.tar is cut short"),
    ("tar", "bad header", changed("x.tar", lambda b: overwritten(b, 1024, b"x")), "damaged at byte 1,024"),
    ("tar", "two in one", changed("x.tar", lambda b: b + b), "x.tar is cut short or damaged at byte"),
    ("tar", "empty", content("x.tar", b""), "x.tar is cut short, damaged or not a plain tar"),
    ("tar", "text", content("x.tar", b"hello" * 1000), "x.tar is cut short, damaged or not a plain tar"),
    ("tar", "no items", content("x.tar", bytes(10240)), "in holds no items"),
    ("tar", "no tars", removed("x.tar"), "in holds no .tar", "the folder that holds the .tar files"),
    ("tar", "no folder", lambda path: path.rename(path.with_name("away")), "in: no such folder"),
    ("tar", "a pipe", pipe("x.tar"), "x.tar is not a file"),
    ("tar", "a folder for a tar", folder("x.tar"), "x.tar is not a file"),
    ("tar", "a device", lambda path: (path / "y.tar").symlink_to("/dev/zero"), "y.tar is not a file"),
    ("tar", "20 GB in a member", holes(header(b"0", LARGE)), "0000000.latent claims 20,000,000,000 bytes"),
    ("tar", "20 GB in a cut member", header(b"0", LARGE), "0000000.latent claims 20,000,000,000 bytes"),
    ("tar", "20 GB in a class", holes(header(b"0", LARGE, "0000000.cls")), "0000000.cls claims 20,000,"),
    ("tar", "20 GB in a pax header", holes(header(b"x", LARGE)), "claims 20,000,000,000 bytes", "x.tar"),
    ("tar", "20 GB in a global header", holes(header(b"g", LARGE)), "claims 20,000,000,000 bytes"),
    ("tar", "20 GB in a long name", holes(header(b"L", LARGE)), "claims 20,000,000,000 bytes"),
    ("tar", "20 GB in a long link", header(b"K", LARGE), "claims 20,000,000,000 bytes"),
    ("tar", "a negative long name", header(b"L", -1024), "claims -1,024 bytes"),
    ("tar", "a negative member", header(b"0", -1024), "0000000.latent"),
    ("tar", "long names without end", long_names, "names and attributes, expected at most 4,096"),
    ("tar", "digits without end", header(b"x", 4000, payload=b"1" * 4000), "x.tar"),
    ("tar", "a negative size in pax", header(b"x", 12, payload=b"12 size=-99\n"), "x.tar"),
    ("tar", "sparse", header(b"S", 512), "x.tar"),
]

# Images


def png(width: int, height: int, kind: int = 2) -> bytes:
    """The beginning of a PNG of that size, with no pixel."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + checksum + b"\0\0\1\0IDAT" + bytes(256)


def whole_png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def animated(kind: str) -> bytes:
    frames, buffer = [Image.new("RGB", (16, 16), colour) for colour in ("black", "white")], io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def renamed(name: str) -> Damage:
    """A damaged image with that name."""
    return lambda path: (path / "ant" / os.fsdecode(name.encode("latin1"))).write_bytes(b"hello")


def images_beside_folders(path: Path) -> None:
    (path / "ant/rgb.png").rename(path / "rgb.png")


def no_images(path: Path) -> None:
    for file in (path / "bee").iterdir():
        file.unlink()


RGB, JPG, WEBP = "ant/rgb.png", "ant/turned.jpg", "bee/rgba.webp"
IMAGE_CASES = [
    ("image", "text", content(RGB, b"hello"), "ant/rgb.png: not a readable image"),
    ("image", "empty", content(RGB, b""), "ant/rgb.png: not a readable image"),
    ("image", "one pixel", content(RGB, whole_png(1, 1)), "ant/rgb.png: 1×1 pixels, fewer than 8 on a side"),
    ("image", "a bomb", content(RGB, png(100_000, 100_000)), "ant/rgb.png", "10000000000 pixels"),
    ("image", "a smaller bomb", content(RGB, png(11_000, 11_000)), "11000×11000 pixels, more than"),
    ("image", "a thread", content(RGB, whole_png(8, 1_000_000)), "8×1000000 pixels", "100 times the other"),
    ("image", "a lying thread", content(RGB, png(1_000_000, 8)), "1000000×8 pixels", "100 times the other"),
    ("image", "PNG cut short", cut(RGB, -60), "ant/rgb.png: not a readable image"),
    ("image", "JPEG cut short", cut(JPG, -20), "ant/turned.jpg: not a readable image"),
    ("image", "JPEG cut in the header", cut(JPG, 300), "ant/turned.jpg: not a readable image"),
    ("image", "WebP cut short", cut(WEBP, -20), "bee/rgba.webp: not a readable image"),
    ("image", "5 GB", huge(RGB, 5 * 10**9), "ant/rgb.png: 5,000,000,000 bytes, more than the"),
    ("image", "animated GIF", content(RGB, animated("GIF")), "ant/rgb.png: animated; expected one image"),
    ("image", "animated PNG", content(RGB, animated("PNG")), "ant/rgb.png: animated; expected one image"),
    ("image", "animated WebP", content(WEBP, animated("WEBP")), "bee/rgba.webp: animated; expected"),
    (
        "image",
        "PostScript",
        content(JPG, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "not a readable",
    ),
    ("image", "lines in a name", renamed("a\nb\x1b[2J.png"), r"ant/a\nb\x1b[2J.png: not a readable image"),
    ("image", "a name not of UTF-8", renamed("\xff\xfe.png"), r"ant/\udcff\udcfe.png: not a readable"),
    ("image", "both images and folders", images_beside_folders, "(rgb.png) and sub-folders (ant): move"),
    ("image", "a class without images", no_images, "no images (.jpg, .jpeg, .png, .webp) in", "/bee"),
    ("image", "no folder", lambda path: path.rename(path.with_name("away")), "there is no such folder"),
]

# Sets of samples: samples.json with samples.npz or with PNGs

ABOUT, ARRAYS = "samples.json", "samples.npz"


def arrays(**new: np.ndarray) -> Damage:
    """The .npz has other arrays."""
    return lambda path: np.savez(path / ARRAYS, allow_pickle=True, **new)


def features(**new: np.ndarray) -> Damage:
    """The .npz of features has other arrays."""
    return lambda path: np.savez(path, allow_pickle=True, **new)


def arr_0(new: bytes) -> Damage:
    """The member arr_0.npy is `new`, in a sound archive."""

    def damage(path: Path) -> None:
        with zipfile.ZipFile(path / ARRAYS, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("arr_0.npy", new)

    return damage


def numpy_header(shape: str, dtype: str = "'|u1'", version: int = 1) -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<L", len(text)) + text


PICTURES, BIG = np.zeros((3, 8, 8, 3), np.uint8), np.zeros((9, 9, 3), np.uint8)
BOMB = numpy_header("(30, 1000, 1000, 1)") + bytes(30_000_000)
SAMPLES = [
    ("samples", "json missing, other sizes", json_with(ABOUT, num_samples=4), "holds 3 samples", "says 4"),
    ("samples", "not finished", json_with(ABOUT, finished=False), "not finished", "the command"),
    ("samples", "finished a text", json_with(ABOUT, finished="true"), "not finished"),
    ("samples", "count a text", json_with(ABOUT, num_samples="3"), "num_samples=3, expected a whole"),
    ("samples", "count true", json_with(ABOUT, num_samples=True), "num_samples=True"),
    ("samples", "shape a text", json_with(ABOUT, image_shape="8"), "image_shape=8, expected [height"),
    ("samples", "shape of texts", json_with(ABOUT, image_shape=["8", 8, 3]), "image_shape=['8', 8, 3]"),
    ("samples", "another shape", json_with(ABOUT, image_shape=[8, 8, 1]), "says images of [8, 8, 1]"),
    ("samples", "json deep", deep(ABOUT), "samples.json is damaged"),
    ("samples", "deep inside", json_with(ABOUT, model=json.loads("[" * 300 + "]" * 300)), "nested too"),
    ("samples", "json a list", content(ABOUT, b"[]"), "expected a JSON object"),
    ("samples", "npz text", content(ARRAYS, b"hello" * 99), "samples.npz is damaged or no .npz"),
    ("samples", "npz empty", content(ARRAYS, b""), "samples.npz is damaged or no .npz"),
    ("samples", "npz cut", cut(ARRAYS, -50), "samples.npz is damaged or no .npz"),
    ("samples", "npz a pipe", pipe(ARRAYS), "samples.npz: not a file"),
    ("samples", "no arr_0", arrays(mine=PICTURES), "has no array arr_0, only mine"),
    ("samples", "objects", arrays(arr_0=np.full((3, 8, 8, 3), None)), "holds object"),
    ("samples", "three dimensions", arrays(arr_0=PICTURES[0]), "arr_0 is uint8 [8, 8, 3], expected"),
    ("samples", "doubles", arrays(arr_0=PICTURES.astype(float)), "arr_0 is float64"),
    ("samples", "none", arrays(arr_0=PICTURES[:0]), "arr_0 is uint8 [0, 8, 8, 3], expected"),
    ("samples", "NCHW", arrays(arr_0=PICTURES.transpose(0, 3, 1, 2).copy()), "images have 3 channels or 1"),
    ("samples", "Fortran's order", arrays(arr_0=np.asfortranarray(PICTURES)), "Fortran's order"),
    ("samples", "a huge shape", arr_0(numpy_header("(9000000000000000000, 8, 8, 3)")), "but has 0 bytes"),
    ("samples", "a negative shape", arr_0(numpy_header("(-3, -8, 8, 3)") + bytes(576)), "(-3, -8, 8, 3)"),
    ("samples", "a nested header", arr_0(numpy_header("(" * 5000 + ")" * 5000)), "damaged or no .npz"),
    ("samples", "a header of 2 GB", arr_0(b"\x93NUMPY\2\0\0\0\0\x70" + bytes(9**7)), "damaged or no .npz"),
    ("samples", "a header of code", arr_0(numpy_header("__import__('os').system('touch pwned')")), "no .npz"),
    ("samples", "a bomb", arr_0(BOMB), "claims to be 30,000,083 bytes in", "a decompression bomb?"),
    ("samples", "values changed", changed(ARRAYS, lambda old: old.replace(bytes(range(50)), bytes(50))),
     "damaged or no .npz file: Bad CRC-32"),
    ("features", "images", features(arr_0=PICTURES), "arr_0 is uint8 [3, 8, 8, 3], expected floats [n, D]"),
    ("features", "whole numbers", features(pool=np.arange(6).reshape(2, 3)), "pool is int64 [2, 3]"),
    ("features", "none", features(features=np.zeros((0, 4))), "features is float64 [0, 4], expected"),
    ("features", "of other names", features(x=np.zeros((3, 4))), "has no array features, only x"),
    ("features", "objects", features(features=np.full((3, 4), None)), "holds object"),
    ("sample images", "one missing", removed("000000/000001.png"), "holds 2 samples", "in it says 3"),
    ("sample images", "one too small", lambda path: save_png(path / "000000/000001.png", PICTURES[0, :7]),
     "000001.png", "fewer than 8 on a side"),
    ("sample images", "another size", lambda path: save_png(path / "000000/000001.png", BIG),
     "000001.png is [9, 9, 3], others of this set [8, 8, 3]"),
    ("sample images", "transparent", lambda path: Image.new("RGBA", (8, 8)).save(path / "000000/000001.png"),
     "000001.png is uint8 [8, 8, 4], which `sample` writes none of"),
    ("sample images", "all of another size", json_with(ABOUT, image_shape=[9, 9, 3]), "is [8, 8, 3]"),
    ("sample images", "text", content("000000/000002.png", b"hello"), "000002.png: not a readable image"),
    ("sample images", "a pipe", pipe("000000/000002.png"), "000002.png: not a file"),
]  # fmt: skip

CASES = [*MOMENTS_CASES, *LMDB_CASES, *TAR_CASES, *IMAGE_CASES, *SAMPLES]
