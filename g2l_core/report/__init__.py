"""Reports of a benchmark: HTML, Markdown, JSON, CSV and the terminal's table, from one `results.Report`."""
