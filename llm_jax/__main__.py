"""`python -m llm_jax VERB` is `llm-jax VERB`."""

from llm_jax.cli import entry

if __name__ == "__main__":
    entry()
