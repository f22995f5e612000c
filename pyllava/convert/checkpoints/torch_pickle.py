"""An interpreter for the one kind of pickle that torch.save writes: tables of tensors. It can name tensors,
nothing else.

Python's own unpickler is not used: it would allocate what a hostile memo index or length asks for. This one
knows the opcodes below and a fixed table of globals; anything else is UnsafeCheckpoint, and no callable from
the file is ever run.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, UnsafeCheckpoint, shown

MAX_OPCODES = 1_000_000
MAX_DIMS = 8


@dataclass(frozen=True)
class Function:
    """A global that REDUCE may name; the work is done by our own code in `_call`."""

    name: str


@dataclass(frozen=True)
class StorageType:
    dtype: str  # a key of dtypes.STORED


@dataclass(frozen=True)
class Storage:
    """A member `data/<key>` of the archive that holds `n_elements` numbers."""

    dtype: str
    key: str
    n_elements: int


@dataclass(frozen=True)
class View:
    """A tensor: a strided view of a storage. Offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


GLOBALS: dict[tuple[str, str], Function | StorageType] = {
    ("collections", "OrderedDict"): Function("OrderedDict"),
    ("torch._utils", "_rebuild_tensor"): Function("_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"): Function("_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"): Function("_rebuild_parameter"),
    ("torch", "DoubleStorage"): StorageType("f64"),
    ("torch", "FloatStorage"): StorageType("f32"),
    ("torch", "HalfStorage"): StorageType("f16"),
    ("torch", "BFloat16Storage"): StorageType("bf16"),
    ("torch", "LongStorage"): StorageType("i64"),
    ("torch", "IntStorage"): StorageType("i32"),
    ("torch", "ShortStorage"): StorageType("i16"),
    ("torch", "CharStorage"): StorageType("i8"),
    ("torch", "ByteStorage"): StorageType("u8"),
    ("torch", "BoolStorage"): StorageType("bool"),
}

_MARK = object()


def load(data: bytes) -> Any:
    """The object in a torch pickle: tables, lists, tuples, texts, numbers and `View`s."""
    return _Machine(data).run()


class _Machine:
    """Stack, memo and position. `run` steps through the opcodes; one method or table row each."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        if self.take(1) != b"\x80" or self.number("<B") not in (2, 3, 4, 5):
            raise CheckpointError("the pickle does not start with protocol 2 to 5")
        for _ in range(MAX_OPCODES):
            code = self.number("<B")
            if code == 0x2E:  # STOP
                return self.finish()
            step = _STEPS.get(code)
            if step is None:
                raise UnsafeCheckpoint(
                    f"the pickle uses opcode {shown(bytes([code]))}, which no table of tensors needs"
                )
            step(self)
        raise CheckpointError(f"the pickle has more than {MAX_OPCODES} opcodes")

    def finish(self) -> Any:
        if self.position != len(self.data):
            raise CheckpointError(
                f"the pickle goes on for {len(self.data) - self.position} bytes after its end"
            )
        if len(self.stack) != 1 or self.stack[0] is _MARK:
            raise CheckpointError(f"the pickle ends with {len(self.stack)} objects, need 1")
        return self.stack[0]

    # Reading

    def take(self, n: int) -> bytes:
        end = self.position + n
        if end > len(self.data):
            raise CheckpointError(f"the pickle is cut short at byte {self.position}")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + 256)
        if end < 0:
            raise CheckpointError(f"the pickle has an unterminated name at byte {self.position}")
        piece = self.take(end - self.position)
        self.take(1)
        return _text(piece)

    # The stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise CheckpointError(f"the pickle takes from an empty stack at byte {self.position}")
        return self.stack.pop()

    def pop_many(self, n: int) -> tuple[Any, ...]:
        return tuple(reversed([self.pop() for _ in range(n)]))

    def pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while self.stack:
            item = self.stack.pop()
            if item is _MARK:
                return items[::-1]
            items.append(item)
        raise CheckpointError(f"the pickle has no mark before byte {self.position}")

    def top(self, kind: type[Any]) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise UnsafeCheckpoint(
                f"the pickle changes something that is no {kind.__name__} at byte {self.position}"
            )
        return self.stack[-1]

    # Opcodes that do more than push

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise CheckpointError(f"the pickle recalls object {index}, which it never kept")
        self.push(self.memo[index])

    def put(self, index: int) -> None:
        value = self.pop()
        self.push(value)
        self.memo[index] = value

    def long1(self) -> None:
        n = self.number("<B")
        if n > 8:
            raise CheckpointError(f"the pickle holds an integer of {n} bytes, at most 8")
        self.push(int.from_bytes(self.take(n), "little", signed=True))

    def set_items(self, items: list[Any]) -> None:
        table = self.top(dict)
        if len(items) % 2:
            raise CheckpointError("the pickle has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):  # never hash what the file built: a deep tuple would recurse
                raise CheckpointError(f"the pickle has a key of type {type(key).__name__}")
            table[key] = value

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def frame(self) -> None:
        self.take(8)

    def find(self, module: Any, name: Any) -> None:
        found = GLOBALS.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if found is None:
            where = ".".join(
                part if isinstance(part, str) else type(part).__name__ for part in (module, name)
            )
            raise UnsafeCheckpoint(
                f"the pickle asks for {shown(where)}, which is not part of a table of tensors"
            )
        self.push(found)

    def build(self) -> None:
        """The attributes of an OrderedDict (state_dict's `_metadata`): of no use here."""
        self.pop()
        self.top(dict)

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Function) or not isinstance(args, tuple):
            raise UnsafeCheckpoint(f"the pickle calls {shown(function)} at byte {self.position}")
        self.push(_call(function.name, args))

    def persistent(self) -> None:
        self.push(_storage(self.pop()))


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"the pickle has a text that is not UTF-8: {shown(data)}") from None


