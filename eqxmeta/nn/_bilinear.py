"""The convolution as three bilinear maps, each of which is the others' transpose.

    convolve(x, w) -> y          input_gradient(y, w) -> x          filter_gradient(x, y) -> w

On a CPU each is one matrix product of patches. `lax.conv_general_dilated` would be a grouped
convolution as soon as `vmap` runs over the weights, and inside of any XLA loop its filter gradient
is a naive kernel (jax-ml/jax issue 12868). They are primitives, rather than slices and a product
left to JAX's derivatives, because only so the examples that a `vmap` adds and the positions of an
image become one axis of one product, in both gradients without a transposed copy, and because only
so a gradient is as cheap to differentiate as the convolution itself.

Everywhere: `x [tasks, n, height, width, inputs]`, `w [tasks, kh, kw, inputs, outputs]`,
`y [tasks, n, rows, columns, outputs]`, where each of `tasks` has weights of its own.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from .._jaxpr.flops import register_flops


class Geometry(NamedTuple):
    """Where a kernel of `kernel` positions meets an image of `size`; `(vertical, horizontal)`."""

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]

    @property
    def out(self) -> tuple[int, int]:
        rows, columns = (
            max(0, (size + sum(pad) - dilation * (kernel - 1) - 1) // stride + 1)
            for size, kernel, stride, pad, dilation in zip(*self, strict=True)
        )
        return rows, columns


def convolve(x: Array, w: Array, geometry: Geometry) -> Array:
    # Under `jax.shard_map` what is the same on all devices is marked as varying where the other one
    # varies: the transpose of the mark is the sum over devices that its gradient needs.
    varying = [jax.typeof(z).manual_axis_type.varying for z in (x, w)]
    x, w = (
        lax.pcast(z, missing, to="varying") if (missing := tuple(other - own)) else z
        for z, own, other in zip((x, w), varying, varying[::-1], strict=True)
    )
    return _convolve.bind(x, w, geometry=geometry)


# --- On a CPU: patches and a product.


def _patches(x: Array, geometry: Geometry) -> Array:
    """`[tasks, n, height, width, c] -> [tasks, n, rows, columns, kh * kw * c]`."""
    zero = jnp.zeros((), x.dtype)
    x = lax.pad(x, zero, [(0, 0, 0)] * 2 + [(*p, 0) for p in geometry.padding] + [(0, 0, 0)])
    spans = [(n - 1) * s + 1 for n, s in zip(geometry.out, geometry.stride, strict=True)]

    def shifted(i: int, j: int) -> Array:
        top, left = i * geometry.dilation[0], j * geometry.dilation[1]
        start = (0, 0, top, left, 0)
        stop = (*x.shape[:2], top + spans[0], left + spans[1], x.shape[4])
        return lax.slice(x, start, stop, (1, 1, *geometry.stride, 1))

    kh, kw = geometry.kernel
    return jnp.concatenate([shifted(i, j) for i in range(kh) for j in range(kw)], axis=-1)


def _product(x: Array, w: Array) -> Array:
    """`x [tasks, n, rows, columns, k]` times `w [tasks, k, o]`."""
    # Two axes: with more the compiler would contract them through a transposed copy.
    flat = _flat(x)
    out = flat[0] @ w[0] if x.shape[0] == 1 else flat @ w
    return out.reshape(*x.shape[:-1], w.shape[-1])


def _flat(x: Array) -> Array:
    """`[tasks, ..., k] -> [tasks, -1, k]`, also for no tasks, of which NumPy's -1 says nothing."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _splits(geometry: Geometry, inputs: int, outputs: int, dtype: np.dtype) -> bool:
    """Whether to take the columns of a patch from the input and its rows from the output.

    A patch of `kh * kw * inputs` numbers a position is then one of `kw * inputs` on one side of
    the product and one of `kh * outputs` on the other. The product is as large, and its memory
    traffic is smaller wherever their sum is.
    """
    kh, kw = geometry.kernel
    smaller = kw * inputs + kh * outputs < kh * kw * inputs
    # What the rows give is rounded before it is added up: too coarse for half precision.
    return smaller and geometry.stride[0] == 1 and dtype.itemsize >= 4


def _across(x: Array, geometry: Geometry) -> Array:
    """Patches of one row: `[tasks, n, height, width, c] -> [tasks, n, height, columns, kw * c]`."""
    across = geometry._replace(
        kernel=(1, geometry.kernel[1]), padding=((0, 0), geometry.padding[1])
    )
    return _patches(x, across)


def _rows(x: Array, offset: int, rows: int) -> Array:
    """`rows` rows of `x` from `offset`, zero where there are none."""
    edges = [(0, 0, 0)] * x.ndim
    edges[2] = (-offset, offset + rows - x.shape[2], 0)
    return lax.pad(x, jnp.zeros((), x.dtype), edges)


