"""The measurement of σ in place of the context: brackets, metrics, reports, pages, plots."""
