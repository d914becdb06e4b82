"""Matrix-vector products in the order in which a `vmap` over examples leaves no transposes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from .channels_last import channels_last, has_primitive
from .interpret import interpret, is_staged, jit_body


def examples_first(fun: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """The same function, with every product of a matrix and a vector computed as that of the
    vector and the transposed matrix. For use under `jax.vmap`, over arguments that are arrays.

    Of `weight @ x`, which is how one writes a layer that sees one example, `jax.vmap` makes
    `weight @ x.T`: the examples become the last axis. What adds a bias to it moves them to the
    front again, and so it goes on through the layers and back through their derivatives. Copies
    from one order to the other took a sixth of a meta-training step of a small MLP. With the
    vector first the examples are first everywhere. (Inside of `lax.scan`, `lax.cond`,
    `jax.checkpoint` and functions with a derivative or a batching rule of their own, products stay
    as they are. So does all of `fun` outside of a program that is compiled: there its own
    `jax.jit`s are what is fast.)
    """

    def swapped(*args: PyTree) -> PyTree:
        if not is_staged():
            return fun(*args)
        closed, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
        leaves = jax.tree.leaves(args)
        if has_primitive(closed, "eqxmeta_convolve"):
            out = channels_last(closed, leaves, _swap)
        else:
            out = interpret(closed, leaves, _swap)
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return swapped


def _swap(eqn: Any, inputs: Sequence[Any]) -> Sequence[Any] | None:
    if (body := jit_body(eqn)) is not None:
        return interpret(body, inputs, _swap)
    if eqn.primitive.name != "dot_general":
        return None
    matrix, vector = inputs
    (of_matrix, of_vector), batch = eqn.params["dimension_numbers"]
    precision, sharding = eqn.params["precision"], eqn.params["out_sharding"]
    # A pair is one for each side. An algorithm (`jax.lax.DotAlgorithm`, a tuple as well) may have
    # different types for them, and a sharding names axes: both are what the user asked for.
    if sharding is not None or not (precision is None or type(precision) is tuple):
        return None
    # The result has the axes of the left that are not contracted, then those of the right: it is
    # the same either way only where one side has none left.
    if any(batch) or vector.ndim > len(of_vector) or matrix.ndim == len(of_matrix):
        return None
    product = jax.lax.dot_general(
        vector,
        matrix,
        ((of_vector, of_matrix), ((), ())),
        precision=precision and precision[::-1],
        preferred_element_type=eqn.params["preferred_element_type"],
    )
    return [product]
