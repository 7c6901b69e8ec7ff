"""summary.json as pages for people: the report, its charts, the comparison of several defences."""
