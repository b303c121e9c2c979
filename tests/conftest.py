"""Every test runs on 8 simulated CPU devices, so that meshes are real; nothing here needs an accelerator or a network."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
