"""The papers, a folder each: `papers.KEY.tables`, `papers.KEY.measure`."""
