"""Links: what a hook does to them and keeps on them."""
