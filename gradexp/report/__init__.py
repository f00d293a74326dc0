"""Tables, figures, claims, plan and page from records; runs nothing and imports no torch."""
