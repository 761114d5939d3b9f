"""Does a JSON value have the form that will be read from it?"""

from __future__ import annotations

from typing import Any


def misfit(value: Any, shape: Any, at: str = "") -> str | None:
    """Where `value` has another form than `shape`, in words; None where it has that form.

    A shape is `float` (any finite number), another type, None, a function that says whether it fits, a tuple of
    shapes of which one must fit, [shape] for a list, {str: shape} for an object of any names, or {name: shape} for one
    that has at least these; a name that ends in "?" may be missing, or null.
    """
    if isinstance(shape, tuple):
        found = [misfit(value, one, at) for one in shape]
        return None if None in found else next(why for why in reversed(found))
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{at} must be a list"
        return next(filter(None, (misfit(one, shape[0], f"{at}[{i}]") for i, one in enumerate(value))), None)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{at} must be an object"
        names = dict.fromkeys(value, shape[str]) if str in shape else shape
        for name, inner in names.items():
            plain = name[:-1] if name.endswith("?") and str not in shape else name
            if plain != name and value.get(plain) is None:
                continue
            if plain not in value:
                return f"{at}.{plain} is missing".lstrip(".")
            if why := misfit(value[plain], inner, f"{at}.{plain}".lstrip(".")):
                return why
        return None
    if shape is None or isinstance(shape, type):
        kinds = (int, float) if shape is float else (type(None) if shape is None else shape,)
        fits = type(value) in kinds and (shape is not float or -1e300 < value < 1e300)
    else:
        fits = shape(value)
    return None if fits else f"{at} is {value!r:.60}"


def is_name(value: Any) -> bool:
    """Text that may be the name of a file or a model."""
    return isinstance(value, str) and 0 < len(value) < 4096 and value.isprintable()
