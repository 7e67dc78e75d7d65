"""What was decided for every attention of a model, and why: as records, as a table, as a page."""
