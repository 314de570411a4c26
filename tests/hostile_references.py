"""Hostile references of real images: the cases of tests/test_hostile.py for their reader."""

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from damage import Damage, content, cut, folder, huge, pipe, removed

EYE = np.eye(4)


def arrays(**new: Any) -> Damage:
    """Other arrays; None: it is missing."""

    def damage(path: Path) -> None:
        with np.load(path) as file:
            kept = {name: x for name, x in (dict(file) | new).items() if x is not None}
        np.savez(path, **kept)

    return damage


def about(**new: Any) -> Damage:
    """`about` says something else."""

    def damage(path: Path) -> None:
        with np.load(path) as file:
            said = json.loads(str(file["about"]))
        arrays(about=np.array(json.dumps(said | new)))(path)

    return damage


def claims(name: str, shape: str, dtype: str = "<f8", size: int = 32, packed: bool = False) -> Damage:
    """An array's header says so, before `size` bytes."""

    def damage(path: Path) -> None:
        with np.load(path) as file:
            kept = {other: x for other, x in file.items() if other != name}
        np.savez(path, **kept)
        header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(size)
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
            archive.writestr(f"{name}.npy", member)

    return damage


def one_array() -> bytes:
    file = io.BytesIO()
    np.save(file, EYE)
    return file.getvalue()


OBJECTS = np.array([{}], object)
DEEP = np.array("[" * 5000)
CASES = [
    ("missing", removed(""), "no such file"),
    ("a folder", folder(""), "not a file"),
    ("a pipe", pipe(""), "not a file"),
    ("empty", content("", b""), "is damaged or no .npz file"),
    ("text", content("", b"hello" * 99), "is damaged or no .npz file"),
    ("an .npy", content("", one_array()), "is damaged or no .npz file"),
    ("cut short", cut("", -9), "is damaged or no .npz file"),
    ("a terabyte by a hole", huge("", 10**12), "is damaged or no .npz file"),
    ("no statistics", arrays(mu=None, sigma=None), "is no reference: it has no mu and sigma"),
    ("no covariance", arrays(sigma=None), "is no reference: it has mu, but no sigma"),
    ("objects", arrays(mu=OBJECTS), "mu.npy"),
    ("a text for the mean", arrays(mu=np.array("x")), "mu [] <U1 and sigma"),
    ("integers", arrays(mu=np.arange(4)), "mu [4] int64 and sigma"),
    ("other sizes", arrays(mu=np.zeros(3)), "mu [3] float64 and sigma [4, 4] float64, expected [D] and"),
    ("a mean of two dimensions", arrays(mu=EYE), "mu [4, 4] float64"),
    ("no size", arrays(mu=np.zeros(0), sigma=np.zeros((0, 0))), "mu [0] float64"),
    ("terabytes claimed", claims("sigma", "(1000000, 1000000)"), "sigma.npy"),
    ("more than any claimed", claims("sigma", f"({10**30}, {10**30})"), "sigma.npy"),
    ("a negative size claimed", claims("sigma", "(-2, -2)"), "sigma.npy"),
    ("packed zeros", claims("sigma", "(2048, 2048)", size=2**25, packed=True), "sigma.npy", "bomb"),
    ("NaN", arrays(mu=EYE[0] * np.nan), "mu or sigma holds values that are not finite"),
    ("infinite", arrays(sigma=np.diag([1, np.inf, 1, 1])), "mu or sigma holds values that are not"),
    ("not symmetric", arrays(sigma=np.triu(np.ones((4, 4)))), "sigma is no covariance"),
    ("negative", arrays(sigma=-EYE), "sigma is no covariance"),
    ("spatial half there", arrays(mu_s=np.zeros(4)), "it has mu_s, but no sigma_s"),
    ("features of another size", arrays(features=np.zeros((5, 3), np.float32)), "features [5, 3] float32"),
    ("features infinite", arrays(features=np.full((5, 4), np.inf, np.float32)), "features holds values that"),
    ("features of other images", arrays(features=np.zeros((2, 4), np.float32)), "2 images beside 5 images"),
    ("images of floats", arrays(arr_0=np.zeros((5, 2, 2, 1))), "arr_0 [5, 2, 2, 1] float64, expected uint8"),
    ("images of two channels", arrays(arr_0=np.zeros((5, 2, 1, 2), np.uint8)), "arr_0 [5, 2, 1, 2] uint8"),
    ("about no text", arrays(about=np.zeros(3)), "`about` is no short text"),
    ("about long", arrays(about=np.array("x" * 20_000)), "`about` is no short text"),
    ("about no JSON", arrays(about=np.array("hello")), "`about` is no JSON"),
    ("about deep", arrays(about=DEEP), "`about` is no JSON"),
    ("about a list", arrays(about=np.array("[]")), "`about` lacks one of count, extractor"),
    ("count a text", about(count="5"), "`about` lacks one of count, extractor"),
    ("count true", about(count=True), "`about` lacks one of"),
    ("count zero", about(count=0), "statistics of 0 images"),
    ("count large", about(count=10**400), "statistics of a huge number images"),
    ("extractor a number", about(extractor=3), "`about` lacks one of"),
]  # fmt: skip
CASES = [("reference", *case) for case in CASES]
