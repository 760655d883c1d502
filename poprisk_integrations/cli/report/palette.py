"""Colours of charts and page, in light and dark."""

__all__ = ["DARK", "LIGHT", "SERIES", "variable_of"]

# Name -> light, dark. Text and lines have a contrast of at least 4.5:1 to both backgrounds in their
# theme. Series go from blue to grey so that neighbours differ in brightness too.
_COLOURS = {
    "page": ("#f6f7f9", "#0f1317"),
    "card": ("#ffffff", "#181d23"),
    "ink": ("#1b2127", "#e6eaee"),
    "muted": ("#535c66", "#a7b1bb"),
    "line": ("#d4d9df", "#38414b"),
    "link": ("#0a58a6", "#7db8ff"),
    "s0": ("#0b60a8", "#6fb4ff"),
    "s1": ("#b4400a", "#ff9a5a"),
    "s2": ("#006f4e", "#45cfa0"),
    "s3": ("#7b35b8", "#c7a2ff"),
    "s4": ("#7a5800", "#e2c05c"),
    "s5": ("#4c5661", "#c4ccd4"),
}
LIGHT = {name: light for name, (light, _) in _COLOURS.items()}
DARK = {name: dark for name, (_, dark) in _COLOURS.items()}
SERIES = tuple(LIGHT[f"s{index}"] for index in range(6))


def variable_of(light: str) -> str | None:
    """The page's variable for a colour of the light theme; None for any other colour.

    Example:
        >>> variable_of("#0b60a8")
        'var(--s0)'
    """
    return next((f"var(--{name})" for name, value in LIGHT.items() if value == light), None)
