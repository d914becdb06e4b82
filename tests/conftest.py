"""Arrays are checked wherever tests go: jaxtyping's shapes and dtypes, by beartype."""

import gc
import os
import pathlib
import signal

import jaxtyping
from jaxtyping import install_import_hook

# Modules without arrays are left to the type checker: checking every call of theirs would take a
# fifth of the suite's time.
ROOT = pathlib.Path(__file__).parents[1]
install_import_hook(
    [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for pattern in ("eqxmeta/**/*.py", "eqxmeta/callbacks/*.py")
        for path in ROOT.glob(pattern)
        if "jaxtyping" in path.read_text()
    ],
    "beartype.beartype",
)

import jax  # noqa: E402
import pytest  # noqa: E402

# In the background of a shell Ctrl-C is ignored, by processes that are started from here too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What JAX traces with is made by the hundred thousand: at Python's own threshold the garbage
# collector takes an eighth of the suite's time.
gc.set_threshold(20_000, 20, 100)

# XLA's expensive passes would take half of the suite's time.
jax.config.update("jax_disable_most_optimizations", True)

# Broadcasting between ranks is written out, or is a bug.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    # Four devices, for the tests that ask for several: all others compute on the first.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4"
    # A program is compiled once, for both workers and for the runs to come: half of the time of the
    # tests that train. `pytest --cache-clear` empties the folder.
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # JAX 0.10's emitters of fused kernels take twice as long as all else that compiles, and small
    # programs in one piece less than in 32. (The flags are not all known to later versions.) Not in
    # `-m optimised`, where programs are compiled as users' are.
    run = config.option.markexpr.replace("not optimised", "")
    if jax.__version_info__[:2] == (0, 10) and "optimised" not in run:
        cheap = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {cheap}"


@pytest.fixture(scope="module", autouse=True)
def leave_programs_to_the_end():
    """The garbage collector would look through all that JAX has kept, for seconds each time."""
    yield
    gc.freeze()


@pytest.fixture(autouse=True)
def optimised(request):
    """All of XLA's passes, in tests that are marked so: what users run is what must be bitwise
    reproducible."""
    if request.node.get_closest_marker("optimised") is None:
        yield
        return
    jax.clear_caches()  # a program that was compiled without them would be used
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture
def strict_dtypes():
    """Implicit dtype promotion is an error. Not for every test: optax's Adam relies on it."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    """64-bit types are on."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def as_users_run_it():
    """Without the annotations' check by beartype, which would be first to raise."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
