"""Triton's interpreter, made honest: bfloat16 that rounds as hardware does, and a watch over memory.

The stock interpreter keeps bfloat16 as uint16 and computes on the bit patterns, reads past the end of tensors without a
word, and runs programs one after another, so that races never show. `install` mends the first and raises for the rest:
an access outside every argument, two programs that touch the same address (one of them storing), one store that writes
an address twice. TRITON_INTERPRET=1 must be set before Triton is imported (tests/conftest.py does so).
"""

from __future__ import annotations

import numpy as np


class MemoryFault(Exception):
    """A kernel reached outside its arguments, or two programs raced."""


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns to float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(np.shape(bits))


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bit patterns, to nearest, ties to even."""
    f = np.ascontiguousarray(np.asarray(values, dtype=np.float32))
    bits = f.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(f), 0x7FC0, rounded).astype(np.uint16).reshape(f.shape)


def install() -> None:
    """Patch the interpreter; a second call does nothing."""
    from triton.runtime import interpreter

    if getattr(interpreter, "_honest", False):
        return
    interpreter._honest = True
    _bfloat16(interpreter)
    _memory(interpreter)


def _bfloat16(interpreter) -> None:
    import triton.language as tl
    from triton._C.libtriton import ir

    Handle, Builder, np_dtype = interpreter.TensorHandle, interpreter.InterpreterBuilder, interpreter._get_np_dtype
    old = {n: getattr(Builder, n) for n in ("cast_impl", "create_fp_to_fp", "binary_op", "unary_op", "ternary_op")}
    old |= {n: getattr(Builder, n) for n in ("create_fma", "create_dot")}
    plain = (tl.bfloat16, tl.float16, tl.float32, tl.float64)

    def is_bf16(handle) -> bool:
        return not isinstance(handle.dtype, tl.pointer_type) and handle.dtype.scalar == tl.bfloat16

    def value(handle):
        return widen(handle.data) if is_bf16(handle) else handle.data

    def wrap(out, dtype):
        return Handle(out if out.dtype == np.bool_ else narrow(out), dtype)

    def cast_impl(self, source, target):
        if isinstance(source.dtype, tl.pointer_type) or tl.bfloat16 not in (source.dtype.scalar, target.scalar):
            return old["cast_impl"](self, source, target)
        if source.dtype.scalar == target.scalar:
            return Handle(source.data, target.scalar)
        x = value(source)
        to_bf16 = target.scalar == tl.bfloat16
        return Handle(narrow(x.astype(np.float32)) if to_bf16 else x.astype(np_dtype(target)), target.scalar)

    def create_fp_to_fp(self, source, target, rounding):
        s, t = source.dtype.scalar, target.scalar
        nearest = rounding in (None, ir.ROUNDING_MODE.RTNE)
        if tl.bfloat16 in (s, t) and s in plain and t in plain and nearest:
            return cast_impl(self, source, target)
        return old["create_fp_to_fp"](self, source, target, rounding)

    def binary_op(self, a, b, op):
        if is_bf16(a) or is_bf16(b):
            return wrap(op(value(a), value(b)), a.dtype.scalar)
        return old["binary_op"](self, a, b, op)

    def unary_op(self, a, op):
        return wrap(op(value(a)), tl.bfloat16) if is_bf16(a) else old["unary_op"](self, a, op)

    def ternary_op(self, a, b, c, op):
        if is_bf16(c) and op is not np.where:
            return wrap(op(value(a), value(b), value(c)), tl.bfloat16)
        return old["ternary_op"](self, a, b, c, op)

    def create_fma(self, a, b, c):
        if not is_bf16(c):
            return old["create_fma"](self, a, b, c)
        return wrap((value(a).astype(np.float64) * value(b) + value(c)).astype(np.float32), tl.bfloat16)

    def create_dot(self, a, b, *rest):
        if is_bf16(a):
            a, b = Handle(value(a), tl.float32), Handle(value(b), tl.float32)
        return old["create_dot"](self, a, b, *rest)

    def get_bf16(self, number):
        return Handle(narrow(np.array([number], np.float32)), tl.bfloat16)

    for function in (cast_impl, create_fp_to_fp, binary_op, unary_op, ternary_op, create_fma, create_dot, get_bf16):
        setattr(Builder, function.__name__, function)


def _memory(interpreter) -> None:
    Builder, Grid = interpreter.InterpreterBuilder, interpreter.GridExecutor
    begin, load, store = Grid._init_args_hst, Builder.create_masked_load, Builder.create_masked_store
    atomic = Builder.create_atomic_rmw
    spans: list[tuple[int, int, np.ndarray]] = []  # address range of an argument and who wrote each of its bytes
    met: dict[int, list[int]] = {}  # programs that have added to an address, in their order
    acquired: dict[int, set[int]] = {}  # programs whose stores a program may see since: those before it there

    def tensors(values):
        for v in values:
            if isinstance(v, tuple):
                yield from tensors(v)
            elif hasattr(v, "data_ptr") and v.numel():
                extent = sum((n - 1) * s for n, s in zip(v.size(), v.stride(), strict=True)) + 1
                yield v.data_ptr(), v.data_ptr() + extent * v.element_size()

    def launch(self, args, kwargs):
        args, kwargs = begin(self, args, kwargs)
        for record in (spans, met, acquired):
            record.clear()
        for low, high in sorted(tensors([*args, *kwargs.values()])):
            if spans and low < spans[-1][1]:  # views of one tensor
                low, high = spans[-1][0], max(high, spans.pop()[1])
            spans.append((low, high, np.full(high - low, -1, np.int64)))
        return args, kwargs

    def program_of(self) -> int:
        x, y, z = self.grid_idx
        return (x * self.grid_dim[1] + y) * self.grid_dim[2] + z

    def touch(self, pointers, mask, stores: bool) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        where, wanted = np.broadcast_arrays(pointers.data, mask.data)
        where = where[wanted.astype(bool)].astype(np.int64)
        program, left = program_of(self), where.size
        known = [program, -1, *acquired.get(program, ())]
        for low, high, writers in spans:
            here = where[(where >= low) & (where + size <= high)] - low
            left -= here.size
            others = writers[here]
            if not np.isin(others, known).all():
                raise MemoryFault(f"program {program} reaches what program {others.max()} stored in the same launch")
            if stores:
                if np.unique(here).size != here.size:
                    raise MemoryFault(f"program {program} stores twice to one address in one instruction")
                writers[here] = program
        if left:
            raise MemoryFault(f"program {program} {'stores' if stores else 'loads'} {left} elements out of bounds")

    def masked_load(self, pointers, mask, *rest, **named):
        touch(self, pointers, mask, stores=False)
        return load(self, pointers, mask, *rest, **named)

    def masked_store(self, pointers, value, mask, *rest, **named):
        touch(self, pointers, mask, stores=True)
        return store(self, pointers, value, mask, *rest, **named)

    def atomic_rmw(self, operation, pointer, value, mask, order, scope):
        """Release and acquire: what the programs before it at this address had stored is there to be read."""
        if order.name == "ACQUIRE_RELEASE":
            program, address = program_of(self), int(pointer.data.flat[0])
            acquired.setdefault(program, set()).update(met.setdefault(address, []))
            met[address].append(program)
        return atomic(self, operation, pointer, value, mask, order, scope)

    Builder.create_atomic_rmw = atomic_rmw
    Grid._init_args_hst, Builder.create_masked_load, Builder.create_masked_store = launch, masked_load, masked_store
