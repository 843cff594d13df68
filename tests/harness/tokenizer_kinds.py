"""Tiny tokenizers of every kind that checkpoints carry; what matters here is how each decodes."""

from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

#: Each kind has these: two special tokens, and one that is added but is text.
SPECIAL = ("<s>", "</s>")
ADDED = "<tool call>"
_BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
_PIECES = ("a", "é", "日本", ".", " ", "\ufffd", "n't", "'", "<0xZZ>", "<0x0>")
_METASPACE = ("▁", "▁a", "▁b", "▁▁", "a▁b", *_PIECES)


def byte_level() -> Tokenizer:
    """As Llama 3, Qwen and most of today: a token is a run of bytes, of whole characters or not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("Ġ", "a"), ("æ", "Ĺ"), ("æĹ", "¥"), ("Ł", "ĺ")]
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, *("".join(pair) for pair in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _with_added(tokenizer, decoders.ByteLevel())


def llama_2() -> Tokenizer:
    """Bytes where no piece fits, blanks as a symbol of their own, and the first one taken away."""
    tokenizer = _bpe((*_BYTES, *_METASPACE), byte_fallback=True)
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _with_added(tokenizer, decoders.Sequence(chain))


def gemma() -> Tokenizer:
    """As llama_2, but for the first blank, which stays."""
    tokenizer = _bpe((*_BYTES, *_METASPACE), byte_fallback=True)
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return _with_added(tokenizer, decoders.Sequence(chain))


def stripped_at_the_end() -> Tokenizer:
    """A decoder that takes a blank from the end."""
    tokenizer = _bpe((*_BYTES, *_METASPACE), byte_fallback=True)
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 0, 1)]
    return _with_added(tokenizer, decoders.Sequence(chain))


def stripped_by_token() -> Tokenizer:
    """A decoder that takes a blank from each token: nothing has fused them before."""
    tokenizer = _bpe((*_BYTES, *_METASPACE), byte_fallback=True)
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]
    return _with_added(tokenizer, decoders.Sequence(chain))


def unigram() -> Tokenizer:
    """As T5: blanks as a symbol, taken from the first token whole."""
    return _with_added(_unigram(_METASPACE, byte_fallback=False), decoders.Metaspace())


def unigram_with_bytes() -> Tokenizer:
    """The same with bytes where no piece fits."""
    chain = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _with_added(_unigram((*_BYTES, *_METASPACE), byte_fallback=True), chain)


def metaspace_that_keeps_the_first_blank() -> Tokenizer:
    """A decoder for text to which no blank was added."""
    return _with_added(_unigram(_METASPACE, byte_fallback=False), decoders.Metaspace(prepend_scheme="never"))


def word_piece() -> Tokenizer:
    """As BERT: words joined by blanks, but for their parts and what stands before punctuation."""
    return _with_added(_word_piece(), decoders.WordPiece(cleanup=True))


def word_piece_without_cleanup() -> Tokenizer:
    """The same with a blank before punctuation."""
    return _with_added(_word_piece(), decoders.WordPiece(cleanup=False))


def ends_of_words() -> Tokenizer:
    """As the first GPT: a token says that its word ends, and the last one has no blank after it."""
    return _with_added(_bpe(("a</w>", "b</w>", "</w>", *_PIECES)), decoders.BPEDecoder(suffix="</w>"))


def words() -> Tokenizer:
    """No decoder at all: tokens are joined by blanks."""
    return _with_added(_bpe((*_BYTES, *_PIECES)), None)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    make.__name__: make
    for make in (
        byte_level,
        llama_2,
        gemma,
        stripped_at_the_end,
        stripped_by_token,
        unigram,
        unigram_with_bytes,
        metaspace_that_keeps_the_first_blank,
        word_piece,
        word_piece_without_cleanup,
        ends_of_words,
        words,
    )
}


def ids_of(tokenizer: Tokenizer, *contents: str) -> list[int]:
    """The ids of tokens, which the vocabulary has."""
    found = [tokenizer.token_to_id(content) for content in contents]
    assert None not in found, contents
    return [token_id for token_id in found if token_id is not None]


def _bpe(tokens: tuple[str, ...], *, byte_fallback: bool = False) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(("<unk>", *tokens))}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=byte_fallback))


def _unigram(tokens: tuple[str, ...], *, byte_fallback: bool) -> Tokenizer:
    scored = [("<unk>", 0.0), *((token, -float(index)) for index, token in enumerate(tokens, 1))]
    return Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=byte_fallback))


def _word_piece() -> Tokenizer:
    tokens = ("<unk>", "##", "##a", "##.", "do", "not", "do not", *_PIECES)
    return Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))


def _with_added(tokenizer: Tokenizer, decoder: decoders.Decoder | None) -> Tokenizer:
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(content, special=True) for content in SPECIAL])
    tokenizer.add_tokens([AddedToken(ADDED, special=False)])
    return tokenizer
