"""Reports for people: self-contained HTML pages with interactive figures, light or dark as the reader's system is."""
