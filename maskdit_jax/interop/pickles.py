"""What a .pt file holds, looked at before PyTorch reads it.

`torch.load(weights_only=True)` runs no code, but it does what a file says: it unpacks archives, makes
buffers of any size and hashes what is nested beyond measure. So the archive's directory and every step of
the pickles are compared here with what `torch.save` writes of tensors, numbers and texts.
"""

import io
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from maskdit_jax.errors import UserError, first_line, shown

# MaskDiT-XL/2 with its EMA and the state of Adam, 1,890 tensors, takes 56,025, in 160 kB.
MAX_OPERATIONS = 500_000
MAX_BYTES = 2**24  # of the pickles, of the archive's directory, and of whatever in it is no tensor
_DTYPES = "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128".split()
_STORAGES = "Float Double Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble".split()
# What a pickle may name: all that the tensors of a network and plain data need. OrderedDict and Namespace,
# in which training scripts keep their flags, may be made empty only, and filled from a dict.
_EMPTY = ("collections OrderedDict", "argparse Namespace")
_CALLED = (
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    "torch device",
)
_NAMED = {
    *(*_EMPTY, *_CALLED),
    *(f"torch {name}" for name in _DTYPES),
    *(f"torch {name}Storage" for name in _STORAGES),
}
# Operations by how many values they take from the stack; MARK: all since the newest mark.
_TAKEN: dict[str, int] = {
    **dict.fromkeys("PROTO STOP MARK GLOBAL BINPUT LONG_BINPUT BINGET LONG_BINGET".split(), 0),
    **dict.fromkeys("NONE NEWFALSE NEWTRUE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET".split(), 0),
    **dict.fromkeys("BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING".split(), 0),
    **dict.fromkeys("TUPLE1 BUILD APPEND BINPERSID".split(), 1),
    **dict.fromkeys("TUPLE2 NEWOBJ REDUCE SETITEM".split(), 2),
    "TUPLE3": 3,
}
_TAKE_TO_MARK = ("TUPLE", "APPENDS", "SETITEMS")
# Others may take for ever to be hashed: tuples nested in tuples, or numbers that all have one hash.
_KEYS = "BINUNICODE SHORT_BINSTRING BININT BININT1 BININT2 LONG1 NONE NEWTRUE NEWFALSE".split()
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first of the five pickles of an old file
Stack = list[Any]


def check_pickled(path: Path) -> bool:
    """Whether the file is an archive, as PyTorch writes since 1.6; otherwise it is of the older kind.

    Raises:
      UserError: it is damaged, or holds what would be more than plain tensors and data, or take memory or
        time out of proportion.
    """
    try:
        with path.open("rb") as file:
            is_archive = file.read(4) == b"PK\3\4"
            if is_archive:
                _check_pickle(io.BytesIO(_read_data_pkl(file, path)))
            else:
                file.seek(0)
                _check_legacy(io.BytesIO(file.read(MAX_BYTES)))
        return is_archive
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, LookupError, struct.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{path} is damaged or not a PyTorch file: {first_line(error, 150)}") from error


def _read_data_pkl(file: BinaryIO, path: Path) -> bytes:
    size, found = path.stat().st_size, 0
    count = count_members(file, size)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = {member.filename.lower() for member in members}
        top = members[0].filename.partition("/")[0]
        # PyTorch takes names without regard to case, and may take another of two.
        if len(members) != count or len(names) != count or not all(name.isascii() for name in names):
            raise UserError("refused: an archive whose directory can be read in several ways")
        if any(name.endswith("/constants.pkl") for name in names):
            raise UserError("refused: a TorchScript program, expected tensors by name")
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise UserError(
                    f"refused: {shown(member.filename)} in it is compressed, as PyTorch writes none"
                )
            if not member.filename.startswith(f"{top}/data/") and member.file_size > MAX_BYTES:
                raise UserError(f"refused: {shown(member.filename)} in it has {member.file_size:,} bytes")
            found += member.file_size
        if found > size:
            raise UserError(f"refused: it claims {found:,} bytes of content, but has {size:,}")
        return archive.read(f"{top}/data.pkl")


