"""Read untrusted pickles without executing code.

`pickle.load` can run arbitrary code of a file, so it is not used. This interpreter supports the
opcodes for lists, dicts, texts, integers and a uint8 matrix, as written by any numpy under Python 2
or 3 in protocols 0 to 5. It imports and calls nothing: the five names that a file may contain are
only symbols. Its work is bounded by the size of the file and by a maximum number of opcodes.
"""

from __future__ import annotations

import codecs
import io
import pickle  # only for the names of the opcodes
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np

MAX_OPCODES = 2_000_000  # CIFAR-100's train has 0.2 million, or 0.8 million in protocol 0


class Name(Enum):
    """A global name that a file may contain; `_reduce` defines its meaning."""

    RECONSTRUCT = auto()
    FROMBUFFER = auto()
    NDARRAY = auto()
    DTYPE = auto()
    ENCODE = auto()


@dataclass(eq=False)
class Matrix:
    """The only supported object, a matrix in C order; `pixels` is None until its state is read."""

    pixels: np.ndarray | None = None  # uint8 [N, M]


UINT8 = object()  # the only supported dtype
_UINT8_STATE = (3, "|", None, None, None, -1, -1, 0)

_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): Name.RECONSTRUCT,  # numpy 1
    ("numpy._core.multiarray", "_reconstruct"): Name.RECONSTRUCT,  # numpy 2
    ("numpy.core.numeric", "_frombuffer"): Name.FROMBUFFER,
    ("numpy._core.numeric", "_frombuffer"): Name.FROMBUFFER,
    ("numpy", "ndarray"): Name.NDARRAY,
    ("numpy", "dtype"): Name.DTYPE,
    ("_codecs", "encode"): Name.ENCODE,  # Python 3 writes bytes this way in protocols 0 to 2
}
# Opcodes followed by a little-endian number, and its width in bytes.
_INTEGERS = {pickle.BININT1: 1, pickle.BININT2: 2, pickle.BININT: 4}
_PUTS = {pickle.BINPUT: 1, pickle.LONG_BINPUT: 4}
_GETS = {pickle.BINGET: 1, pickle.LONG_BINGET: 4}
_TEXTS = {pickle.SHORT_BINUNICODE: 1, pickle.BINUNICODE: 4, pickle.BINUNICODE8: 8}
_BYTES = {
    pickle.SHORT_BINSTRING: 1,
    pickle.BINSTRING: 4,
    pickle.SHORT_BINBYTES: 1,
    pickle.BINBYTES: 4,
    pickle.BINBYTES8: 8,
    pickle.BYTEARRAY8: 8,
}
_SKIPPED = {pickle.PROTO: 1, pickle.FRAME: 8}
_CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False}
_TUPLES = {pickle.EMPTY_TUPLE: 0, pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}


