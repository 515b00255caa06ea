"""Tokenizers: bytes, which every machine has, or the one that is saved in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from colledge.data.text.tokens import Tokenizer
from colledge.errors import ModelError, said_by

BYTES = "bytes"
_END = 256
_OF_ANOTHER_VERSION = ("untagged enum", "Unknown tokenizer version", "unknown variant")


class ByteTokenizer:
    """A token a byte of UTF-8; 256 ends a document (a `Tokenizer`). It has no chat template."""

    eos_token_id: int | None = _END
    chat_template: str | None = None

    def __len__(self) -> int:
        """Return 257."""
        return _END + 1

    def __call__(self, text: list[str], **options: bool) -> Mapping[str, Any]:
        """Return `input_ids`, the bytes of every text."""
        if options.get("return_offsets_mapping"):
            raise NotImplementedError("a byte may be a part of a character")
        return {"input_ids": [list(one.encode(errors="surrogatepass")) for one in text]}

    def decode(self, token_ids: list[int]) -> str:
        """Return tokens as text; bytes that are no UTF-8 by their escapes, ends left out."""
        return bytes(token for token in token_ids if token != _END).decode(errors="backslashreplace")

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: bool) -> Any:
        """Raise NotImplementedError."""
        raise NotImplementedError("bytes have no chat template")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer in a folder, such as a model's.

    Raises:
        ModelError: There is none that can be used.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer(["a text"])  # some values are looked at only now
        return cast(Tokenizer, tokenizer)
    except (
        BaseException
    ) as fault:  # the libraries raise whatever malformed files make of them, Rust's own too
        if not isinstance(fault, Exception) and type(fault).__name__ != "PanicException":
            raise
        fix = "save the tokenizer beside the model with tokenizer.save_pretrained."
        if any(words in str(fault) for words in _OF_ANOTHER_VERSION):
            fix = f"it may be of a newer version: update tokenizers (here {version('tokenizers')}), or save it anew."
        raise ModelError(f"{folder}: no usable tokenizer there ({said_by(fault)}).", fix=fix) from None


def vocabulary_digest(tokenizer: Tokenizer) -> str:
    """Return a digest of what each token stands for, by which machines tell whether theirs are alike."""
    tokens = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    return hashlib.sha256(
        repr((tokenizer.eos_token_id, tokens)).encode(errors="backslashreplace")
    ).hexdigest()
