#!/usr/bin/env python3
"""Golden data of tokenizers: tokenizer.json files of every common design, texts, ids, decoded texts.

    make_golden_tokenizers.py --seed 1 --set dev --out DIR [--smollm2 FOLDER]      # DIR/tokenizers/...
    make_golden_tokenizers.py --seed 2 --set held --out DIR [--smollm2 FOLDER]

FOLDER is a Hugging Face folder with the real tokenizer.json of SmolLM2 (scripts/smollm2_to_hf.py makes one); the dev set copies the file,
the held set only stores other texts for it. Everything else is trained here, small, on GSM8K and the text in golden_text.py.
Needs tokenizers, sentencepiece, numpy.
"""
import base64
import io
import json
import os
import shutil
import sys
import tempfile

from golden_lib import arguments, folder_size, versions, write_bytes, write_json, write_json_rows, write_text
from golden_text import corpus, texts

import numpy as np
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
BYTES = ["<0x%02X>" % b for b in range(256)]


def byte_bpe(seed, vocab, pre, specials, normalizer=None, **model):
    """A trained byte-level BPE; `pre` without the final byte mapping is added to by the caller."""
    tok = Tokenizer(models.BPE(**model))
    if normalizer:
        tok.normalizer = normalizer
    tok.pre_tokenizer = pre
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(corpus(seed), trainers.BpeTrainer(vocab_size=vocab, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tok


def split(pattern, behavior="isolated"):
    return pre_tokenizers.Split(Regex(pattern), behavior)


def to_bytes():
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def edited(tok, change):
    """The tokenizer after `change` has worked on its JSON form."""
    state = json.loads(tok.to_str())
    change(state)
    return Tokenizer.from_str(json.dumps(state, ensure_ascii=False))


def few_characters(seed, limit):
    """The corpus with all but its `limit` most frequent characters removed (the trainers' own limit breaks ties at random)."""
    lines, count = corpus(seed), {}
    for line in lines:
        for c in line:
            count[c] = count.get(c, 0) + 1
    keep = set(sorted(count, key=lambda c: (-count[c], c))[:limit])
    return ["".join(c for c in line if c in keep) for line in lines]


def spm_bpe(seed, vocab, specials=("<unk>", "<s>", "</s>")):
    """SentencePiece-like BPE: `▁` words, a limited alphabet, byte fallback. Byte tokens stay in the vocabulary but are no added tokens."""
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tok.train_from_iterator(few_characters(seed, 150), trainers.BpeTrainer(vocab_size=vocab, special_tokens=list(specials) + BYTES, show_progress=False))

    def drop_bytes(state):
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in BYTES]
        state["pre_tokenizer"] = None
    return edited(tok, drop_bytes)


def sentencepiece_model(seed, vocab, **options):
    """(pieces with scores, precompiled charsmap) of a SentencePiece unigram model, read from its protocol buffer."""
    out = io.BytesIO()
    lines = [t for x in corpus(seed) for t in x.split("\n") if t]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, model_type="unigram", vocab_size=vocab, num_threads=1, minloglevel=2,
                                             pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=0.98, hard_vocab_limit=False, **options)

    def fields(raw):
        at = 0

        def varint():
            nonlocal at
            value = shift = 0
            while True:
                byte = raw[at]
                at += 1
                value |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    return value
        while at < len(raw):
            key = varint()
            kind = key & 7
            if kind == 0:
                value = varint()
            else:
                size = {1: 8, 5: 4}.get(kind) or varint()
                value = raw[at:at + size]
                at += size
            yield key >> 3, value

    pieces, charsmap = [], b""
    for number, value in fields(out.getvalue()):
        if number == 1:
            part = dict(fields(value))
            pieces.append((part[1].decode("utf-8"), float(np.frombuffer(part.get(2, b"\0\0\0\0"), "<f4")[0])))
        elif number == 3:
            charsmap = dict(fields(value)).get(2, b"")
    return pieces, charsmap


def special(*tokens):
    return [AddedToken(t, special=True, normalized=False) for t in tokens]


# --------------------------------------------------------------------------------------------------------------- designs

