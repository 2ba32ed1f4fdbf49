"""Griffe extension for mkdocs.yml: docstrings of the package, some of whose marks are Sphinx's, as Markdown."""

import re

import griffe

ROLE = re.compile(r":\w+:(?=`)")  # :class:`SharedLoRACache`
LITERAL_BLOCK = re.compile(r"::$", re.MULTILINE)
# "__base__" and "*+name" are names, not emphasis.
QUOTED_NAME = re.compile(r'(?<!`)"(?:[^\s"`]+|\[[^\]"`\n]*\])"(?!`)')


class MarkdownDocstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            text = ROLE.sub("", obj.docstring.value)
            text = LITERAL_BLOCK.sub(":", text)
            obj.docstring.value = QUOTED_NAME.sub(lambda name: f"`{name[0]}`", text)
