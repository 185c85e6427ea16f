"""The bench: model x tasks x methods x budgets, measured honestly and kept cell by cell."""
