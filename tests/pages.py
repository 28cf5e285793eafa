"""What a browser would make of the page of a report."""

from html.parser import HTMLParser

LINKS = ("src", "href", "action", "data", "poster", "srcset", "xlink:href")


class Page(HTMLParser):
    """What a browser would make of a report: elements, links, ids, the text outside of scripts, embedded JSON."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.links, self.ids, self.words, self.tips = [], [], [], [], []
        self.cells, self.in_cell = [], False
        self.inside, self.handlers = None, []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.links += [values[name] for name in LINKS if name in values]
        self.handlers += [name for name in values if name.startswith("on")]
        self.ids += [values["id"]] if "id" in values else []
        self.inside = tag if tag in {"script", "style"} else self.inside
        if tag in {"td", "th"}:
            self.cells.append("")
            self.in_cell = True
        self.tips += [values["data-tip"]] if "data-tip" in values else []

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in {"td", "th"}
        if tag == self.inside:
            self.inside = None

    def handle_data(self, content):
        if self.inside is None:
            self.words.append(content)
            if self.in_cell:
                self.cells[-1] += content

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())