def gpt2(seed, held):
    tok = byte_bpe(seed, 1000 if not held else 620, pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"])
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    return tok, ["<|endoftext|>"], "ByteLevel BPE with the GPT-2 pattern"


def llama3(seed, held):
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tok = byte_bpe(seed, 1000 if not held else 640, pre_tokenizers.Sequence([split(LLAMA3), to_bytes()]), [], ignore_merges=True)
    # whole words that no chain of merges reaches: only ignore_merges finds them
    state = json.loads(tok.to_str())
    vocab = state["model"]["vocab"]
    for word in ("Ġwonderful", "zebra", "ĠPython", "!!!", "ĠÐºÐ¾Ñĥ"):
        vocab.setdefault(word, len(vocab))
    tok = Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
    tok.add_special_tokens(names)
    bos = tok.token_to_id(names[0])
    tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), processors.TemplateProcessing(
        single=f"{names[0]} $A", pair=f"{names[0]} $A {names[0]}:1 $B:1", special_tokens=[(names[0], bos)])])
    return tok, names[:3] + ["wonderful", " zebra"], "Split with the Llama-3 pattern, ByteLevel, ignore_merges (five words are in the vocabulary but not reachable by merges), bos template"


def qwen2(seed, held):
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tok = byte_bpe(seed, 1000 if not held else 610, pre_tokenizers.Sequence([split(QWEN2), to_bytes()]), [], normalizers.NFC())
    tok.add_special_tokens(names)
    tok.add_tokens([AddedToken("<tool_call>", special=False, normalized=False), AddedToken("</tool_call>", special=False, normalized=False)])
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    return tok, names[1:] + ["<tool_call>"], "NFC, Split with the Qwen2 pattern, ByteLevel; added tokens that are not special"


def llama2_legacy(seed, held):
    tok = spm_bpe(seed, 900 if not held else 640)
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    return tok, ["<s>", "</s>", "<unk>"], "SentencePiece-like BPE with byte fallback, legacy normalizer Prepend + Replace, no pre-tokenizer"


def mistral(seed, held):
    tok = spm_bpe(seed + 10, 900 if not held else 640)
    scheme = "first" if not held else "always"
    tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.post_processor = processors.TemplateProcessing(single="<s> $A" if not held else "<s> $A </s>", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1), ("</s>", 2)])
    tok.add_special_tokens(["[INST]", "[/INST]"])
    return tok, ["<s>", "[INST]", "[/INST]"], f"SentencePiece-like BPE with byte fallback, Metaspace(prepend {scheme}, split false)"


def gemma(seed, held):
    tok = spm_bpe(seed + 20, 900 if not held else 640, ("<pad>", "<eos>", "<bos>", "<unk>"))
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tok.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("\n", "\n\n", "\t", "▁▁", "▁▁▁")])
    tok.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)])
    return tok, ["<bos>", "<start_of_turn>", "<end_of_turn>"], "BPE with byte fallback, normalizer Replace, Split on a blank that no longer occurs, no prefix; line breaks and blank runs are added tokens"


def t5(seed, held):
    if not held:
        pieces, charsmap = sentencepiece_model(seed, 900, normalization_rule_name="nmt_nfkc")
    else:  # a small rule set instead of the real one
        rules = {"ﬁ": "fi", "ﬂ": "fl", "①": "1", "½": "1/2", "\u212b": "\u00c5", "a\u0301": "á", "e\u0301": "é", "\u00a0": " ", "\u3000": " ", "\u200b": "", "…": "...", "“": '"', "”": '"', "’": "'",
                 "ｆ": "f", "ｕ": "u", "ﾊﾝ": "ハン", "\t": " ", "👍🏽": "👍", "㎏": "kg", "ß": "ss", "\u2126": "\u03a9", "abc": "ABC", "ab": "xy"}
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "rules.tsv")
            with open(path, "w", encoding="utf-8") as f:
                for a, b in rules.items():
                    f.write(" ".join("%X" % ord(c) for c in a) + "\t" + " ".join("%X" % ord(c) for c in b) + "\n")
            pieces, charsmap = sentencepiece_model(seed, 600, normalization_rule_tsv=path)
    assert charsmap
    extra = [f"<extra_id_{i}>" for i in range(9, -1, -1)]
    model = {"type": "Unigram", "unk_id": 2, "vocab": [list(p) for p in pieces] + [[e, 0.0] for e in extra], "byte_fallback": False}
    pre = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    blob = base64.b64encode(charsmap).decode()
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": blob}, {"type": "Strip", "strip_left": False, "strip_right": True},
                                                      {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}]}
    if held:
        normalizer = {"type": "Precompiled", "precompiled_charsmap": blob}
        pre = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, pre]}
    tok = Tokenizer.from_str(json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": pre, "post_processor": None,
                                         "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}, "model": model}, ensure_ascii=False))
    tok.add_special_tokens(special("<pad>", "</s>", "<unk>", *extra))
    tok.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return tok, ["</s>", "<extra_id_0>"], "Unigram with a precompiled charsmap " + ("(nmt_nfkc), Strip, Replace, Metaspace" if not held else "(a small one), WhitespaceSplit + Metaspace")


def unigram_byte(seed, held):
    pieces, _ = sentencepiece_model(seed + 3, 800 if not held else 560, normalization_rule_name="identity", byte_fallback=True)
    scheme = "first" if not held else "never"
    tok = Tokenizer.from_str(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [list(p) for p in pieces], "byte_fallback": True}}, ensure_ascii=False))
    tok.add_special_tokens(special("<pad>", "</s>", "<unk>"))
    tok.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 1)])
    return tok, ["</s>", "<unk>"], f"Unigram with byte fallback, NFKC, Metaspace({scheme})"


