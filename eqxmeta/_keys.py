"""Keys: split where there may be none, and used more than once on purpose."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray


def split_or_none(key: PRNGKeyArray | None) -> tuple[Any, Any]:
    return (None, None) if key is None else tuple(jax.random.split(key))


def used_again(tree: Any) -> Any:
    """`tree`, of which the same keys are used more than once on purpose, as where something is
    computed again: said to JAX, whose `jax_debug_key_reuse` looks for those that are by mistake."""

    def clone(x: Any) -> Any:
        return jax.random.clone(x) if _is_key(x) else x

    return jax.tree.map(clone, tree)


def keys_as_data(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """`tree` with the data of its keys in their place, and what puts keys in the place of data. For
    loops, which are cut in two where they are differentiated: `jax_debug_key_reuse` would take a
    key that both parts need for one that is used again."""
    implementations = jax.tree.map(lambda x: jax.random.key_impl(x) if _is_key(x) else None, tree)

    def with_keys(data: Any) -> Any:
        return jax.tree.map(
            lambda x, impl: x if impl is None else jax.random.wrap_key_data(x, impl=impl),
            data,
            implementations,
        )

    data = jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, used_again(tree))
    return data, with_keys


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
