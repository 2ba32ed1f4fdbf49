"""Full-text search over a folder-sized text collection: the tool that the agents of the demo call.

One Markdown file with a `## Title` before each article is indexed in memory with Tantivy (BM25, English stop words and
stemming). The three tools that the role adapters were trained with all read this local collection: `BingSearch[query]`,
`Retrieve[title]` and `Lookup[keyword]`. Nothing here knows of models or caches.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tantivy

LIBRARY = Path(__file__).parent / "demo_library"


@dataclass(frozen=True)
class Article:
    title: str
    text: str

    @property
    def sentences(self) -> list[str]:
        return re.split(r"(?<=[.!?])\s+", self.text)


def read_articles(path: Path = LIBRARY / "articles.md") -> list[Article]:
    """Read the articles of a Markdown file, each paragraph joined to one line."""
    parts = re.split(r"^## +", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    pairs = (part.split("\n", 1) for part in parts)
    return [Article(title.strip(), " ".join(text.split())) for title, text in pairs]


class SearchTool:
    """The tools that an agent may call by name, over one list of articles.

    It remembers the queries, and the passage that `Lookup` reads on in, so an instance belongs to one episode.
    """

    def __init__(self, articles: list[Article] | None = None) -> None:
        self.articles = read_articles() if articles is None else articles
        analyzer = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple()).filter(tantivy.Filter.lowercase())
        analyzer = analyzer.filter(tantivy.Filter.stopword("english")).filter(tantivy.Filter.stemmer("english"))
        self._analyzer = analyzer.build()
        fields = tantivy.SchemaBuilder().add_unsigned_field("number", stored=True)
        for name in ("title", "text"):
            fields = fields.add_text_field(name, tokenizer_name="english")
        self._schema = fields.build()
        self._index = tantivy.Index(self._schema)
        self._index.register_tokenizer("english", self._analyzer)
        # One thread: the order of equally good articles is then always the same.
        writer = self._index.writer(num_threads=1)
        for number, article in enumerate(self.articles):
            writer.add_document(tantivy.Document(number=number, title=article.title, text=article.text))
        writer.commit()
        writer.wait_merging_threads()
        self._index.reload()
        self._tools = {"BingSearch": self._bing_search, "Retrieve": self._retrieve, "Lookup": self._lookup}
        self._queries: Counter[str] = Counter()
        self._passage: list[str] = []
        self._keyword = ""
        self._position = 0

    @property
    def names(self) -> list[str]:
        return list(self._tools)

    def call(self, name: str, argument: str) -> str:
        """Run one tool and return its answer as one line; a wrong name or empty result is an answer too."""
        tool = self._tools.get(name)
        if tool is None:
            return f"There is no tool {name}. The tools are {', '.join(self.names)}."
        return tool(argument.strip())

    def search(self, query: str, limit: int = 3) -> list[Article]:
        """Return the articles that match any word of the query, best first; words of the title count double."""
        # Built from terms instead of parsed: agents write colons, brackets and "not" at will.
        clauses = []
        for word in self._analyzer.analyze(query):
            title, text = (tantivy.Query.term_query(self._schema, name, word) for name in ("title", "text"))
            clauses += [(tantivy.Occur.Should, tantivy.Query.boost_query(title, 2.0)), (tantivy.Occur.Should, text)]
        if not clauses:
            return []
        searcher = self._index.searcher()
        hits = searcher.search(tantivy.Query.boolean_query(clauses), limit).hits
        return [self.articles[searcher.doc(address)["number"][0]] for _, address in hits]

    def _remember(self, sentences: list[str]) -> None:
        self._passage, self._keyword, self._position = sentences, "", 0

    def _bing_search(self, query: str) -> str:
        """The best article whole, and the first sentence of the next one; the same query again goes on down the list."""
        shown = self._queries[query.casefold()]
        self._queries[query.casefold()] += 1
        found = self.search(query, limit=shown + 2)[shown:]
        if not found:
            return "No more results" if shown else "No Results"
        sentences = found[0].sentences + [article.sentences[0] for article in found[1:]]
        self._remember(sentences)
        return " ".join(sentences)

    def _retrieve(self, title: str) -> str:
        wanted = title.strip("'\" ").casefold()
        for article in self.articles:
            if wanted in (article.title.casefold(), re.sub(r" \(.*\)$", "", article.title).casefold()):
                self._remember(article.sentences)
                return article.text
        similar = [article.title for article in self.search(title)]
        return f"Could not find [{title}]. Similar: {similar}" if similar else f"Could not find [{title}]."

    def _lookup(self, keyword: str) -> str:
        if keyword.casefold() != self._keyword:
            self._keyword, self._position = keyword.casefold(), 0
        found = [sentence for sentence in self._passage if self._keyword and self._keyword in sentence.casefold()]
        if self._position >= len(found):
            return "No more results" if found else "No Results"
        self._position += 1
        return f"(Result {self._position}/{len(found)}) {found[self._position - 1]}"
