"""Runs examples/engines/transformers_cache.py with a small model and a tokenizer of bytes, made here."""

import contextlib
import io
import pathlib
import runpy
import sys

import tokenizers
import transformers
from transformers_model import ARGUMENTS, finish, tiny_model

folder = pathlib.Path(ARGUMENTS["folder"])
if not (folder / "model").exists():
    vocabulary = {letter: i for i, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    bytes_of = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    bytes_of.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_of.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_of).save_pretrained(folder / "model")
    tiny_model(vocab_size=256).save_pretrained(folder / "model")

sys.argv = [ARGUMENTS["example"], str(folder / "model"), f"file://{folder}/kv", "Once upon a time, " * 10]
out, err = io.StringIO(), io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    runpy.run_path(ARGUMENTS["example"], run_name="__main__")
finish({"text": out.getvalue(), "report": err.getvalue()})
