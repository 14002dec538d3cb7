"""HTML reports: self-contained pages, light and dark."""
