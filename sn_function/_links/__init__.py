"""Links: what a hook changes in them, and the state that they keep for it."""
