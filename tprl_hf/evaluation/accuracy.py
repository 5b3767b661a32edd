"""When an answer is right."""


def is_right(answer: str, reference: str) -> bool:
    """
    Whether an answer equals the reference, letter case, surrounding blanks and a closing full stop aside.

    Example:

    ```python
    >>> is_right(" Yes.", "yes"), is_right("yes it is", "yes")
    (True, False)
    ```
    """
    return _normalized(answer) == _normalized(reference)


def _normalized(text: str) -> str:
    return text.strip().rstrip(".").rstrip().lower()