def _storage(identity: Any) -> Storage:
    """("storage", StorageType, key, device, n_elements)."""
    if isinstance(identity, tuple) and len(identity) == 5:
        kind, storage_type, key, _, n = identity
        right = kind == "storage" if isinstance(kind, str) else False
        if (
            right
            and isinstance(storage_type, StorageType)
            and isinstance(key, str)
            and type(n) is int
            and n >= 0
        ):
            return Storage(storage_type.dtype, key, n)
    raise UnsafeCheckpoint("the pickle refers to something outside it that is no storage of numbers")


def _call(name: str, args: tuple[Any, ...]) -> Any:
    if name == "OrderedDict" and not args:
        return {}
    if name == "_rebuild_parameter" and len(args) == 3 and isinstance(args[0], View):
        return args[0]
    if name == "_rebuild_tensor" and len(args) == 4:
        return _view(*args)
    if name == "_rebuild_tensor_v2" and len(args) in (6, 7):
        if (
            len(args) == 7 and args[6]
        ):  # lazy conjugate or negation: the stored numbers would be the wrong ones
            raise CheckpointError("the pickle holds a tensor with extra state (conjugate or negated view)")
        return _view(*args[:4])
    raise UnsafeCheckpoint(f"the pickle calls {name} with {len(args)} arguments of the wrong kind")


def _view(storage: Any, offset: Any, shape: Any, strides: Any) -> View:
    """A checked view: every element it reaches lies inside its storage."""
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise UnsafeCheckpoint(
            "the pickle builds a tensor from something that is no storage, shape and strides"
        )
    if len(shape) > MAX_DIMS or len(shape) != len(strides):
        raise CheckpointError(f"the pickle holds a tensor with {len(shape)} sizes and {len(strides)} strides")
    if not all(type(n) is int and 0 <= n < 2**48 for n in (offset, *shape, *strides)):
        raise CheckpointError("the pickle holds a tensor with a negative or absurd offset, size or stride")
    if math.prod(shape) > 2**48:
        raise CheckpointError("the pickle holds a tensor of more than 2^48 elements")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.n_elements:
        raise CheckpointError(
            f"the pickle holds a tensor that reaches element {last} of {storage.n_elements}"
        )
    return View(storage, offset, shape, strides)


def _sized(form: str, make: Callable[[bytes], Any]) -> Callable[[_Machine], None]:
    """An opcode that pushes `make` of a piece whose length comes first."""
    return lambda m: m.push(make(m.take(m.number(form))))


_STEPS: dict[int, Callable[[_Machine], None]] = {
    0x95: _Machine.frame,
    0x28: lambda m: m.push(_MARK),
    0x4E: lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    0x4A: lambda m: m.push(m.number("<i")),  # BININT
    0x4B: lambda m: m.push(m.number("<B")),
    0x4D: lambda m: m.push(m.number("<H")),
    0x8A: _Machine.long1,
    0x47: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),  # BINFLOAT
    0x58: _sized("<I", _text),  # BINUNICODE
    0x8C: _sized("<B", _text),
    0x42: _sized("<I", bytes),  # BINBYTES
    0x43: _sized("<B", bytes),
    0x7D: lambda m: m.push({}),
    0x5D: lambda m: m.push([]),
    0x29: lambda m: m.push(()),
    0x74: lambda m: m.push(tuple(m.pop_to_mark())),
    0x85: lambda m: m.push(m.pop_many(1)),
    0x86: lambda m: m.push(m.pop_many(2)),
    0x87: lambda m: m.push(m.pop_many(3)),
    0x61: lambda m: m.append([m.pop()]),  # APPEND
    0x65: lambda m: m.append(m.pop_to_mark()),
    0x73: lambda m: m.set_items(list(m.pop_many(2))),  # SETITEM
    0x75: lambda m: m.set_items(m.pop_to_mark()),
    0x71: lambda m: m.put(m.number("<B")),  # BINPUT
    0x72: lambda m: m.put(m.number("<I")),
    0x94: lambda m: m.put(len(m.memo)),
    0x68: lambda m: m.get(m.number("<B")),  # BINGET
    0x6A: lambda m: m.get(m.number("<I")),
    0x63: lambda m: m.find(m.line(), m.line()),  # GLOBAL
    0x93: lambda m: m.find(*m.pop_many(2)),  # STACK_GLOBAL
    0x52: _Machine.reduce,
    0x62: _Machine.build,
    0x51: _Machine.persistent,
}