def count_members(file: BinaryIO, size: int) -> int:
    """Members of a zip file whose directory stands where every reader looks for it, and is no larger than
    its purpose; the library would read one of any size."""
    file.seek(max(size - 98, 0))
    tail = file.read(98)
    if len(tail) < 98:
        raise ValueError("it is cut short")
    magic, *_, count, length, start, comment = struct.unpack("<4s4H2LH", tail[-22:])
    at = size - 22
    if tail[-42:-38] == b"PK\6\7":  # a second record, of 64-bit numbers; the first then holds their minimum
        short, at = (count, length, start), size - 98
        (points_to,) = struct.unpack("<8xQ4x", tail[-42:-22])
        other, record, *_, count, length, start = struct.unpack("<4sQ2H2L4Q", tail[:56])
        same = short == (min(count, 2**16 - 1), min(length, 2**32 - 1), min(start, 2**32 - 1))
        if other != b"PK\6\6" or record != 44 or points_to != at or not same:
            raise ValueError("the archive's directory contradicts itself")
    if magic != b"PK\5\6" or comment or start + length != at:
        raise ValueError("no archive's directory at its end: it is cut short, or something was added")
    if length > MAX_BYTES or not count:
        raise ValueError(f"a directory of {length:,} bytes with {count:,} members")
    return count


def _check_legacy(start: io.BytesIO) -> None:
    """The five pickles before the numbers: a magic one, protocol, system, content, names of storages."""
    if start.read(len(_LEGACY_START)) != _LEGACY_START:
        raise ValueError("it begins like none")
    for _ in range(4):
        _check_pickle(start)


def _check_pickle(pickle: io.BytesIO) -> None:
    """Follow a pickle to its end without making anything; a value on the stack is the operation it is from.

    A tuple's is the tuple of its values', a name's the name.
    """
    stack: Stack = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    steps: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(pickle)
    for number, (operation, argument, _) in enumerate(steps):
        name = operation.name
        if number > MAX_OPERATIONS:
            raise UserError(f"refused: its pickle takes more than {MAX_OPERATIONS:,} operations")
        if name not in _TAKEN and name not in _TAKE_TO_MARK:
            raise ValueError(f"its pickle uses {name}, which torch.save does not")
        first = marks.pop() if name in _TAKE_TO_MARK else len(stack) - _TAKEN[name]
        if first < (marks[-1] if marks else 0):
            raise ValueError("its pickle takes what is not there")
        taken = stack[first:]
        del stack[first:]
        match name:
            case "PROTO" if argument != 2:
                raise ValueError(f"pickle protocol {argument}, expected 2")
            case "PROTO" | "STOP":
                pass
            case "MARK":
                marks.append(len(stack))
            case "GLOBAL":
                stack.append(_check_name(argument))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "SETITEM" | "SETITEMS":
                _check_keys(taken[::2])
            case "APPEND" | "APPENDS":
                pass
            case "BUILD":
                if taken != ["EMPTY_DICT"]:
                    raise ValueError("an object's attributes that are no dict")
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(taken))
            case "REDUCE" | "NEWOBJ" | "BINPERSID":
                _check_call(name, taken)
                stack.append(name)
            case "LONG1" if argument.bit_length() > 64:
                raise ValueError(f"a number of {argument.bit_length():,} bits")
            case _:
                stack.append(name)


def _check_name(name: str) -> str:
    if name not in _NAMED:
        raise UserError(
            f"refused, it is more than plain tensors: reading it would call {shown(name.replace(' ', '.'))}. "
            "Nothing was run. Ask its author for .safetensors, or, if you trust the file, load it with "
            "torch and save its tensors alone"
        )
    return name


def _check_keys(keys: Stack) -> None:
    for key in keys:
        if not isinstance(key, str) or key not in _KEYS:
            what = (
                "a tuple" if isinstance(key, tuple) or key == "EMPTY_TUPLE" else "neither a text nor a number"
            )
            raise UserError(f"refused: a key in it is {what}, expected tensors by name")


def _check_call(operation: str, taken: Stack) -> None:
    """Calls make empty containers or tensors; what a tensor's values are looked up by is a tuple of texts."""
    *called, arguments = taken
    if operation == "BINPERSID":
        fits = isinstance(arguments, tuple) and all(isinstance(kind, str) for kind in arguments)
    elif called[0] in _EMPTY:
        fits = arguments == "EMPTY_TUPLE"
    else:
        fits = operation == "REDUCE" and called[0] in _CALLED and isinstance(arguments, tuple)
    if not fits:
        raise ValueError("its pickle makes something other than tensors")
