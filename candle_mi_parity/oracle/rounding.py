"""Float64 everywhere, and on request the rounding noise that float32 would have added.

A model that transformers loads in float64 is not float64 inside: norms, softmax and rotary cast to float32 and back.
:class:`Float64` is a dispatch mode that turns every float32 (or narrower) result type into float64, for all families.
:class:`RoundingNoise` extends it: Monte-Carlo arithmetic after Verificarlo (Denis et al. 2016; Sohier et al., TOMS
47(2) 2021), where each operation adds a random error of the size of float32 rounding, without any float32 run.

Rules, with u = 2⁻²⁴ the unit roundoff of float32 and o the result of an operation (per-element standard
deviation):

==================================  =====================================================================
matmul over K terms                 u·sqrt(A·K · Σa²b² + o²/3)    zero-mean accumulation, then one rounding
mean, sum over N terms              u·sqrt(N)/3·\\|o\\|               partial sums k/N·o, rounded one by one
softmax over N terms                u·sqrt(2/3)·\\|o\\| each, and one common factor u·sqrt(N)/3 a row
add, sub, mul, div, pow, …          u/sqrt(3)·\\|o\\|               the deviation of a uniform error in ±u
exp, silu, gelu, tanh, rsqrt, …     2u/sqrt(3)·\\|o\\|
layer norm over N terms             mean, variance, rsqrt and affine, each by its rule above
gelu of x                           and u/(2·sqrt(3))·\\|x\\|: 1 + tanh and 1 + erf cancel where x < 0
each of these in float16, o ≠ 0     and 2⁻²⁵/sqrt(3), for the subnormal numbers below 2⁻¹⁴
views, copies, gathers              exact
==================================  =====================================================================

An operation without a rule is an error. A depends on the order of a device's sums, see :class:`Arithmetic`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.module_tracker import ModuleTracker

from candle_mi_parity.errors import OracleError
from candle_mi_parity.oracle.arithmetic import CPU_FLOAT32, UNIT, Arithmetic
from candle_mi_parity.oracle.torch_state import torch_state

_ONE = 1 / math.sqrt(3)
"""Standard deviation of one rounding in units of the roundoff: a uniform error in ±1."""
_SUBNORMAL = {2.0**-11: 2.0**-25 * _ONE}
"""Unit roundoff → deviation of one rounding below the format's normal range, where its spacing is constant. Only
float16's range, whose spacing there is 2⁻²⁴, is reached by a model; the gate's floor covers float32's."""

_UNIT_OF = "_candle_mi_parity_unit"
_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})

_EXACT = frozenset(
    """
    alias arange argmax as_strided bitwise_and bitwise_not cat clone contiguous copy_ detach detach_
    embedding empty empty_like empty_strided eq expand fill_ full full_like gather ge gt index index_select
    is_nonzero item lift_fresh lift_fresh_copy logical_and logical_not logical_or lt le masked_fill
    masked_fill_ _local_scalar_dense max min minimum maximum ne neg new_empty new_empty_strided new_full
    new_ones new_zeros ones ones_like permute relu repeat reshape resize_ scalar_tensor scatter_ select slice
    sort split split_with_sizes squeeze stack t topk to _to_copy transpose tril triu unbind unfold unsqueeze
    _unsafe_view view where zero_ zeros zeros_like abs clamp clamp_min _reshape_alias random_
    """.split()  # noqa: SIM905 -- a list of ninety quoted names is no easier to read
)
_ONE_ROUNDING = frozenset({"add", "sub", "mul", "div", "rsub", "pow", "sqrt", "reciprocal"})
_TWO_ROUNDINGS = frozenset(
    {"exp", "silu", "gelu", "tanh", "rsqrt", "sin", "cos", "sigmoid", "log", "log1p", "softplus", "erf"}
)
_REDUCTIONS = frozenset({"mean", "sum"})
_MATMULS = frozenset({"mm", "addmm", "bmm", "baddbmm"})


@cache
def _name(func: Any) -> str:
    """``aten.add_.Tensor`` → ``add``: the in-place form rounds in the same way."""
    name = str(func.overloadpacket.__name__)
    in_place = name.endswith("_") and name[:-1] in _ONE_ROUNDING | _TWO_ROUNDINGS | _REDUCTIONS
    return name[:-1] if in_place else name


@cache
def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


