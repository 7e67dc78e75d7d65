"""A precision for each site: what a plan records, how it is read and written, and models that follow one step by step."""
