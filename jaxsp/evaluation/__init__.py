"""How well σ stands in for the context: conditions, metrics, report, plots."""
