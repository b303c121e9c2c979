"""Small genuine tfds datasets of real text, written for a test."""

import contextlib
import inspect
import io
import pydoc_data.topics

import numpy as np
import tensorflow_datasets as tfds

TOPICS = [inspect.cleandoc(text) for _, text in sorted(pydoc_data.topics.topics.items())]


def write_corpus(data_dir, splits: dict[str, list], name: str = "tiny", file_format: str = "array_record"):
    """Writes the texts (str, or bytes that need not be UTF-8) of each split; record order is the order given."""

    def split_generators(self, dl_manager):
        return {
            split: ((i, {"text": text, "number": i}) for i, text in enumerate(texts)) for split, texts in splits.items()
        }

    def info(self):
        features = {"text": tfds.features.Text(), "number": tfds.features.Scalar(dtype=np.int64)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True, description="a test"
        )

    with tfds.core.registered.skip_registration():
        builder_class = type(
            "Tiny",
            (tfds.core.GeneratorBasedBuilder,),
            {
                "name": name,
                "VERSION": tfds.core.Version("1.0.0"),
                "pkg_dir_path": None,
                "_info": info,
                "_split_generators": split_generators,
                "_generate_examples": lambda self: None,
            },
        )
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder_class(data_dir=str(data_dir), file_format=file_format).download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )


def shards(data_dir, name: str = "tiny", split: str = "train") -> list:
    return sorted((data_dir / name / "1.0.0").glob(f"{name}-{split}.*"))


class CharacterTokenizer:
    """Stands in for a Tokenizer where only the ids matter: a character is its code plus 10."""

    vocab_size = 0x110000 + 10
    sha256 = "characters"
    bos, eos = 1, 2

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([ord(character) + 10 for character in text], np.int32) for text in texts]


def concatenation(texts: list[str]) -> np.ndarray:
    """What a token store of these documents must hold, by CharacterTokenizer."""
    return np.array([token for text in texts for token in (1, *(ord(character) + 10 for character in text), 2)])
