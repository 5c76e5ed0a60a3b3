#!/usr/bin/env python3
"""tests/data/csv: tables as Python's csv module writes them, and what it reads from them.

    scripts/golden/make_golden_csv.py        # the same files each time

NAME.csv is a table in one of the forms that RFC 4180 leaves open, NAME.jsonl a line {"line": L, "row": {column: value}} for each record of it, L being
the line that it begins in. Needs nothing but Python.
"""
import csv
import io
import json
import pathlib
import random

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "tests" / "data" / "csv"
PIECES = ["a", "word", " ", "  two blanks ", ",", ",,", '"', '""', '"quoted"', "'", "\n", "\n\n", "\r\n", "\t", ";", "|", "\\", "\\n", "0", "-1.5e3", "#", "é", "日本", "😀", "\u2028", "\ufeff", "{}"]


def value(random):
    return "".join(random.choice(PIECES) for _ in range(random.choice([0, 1, 1, 2, 3, 5, 9])))


def table(columns, rows, seed, line_end="\r\n", **dialect):
    r = random.Random(seed)
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=line_end, **dialect)
    writer.writerow(columns)
    writer.writerows([value(r) for _ in columns] for _ in range(rows))
    return out.getvalue()


def records(text):
    """What csv.reader makes of the text, a line ending in LF alone, so that its count of lines is that of editors."""
    reader = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    names, before = next(reader), reader.line_num
    for fields in reader:
        if fields:
            assert len(fields) == len(names), (fields, names)
            yield {"line": before + 1, "row": dict(zip(names, fields))}
        before = reader.line_num


PAIR = ["prompt", "completion"]
TABLES = {
    "excel": table(PAIR, 60, 1),
    "unix": table(PAIR, 60, 2, "\n", quoting=csv.QUOTE_ALL),
    "minimal": table(["instruction", "input", "output"], 60, 3, "\n"),
    "one_column": table(["text"], 60, 4),
    "names": table(["a,b", 'with "quotes"', "two\nlines", " blanks ", "é", "x"], 20, 5),
    "wide": table([f"c{i}" for i in range(100)], 8, 6),
    "mark": "\ufeff" + table(PAIR, 10, 7),
    "mark_and_quote": "\ufeff" + table(PAIR, 10, 8, "\n", quoting=csv.QUOTE_ALL),
    "no_last_line_end": table(PAIR, 10, 9).removesuffix("\r\n"),
    "both_line_ends": table(PAIR, 10, 10, "\n") + table(PAIR, 10, 11).split("\r\n", 1)[1],
    "empty_lines": table(PAIR, 10, 12, "\r\n\r\n\n"),
    "empty_values": "a,b,c\n,,\n\"\",,\"\"\n,x,\n",
    "blanks": "text\n \n\t\n\" \"\n  a  \n",
    "no_record": "a,b\n",
}

FOLDER.mkdir(parents=True, exist_ok=True)
for name, text in TABLES.items():
    (FOLDER / f"{name}.csv").write_bytes(text.encode("utf-8"))
    found = records(text.removeprefix("\ufeff"))
    (FOLDER / f"{name}.jsonl").write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found).encode("utf-8"))
print(f"{FOLDER}: {len(TABLES)} tables")
