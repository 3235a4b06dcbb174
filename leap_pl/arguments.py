"""What the argument parser complains of, in one line."""

import re


def one_line(error: Exception) -> str:
    """The parser's message without its layout and its Python: which key, what was found, what would do."""
    text = " ".join(str(error).split())
    found = re.search(r'Parser key "([^"]+)":?\s*(.*)', text)
    if found is None:
        return text
    key, complaint = found.groups()
    # A key that may also be left out is of two types, and the parser tells of the failure of each.
    union = re.search(
        r"any of the Union subtypes Subtypes: .*? Errors: (.*) Given value type: .* Given value: (.*)", complaint
    )
    if union:
        reasons = [reason for reason in re.split(r"(?:^| )- ", union[1]) if reason and "NoneType" not in reason]
        complaint = f"{'; or '.join(dict.fromkeys(reasons))}. Got value: {union[2]}"
    plain = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>|typing\.(?=Literal)", r"\1", complaint)
    return f"{key}: {re.sub('Expected an? ', 'expected ', plain)}"
