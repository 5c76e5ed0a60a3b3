"""Text for the golden scripts: a small training corpus and adversarial strings. Everything but GSM8K is written here."""
import json
import os
import unicodedata

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
# A folder with train.jsonl and test.jsonl, rows with "question" and "answer". The stored data was made from the complete set.
GSM8K = os.environ.get("GSM8K") or os.path.join(HERE, "..", "..", "recipes", "data", "gsm8k")

PROSE = {
    "en": "The river ran past the old mill, and nobody in the village remembered who had built it. It's said they've kept the wheel turning since 1847; "
          "we'll never know. \"Don't touch the lever!\" she shouted. He didn't. I'm sure you'd have done the same, wouldn't you? State-of-the-art, e.g. A/B tests.",
    "ru": "Старая мельница стояла у самой реки. Вечером в деревне зажигались огни, и дети бежали домой. Он сказал: «Не трогай рычаг!» Ёлка, съёмка, объявление, двадцать пять рублей.",
    "uk": "Їжак під'їв сливи й пішов до лісу. Ґанок скрипів, а щастя було поряд. Сьогодні чудова погода, правда?",
    "el": "Η θάλασσα ήταν ήρεμη και ο ουρανός γαλανός. Πού πηγαίνεις; Ευχαριστώ πολύ, Οδυσσέας.",
    "de": "Die Straße führte über die Brücke zum Schloß. Größe, Übermut und fünfzig Äpfel für Jörg. STRASSE, straße, ẞ.",
    "fr": "L'été dernier, nous avons mangé des crêpes à Nîmes. Où est passé l'œuf ? Ça va, garçon ! Noël, naïf, cœur.",
    "es": "¿Dónde está la niña? ¡Mañana será otro día! El pingüino comió piñones en el jardín.",
    "tr": "İstanbul'da ılık bir gün, ışık ve gölge. Çay içtik, şeker yoktu. Iğdır, iğne.",
    "vi": "Hôm nay trời đẹp quá, chúng ta đi dạo bên bờ hồ nhé. Tiếng Việt có nhiều dấu.",
    "zh": "今天天气很好，我们去河边散步吧。他说：“不要碰那个开关！”一共有三千五百二十六个苹果。機器學習與語言模型。",
    "ja": "今日はとても良い天気ですね。ラーメンを食べに行きましょう！カタカナとひらがな、漢字を混ぜて書く。ﾊﾝｶｸ文字もある。",
    "ko": "오늘은 날씨가 아주 좋습니다. 강가에 산책하러 갑시다. 안녕하세요, 반갑습니다!",
    "ar": "الطقس جميل اليوم، لنذهب إلى النهر. السَّلامُ عَلَيْكُم، كم الساعة؟ ١٢٣٤",
    "he": "שלום עולם, היום יום יפה מאוד. בְּרֵאשִׁית בָּרָא",
    "hi": "आज मौसम बहुत अच्छा है। हम नदी के किनारे चलते हैं। १२३ क्षत्रिय",
    "th": "วันนี้อากาศดีมาก ไปเดินเล่นริมแม่น้ำกันเถอะ ๑๒๓",
    "emoji": "Well done 🎉🎉 👍🏽 family 👨‍👩‍👧‍👦 flags 🇩🇪🇯🇵 heart ❤️ rainbow 🏳️‍🌈 keycap 1️⃣ 😀😃😄",
    "c": "int main(int argc, char **argv) {\n\tfor (size_t i = 0; i < n; ++i) {\n\t\tsum += a[i] * b[i]; // dot\n\t}\n\tif (x != NULL && y->next >= 0x1F) return -1;\n\treturn 0;\n}\n",
    "py": "def forward(self, x):\n    # scaled dot product\n    q, k = self.q(x), self.k(x)\n    return (q @ k.transpose(-2, -1)) / math.sqrt(self.d)\n\n\nclass Foo(Bar):\n    pass\n",
    "json": "{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\", \"days\": 3, \"units\": null}}\n[1, 2.5, -3e-4, true]\n",
    "math": "f(x) = ∑_{i=0}^{n} aᵢxⁱ ≤ ∫₀^∞ e^{−x²} dx ≈ 0.886; ∀ε>0 ∃δ: |x−y|<δ ⇒ |f(x)−f(y)|<ε. 12,345.67 × 10³ = 1.234567e7; ½ ¼ ²³ Ⅷ ㊿",
    "space": "a  b   c    d\n\n\n  e\t\tf \n g  \n\n   \t  h\r\ni\r\n\r\nj     ",
}


