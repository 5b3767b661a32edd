"""Model cards: Jinja templates, and the filling of them from the files that training and evaluation write."""

from .render import percent, render_card

__all__ = ["percent", "render_card"]
