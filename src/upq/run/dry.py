"""What shows from tokenizer, template, first rows and settings, before any work: no fault there waits for hours."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from upq.artifact.transformers import write_companions
from upq.core.paths import local
from upq.data.encoding import Encoder
from upq.data.rows import FIRST, Document, Tally
from upq.data.sources import read_documents, sources_of
from upq.model.library import library_errors
from upq.model.loading import embedding_rows, generation_config
from upq.run.recipe import Recipe
from upq.text.generation import end_tokens
from upq.text.tokenizer import check_ids, check_tokens

_CHARACTERS = 10_000  # of each text, that the check of 100 takes less than a second: a file may be one of 128 MB


def check_text(
    model: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    name: str,
    *,
    hub: bool = False,
) -> None:
    """Raise UPQError for what a run of `recipe` on the directory `model`, which is called `name`, would end with.

    `hub`: data sets of the hub are asked for their first rows as well as what is on this machine.
    """
    rows = embedding_rows(config)
    check_ids(tokenizer, rows, name)
    generation = generation_config(model)
    ends = end_tokens(generation, tokenizer)
    for stage in recipe.stages.values():
        stage.check_text(tokenizer, ends, rows)
    encoder = Encoder(tokenizer, recipe.data.loss_on)
    for source in sources_of(recipe.data):
        if hub or local(source.path).exists():
            tally, empty, read = Tally(recipe.data.on_bad_row), 0, 0
            for document in islice(read_documents(source, tally), FIRST):
                found = encoder.encode([_shortened(document)], tally)
                for encoded in found:
                    check_tokens(tokenizer, encoded.tokens_L.tolist(), rows, document.where)
                read, empty = read + 1, empty + (not found and document.size <= _CHARACTERS)
            if read == empty < FIRST:  # all of it has been read
                raise tally.nothing(source.path)
    with TemporaryDirectory(prefix="upq-") as folder:  # the writers of the last step
        with library_errors(f"{name}: cannot save its configuration"):
            config.save_pretrained(folder)
            if not (model / "generation_config.json").is_file():  # which is copied
                generation.save_pretrained(folder)
        write_companions(Path(folder), tokenizer, model)


def _shortened(document: Document) -> Document:
    content = document.content
    return dataclasses.replace(document, content=content[:_CHARACTERS]) if isinstance(content, str) else document