def safe_loads(data: bytes) -> Any:  # noqa: C901, PLR0912, PLR0915 - one branch per opcode
    """Return the value of a pickle, made of dict, list, tuple, bytes, str, int, bool, None and Matrix.

    Raises ArithmeticError, LookupError, TypeError or ValueError for anything else.
    """
    source = io.BytesIO(data)  # does not copy the bytes
    stack: list[Any] = []
    marked: list[list[Any]] = []  # the stack below each open mark
    memo: dict[int, Any] = {}
    encoded = 0  # characters; encoding a memoized text again and again would be a bomb

    def take(count: int) -> bytes:
        chunk = source.read(count)  # allocates no more than the file contains
        if len(chunk) != count:
            raise ValueError("it is truncated")
        return chunk

    def number(width: int) -> int:
        return int.from_bytes(take(width), "little")

    def line() -> bytes:
        text = source.readline()
        if not text.endswith(b"\n"):
            raise ValueError("it is truncated")
        return text[:-1]

    def since_mark() -> list[Any]:
        """Pop the items above the last mark; call it in a separate statement, as it rebinds `stack`."""
        nonlocal stack
        items, stack = stack, marked.pop()
        return items

    for _ in range(MAX_OPCODES):
        opcode = source.read(1)
        if opcode in _INTEGERS:
            width = _INTEGERS[opcode]
            stack.append(int.from_bytes(take(width), "little", signed=width == 4))
        elif opcode in _BYTES:
            stack.append(take(number(_BYTES[opcode])))
        elif opcode in _PUTS:
            memo[number(_PUTS[opcode])] = stack[-1]
        elif opcode in _TEXTS:
            stack.append(take(number(_TEXTS[opcode])).decode())
        elif opcode == pickle.MEMOIZE:
            memo[len(memo)] = stack[-1]
        elif opcode in _GETS:
            stack.append(memo[number(_GETS[opcode])])
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _SKIPPED:
            take(_SKIPPED[opcode])
        elif opcode in _TUPLES:
            stack.append(tuple(reversed([stack.pop() for _ in range(_TUPLES[opcode])])))
        else:
            match opcode:
                case pickle.MARK:
                    marked.append(stack)
                    stack = []
                case pickle.EMPTY_LIST:
                    stack.append([])
                case pickle.EMPTY_DICT:
                    stack.append({})
                case pickle.TUPLE:
                    items = since_mark()
                    stack.append(tuple(items))
                case pickle.LIST:
                    items = since_mark()
                    stack.append(items)
                case pickle.DICT:
                    items = since_mark()
                    stack.append(_set_items({}, items))
                case pickle.APPEND:
                    item = stack.pop()
                    list.append(stack[-1], item)
                case pickle.APPENDS:
                    items = since_mark()
                    list.extend(stack[-1], items)
                case pickle.SETITEM:
                    value, key = stack.pop(), stack.pop()
                    _set_items(stack[-1], [key, value])
                case pickle.SETITEMS:
                    items = since_mark()
                    _set_items(stack[-1], items)
                case pickle.INT:
                    stack.append(int(line()))  # 00 and 01 are False and True
                case pickle.LONG:
                    stack.append(int(line().removesuffix(b"L")))
                case pickle.STRING:
                    stack.append(_unquote(line()))
                case pickle.UNICODE:
                    stack.append(_unescape(line()))
                case pickle.PUT:
                    memo[int(line())] = stack[-1]
                case pickle.GET:
                    stack.append(memo[int(line())])
                case pickle.GLOBAL:
                    module, name = line().decode(), line().decode()
                    stack.append(_name(module, name))
                case pickle.STACK_GLOBAL:
                    name, module = stack.pop(), stack.pop()
                    stack.append(_name(module, name))
                case pickle.REDUCE:
                    arguments, function = stack.pop(), stack.pop()
                    if function is Name.ENCODE:
                        encoded += len(arguments[0])
                        if encoded > len(data):
                            raise ValueError("it encodes more text than it contains")
                    stack.append(_reduce(function, arguments))
                case pickle.BUILD:
                    state = stack.pop()
                    _build(stack[-1], state)
                case pickle.STOP:
                    (value,) = stack
                    if marked or source.read(1):
                        raise ValueError("it has data after its end")
                    return value
                case b"":
                    raise ValueError("it is truncated")
                case _:
                    raise ValueError(f"opcode {opcode!r} does not occur in CIFAR's pickles")
    raise ValueError("it has too many opcodes")


def _set_items(target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(target) is not dict or not isinstance(key, str | bytes) or key in target:
            raise ValueError("a dict has a repeated key or a key that is not a text")
        target[key] = value
    return target


def _unquote(text: bytes) -> bytes:
    """Return the value of a string that Python 2 wrote as source code, with quotes and escapes."""
    if len(text) < 2 or text[0] != text[-1] or text[:1] not in b"'\"":
        raise ValueError("a string has no quotes")
    return codecs.escape_decode(text[1:-1])[0]


def _unescape(text: bytes) -> str:
    """Return the value of a text with escapes; ValueError for a lone surrogate, as in UTF-8."""
    value = text.decode("raw-unicode-escape")
    value.encode()
    return value


def _name(module: Any, name: Any) -> Name:
    # Look up texts only: hashing a nested tuple can take forever or overflow the C stack.
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a name is not a text")
    if (symbol := _NAMES.get((module, name))) is None:
        raise ValueError(f"it names {module:.40}.{name:.40}, which no CIFAR file needs")
    return symbol


def _reduce(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case Name.ENCODE, (str(text), "latin1"):
            return text.encode("latin1")
        case Name.DTYPE, ("u1" | b"u1", 0, 1):
            return UINT8
        case Name.RECONSTRUCT, (Name.NDARRAY, (0,), b"b" | "b"):
            return Matrix()
        case Name.FROMBUFFER, (bytes(data), dtype, (int(rows), int(columns)), "C") if (
            dtype is UINT8
        ):
            return Matrix(_matrix(data, rows, columns))
    raise ValueError("it contains an object that is not a uint8 matrix in C order")


def _build(target: Any, state: Any) -> None:
    if target is UINT8 and isinstance(state, tuple) and len(state) == len(_UINT8_STATE):
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        if (state[0], order, *state[2:]) == _UINT8_STATE:
            return
    match target, state:
        case Matrix(pixels=None), (1, (int(rows), int(columns)), dtype, 0, bytes(data)) if (
            dtype is UINT8
        ):
            target.pixels = _matrix(data, rows, columns)
            return
    raise ValueError("it contains an object that is not a uint8 matrix in C order")


def _matrix(data: bytes, rows: int, columns: int) -> np.ndarray:
    if rows < 0 or columns < 0 or rows * columns != len(data):
        raise ValueError("the size of an array does not match its shape")
    return np.frombuffer(data, dtype=np.uint8).reshape(rows, columns)