def gsm8k(split, limit):
    rows = []
    with open(os.path.join(GSM8K, split + ".jsonl"), encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            rows.append(row["question"])
            rows.append(row["answer"])
            if len(rows) >= limit:
                break
    return rows[:limit]


def corpus(seed, lines=1500):
    """Training text: GSM8K lines and every paragraph above, repeated so that rare scripts get merges too."""
    rng = np.random.default_rng(seed)
    math = gsm8k("train", 6000)
    pick = [math[i] for i in rng.permutation(len(math))[:lines]]
    return pick + [p for p in PROSE.values() for _ in range(6 + int(rng.integers(6)))]


FIXED = [
    "", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n", "\n ", "\u00a0", "\u3000", "\u2003\u2003", "\ufeff", "\u200b", "\u200d", "\u2028", "\u2029", "\u0085", "\x0b\x0c", "\x1c\x1d\x1e\x1f",
    "a", "A", "0", "Hello", "hello world", " hello world", "hello world ", "  hello  world  ", "Hello, world!", "HELLO WORLD", "hElLo", "hello\nworld", "hello\n\nworld", "hello\r\nworld", "hello\tworld",
    "I'm I've I'll I'd you're it's don't", "I'M I'VE I'LL I'D YOU'RE IT'S DON'T", "'s 't 're 've 'm 'll 'd", "''s '' ' 'x 'sx 'LL'll", "we\u2019ll don\u2019t", "'\u017f", "\u212a\u017f", "o'clock rock'n'roll",
    "1", "12", "123", "1234", "12345", "1234567890", "3.14159", "1,234,567.89", "0x1F", "1e-10", "10%", "$5.00", "№5", "2³", "½", "Ⅷ", "٣٤", "१२३", "๑๒", "𝟘𝟙𝟚", "①②", "１２３", "12a34b", "a1b2c3", "007", "1 2 3", "1\n2\n3", "12 345 678",
    "foo_bar", "fooBar", "foo-bar", "foo.bar", "foo/bar\\baz", "a+b=c", "x**2", "!!!", "???", "...", "…", "--", "—", "()", "[]{}<>", "&&||", "@user #tag", "a@b.co", "https://example.org/a?b=c&d=%20#e", "C:\\dir\\file.txt", "<html><b>x</b></html>", "\"quoted\" 'single' `back`", "\\n\\t\\0", "%s %d %%", "~^`|",
    "word" * 40, "a" * 300, " " * 100, "\n" * 60, "\t" * 30, "ab" * 150, "😀" * 40, "е" * 100, "你" * 80, "." * 200, "=" * 100, "0" * 120, "\u0301" * 30, "a\u0301" * 40, " a" * 100, "\r\n" * 20, "a " * 60, "▁" * 10, "Ġ" * 10, "##" * 10,
    "café", "cafe\u0301", "ﬁﬂ", "ﷺ", "Å", "A\u030a", "\u1e9b\u0323", "\uac00", "\u1100\u1161", "각", "각", "ｆｕｌｌｗｉｄｔｈ", "ﾊﾝｶｸ", "①", "ǆ", "İi̇ıI", "ß ẞ SS", "ΑΣ ας", "ﬃ", "²³¹", "™©®", "㎏", "Ω Ω", "\u0958 क़",
    "🇩🇪", "👨‍👩‍👧‍👦", "👍🏽", "❤️", "❤", "1️⃣", "🏳️‍🌈", "😀😃", "a😀b", " 😀 ", "🧑🏿‍🚀", "\U0001f1e9", "\u200d\u200d", "\ufe0f",
    "\u202eabc\u202c", "\u2066x\u2069", "שלום world שלום", "السلام (1) عليكم", "a\u200bb", "a\u00adb", "a\u2060b", "a\u034fb", "zero\u200cwidth", "\ufeffbom", "x\ufeffy", "\u180e",
    "\ufffd", "\ufffd\ufffd", "a\ufffdb", "\ufffe", "\uffff", "\U0010ffff", "\U000fffff", "\ue000", "\U000f0000", "\x00", "a\x00b", "\x01\x02\x7f", "\x80\x9f", "\x1b[31mred\x1b[0m", "\ud7ff\ue000", "\U00010000",
    "Ā ā Ġ ġ Ċ ċ", "▁hello▁world", "▁", " ▁ ", "▁▁", "##ing", "[UNK]", "[CLS]", "<0x41>", "<0x0A><0xE4>", "<unk>", "<s>", "</s>", "<pad>", "Ã©", "â€™",
    "the quick brown fox jumps over the lazy dog", "The Quick Brown Fox", "tHe qUiCk", "thequickbrownfox", "antidisestablishmentarianism", "supercalifragilisticexpialidocious", "a b c d e f g h i j k", "A.B.C.", "U.S.A.", "e.g., i.e.", "Mr. & Mrs. O'Neill-Smith",
    " leading", "trailing ", "\tleading tab", "trailing newline\n", "\n\nlead", "a\n b\n  c\n   d", "    four spaces", "   three", "a  b", "a   b", "a\t b", "a \tb", "a\n\n\nb", "a \n b", "a\u00a0b", "a\u3000b", "a\u2009b", "x\u0085y", " \u00a0 ",
    "if (a<b && c>d) { return x[0]->y; }", "for i in range(10):\n    print(i)\n", "def f():\n\treturn 1", "#include <stdio.h>\n", "SELECT * FROM t WHERE a='b';", "a=1;b=2", "{\"a\": [1, 2, {\"b\": null}]}", "// comment\n/* block */",
    "مرحبا", "नमस्ते", "สวัสดี", "こんにちは世界", "안녕하세요", "你好，世界！", "Привет, мир!", "Γειά σου", "שָׁלוֹם", "ქართული", "հայերեն", "አማርኛ", "ᚠᚢᚦ", "𐍈𐌰", "𒀀𒁁", "𝓗𝓮𝓵𝓵𝓸", "𠜎𠜱", "மொழி", "മലയാളം", "ខ្មែរ", "မြန်မာ", "བོད", "ᐃᓄᒃ",
]


def stable_chars():
    """Characters grouped by Unicode general category; every one is old enough for any library's tables."""
    groups = {}
    for cp in list(range(0x0, 0xd800)) + list(range(0xe000, 0x3200)) + list(range(0xe000, 0x11000)) + list(range(0x1d400, 0x1d800)) + list(range(0x1f300, 0x1f650)) + list(range(0x20000, 0x20100)):
        ch = chr(cp)
        cat = unicodedata.category(ch)
        if cat in ("Cn", "Cs"):
            continue
        if unicodedata.ucd_3_2_0.category(ch) == "Cn" and cp < 0x1d400:  # older than Unicode 4: no later reclassification
            continue
        groups.setdefault(cat, []).append(ch)
    groups["Co"] = ["\ue000", "\uf8ff", "\U000f0001", "\U0010fffd"]
    groups["Cn"] = ["\ufdd0", "\ufffe", "\U0001fffe", "\U0010ffff"]  # noncharacters: never assigned
    return groups


def texts(seed, specials=(), count=320):
    """At least `count` strings: the fixed list, then seeded ones (all categories, mixtures, broken UTF-8, special tokens in text)."""
    rng = np.random.default_rng(seed)
    out = list(FIXED)
    groups = stable_chars()
    words = [w for p in PROSE.values() for w in p.split(" ") if w]
    pick = lambda seq: seq[int(rng.integers(len(seq)))]  # noqa: E731
    for cat in sorted(groups):  # every category: alone, between letters, in a run
        g = groups[cat]
        a, b, c = pick(g), pick(g), pick(g)
        out += [a, f"x{a}y {b}z", (a + b + c) * 2 + " " + c]
    for s in specials:
        out += [s, s + s, " " + s + " ", "a" + s + "b", s + "hello", "hello" + s, "hello " + s + "  world", s.upper(), s[:-1], s[1:], "\n" + s + "\n", s + " " + s + "\t" + s]
    math = gsm8k("test", 400)
    for _ in range(25):
        out.append(pick(math))
    for _ in range(25):  # words of several scripts with odd separators
        n = int(rng.integers(2, 9))
        out.append("".join(pick(words) + pick([" ", " ", "  ", "\n", "\t", "", ", ", " - ", "\u00a0", "\n\n"]) for _ in range(n)))
    every = [c for g in groups.values() for c in g]
    for _ in range(25):  # random characters
        out.append("".join(pick(every) for _ in range(int(rng.integers(1, 40)))))
    for _ in range(15):  # bytes that are no UTF-8, replaced
        out.append(bytes(rng.integers(0, 256, int(rng.integers(1, 24)), dtype=np.uint8)).decode("utf-8", "replace"))
    for _ in range(10):  # valid text cut inside a character, replaced
        raw = pick(list(PROSE.values())).encode("utf-8")
        i = int(rng.integers(0, len(raw) - 5))
        out.append(raw[i:i + int(rng.integers(4, 40))].decode("utf-8", "replace"))
    for p in PROSE.values():
        i = int(rng.integers(0, max(1, len(p) - 40)))
        out += [p, p[i:i + int(rng.integers(5, 80))]]
    seen, unique = set(), []
    for t in out:
        if t not in seen:
            seen.add(t)
            unique.append(t)
    while len(unique) < count:
        unique.append("".join(pick(every) for _ in range(int(rng.integers(1, 60)))))
    for t in unique:
        t.encode("utf-8")
    return unique