class _AboveDispatch(TorchFunctionMode):
    """Two cases that a dispatch mode does not see.

    ``torch.tensor(0.1, dtype=torch.float32)`` rounds before any dispatch. ``x.to(dtype)`` dispatches nothing where x
    has that dtype, though in a narrower model it would round; ``x.to(device)`` never does.
    """

    def __init__(self, narrow: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._narrow = narrow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and out.is_floating_point():
            return func(*args, **{**kwargs, "dtype": torch.float64})
        cast = any(isinstance(value, torch.dtype | torch.Tensor) for value in (*args[1:], *kwargs.values()))
        if func in (torch.Tensor.to, torch.Tensor.type_as) and cast and out is args[0] and out.is_floating_point():
            return self._narrow(out)
        return out


class Float64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every floating result is float64, whatever dtype the code requested; no gradients, see :func:`torch_state`.

    Composite operations never reach a dispatch mode under ``torch.no_grad``; where one does
    (``torch.inference_mode``), its inner casts would not be seen, so it is refused.

    :raises OracleError: on a composite operation, or a floating result that is not float64.
    """

    def __enter__(self) -> Any:
        self._around = ExitStack()
        self._around.enter_context(torch_state(torch.float64))
        self._around.enter_context(_AboveDispatch(self.narrow))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._around.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_composite(func):
            raise OracleError(f"{func} is composite and reached the float64 mode; run under torch.no_grad")
        kwargs = dict(kwargs or {})
        asked = kwargs.get("dtype")
        if asked in _NARROW:
            kwargs["dtype"] = torch.float64
        if func is torch.ops.aten._softmax.default:
            args = (args[0], args[1], False)  # half_to_float asks for a float32 result
        if func is not torch.ops.aten.copy_.default and _holds_narrow(args):
            args = _widen(args)
        out = self.round(func, args, func(*args, **kwargs), asked)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in _NARROW:
                if func is torch.ops.aten.copy_.default:
                    continue  # a checkpoint's own buffer being filled, before it is widened
                raise OracleError(f"{func} gave {tensor.dtype} inside the float64 mode")
        return out

    def round(self, _func: Any, _args: Any, out: Any, _asked: torch.dtype | None) -> Any:
        """Hook for the noise; the truth adds none. ``_asked`` is the dtype that the code requested."""
        return out

    def narrow(self, tensor: torch.Tensor) -> torch.Tensor:
        """Hook for a cast to the model's own dtype, which in float64 does nothing."""
        return tensor


def _holds_narrow(values: Any) -> bool:
    """Avoids :func:`_widen`, which copies the tuple of operands, in most operations."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.dtype in _NARROW:
                return True
        elif isinstance(value, tuple | list) and _holds_narrow(value):
            return True
    return False


def _widen(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype in _NARROW else value
    if isinstance(value, tuple | list):
        return type(value)(_widen(item) for item in value)
    return value


@cache
def _normal_numbers(size: int) -> torch.Tensor:
    """N(0, 1) numbers, float64, from numpy's PCG64: the same on every machine, unlike torch's ``normal_``."""
    numbers = np.random.Generator(np.random.PCG64(0)).standard_normal(size, dtype=np.float32)
    return torch.from_numpy(numbers).to(torch.float64)


class NoisePool:
    """Standard normal numbers, drawn once a process and read from random offsets that depend on the seed.

    Fresh numbers for every operation would cost more than the forward pass. Two reads share an offset with
    probability 2⁻²², which does not affect a variance estimate.
    """

    SIZE = 1 << 22

    def __init__(self, seed: int) -> None:
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._numbers = _normal_numbers(self.SIZE)

    def draw(self, like: torch.Tensor) -> torch.Tensor:
        """Independent N(0, 1) numbers, float64, with the shape and device of ``like``; read-only."""
        count = like.numel()
        pieces = []
        while count > 0:
            offset = int(self._rng.integers(self.SIZE))
            pieces.append(self._numbers[offset : offset + count])
            count -= pieces[-1].numel()
        if not pieces:
            return torch.zeros_like(like)
        flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return flat.view(like.shape).to(like.device)


class MatmulCalls(ModuleTracker):
    """Names the matmuls of a pass by the innermost module and a number within it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def next(self) -> tuple[str, int]:
        module = max(self.parents - {"Global"}, key=len, default="no module")
        self.counts[module] += 1
        return module, self.counts[module]


class MatmulScales:
    """Σa²b² of every matmul of the truth pass, by module and call.

    In the samples these sums differ by parts in 10⁷, so they are computed once, in the truth pass.
    """

    def __init__(self) -> None:
        self._squares: dict[tuple[str, int], torch.Tensor] = {}

    def record(self, call: tuple[str, int], squares: torch.Tensor) -> None:
        self._squares[call] = squares

    def replay(self, call: tuple[str, int], out: torch.Tensor) -> torch.Tensor:
        """The sums of a matmul, repeated for the samples in a batch.

        :raises OracleError: the truth pass has no such matmul, or one of another shape.
        """
        squares = self._squares.get(call)
        if squares is None or out.shape[0] % squares.shape[0] or out.shape[1:] != squares.shape[1:]:
            found = "none there" if squares is None else f"one of shape {tuple(squares.shape)}"
            where = f"matmul {call[1]} in {call[0]}"
            raise OracleError(f"{where} of a sample has shape {tuple(out.shape)}; the truth pass has {found}")
        rows = out.shape[0] // squares.shape[0]
        return squares.repeat(rows, *[1] * (out.dim() - 1)) if rows > 1 else squares

    def require_all(self, calls: MatmulCalls) -> None:
        """:raises OracleError: a matmul of the truth pass is missing from a sample."""
        for module, number in self._squares:
            if number > calls.counts[module]:
                raise OracleError(f"matmul {number} in {module} of the truth pass is not in a sample")


class _NamingMatmuls(Float64):  # type: ignore[no-untyped-call]
    """A pass whose matmuls have names."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        self._calls = self._around.enter_context(MatmulCalls())
        return entered


class Truth64(_NamingMatmuls):  # type: ignore[no-untyped-call]
    """The truth pass: float64 without noise; it records each matmul's Σa²b² for the samples."""

    def __init__(self, scales: MatmulScales) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._scales = scales

    def round(self, func: Any, args: Any, out: Any, _asked: torch.dtype | None) -> Any:
        if (name := _name(func)) in _MATMULS:
            left, right = args[-2:]
            product = torch.mm if name.endswith("mm") and left.dim() == 2 else torch.bmm
            # float32 is precise enough for the size of the noise, and twice as fast.
            squares = product(*(factor.to(torch.float32, copy=True).square_() for factor in (left, right)))
            self._scales.record(self._calls.next(), squares.double())
        return out


class RoundingNoise(_NamingMatmuls):  # type: ignore[no-untyped-call]
    """A sample: float64 plus, at every operation, an error of the size of that operation's rounding.

    In a model of a narrower format some code requests float32 (norms, softmax, rotary tables). All tensors are
    float64 here, so the format that a tensor would have is carried as its unit roundoff: float32's where the code
    requested float32 or an operand has it, the model's elsewhere. Matmuls and layer norms accumulate in float32 in
    every format, as kernels do, and round once.

    :param pool: source of N(0, 1) numbers.
    :param scales: the truth pass's matmul sums.
    :raises OracleError: a floating operation has no rule, or the matmuls differ from those of the truth pass.
    """

    def __init__(self, pool: NoisePool, scales: MatmulScales, arithmetic: Arithmetic = CPU_FLOAT32) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pool = pool
        self._scales = scales
        self._model_unit = arithmetic.unit
        self._accumulation = arithmetic.accumulation

    def __exit__(self, kind: Any, *exception: Any) -> None:
        super().__exit__(kind, *exception)
        if kind is None:
            self._scales.require_all(self._calls)

    def round(self, func: Any, args: Any, out: Any, asked: torch.dtype | None) -> Any:
        name = _name(func)
        unit = self._unit_of_result(args, asked)
        if name == "native_layer_norm":
            return (_tag(self._layer_norm(args, unit), unit), *out[1:])
        if not isinstance(out, torch.Tensor) or not out.dtype.is_floating_point:
            if isinstance(out, tuple | list) and name not in _EXACT:
                raise OracleError(f"{func} has no noise rule")
            for part in out if isinstance(out, tuple | list) else ():
                _tag(part, unit)
            return out
        if name == "_to_copy" and unit > self._unit_of(args[0]):
            out = self._relative(out, _ONE, unit)
        return _tag(out if name in _EXACT else self._noisy(func, name, args, out, unit), unit)

    def narrow(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._unit_of(tensor) >= self._model_unit:
            return tensor
        with _disable_current_modes():
            rounded = self._relative(tensor.clone(), _ONE, self._model_unit)
        _tag(rounded, self._model_unit)
        return rounded

    def _unit_of(self, tensor: torch.Tensor) -> float:
        return float(getattr(tensor, _UNIT_OF, self._model_unit))

    def _unit_of_result(self, args: Any, asked: torch.dtype | None) -> float:
        if asked is not None and asked.is_floating_point:
            return UNIT if asked == torch.float32 else self._model_unit
        operands = [item for arg in args for item in (arg if isinstance(arg, tuple | list) else (arg,))]
        # A zero-dimensional operand does not promote, as in torch.
        units = [
            self._unit_of(operand)
            for operand in operands
            if isinstance(operand, torch.Tensor) and operand.dtype.is_floating_point and operand.dim() > 0
        ]
        return min(units, default=self._model_unit)

    def _noisy(self, func: Any, name: str, args: Any, out: torch.Tensor, unit: float) -> torch.Tensor:
        if name in _MATMULS:
            accumulated = UNIT**2 * args[-1].shape[-2] * self._accumulation
            variance = (self._scales.replay(self._calls.next(), out) * accumulated).addcmul_(
                out, out, value=unit**2 / 3
            )
            return self._subnormal(out.addcmul_(variance.sqrt_(), self._pool.draw(out)), unit)
        if name == "_softmax":
            row = out.select(args[1], 0).unsqueeze(args[1])
            common = self._pool.draw(row) * (math.sqrt(out.shape[args[1]]) / 3)
            return self._relative(out, math.sqrt(2) * _ONE, unit, common)
        if name in _REDUCTIONS:
            # Of positive terms the k-th partial sum is k/N of the whole: Σ (k/N)²/3 = N/9.
            return self._relative(out, math.sqrt(args[0].numel() / max(out.numel(), 1)) / 3, unit)
        if name in _ONE_ROUNDING:
            return self._relative(out, _ONE, unit)
        if name in _TWO_ROUNDINGS:
            out = self._relative(out, 2 * _ONE, unit)
            if name == "gelu":
                # x/2·(1 + tanh u), in float32 in any format: the rounding of the tanh remains where the sum cancels.
                out.addcmul_(self._pool.draw(out), args[0], value=UNIT * _ONE / 2)
            return out
        raise OracleError(f"{func} has no noise rule: add one to rounding.py with the reason for its size")

    def _relative(
        self, out: torch.Tensor, size: float, unit: float, common: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``out·(1 + unit·(size·N(0,1) + common))``, in place: nothing else refers to a dispatch result yet."""
        noise = self._pool.draw(out)
        if common is None:
            return self._subnormal(out.addcmul_(out, noise, value=unit * size), unit)
        return self._subnormal(out.addcmul_(out, noise * size + common, value=unit), unit)

    def _subnormal(self, out: torch.Tensor, unit: float) -> torch.Tensor:
        """The rounding of numbers below the normal range of a format, in place; an exact 0 stays."""
        if (deviation := _SUBNORMAL.get(unit)) is None:
            return out
        return out.addcmul_(self._pool.draw(out), (out != 0).to(out.dtype), value=deviation)

    def _layer_norm(self, args: Any, unit: float) -> torch.Tensor:
        """LayerNorm in its float32 steps, each with its own rounding.

        :param args: ``(x, normalized_shape, weight, bias, eps)`` of ``aten.native_layer_norm``.
        """
        x, shape, weight, bias, eps = args
        dims = list(range(x.dim() - len(shape), x.dim()))
        mean = x.mean(dims, keepdim=True)
        # The error of a mean scales with the terms, not with their sum, which may cancel.
        spread = x.square().mean(dims, keepdim=True).sqrt()
        mean = mean.addcmul_(spread, self._pool.draw(mean), value=UNIT * _ONE)
        centred = self._relative(x - mean, _ONE, UNIT)
        variance = self._relative(centred.square().mean(dims, keepdim=True), math.sqrt(math.prod(shape)) / 3, UNIT)
        scale = self._relative((variance + eps).rsqrt_(), 2 * _ONE, UNIT)
        out = self._relative(centred * scale, _ONE, UNIT)
        if weight is not None:
            out = self._relative(out * weight, _ONE, UNIT)
        out = out if bias is None else self._relative(out + bias, _ONE, UNIT)
        return self._relative(out, _ONE, unit) if unit > UNIT else out


def _tag(value: Any, unit: float) -> Any:
    """Record the format that a tensor would have."""
    if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
        setattr(value, _UNIT_OF, unit)
    return value
