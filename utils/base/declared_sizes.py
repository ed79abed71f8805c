"""What a checkpoint file declares is compared with what it holds, before torch takes memory for it or follows it anywhere.

A file of a kilobyte may declare a tensor of a terabyte (its storage, or a view with stride 0), or be a compressed archive that unpacks
to one. Nothing is unpickled here: the opcodes are read one by one (pickletools) and only tuples, numbers and names are followed.
"""

from __future__ import annotations

import math
import os
import pickletools
import zipfile
from typing import BinaryIO

ITEM_BYTES = {
    **{"DoubleStorage": 8, "LongStorage": 8, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16},
    **{"FloatStorage": 4, "IntStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "ShortStorage": 2},
    **{"CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "UntypedStorage": 1},
}
# Functions that a tensor may be rebuilt with: the positions of offset, size and stride among their arguments.
REBUILDS = {"_rebuild_tensor": (1, 2, 3), "_rebuild_tensor_v2": (1, 2, 3), "_rebuild_tensor_v3": (1, 2, 3)}
PLAIN_CALLS = {
    ("collections", "OrderedDict"),
    ("collections", "Counter"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_parameter"),
}
MAX_DIMS = 64
MAX_EMPTY_DIM = 2**16


class Unsafe(Exception):
    """The file holds something else than tensors and plain values."""


class Damaged(Exception):
    """The file is no checkpoint, is cut short, or declares more than it holds."""


class _Mark:
    pass


class _Unknown:
    """A value that is not followed."""


class _Name(tuple):
    """(module, name) of a global."""


class _Storage:
    def __init__(self, items: int):
        self.items = items


def check_file(path: str | os.PathLike) -> None:
    """Reads a checkpoint's declarations, and of a zip file the checksum of every entry.

    Raises:
        Unsafe: it would need code to be run, or names an object other than tensors and plain containers.
        Damaged: cut short, flipped bytes (zip files have checksums, torch's reader does not compare them), or sizes that are not there.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        begin = file.read(4)
        file.seek(0)
        if begin.startswith(b"PK\x03\x04"):
            _check_zip(file, size)
        elif begin[:1] == b"\x80":
            _check_legacy(file, size)
        else:
            raise Damaged("its first bytes are not those of a checkpoint")


def _check_zip(file: BinaryIO, size: int) -> None:
    """torch's format since 1.6: an uncompressed zip archive with data.pkl and an entry per storage."""
    try:
        archive = zipfile.ZipFile(file)
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) != len(names):
            raise Damaged("entries with the same name")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise Damaged(f"entry '{entry.filename}' is compressed, which torch never does")
        if sum(entry.file_size for entry in entries) > size:
            raise Damaged("its entries are larger than the file")
        pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Damaged("no data.pkl")
        broken = archive.testzip()
        if broken is not None:
            raise Damaged(f"wrong checksum in entry '{broken}'")
        prefix = pickles[0].removesuffix("data.pkl")
        sizes = {entry.filename: entry.file_size for entry in entries}
        with archive.open(pickles[0]) as stream:
            _walk(stream, lambda key, nbytes: nbytes <= sizes.get(f"{prefix}data/{key}", -1))
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, UnicodeError) as error:
        raise Damaged(str(error) or "cut short") from None


def _check_legacy(file: BinaryIO, size: int) -> None:
    """torch's format before 1.6: five pickles (magic number, protocol, system, content, keys), then the storages' bytes."""
    storages: dict[str, int] = {}

    def fits(key: str, nbytes: int) -> bool:
        storages[key] = nbytes
        return sum(storages.values()) <= size

    for _ in range(5):
        _walk(file, fits)


def _walk(stream: BinaryIO, fits) -> None:
    """Follows one pickle up to its end; `fits(key, nbytes)` says whether the file can hold such a storage."""
    stack: list = []
    memo: dict[int, object] = {}
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            _follow(opcode.name, argument, stack, memo, fits)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        # genops raises ValueError on a stream that ends or is none; the others come of a stack that does not fit.
        raise Damaged(f"unreadable ({type(error).__name__})") from None


def _follow(name: str, argument, stack: list, memo: dict, fits) -> None:
    """One opcode, of those that torch's weights_only reader knows."""
    if name in ("PROTO", "STOP", "FRAME"):
        return
    if name in ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "BINFLOAT"):
        stack.append(argument)
    elif name in ("NONE", "NEWFALSE", "NEWTRUE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "SHORT_BINSTRING"):
        stack.append(_Unknown)
    elif name == "MARK":
        stack.append(_Mark)
    elif name == "EMPTY_TUPLE":
        stack.append(())
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        _replace_last(stack, int(name[-1]))
    elif name == "TUPLE":
        values = _pop_to_mark(stack)
        stack.append(tuple(values))
    elif name in ("APPENDS", "SETITEMS"):
        _pop_to_mark(stack)
        stack[-1]
    elif name in ("APPEND", "BUILD"):
        stack.pop()
    elif name == "SETITEM":
        del stack[-2:]
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "GLOBAL":
        stack.append(_allowed(*argument.split(" ", 1)))
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop(), fits))
    elif name in ("REDUCE", "NEWOBJ"):
        arguments, function = stack.pop(), stack.pop()
        stack.append(_call(function, arguments))
    else:
        raise Unsafe(f"pickle opcode {name}")