def _offsets(geometry: Geometry) -> list[int]:
    """The row of the input that the first row of the output sees, for each row of the kernel."""
    return [i * geometry.dilation[0] - geometry.padding[0][0] for i in range(geometry.kernel[0])]


def _convolve_cpu(x: Array, w: Array, *, geometry: Geometry) -> Array:
    tasks, kh, kw, inputs, outputs = w.shape
    if not _splits(geometry, inputs, outputs, x.dtype):
        return _product(_patches(x, geometry), _flat(w))
    # What each row of the input gives to each of the `kh` rows of the output that see it.
    w = jnp.transpose(w, (0, 2, 3, 1, 4)).reshape(tasks, kw * inputs, kh * outputs)
    given = _product(_across(x, geometry), w)
    given = jnp.split(given, kh, axis=-1)
    rows = geometry.out[0]
    return functools.reduce(jnp.add, map(lambda g, o: _rows(g, o, rows), given, _offsets(geometry)))


def _filter_gradient_cpu(x: Array, y: Array, *, geometry: Geometry) -> Array:
    tasks, inputs, outputs = x.shape[0], x.shape[-1], y.shape[-1]
    kh, kw = geometry.kernel
    if not _splits(geometry, inputs, outputs, x.dtype):
        w = _contract(_patches(x, geometry), y)
        return w.reshape(tasks, kh, kw, inputs, outputs)
    height = geometry.size[0]
    seen = jnp.concatenate([_rows(y, -o, height) for o in _offsets(geometry)], axis=-1)
    w = _contract(_across(x, geometry), seen).reshape(tasks, kw, inputs, kh, outputs)
    return jnp.transpose(w, (0, 3, 1, 2, 4))


def _contract(x: Array, y: Array) -> Array:
    """`x [tasks, ..., a]` and `y [tasks, ..., b]` to `[tasks, a, b]`."""
    x, y = _flat(x), _flat(y)
    if x.shape[0] != 1:
        return jnp.swapaxes(lax.dot_general(y, x, (((1,), (1,)), ((0,), (0,)))), 1, 2)
    dimensions = (((0,), (0,)), ((), ()))
    # The product would turn its left side: the smaller one.
    if x.shape[-1] <= y.shape[-1]:
        return lax.dot_general(x[0], y[0], dimensions)[None]
    return lax.dot_general(y[0], x[0], dimensions).T[None]


def _input_gradient_cpu(y: Array, w: Array, *, geometry: Geometry) -> Array:
    if geometry.stride == (1, 1):
        # A convolution of the gradient with the kernel turned around.
        reach = [d * (k - 1) for d, k in zip(geometry.dilation, geometry.kernel, strict=True)]
        padding = tuple((r - a, r - b) for r, (a, b) in zip(reach, geometry.padding, strict=True))
        turned = jnp.swapaxes(w[:, ::-1, ::-1], 3, 4)
        back = geometry._replace(size=geometry.out, padding=padding)
        return _convolve_cpu(y, turned, geometry=back)
    # Each position of the output is spread over its patch, and what overlaps is added.
    wide = _product(y, jnp.swapaxes(_flat(w), 1, 2))
    x = jax.ShapeDtypeStruct((*y.shape[:2], *geometry.size, w.shape[3]), y.dtype)
    return jax.linear_transpose(functools.partial(_patches, geometry=geometry), x)(wide)[0]


# --- Elsewhere: the convolution of the platform.


def _convolve_lax(x: Array, w: Array, *, geometry: Geometry) -> Array:
    def one(x: Array, w: Array) -> Array:
        return lax.conv_general_dilated(
            x,
            w,
            geometry.stride,
            geometry.padding,
            rhs_dilation=geometry.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    return one(x[0], w[0])[None] if x.shape[0] == 1 else jax.vmap(one)(x, w)


def _input_gradient_lax(y: Array, w: Array, *, geometry: Geometry) -> Array:
    x = jax.ShapeDtypeStruct((*y.shape[:2], *geometry.size, w.shape[3]), y.dtype)
    return jax.linear_transpose(lambda x: _convolve_lax(x, w, geometry=geometry), x)(y)[0]


def _filter_gradient_lax(x: Array, y: Array, *, geometry: Geometry) -> Array:
    shape = (x.shape[0], *geometry.kernel, x.shape[-1], y.shape[-1])
    w = jax.ShapeDtypeStruct(shape, x.dtype)
    return jax.linear_transpose(lambda w: _convolve_lax(x, w, geometry=geometry), w)(y)[0]


# --- As primitives.


def _primitive(name: str, cpu: Callable[..., Array], elsewhere: Callable[..., Array]) -> Primitive:
    primitive = Primitive(name)

    @functools.cache
    def compiled(geometry: Geometry) -> Callable[..., Array]:
        return jax.jit(functools.partial(primitive.bind, geometry=geometry))

    def abstract(a: Any, b: Any, *, geometry: Geometry) -> Any:
        out = jax.eval_shape(
            functools.partial(cpu, geometry=geometry),
            jax.ShapeDtypeStruct(a.shape, a.dtype),
            jax.ShapeDtypeStruct(b.shape, b.dtype),
        )
        # All else that the type says, such as over which axes of a mesh it varies, stays.
        return a.update(shape=out.shape, dtype=out.dtype, weak_type=False)

    def evaluate(a: Array, b: Array, *, geometry: Geometry) -> Array:
        with jax.disable_jit(False):  # else compiling it would come back here
            return compiled(geometry)(a, b)

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(cpu, multiple_results=False), platform="cpu")
    mlir.register_lowering(primitive, mlir.lower_fun(elsewhere, multiple_results=False))
    return primitive