def word_counts(lines, normalizer, pre):
    count = {}
    for line in lines:
        for word, _ in pre.pre_tokenize_str(normalizer.normalize_str(line)):
            count[word] = count.get(word, 0) + 1
    return count


def bert(seed, held):
    normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=not held)
    pre = pre_tokenizers.BertPreTokenizer()
    words = word_counts(few_characters(seed, 220), normalizer, pre)
    score = {}  # beginnings and inner parts of words, weighed by what they save (the library's trainer is not reproducible)
    for word, n in words.items():
        for i in range(len(word)):
            for j in range(i + 2, min(len(word), i + 9) + 1):
                piece = word[:j] if i == 0 else "##" + word[i:j]
                score[piece] = score.get(piece, 0) + n * (j - i)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = sorted({c for w in words for c in w})
    vocab = names + letters + ["##" + c for c in letters if c.isalnum() and ord(c) % 7]  # some characters have no ## form: the word becomes [UNK]
    vocab += sorted(score, key=lambda p: (-score[p], p))[:(1000 if not held else 700) - len(vocab)]
    tok = Tokenizer(models.WordPiece(vocab={t: i for i, t in enumerate(vocab)}, unk_token="[UNK]", max_input_chars_per_word=100 if not held else 24))
    tok.normalizer, tok.pre_tokenizer = normalizer, pre
    tok.add_special_tokens(names)
    tok.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tok.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return tok, ["[MASK]", "[SEP]"], "WordPiece, BertNormalizer(lowercase %s), BertPreTokenizer" % (not held)


def roberta(seed, held):
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    tok = byte_bpe(seed + 5, 800 if not held else 600, pre_tokenizers.ByteLevel(add_prefix_space=True), names)
    tok.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True, normalized=False)])
    tok.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=True)
    return tok, ["<mask>", "</s>"], "ByteLevel with add_prefix_space, RobertaProcessing, <mask> with lstrip"


def zoo(seed, held):
    norm = [normalizers.NFKC(), normalizers.Lowercase()] if not held else [normalizers.NFD(), normalizers.StripAccents()]
    tok = byte_bpe(seed + 6, 700 if not held else 580, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=held), pre_tokenizers.ByteLevel(add_prefix_space=not held)]), ["<pad>"], normalizers.Sequence(norm))
    add = [AddedToken("<l>", lstrip=True, special=True), AddedToken("<r>", rstrip=True, special=True), AddedToken("<lr>", lstrip=True, rstrip=True, special=False, normalized=False),
           AddedToken("word", single_word=True, special=False, normalized=True), AddedToken("Wow", special=False, normalized=True), AddedToken("RAW", special=False, normalized=False),
           AddedToken("foo bar", special=False, normalized=False), AddedToken("foo", special=False, normalized=False), AddedToken("foo bar baz", special=False, normalized=True),
           AddedToken("café", special=False, normalized=True), AddedToken("日本", single_word=True, special=False, normalized=False), AddedToken("ﬁ", special=False, normalized=True),
           AddedToken("<s1>", single_word=True, special=True), AddedToken("  ", special=False, normalized=False), AddedToken("\n\n", special=False, normalized=True, rstrip=True)]
    tok.add_special_tokens([t for t in add if t.special])
    tok.add_tokens([t for t in add if not t.special])
    tok.post_processor = processors.ByteLevel(trim_offsets=True)
    return tok, [t.content for t in add if t.content.strip()], "added tokens with every combination of lstrip, rstrip, single_word, normalized; " + ("NFKC + Lowercase, Digits runs" if not held else "NFD + StripAccents, single Digits")


