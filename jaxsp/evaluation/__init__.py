"""How well σ stands in for the context: brackets, metrics, report, plots."""