_convolve = _primitive("eqxmeta_convolve", _convolve_cpu, _convolve_lax)
_input_gradient = _primitive("eqxmeta_input_gradient", _input_gradient_cpu, _input_gradient_lax)
_filter_gradient = _primitive("eqxmeta_filter_gradient", _filter_gradient_cpu, _filter_gradient_lax)

# The gradient of each in each of its arguments: a bilinear map of the cotangent and the other one.
ad.defbilinear(
    _convolve,
    lambda ct, x, w, *, geometry: _input_gradient.bind(ct, w, geometry=geometry),
    lambda ct, x, w, *, geometry: _filter_gradient.bind(x, ct, geometry=geometry),
)
ad.defbilinear(
    _input_gradient,
    lambda ct, y, w, *, geometry: _convolve.bind(ct, w, geometry=geometry),
    lambda ct, y, w, *, geometry: _filter_gradient.bind(ct, y, geometry=geometry),
)
ad.defbilinear(
    _filter_gradient,
    lambda ct, x, y, *, geometry: _input_gradient.bind(y, ct, geometry=geometry),
    lambda ct, x, y, *, geometry: _convolve.bind(x, ct, geometry=geometry),
)


def _as_tasks(primitive: Primitive, args: Any, axes: Any, geometry: Geometry) -> tuple[Array, int]:
    """Under `vmap`: every element of its axis has its own weights."""
    size = next(x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None)
    moved = [
        jnp.broadcast_to(x, (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0)
        for x, a in zip(args, axes, strict=True)
    ]
    tasks = moved[0].shape[1]
    merged = (x.reshape(size * tasks, *x.shape[2:]) for x in moved)
    out = primitive.bind(*merged, geometry=geometry)
    return out.reshape(size, tasks, *out.shape[1:]), 0


def _batch(primitive: Primitive) -> Callable[..., tuple[Array, int]]:
    def rule(args: Any, axes: Any, *, geometry: Geometry) -> tuple[Array, int]:
        if axes[1] is not None:
            return _as_tasks(primitive, args, axes, geometry)
        # The same weights: more examples.
        x, w = args
        x = jnp.moveaxis(x, axes[0], 1)
        tasks, size, n, *shape = x.shape
        out = primitive.bind(x.reshape(tasks, size * n, *shape), w, geometry=geometry)
        return out.reshape(*x.shape[:3], *out.shape[2:]), 1

    return rule


for _each in (_convolve, _input_gradient):
    batching.primitive_batchers[_each] = _batch(_each)
# Of a filter's gradient each element is a sum of its own.
batching.primitive_batchers[_filter_gradient] = lambda args, axes, *, geometry: _as_tasks(
    _filter_gradient, args, axes, geometry
)


def _flops(eqn: Any) -> int:
    # Every product of a position of the output with one of the kernel, for all three.
    geometry = eqn.params["geometry"]
    shapes = [v.aval.shape for v in (*eqn.invars, eqn.outvars[0])]
    n = next(s[1] for s, other in zip(shapes, _OPERANDS[eqn.primitive.name], strict=True) if other)
    w = next(s for s, o in zip(shapes, _OPERANDS[eqn.primitive.name], strict=True) if not o)
    return 2 * n * math.prod(geometry.out) * math.prod(w)


# Of two arguments and the result: which are images, the other one is the weights.
_OPERANDS = {
    "eqxmeta_convolve": (True, False, True),
    "eqxmeta_input_gradient": (True, False, True),
    "eqxmeta_filter_gradient": (True, True, False),
}
for _name in _OPERANDS:
    register_flops(_name, _flops)