def smollm(seed, held):
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tok = byte_bpe(seed + 7, 620, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]), names)
    return tok, names, "Digits(individual) + ByteLevel, no post-processor"


def neox(seed, held):
    tok = byte_bpe(seed + 8, 620, pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>", "<|padding|>"], normalizers.NFC())
    tok.add_tokens([AddedToken(" " * n, special=False, normalized=True) for n in range(24, 1, -1)])
    tok.post_processor = processors.ByteLevel(trim_offsets=True)
    return tok, ["<|endoftext|>", "<|padding|>"], "NFC + ByteLevel, runs of 2 to 24 blanks are added tokens"


def deepseek(seed, held):
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
    tok = byte_bpe(seed + 9, 620, pre_tokenizers.Sequence([split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK), to_bytes()]), [])
    tok.add_special_tokens(names)
    tok.post_processor = processors.TemplateProcessing(single=f"{names[0]} $A", pair=f"{names[0]} $A {names[0]}:1 $B:1", special_tokens=[(names[0], tok.token_to_id(names[0]))])
    return tok, names[1:], "three Splits in a row, ByteLevel; special tokens with fullwidth characters"


def o200k(seed, held):
    names = ["<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"]
    tok = byte_bpe(seed + 11, 620, pre_tokenizers.Sequence([split(O200K), to_bytes()]), [])
    tok.add_special_tokens(names)
    tok.add_tokens([AddedToken("<|tool|>", special=False, normalized=False, rstrip=True)])
    return tok, names[1:] + ["<|tool|>"], "the pattern with upper- and lower-case classes"


def falcon(seed, held):
    tok = byte_bpe(seed + 12, 620, pre_tokenizers.Sequence([pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits(individual_digits=False),
                                                              split("[0-9][0-9][0-9]")]), [">>TITLE<<", "<|endoftext|>"])
    tok.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    return tok, [">>TITLE<<"], "Punctuation(contiguous), ByteLevel, Digits runs, Split of three digits"


def bloom(seed, held):
    names = ["<unk>", "<s>", "</s>", "<pad>"]
    tok = byte_bpe(seed + 13, 620, pre_tokenizers.Sequence([split(BLOOM), to_bytes()]), names)
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    return tok, names[1:3], "the BLOOM pattern (a character class with parentheses and bars in it)"


def word_suffix(seed, held):
    normalizer, pre = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    count = word_counts(few_characters(seed + 14, 110), normalizer, pre)
    words = {tuple(w[:-1]) + (w[-1] + "</w>",): count[w] for w in sorted(count, key=lambda w: (-count[w], w))[:2500]}
    letters = sorted({c[0] for w in words for c in w if c[0] != "<"})
    vocab, merges = ["<unk>"] + letters + [c + "</w>" for c in letters], []
    while len(vocab) < 600:  # plain BPE training; ties go to the smaller pair
        pairs = {}
        for w, n in words.items():
            for p in zip(w, w[1:]):
                pairs[p] = pairs.get(p, 0) + n
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        if best[0] + best[1] not in vocab:
            vocab.append(best[0] + best[1])
        merged = {}
        for w, n in words.items():
            out, i = [], 0
            while i < len(w):
                if w[i:i + 2] == best:
                    out.append(best[0] + best[1])
                    i += 2
                else:
                    out.append(w[i])
                    i += 1
            merged[tuple(out)] = merged.get(tuple(out), 0) + n
        words = merged
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocab)}, merges=merges, unk_token="<unk>", end_of_word_suffix="</w>", fuse_unk=False))
    tok.normalizer, tok.pre_tokenizer = normalizer, pre
    tok.add_special_tokens(["<unk>"])
    tok.decoder = decoders.BPEDecoder(suffix="</w>")
    return tok, ["<unk>"], "character BPE with end_of_word_suffix and an unk token that is not fused"


