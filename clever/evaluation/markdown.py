"""Tables in Markdown. Imports nothing, so that scripts which only read results start quickly."""


def align(lines: list[list[str]], text_columns: int = 1) -> str:
    """A Markdown table, the title first, with aligned columns; all but the first `text_columns` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def row(cells: list[str]) -> list[str]:
        pairs = enumerate(zip(cells, widths, strict=True))
        return [cell.ljust(width) if i < text_columns else cell.rjust(width) for i, (cell, width) in pairs]

    rule = ["-" * width if i < text_columns else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [row(lines[0]), rule, *map(row, lines[1:])])
