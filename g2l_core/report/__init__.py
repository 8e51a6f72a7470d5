"""Reports of a benchmark: HTML, Markdown, JSON, CSV and a table for the terminal, from one `results.Report`.

`write.write_report` and `write.read_report` are the entry points. `tables` and `meanings` hold what all forms share:
reading order, titles, numbers as text; `wrapping` how lines are broken, and `names` what encoders are called. A page is
filled in by `html` and `pictures` from the templates in `templates/`, through `page.render`; `plots` draws its charts.
Pages of other rooms use `page.render` and `plots` too.
"""

__all__ = ["html", "json", "markdown", "meanings", "names", "page", "pictures", "plots", "tables", "wrapping", "write"]
