"""Hook of mkdocs.yml: the notebooks of ``examples/notebooks/``, with their outputs as committed, as pages of the site.

A link of a page to ``../examples/notebooks/NAME.ipynb``, right where the repository is read, becomes one to the page here.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

NOTEBOOKS = Path(__file__).resolve().parents[1] / "examples" / "notebooks"
LINK = re.compile(r"\((?:\.\./examples/notebooks/)?(\w+)\.ipynb\)")


def on_files(files, *, config):
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        page, resources = MarkdownExporter().from_filename(str(path), {"unique_key": path.stem})
        images = resources["outputs"]
        for name in images:
            files.append(File.generated(config, f"notebooks/{name}", content=images[name]))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=LINK.sub(r"(\1.md)", page)))
    return files


def on_page_markdown(markdown, *, page, config, files):
    return LINK.sub(r"(notebooks/\1.md)", markdown)
