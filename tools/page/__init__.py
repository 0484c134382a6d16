"""Reports for people: one HTML file that needs nothing else, made of sections, tables, charts and graphs."""
