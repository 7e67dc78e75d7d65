"""Facts about the nodes of an FX graph: what they are, what they write, where they come from, what surrounds them, which of
their sizes are known.

No decision is made here.
"""
