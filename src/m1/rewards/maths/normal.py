"""One way of writing what can be written in many: LaTeX and Unicode of the same meaning."""

import re

_SAME = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "π": r"\pi ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "°": r"^{\circ}", "½": r"\frac{1}{2}",
    "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "ℝ": r"\mathbb{R}",
    "∅": r"\emptyset ", "√": r"\sqrt ", "′": "'", "’": "'", "“": '"', "”": '"', "％": "%",
    "，": ",", "：": ":", "（": "(", "）": ")", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_SPACES = re.compile(
    r"(?<!\\)\\[,;:!> ]|\\q?quad\b|~|\\hspace\{[^}]*\}|\\(?:phantom|vphantom)\{[^}]*\}"
)
_STYLE = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|boldsymbol|bf|rm|it|large|Large"
    r"|bigl?|bigr|Bigl?|Bigr|biggl?|biggr|Biggl?|Biggr|left|right|middle)(?![A-Za-z])\.?"
)
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|textsf|textnormal|mathrm|mathbf|mathit|mathsf|mathtt"
    r"|mathnormal|mbox|hbox|operatorname\*?|emph|bm|ensuremath|fbox|boxed)\s*\{([^{}]*)\}"
)
_SYNONYMS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "nicefrac": "frac", "sfrac": "frac",
    "dbinom": "binom", "tbinom": "binom", "leq": "le", "leqslant": "le", "geq": "ge",
    "geqslant": "ge", "neq": "ne", "lt": "<", "gt": ">", "rightarrow": "to", "lbrace": r"\{",
    "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "lvert": "|", "rvert": "|", "vert": "|",
    "mid": "|", "varnothing": "emptyset", "arccosh": "operatorname{arccosh}", "land": "wedge",
    "lor": "vee", "lparen": "(", "rparen": ")", "degree": r"^{\circ}", "percnt": r"%",
    "textasciicircum": "^", "textdollar": "", "euro": "", "pounds": "", "ldots": "dots",
    "cdots": "dots", "colon": ":", "And": "and",
}  # fmt: skip
_SYNONYM = re.compile(r"\\(" + "|".join(_SYNONYMS) + r")(?![A-Za-z])")
_OUTER = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_FUNCTIONS = "sin cos tan cot csc ln log exp arcsin arccos arctan sinh cosh"
_BARE_FUNCTION = re.compile(
    r"(?<![A-Za-z\\])(" + "|".join(_FUNCTIONS.split()) + r"|sqrt|pi|theta|infty)(?![A-Za-z])"
)
_SHORT_FRACTION = re.compile(r"\\frac\s*(\d|[A-Za-z])\s*(\d|[A-Za-z])(?![\d])")
_HALF_SHORT_FRACTION = re.compile(r"\\frac\s*(\{(?:[^{}]|\{[^{}]*\})*\})\s*(\d|[A-Za-z])")
_OTHER_HALF = re.compile(r"\\frac\s*(\d|[A-Za-z])\s*(\{[^{}]*\})")
_SHORT_ROOT = re.compile(r"\\sqrt\s*(\d+|[A-Za-z](?![A-Za-z]))")
_PAREN_ROOT = re.compile(r"\\sqrt\s*\(([^()]*)\)")
_ENDING = re.compile(r"(?:\s|(?<!\\)[.,;:]|\\\\)+$")


def normalize(text: str) -> str:
    """The text with one spelling for each symbol, without markup, spaces collapsed."""
    for wide, plain in _SAME.items():
        text = text.replace(wide, plain)
    text = _SUPERSCRIPT.sub(lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT.sub(lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text)
    text = text.replace(r"\$", "$dollar$").replace(r"\left.", "").replace(r"\right.", "")
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,|\\!,|,\\!)(?=\d{3}(?!\d))", "", text)
    text = _strip_outer(text)
    text = text.replace("$dollar$", r"\$")
    text = re.sub(r"\\\$", "", text).replace(r"\%", "%").replace("$", "")
    text = _SPACES.sub(" ", text)
    text = _STYLE.sub("", text)
    for _ in range(4):
        text, count = _TEXT.subn(lambda m: f" {m.group(1)} ", text)
        if not count:
            break
    text = _SYNONYM.sub(_synonym, text)
    text = _BARE_FUNCTION.sub(lambda m: "\\" + m.group(1), text)
    text = _PAREN_ROOT.sub(r"\\sqrt{\1}", text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _HALF_SHORT_FRACTION.sub(r"\\frac\1{\2}", text)
    text = _OTHER_HALF.sub(r"\\frac{\1}\2", text)
    text = re.sub(r"\^\{?\\circ\}?", r"^{\\circ}", text)
    text = re.sub(r"\\log\s*_\s*\{?e\}?", r"\\ln ", text)
    text = re.sub(r"\s+", " ", text).strip()
    return _ENDING.sub("", text)


def compact(text: str) -> str:
    """A normalised text without the spaces and braces that carry no meaning, to compare as text.

    Spaces stay between letters, where they separate words.
    """
    text = re.sub(r"(?<![A-Za-z])\s+|\s+(?![A-Za-z])", "", text)
    return re.sub(r"([\^_])\{([A-Za-z0-9])\}", r"\1\2", text)


def nesting(text: str) -> int:
    """The deepest nesting of brackets of any kind."""
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest


def _strip_outer(text: str) -> str:
    for _ in range(6):
        before, text = text, text.strip()
        text = _ENDING.sub("", text)
        for opening, closing in _OUTER:
            inside = text[len(opening) : len(text) - len(closing)]
            long_enough = len(text) > len(opening) + len(closing)
            if text.startswith(opening) and text.endswith(closing) and long_enough:
                if opening not in inside:
                    text = inside
                break
        if text == before:
            break
    return text


def _synonym(match: re.Match[str]) -> str:
    found = _SYNONYMS[match.group(1)]
    is_command = found[:1].isalpha() and match.group(1) != "And"
    return f"\\{found}" if is_command else found
