"""A caption -> the words that caption metrics compare, as the Penn Treebank splits them.

COCO's evaluation runs Stanford's PTBTokenizer 3.4.1, a Java program, with ``-lowerCase``
and drops punctuation. These rules are ours and give the same words for captions as people
write them; they know fewer abbreviations that keep their point. No mlx.

Source: https://github.com/salaniz/pycocoevalcap/blob/ad63453cfab57a81a02b2949b17a91fab1c3df77/tokenizer/ptbtokenizer.py
"""

from __future__ import annotations

import re

# As COCO's list has them, in which brackets are spelled with capitals: so they stay.
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
}  # fmt: skip
# Quotes and dashes of every kind.
_PLAIN = str.maketrans(
    dict.fromkeys("\u2018\u2019", "'")
    | dict.fromkeys('"\u201c\u201d', "''")
    | dict.fromkeys("\u2013\u2014", "--")
    | {"\u20ac": "$", "\u00a3": "#"}  # So the program writes euros and pounds.
)
# Words that are two, and where they part.
_PARTED = {
    "cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "gimme": 3, "lemme": 3, "'tis": 2,
    "'twas": 2, "y'all": 2,
}  # fmt: skip
_TOKEN = re.compile(
    r"""
    '' | -{2,} | \.{2,} | [!?]+
    | '(?:s|re|ve|ll|d|m)\b                 # written apart from its word
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|prof)\.
    | (?:[a-z]\.){2,}                       # u.s.
    | '\d\ds?(?!\w) | 'n'(?!\w) | '(?:tis|twas)\b
    | no\.(?=\s\d)
    | [-+]\d+(?:[.,:]\d+)* | [-+]?\.\d+     # with a sign, or beginning with the point
    | \d+(?:[.,]\d+)+(?:-\w+)*             # 1,000 and 3.5-inch
    | \d+(?::\d+)+                         # 10:30
    | \d+(?=')                              # feet and inches
    | (?:[#@](?!\d))?\w+(?:[-&/@'.]\w+)*   # t-shirt, cat/dog, o'clock, www.site.com
    | [^\w\s]
    """,
    re.VERBOSE,
)
_ENDING = re.compile(r"n't|'(?:s|re|ve|ll|d|m)")
# All of a token's, read backwards and so in a single pass, behind a letter.
_ENDINGS = re.compile(r"(?:(?:t'n|(?:s|er|ev|ll|d|m)')(?=[^\W_]))*")


def words(caption: str) -> list[str]:
    """The words of a caption, lower-cased and without punctuation."""
    found = [
        word
        for token in _TOKEN.findall(caption.lower().translate(_PLAIN))
        for word in _parted(token)
    ]
    return [_BRACKETS.get(word, word) for word in found if word not in _DROPPED]


def _parted(token: str) -> list[str]:
    """A token without its contracted ends, and these: shouldn't've is three words."""
    found = _ENDINGS.match(token[::-1])
    assert found is not None
    token, ends = token[: len(token) - found.end()], token[len(token) - found.end() :]
    cut = _PARTED.get(token)
    first = [token[:cut], token[cut:]] if cut else [token]
    return [*first, *_ENDING.findall(ends)]