DEV = [gpt2, llama3, qwen2, llama2_legacy, mistral, gemma, t5, unigram_byte, bert, roberta, zoo]
HELD = [gpt2, llama3, qwen2, llama2_legacy, mistral, gemma, t5, unigram_byte, bert, zoo, smollm, neox, deepseek, o200k, falcon, bloom, word_suffix]


# ----------------------------------------------------------------------------------------------------------------- cases

LEFT_OUT = []  # texts on which the reference panics

def case_rows(tok, samples, before, after):
    rows = []
    for t in samples:
        try:
            plain, full = tok.encode(t, add_special_tokens=False).ids, tok.encode(t, add_special_tokens=True).ids
        except BaseException as e:  # the library panics on some texts: no reference, left out
            if type(e).__name__ != "PanicException":
                raise
            LEFT_OUT.append(t)
            continue
        row = {"text": t, "ids": plain}
        if full != before + plain + after:
            row["ids_special"] = full
        decoded, skipped = tok.decode(plain, skip_special_tokens=False), tok.decode(plain, skip_special_tokens=True)
        if decoded != t:
            row["decoded"] = decoded
        if skipped != decoded:
            row["decoded_skip"] = skipped
        rows.append(row)
    return rows


def other_rows(tok, samples, rng):
    """Random id sequences to decode, and pairs."""
    size = tok.get_vocab_size()
    known = [i for i in range(size + 40) if tok.id_to_token(i) is not None]
    decode = []
    for k in range(40):
        ids = [known[int(i)] for i in rng.integers(0, len(known), int(rng.integers(1, 25)))]
        decode.append({"ids": ids, "decoded": tok.decode(ids, skip_special_tokens=False), "decoded_skip": tok.decode(ids, skip_special_tokens=True)})
    short = [s for s in samples if 0 < len(s) < 60]
    short = [s for s in short if s not in LEFT_OUT]
    for k in range(20):  # what a model sees: with the special tokens around
        ids = tok.encode(short[int(rng.integers(len(short)))], add_special_tokens=True).ids
        decode.append({"ids": ids, "decoded": tok.decode(ids, skip_special_tokens=False), "decoded_skip": tok.decode(ids, skip_special_tokens=True)})
    pairs = []
    for k in range(12):
        a, b = short[int(rng.integers(len(short)))], short[int(rng.integers(len(short)))]
        e = tok.encode(a, b)
        pairs.append({"a": a, "b": b, "ids": e.ids, "type_ids": e.type_ids})
    return decode, pairs


def write_cases(path, name, about, tok, samples, rng):
    probe = tok.encode("a", add_special_tokens=False).ids
    full = tok.encode("a", add_special_tokens=True).ids
    at = next(i for i in range(len(full)) if full[i:i + len(probe)] == probe)
    before, after = full[:at], full[at + len(probe):]
    rows = case_rows(tok, samples, before, after)
    decode, pairs = other_rows(tok, samples, rng)
    for row in rows:  # recompute from what is stored
        assert tok.encode(row["text"], add_special_tokens=True).ids == row.get("ids_special", before + row["ids"] + after)
    write_json_rows(path, {"about": about, "tokenizer": name, "before": before, "after": after}, rows, more={"decode": decode, "pairs": pairs})
    return len(rows)


