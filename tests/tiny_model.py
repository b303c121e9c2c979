"""Two tiny models, one of each family, and packed rows to train them on.

B row, U = T + 1 tokens of a row
"""

import copy
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import config
from llm_jax.model.transformer import Transformer
from llm_jax.parallel import sharding
from llm_jax.training.state import model_shape

VOCAB_SIZE = 64
LENGTH = 32
RULES = sharding.Rules()
FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time, which is most of the time of these tests

LLAMA = config.Model(num_layers=2, width=32, num_heads=8, num_kv_heads=4, head_width=8, qk_norm=True, dtype="float32")
GPT2 = config.Model(
    num_layers=2, width=32, num_heads=4, activation="gelu", norm="layernorm", norm_epsilon=1e-5, position="learned",
    use_bias=True, tie_embeddings=True, logit_soft_cap=5.0, dtype="float32",
)  # fmt: skip
SINUSOIDAL = config.Model(
    num_layers=2, width=32, num_heads=4, norm="layernorm", position="sinusoidal", activation="gelu", dtype="float32"
)
FAMILIES = {"llama": LLAMA, "gpt2": GPT2, "sinusoidal": SINUSOIDAL}


def make_mesh(replica: int = 1, fsdp: int = 1, tensor: int = 1, **others: int) -> jax.sharding.Mesh:
    """Over as many of the devices as the sizes of its axes need."""
    parallel = config.Parallel(replica=replica, fsdp=fsdp, tensor=tensor, **others)
    return sharding.make_mesh(parallel, jax.devices()[: replica * fsdp * tensor * math.prod(others.values())])


def model_maker(
    model: config.Model, *, vocab_size: int = VOCAB_SIZE, length: int = LENGTH, unroll=False, remat="none", seed=0
) -> Callable[[], Transformer]:
    """To be called, or evaluated as shapes, under a mesh."""
    shape = model_shape(model, vocab_size=vocab_size, sequence_length=length)
    dtype = jnp.dtype(model.dtype)
    return lambda: Transformer(
        shape, attention="reference", dtype=dtype, unroll=unroll, remat=remat, rounds=1, rules=RULES,
        key=jax.random.key(seed),
    )  # fmt: skip


def make_model(model: config.Model, **options) -> Transformer:
    return jax.jit(model_maker(model, **options), compiler_options=FAST)()


_made = {}


def family(name: str) -> Transformer:
    """FAMILIES[name], made once, on the one device of make_mesh()."""
    if name not in _made:
        with jax.set_mesh(make_mesh()):
            _made[name] = make_model(FAMILIES[name])
    return _made[name]


def variant(model: Transformer, **changes) -> Transformer:
    """The same parameters, run in another way: unroll, remat."""
    other = copy.copy(model)
    for name, value in changes.items():
        assert hasattr(model, name)
        setattr(other, name, value)
    return other


def packed_rows(num_rows: int, length: int = LENGTH, *, seed: int = 0) -> dict[str, np.ndarray]:
    """{"tokens", "segments", "positions"}: int32 [B, U]. Several documents a row, and padding at the end of most rows.

    Each token is the one before plus a small step, mostly, so that there is something to learn.
    """
    rng = np.random.default_rng(seed)
    shape = (num_rows, length + 1)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segments", "positions")}
    for row in range(num_rows):
        end = length + 1 - rng.choice([0, 0, 3, length // 2])
        start, document = 0, 1
        while start < end:
            stop = min(end, start + rng.integers(1, length))
            steps = rng.choice([1, 2, 3, 30], size=stop - start, p=[0.5, 0.3, 0.1, 0.1])
            batch["tokens"][row, start:stop] = (rng.integers(VOCAB_SIZE) + np.cumsum(steps)) % VOCAB_SIZE
            batch["segments"][row, start:stop] = document
            batch["positions"][row, start:stop] = np.arange(stop - start)
            start, document = stop, document + 1
    return batch


def put(arrays, mesh: jax.sharding.Mesh):
    """Arrays whose first dimension is the batch, on the mesh."""

    def put_one(array):
        return jax.device_put(array, jax.NamedSharding(mesh, RULES.spec("batch", *[None] * (array.ndim - 1))))

    return jax.tree.map(put_one, arrays)
