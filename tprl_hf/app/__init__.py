"""A page in the browser on which a model answers with part of its visual tokens, and shows which. See docs/app.md."""