README = """Golden data of tokenizers
=========================
NAME/tokenizer.json and NAME/cases.json; index.json lists them. Reference: the tokenizers library (Tokenizer.from_file, encode, decode).
cases: {text, ids, ids_special, decoded, decoded_skip}
  ids            encode(text, add_special_tokens=false)
  ids_special    encode(text, add_special_tokens=true); left out when it is before + ids + after (two lists at the top of the file)
  decoded        decode(ids, skip_special_tokens=false); left out when equal to text
  decoded_skip   decode(ids, skip_special_tokens=true); left out when equal to decoded
decode: id sequences and their text, both ways. pairs: encode(a, b) with special tokens, ids and type ids.
JSON strings are UTF-8 with control characters escaped; texts hold U+FFFD where they were made from broken UTF-8, NUL, noncharacters, private use.
No clean_up_tokenization_spaces: that step belongs to tokenizer_config.json and is not part of the library's decode.

Parts that formats.md section 7 does not describe (as the reference behaves):
- added_tokens[].id is not used: a token whose content is in the model vocabulary takes that id, the others are numbered from the vocabulary's
  entry count upward in file order. Files are normally consistent with this.
- WordPiece: words longer than max_input_chars_per_word characters give unk_token; else greedy longest match from the left, pieces after
  the first carry continuing_subword_prefix "##"; if any position has no match the whole word is unk_token.
- BertNormalizer: clean_text drops NUL, U+FFFD and control characters (category Other except tab, newline, carriage return) and turns whitespace into blanks;
  handle_chinese_chars puts blanks around CJK ideographs; strip_accents null follows lowercase (NFD, then drop category Mn); lowercase is Unicode's.
- BertPreTokenizer: split at whitespace (removed) and around each punctuation character (ASCII punctuation or category P).
- WordPiece decoder: from the second piece on, the prefix is removed or a blank put in front; with cleanup each piece (with that blank) alone is then
  edited: " ." " ?" " !" " ," " n't" " 'm" " 's" " 've" " 're" lose their blank, " ' " becomes "'", " do not" becomes " don't". Nothing works across pieces.
- RobertaProcessing: cls A sep, pair: cls A sep sep B sep, all type ids 0. BPEDecoder(suffix): the suffix becomes a blank, at the end nothing.
- Gemma: normalizer Replace " " -> "▁", Split(" ", MergedWithPrevious) that finds nothing any more, no prefix, no Strip in the decoder.
- Punctuation, WhitespaceSplit, Strip, StripAccents, NFD, Lowercase occur in the files of this folder.
"""


def main():
    args = arguments(__doc__, [("--smollm2", {"default": None, "help": "folder with SmolLM2's tokenizer.json"})])
    held = args.set == "held"
    rng = np.random.default_rng(args.seed)
    root = os.path.join(args.out, "tokenizers")
    shutil.rmtree(root, ignore_errors=True)
    index = {}
    for design in DEV if not held else HELD:
        name = design.__name__ + ("_uncased" if design is bert and not held else "_cased" if design is bert else "")
        tok, words, about = design(args.seed, held)
        path = os.path.join(root, name, "tokenizer.json")
        write_text(path, json.dumps(json.loads(tok.to_str()), ensure_ascii=False, separators=(",", ":")))
        tok = Tokenizer.from_file(path)  # the file is the reference, not the object that made it
        assert tok.get_vocab_size() <= 2000
        samples = texts(args.seed * 1000 + len(index), words[:8], 320)
        if held:
            samples = [t for t in samples if len(t) <= 250]
        count = write_cases(os.path.join(root, name, "cases.json"), name, about, tok, samples, rng)
        assert count >= 300
        index[name] = {"about": about, "vocab_size": tok.get_vocab_size(), "cases": count, **({"left_out_because_the_reference_panics": len(LEFT_OUT)} if LEFT_OUT else {})}
        LEFT_OUT.clear()
    if args.smollm2:
        source = os.path.join(args.smollm2, "tokenizer.json")
        tok = Tokenizer.from_file(source)
        about = "real tokenizer of SmolLM2-135M-Instruct"
        if not held:
            with open(source, "rb") as f:
                write_bytes(os.path.join(root, "smollm2", "tokenizer.json"), f.read())
        else:
            about += "; tokenizer.json is in the dev set"
        samples = texts(args.seed * 1000 + 500, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], 320)
        count = write_cases(os.path.join(root, "smollm2", "cases.json"), "smollm2", about, tok, samples, rng)
        index["smollm2"] = {"about": about, "vocab_size": tok.get_vocab_size(), "cases": count}
    write_text(os.path.join(root, "README"), README)
    write_json(os.path.join(root, "index.json"), {"about": "tokenizers; see README", "set": args.set, "seed": args.seed, "versions": versions("tokenizers", "sentencepiece", "numpy"), "tokenizers": index})
    print("tokenizers", args.set, folder_size(root), "bytes")


if __name__ == "__main__":
    sys.exit(main())