def _replace_last(stack: list, n: int) -> None:
    values = tuple(stack[-n:])
    if len(values) < n:
        raise IndexError
    stack[-n:] = [values]


def _pop_to_mark(stack: list) -> list:
    values = []
    while (value := stack.pop()) is not _Mark:
        values.append(value)
    return values[::-1]


def _allowed(module: str, name: str) -> _Name:
    is_storage = module in ("torch", "torch.storage") and name in ITEM_BYTES
    is_dtype = module == "torch" and name.rstrip("0123456789") in ("float", "int", "uint", "bool", "bfloat", "complex")
    known = is_storage or is_dtype or (module == "torch._utils" and name in REBUILDS) or (module, name) in PLAIN_CALLS
    if not known:
        raise Unsafe(f"{module}.{name}")
    return _Name((module, name))


def _storage(declaration, fits) -> _Storage:
    kind, cls, key, _, items, *_ = declaration
    if kind != "storage" or not isinstance(items, int) or items < 0 or not isinstance(key, str):
        raise Damaged("a storage that is none")
    if not fits(key, items * ITEM_BYTES[cls[1]]):
        raise Damaged(f"storage '{key}' is declared with {items} entries, more than the file holds")
    return _Storage(items)


def _call(function, arguments):
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise Unsafe("a call of something that is no name")
    if function[1] in ITEM_BYTES or function[1] not in REBUILDS:
        if tuple(function) not in PLAIN_CALLS:
            raise Unsafe(".".join(function))
        return arguments[0] if function[1] == "Size" and arguments else _Unknown
    offset, size, stride = (arguments[at] for at in REBUILDS[function[1]])
    if not isinstance(arguments[0], _Storage):
        raise Damaged("a tensor without a storage")
    numbers = (offset, *size, *stride)
    if any(type(n) is not int or n < 0 for n in numbers) or len(size) != len(stride) or len(size) > MAX_DIMS:
        raise Damaged("a tensor whose shape is none")
    # A stride of 0 repeats one entry any number of times; no checkpoint needs it.
    entries = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if entries == 0:
        # Takes no memory, but its dimensions may become those of a network.
        if max(size) > MAX_EMPTY_DIM:
            raise Damaged(f"an empty tensor {tuple(size)}")
    elif entries > arguments[0].items or last >= arguments[0].items:
        raise Damaged(f"a tensor {tuple(size)} is declared in a storage of {arguments[0].items} entries")
    return _Unknown
